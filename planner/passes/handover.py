"""When the caches of each layer leave a prefill pool: once nothing later in the program names them.

A layer is the grain. What leaves with it hides behind the layers after it, so that the last layer's
part alone is exposed; and it costs the host one event and a few copies, where the layer itself has
several launches.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from tokenspeed_plan.plans.schema import Program, Push
from tokenspeed_plan.plans.schema.program_specs import named_by


def with_pushes(program: Program, cached: AbstractSet[str]) -> Program:
    """The program with a push of each layer.

    Args:
        program: of a prefill pool.
        cached: the buffers that both pools have.
    """
    last: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for number, step in enumerate(program.steps):
        for name in cached & set(named_by(step)):
            layer = name.rpartition(".")[0]
            last[layer] = number
            names.setdefault(layer, set()).add(name)
    order = sorted(last, key=lambda layer: (last[layer], layer))
    pushes = [Push(step=last[layer], buffers=tuple(sorted(names[layer]))) for layer in order]
    return program.model_copy(update={"pushes": tuple(pushes)})
