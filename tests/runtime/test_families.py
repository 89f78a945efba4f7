"""Each model family against transformers: the same greedy ids with every feature on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from conftest import Once, make_spec
from conversations import check_all_is_given_back, converse, poisoned, replay, squeezed
from families import FAMILIES, load_oracle, oracle_ids, write_family
from planning import planned

from tokenspeed_plan.planner import find_model
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, SamplingParams

LENGTHS = (1, 3, 16, 63, 130)
NUM_TOKENS = 12
STATELESS = ("qwen3", "qwen3_moe")
QUICK = "qwen3"  # the family that `make quick` compares with transformers
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != QUICK]
# Few pages, and short prefill steps.
PRESSURE = {"num_pages": 21, "interleaved_tokens": 16}


@pytest.fixture(scope="module")
def family(once: Once) -> Any:
    """family("qwen3") -> the folder of a checkpoint."""
    return cache(lambda name: once(f"family-{name}", lambda to: write_family(to, name)))


@cache
def plan_of(folder: Path, **changes: Any) -> Plan:
    spec = make_spec(folder, **changes)
    return planned(spec)


@pytest.fixture(scope="module")
def wanted(family: Any) -> Any:
    """wanted("qwen3") -> transformers' ids after each prompt."""

    @cache
    def ask(name: str) -> list[list[int]]:
        return oracle_ids(load_oracle(family(name)), prompts(), NUM_TOKENS)

    return ask


@cache
def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    made = [torch.randint(0, VOCAB - 20, (size,), generator=random).tolist() for size in LENGTHS]
    return [*made, made[-1][:100] + made[2]]  # begins like another one


def answers(engine: Engine) -> list[list[int]]:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return [list(done.token_ids) for done in engine.generate(prompts(), params)]


@pytest.mark.parametrize("name", [QUICK, *SLOW])
def test_greedy_ids_equal_transformers(name: str, family: Any, wanted: Any) -> None:
    """In one batch, in short chunks, without a cache, with a cold and a warm one, and preempted."""
    folder = family(name)
    plan = plan_of(folder)
    assert answers(Engine.from_plan(plan, folder, cache=False)) == wanted(name)
    engine = Engine.from_plan(plan, folder, chunk=40)
    assert answers(engine) == wanted(name)
    found = engine.metrics.hit_tokens
    assert answers(engine) == wanted(name)
    assert engine.metrics.hit_tokens - found > 100
    squeezed_engine = Engine.from_plan(squeezed(plan, num_pages=22), folder)
    assert answers(squeezed_engine) == wanted(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_next_uneven"])
@pytest.mark.parametrize("rollback", ["snapshot", "recompute"])
def test_drafts_change_no_id(name: str, rollback: str, family: Any, wanted: Any) -> None:
    """Through the MTP layer of the checkpoint, whose experts and norms are those of the family."""
    spec = make_spec(family(name), speculation={"depth": 2, "rollback": rollback})
    plan = planned(spec)
    assert answers(Engine.from_plan(plan, family(name))) == wanted(name)


def test_the_tensors_say_whether_there_is_an_mtp_layer(tmp_path: Path, family: Any) -> None:
    folder = write_family(tmp_path, "qwen3_next", with_mtp=False)
    assert find_model(make_spec(folder)).config.num_mtp_layers == 0
    assert find_model(make_spec(family("qwen3_next"))).config.num_mtp_layers == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", STATELESS)
def test_conversations_without_recurrent_state(name: str, family: Any) -> None:
    """Cancellation, eviction and hits inside a page change no answer."""
    folder = family(name)
    plan = plan_of(folder)
    assert not any(buffer.arena == "state" for buffer in plan.pool.buffers)
    conversations = converse(plan, folder, 16, 3)
    engine = Engine.from_plan(squeezed(plan, **PRESSURE), folder)
    replay(engine, conversations, 3, cancel=0.05)
    check_all_is_given_back(engine.scheduler.cache)
    assert engine.metrics.evicted_pages
    assert engine.metrics.hit_tokens > 500
    engine = poisoned(squeezed(plan, **PRESSURE), folder)
    replay(engine, conversations[:6], 1, cancel=0.05)


def test_without_state_every_page_is_a_hit(family: Any) -> None:
    """Prompts that part inside a chunk share whole pages; the next turn goes on inside a page."""
    engine = Engine.from_plan(plan_of(family("qwen3")), family("qwen3"))
    size = engine.plan.pool.limits.page_size
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first = [i % 300 for i in range(5 * size + 3)]

    def cached(prompt: list[int]) -> int:
        (done,) = engine.generate([prompt], params)
        history[:] = [*prompt, *done.token_ids]
        assert done.num_cached_tokens is not None
        return done.num_cached_tokens

    history: list[int] = []
    assert cached(first) == 0
    turn = [*history, 9, 9]
    assert cached(turn) == len(first) + 7
    assert cached([*first[: 3 * size], *[301] * size]) == 3 * size
    assert cached(first[: 2 * size + 5]) == 2 * size


def test_preemption_without_recurrent_state(family: Any) -> None:
    """Answers outgrow the pages; preempted sequences go on from their cached pages."""
    plan = plan_of(family("qwen3"))
    prompt_ids = [[7 * i + j for j in range(16)] for i in range(8)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    roomy = Engine.from_plan(plan, family("qwen3"), cache=False)
    wanted = [done.token_ids for done in roomy.generate(prompt_ids, params)]
    engine = Engine.from_plan(squeezed(plan, num_pages=21), family("qwen3"))
    assert [done.token_ids for done in engine.generate(prompt_ids, params)] == wanted
    assert engine.metrics.preemptions
