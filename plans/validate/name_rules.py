"""Pools that the runtime knows, and names that are unique."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Plan, Pool
from tokenspeed_plan.plans.validate.refusal import refuse, require_unique


def check_pools(plan: Plan) -> None:
    """One pool that does both phases; the schema has room for more.

    Raises:
        PlanError: the plan has other pools.
    """
    roles = [pool.role for pool in plan.pools]
    if roles != ["both"]:
        found = ", ".join(roles)
        raise refuse(f"pools ({found}) are not replayed yet, only one of role `both`")


def check_names(plan: Plan, pool: Pool) -> None:
    """Arenas, kernels, programs, and the tensors that a program sees have names of their own.

    Raises:
        PlanError: two share a name.
    """
    require_unique("arena", (arena.name for arena in pool.arenas))
    require_unique("kernel", (kernel.name for kernel in plan.kernels))
    require_unique("program", (program.name for program in pool.programs))
    shared = [weight.name for weight in pool.weights]
    shared += [buffer.name for buffer in pool.buffers]
    for program in pool.programs:
        own = [buffer.name for buffer in program.buffers]
        require_unique("tensor", shared + own)
