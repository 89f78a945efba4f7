"""OpenAI batch files: in, through the engine, out."""

from tokenspeed_plan.runtime.batch.check import Selection
from tokenspeed_plan.runtime.batch.rows import RowLimits
from tokenspeed_plan.runtime.batch.runner import BatchOptions, BatchPlan, run_batch

__all__ = ["BatchOptions", "BatchPlan", "RowLimits", "Selection", "run_batch"]
