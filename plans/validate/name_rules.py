"""Names that are unique."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.validate.refusal import require_unique


def check_names(plan: Plan, pool: Pool) -> None:
    """Arenas, kernels, programs, and the tensors that a program sees have names of their own.

    Raises:
        PlanError: two share a name.
    """
    require_unique("arena", _names(pool.arenas))
    require_unique("kernel", _names(plan.kernels))
    require_unique("program", _names(pool.programs))
    shared = _names((*pool.weights, *pool.buffers))
    for program in pool.programs:
        own = _names(program.buffers)
        require_unique("tensor", shared + own)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def _names(items: Iterable[_Named]) -> list[str]:
    return [item.name for item in items]
