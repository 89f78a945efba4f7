"""OpenAI batch files: every row is checked, answered by the engine, and written."""

from tokenspeed_plan.runtime.serving.batch.options import BatchOptions, BatchPlan
from tokenspeed_plan.runtime.serving.batch.runner import run_batch
from tokenspeed_plan.runtime.serving.batch.scan import Selection
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits

__all__ = ["BatchOptions", "BatchPlan", "RequestLimits", "Selection", "run_batch"]
