"""Changes to a plan for tests, and whether the validator refuses it."""

from __future__ import annotations

from typing import Any

from tokenspeed_plan.plans.bundle import dump_plan, parse_plan
from tokenspeed_plan.plans.canon import kernel_name
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import KernelSpec, Plan
from tokenspeed_plan.plans.validate import validate


def refused(plan: Plan) -> bool:
    """Whether the validator refuses a plan, and says what to do."""
    try:
        validate(plan)
    except PlanError as error:
        assert error.hint
        return True
    return False


def with_program(plan: Plan, index: int, **changes: Any) -> Plan:
    programs = list(plan.pool.programs)
    programs[index] = programs[index].model_copy(update=changes)
    return plan.with_pool(programs=tuple(programs))


def with_kernel(plan: Plan, at: int, changed: KernelSpec) -> Plan:
    """Exchange a kernel; its new name also replaces the old one in steps and scratch buffers."""
    old = plan.kernels[at].name
    changed = changed.model_copy(update={"name": kernel_name(old.rpartition("_")[0], changed)})
    kernels = (*plan.kernels[:at], changed, *plan.kernels[at + 1 :])
    text = dump_plan(plan.model_copy(update={"kernels": kernels, "binaries": ()})).replace(
        old, changed.name
    )
    return parse_plan(text, "plan")
