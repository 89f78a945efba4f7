"""Load a plan and replay it."""

from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

__all__ = ["Completion", "Engine", "Request", "SamplingParams"]
