"""Loads plans and replays them.

The engines are imported on first use, so that commands which only read files do not load PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from tokenspeed_plan.runtime.engine import Engine

        return Engine
    if name == "AsyncEngine":
        from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module `{__name__}` has no `{name}`")


__all__ = ["AsyncEngine", "Completion", "Engine", "Request", "SamplingParams"]
