"""OpenAI batch files: in, through the engine, out."""

from tokenspeed_plan.runtime.serving.batch.runner import BatchOptions, BatchPlan, run_batch
from tokenspeed_plan.runtime.serving.batch.scan import Selection
from tokenspeed_plan.runtime.serving.openai.requests import RowLimits

__all__ = ["BatchOptions", "BatchPlan", "RowLimits", "Selection", "run_batch"]
