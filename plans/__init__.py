"""The contract between planner and runtime: the plan, its file, its rules."""

from tokenspeed_plan.plans.bundle import load_plan, save_plan
from tokenspeed_plan.plans.errors import TokenspeedError
from tokenspeed_plan.plans.schema import Plan

__all__ = ["Plan", "TokenspeedError", "load_plan", "save_plan"]
