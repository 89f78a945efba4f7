"""Measure a plan on this machine, beside the memory floor and beside its own predictions."""

from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Options, bench, default_context
from tokenspeed_plan.runtime.bench.table import as_text

__all__ = ["Options", "as_text", "bench", "default_context", "prepare"]
