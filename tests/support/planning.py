"""Plans of specs that several tests ask for: each is made once a process."""

from __future__ import annotations

from tokenspeed_plan.planner.compile import Compiled, Model, compile_bundle, find_model
from tokenspeed_plan.planner.passes.pipeline import DEFAULT_OPTIONS, PassOptions
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import DType

MOST = 48  # plans that are kept; those of the smallest models take a few MB each
_kept: dict[object, tuple[Model, Compiled]] = {}


def compiled(
    spec: Spec, dtype: DType | None = None, options: PassOptions = DEFAULT_OPTIONS
) -> Compiled:
    """A plan and its kernels' texts; made again where the model's files are not what they were."""
    key, model = (spec.model_dump_json(), spec.folder, dtype, options), find_model(spec)
    if key not in _kept or _kept[key][0] != model:
        if len(_kept) >= MOST:
            del _kept[next(iter(_kept))]
        _kept[key] = model, compile_bundle(spec, model, dtype, options)
    return _kept[key][1]


def planned(spec: Spec, dtype: DType | None = None, options: PassOptions = DEFAULT_OPTIONS) -> Plan:
    """The plan of `compiled`."""
    return compiled(spec, dtype, options).plan
