"""Load a plan and replay it. `Engine` is imported on first use, so that looking at files does not load PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from tokenspeed_plan.runtime.engine import Engine

        return Engine
    raise AttributeError(f"module `{__name__}` has no `{name}`")


__all__ = ["Completion", "Engine", "Request", "SamplingParams"]
