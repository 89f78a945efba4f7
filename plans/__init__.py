"""The contract between planner and runtime: the plan, its file, its rules.

The functions are imported on first use: a process that only passes a plan on needs no schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenspeed_plan.plans.bundle import load_plan, save_plan
    from tokenspeed_plan.plans.errors import TokenspeedError
    from tokenspeed_plan.plans.schema import Plan


def __getattr__(name: str) -> Any:
    if name in ("load_plan", "save_plan"):
        from tokenspeed_plan.plans import bundle

        return getattr(bundle, name)
    if name == "Plan":
        from tokenspeed_plan.plans.schema import Plan

        return Plan
    if name == "TokenspeedError":
        from tokenspeed_plan.plans.errors import TokenspeedError

        return TokenspeedError
    raise AttributeError(f"module `{__name__}` has no `{name}`")


__all__ = ["Plan", "TokenspeedError", "load_plan", "save_plan"]
