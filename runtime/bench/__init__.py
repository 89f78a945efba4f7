"""Measure a plan on this machine, beside the floor that its memory sets and beside what the plan predicted."""

from tokenspeed_plan.runtime.bench.agentic import Workload, converse
from tokenspeed_plan.runtime.bench.agentic import as_text as conversations_as_text
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Options, bench
from tokenspeed_plan.runtime.bench.table import as_text

__all__ = ["Options", "Workload", "as_text", "bench", "conversations_as_text", "converse", "prepare"]
