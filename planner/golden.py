"""The golden tokens of a plan, from the same model in fp64 on the reference backend.

In fp64, machines differ at 1e-14, so that four decimals are the same everywhere.
"""

from __future__ import annotations

from pathlib import Path

from tokenspeed_plan.planner.compile import Model, compile_plan
from tokenspeed_plan.planner.spec import ServingSpec, Spec, TargetSpec, WorkloadSpec
from tokenspeed_plan.plans.bundle import seal
from tokenspeed_plan.plans.schema import CanaryPrompt, Plan
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.plans.weight_digests import all_digests

TEXTS = (
    "def fibonacci(n):\n",
    "import os\n\n\nclass Path:\n    def __init__(self, ",
    "The quick brown fox",
)
NUM_TOKENS = 16


def with_canary(plan: Plan, spec: Spec, model: Model) -> Plan:
    """The plan with golden prompts and digests of the weights' bytes, if there are weights."""
    if model.folder is None or not model.headers:
        return plan
    max_prompt_len = plan.pool.limits.max_seq_len - NUM_TOKENS
    prompts: list[list[int]] = []
    if max_prompt_len > 0:
        prompts = _prompts(model.folder, model.num_valid_tokens)
        prompts = [ids[:max_prompt_len] for ids in prompts]
    facts = plan.model.model_copy(update={"shards": all_digests(model.folder)})
    canary = _golden(spec, model, model.folder, prompts)
    sealed = seal(plan.model_copy(update={"model": facts, "canary": canary}))
    validate(sealed)
    return sealed


def _prompts(folder: Path, num_tokens: int) -> list[list[int]]:
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder)
        return [tokenizer.encode(text) for text in TEXTS]
    positions = range(12)
    return [[(7 * i + 11 * row) % num_tokens for i in positions] for row in range(len(TEXTS))]


def _golden(
    spec: Spec, model: Model, folder: Path, prompts: list[list[int]]
) -> tuple[CanaryPrompt, ...]:
    """The continuations of the prompts, from a plan for one CPU and just these prompts."""
    from tokenspeed_plan.runtime.canary import golden
    from tokenspeed_plan.runtime.engine import Engine

    if not prompts:
        return ()
    workload = WorkloadSpec(
        first_turn_tokens=max(map(len, prompts)), output_tokens=NUM_TOKENS, concurrency=len(prompts)
    )
    small = spec.model_copy(
        update={
            "target": TargetSpec(gpu="cpu"),
            "workload": workload,
            "parallelism": "auto",
            "disaggregation": "off",
            "serving": _without_host_cache(spec.serving),
        }
    )
    engine = Engine.from_plan(compile_plan(small, model, dtype="fp64"), folder, cache=False)
    return golden(engine, prompts, NUM_TOKENS)


def _without_host_cache(serving: ServingSpec | None) -> ServingSpec | None:
    """The knobs without the memory of the target's host, which this machine need not have."""
    return serving and serving.model_copy(update={"host_cache_gib": None})
