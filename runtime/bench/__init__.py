"""Measure a plan on this machine, beside the floor that its memory sets and beside what the plan predicted."""

from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Options, bench
from tokenspeed_plan.runtime.bench.table import as_text

__all__ = ["Options", "as_text", "bench", "prepare"]
