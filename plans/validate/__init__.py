"""The static validator: run on every plan when it is written and when it is loaded.

It proves, without running anything: names resolve, everything lies inside its arena, nothing that
lives at once overlaps, every argument has the shape and format that its kernel was made for, the
pieces of each weight tile it exactly, the memory map adds up, and (in `hazards`) each program
computes what its steps say, on all its streams.
"""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate.format_rules import check_formats
from tokenspeed_plan.plans.validate.host_rules import check_host_cache
from tokenspeed_plan.plans.validate.kernel_rules import (
    check_binaries,
    check_kernels,
    check_operators,
)
from tokenspeed_plan.plans.validate.limit_rules import check_limits
from tokenspeed_plan.plans.validate.memory_rules import check_memory
from tokenspeed_plan.plans.validate.model_rules import (
    check_canary,
    check_files,
    check_predictions,
    check_vocabulary,
)
from tokenspeed_plan.plans.validate.name_rules import check_names
from tokenspeed_plan.plans.validate.pool_rules import check_pools
from tokenspeed_plan.plans.validate.program_rules import check_programs
from tokenspeed_plan.plans.validate.refusal import refuse
from tokenspeed_plan.plans.validate.return_rules import check_answer_returns
from tokenspeed_plan.plans.validate.weight_rules import check_weights

__all__ = ["refuse", "validate"]

_PLAN_RULES = (
    check_operators,
    check_pools,
    check_binaries,
    check_files,
    check_canary,
    check_predictions,
)
_POOL_RULES = (
    check_names,
    check_limits,
    check_formats,
    check_memory,
    check_host_cache,
    check_answer_returns,
    check_weights,
    check_kernels,
    check_vocabulary,
    check_programs,
)


def validate(plan: Plan) -> None:
    """Check every rule of a plan.

    Raises:
        PlanError: the first rule that is broken, naming what breaks it.
    """
    for rule in _PLAN_RULES:
        rule(plan)
    for pool in plan.pools:
        view = plan.view(pool)
        for pool_rule in _POOL_RULES:
            pool_rule(view, pool)
