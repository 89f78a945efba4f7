"""The engine gives transformers' logits and tokens, for any batch, chunk and bucket."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, VOCAB, load_oracle, oracle_greedy
from conftest import make_spec
from planning import planned

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.backend import ReferenceBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.loading.weights import load_weights

LENGTHS = (1, 2, 3, 5, 63, 64, 65, 300)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 20, (length,), generator=generator).tolist()


def poisoned_engine(plan: Plan, folder: Path, chunk: int | None = None) -> Engine:
    """An engine whose activations start as NaN, so that a read before the first write shows."""
    arenas, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas))
    arenas.poison("activations")
    return Engine(
        plan, Executor(PlanMemory(plan, arenas, weights), ReferenceBackend(plan)), chunk=chunk
    )


def plan_of(folder: Path, **changes: Any) -> Plan:
    spec = make_spec(folder, **changes)
    return planned(spec)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_equal_transformers(kind: str, checkpoint: Any) -> None:
    folder = checkpoint(kind)
    oracle = load_oracle(folder, KINDS[kind])
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [oracle_greedy(oracle, ids, 64) for ids in prompts]
    engine = poisoned_engine(plan_of(folder), folder)
    done = engine.generate(
        prompts, SamplingParams(max_tokens=64, ignore_eos=True, num_logprobs=VOCAB)
    )
    assert [list(item.token_ids) for item in done] == wanted
    with torch.no_grad():
        for ids, item in zip(prompts, done, strict=True):
            text = torch.tensor([ids + list(item.token_ids)])
            logits = oracle(input_ids=text).logits[0, len(ids) - 1 : -1]
            ours = torch.tensor(
                [[value for _, value in sorted(step.top)] for step in item.logprobs]
            )
            difference = (ours - torch.log_softmax(logits.double(), -1)).abs()
            assert difference.max() <= 1e-3
            assert difference.mean() <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 512])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_any_chunk_gives_the_same_tokens(kind: str, chunk: int, checkpoint: Any) -> None:
    folder = checkpoint(kind)
    assert in_chunks(folder, chunk) == in_chunks(folder, None)


@cache
def in_chunks(folder: Path, chunk: int | None) -> list[tuple[int, ...]]:
    prompts = [prompt(length, 7) for length in (1, 66, 130, 3)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    done = poisoned_engine(plan_of(folder), folder, chunk).generate(prompts, params)
    return [item.token_ids for item in done]


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_any_order_and_batch_gives_the_same_tokens(concurrency: int, checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of(folder, workload={"concurrency": concurrency})
    prompts = [prompt(length, 3) for length in (5, 80, 1, 33, 129, 2, 64, 17, 4)]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    alone = [poisoned_engine(plan, folder).generate([ids], params)[0].token_ids for ids in prompts]
    for order in (1, -1):
        got = poisoned_engine(plan, folder).generate(prompts[::order], params)
        assert [item.token_ids for item in got] == alone[::order]


def test_bf16_stays_near_the_fp32_reference(checkpoint: Any) -> None:
    folder = checkpoint("dense")
    oracle = load_oracle(folder, KINDS["dense"])
    ids = prompt(120, 1)
    engine = poisoned_engine(
        plan_of(folder, model={"path": str(folder), "weights": "bf16"}), folder
    )
    (done,) = engine.generate([ids], SamplingParams(max_tokens=1, num_logprobs=VOCAB))
    with torch.no_grad():
        wanted = torch.log_softmax(oracle(input_ids=torch.tensor([ids])).logits[0, -1], -1)
    ours = torch.tensor([value for _, value in sorted(done.logprobs[0].top)])
    assert (ours - wanted).abs().mean() < 0.15
