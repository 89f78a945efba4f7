"""What the graph of a published model is built from, for several test modules."""

from __future__ import annotations

from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.passes.limits import CapacityOptions, plan_capacity
from tokenspeed_plan.planner.spec import WorkloadSpec


def context(name: str, depth: int = 0) -> BuildContext:
    config, _ = load_preset(f"qwen3.5-{name}")
    limits = plan_capacity(
        WorkloadSpec(concurrency=1), config, find_hardware("B200"), CapacityOptions(depth=depth)
    )
    return BuildContext(
        config, "bf16", limits, config.vocab_size, lambda prefix: not prefix.startswith("mtp.")
    )
