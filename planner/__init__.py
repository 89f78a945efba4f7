"""Compile a spec into a plan."""

from tokenspeed_plan.planner.compile import compile_plan, find_model
from tokenspeed_plan.planner.spec import load_spec

__all__ = ["compile_plan", "find_model", "load_spec"]
