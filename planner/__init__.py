"""Compile a spec into a plan.

The functions are imported on first use, so that commands which only replay a plan do not load what
makes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenspeed_plan.planner.compile import compile_plan, find_model
    from tokenspeed_plan.planner.spec import load_spec


def __getattr__(name: str) -> Any:
    if name in ("compile_plan", "find_model"):
        from tokenspeed_plan.planner import compile

        return getattr(compile, name)
    if name == "load_spec":
        from tokenspeed_plan.planner.spec import load_spec

        return load_spec
    raise AttributeError(f"module `{__name__}` has no `{name}`")


__all__ = ["compile_plan", "find_model", "load_spec"]
