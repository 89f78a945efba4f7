"""Plans whose buckets have different draft depths give the same tokens as one that never drafts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from conftest import make_spec
from drafting import PROMPTS, tokens_of
from launches import LateLaunch, captured
from torch import Tensor

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.advisor import resolve as decide
from tokenspeed_plan.planner.advisor.resolve import Decided, resolve
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import RollbackWord
from tokenspeed_plan.runtime.engine import Engine

MIXED = {1: 3, 2: 0, 4: 1}
MIXES = [MIXED, {1: 0, 2: 2, 4: 3}, {1: 2, 2: 1, 4: 0}]


@pytest.fixture(scope="module")
def folder(trained_moe: Path) -> Path:
    return trained_moe


def plan_of(folder: Path, depths: dict[int, int], rollback: RollbackWord = "snapshot") -> Plan:
    """A plan of those depths by bucket, whatever the planner would choose."""
    return planned(folder, tuple(depths.items()), rollback)


@cache
def planned(folder: Path, items: tuple[tuple[int, int], ...], rollback: RollbackWord) -> Plan:
    depths = dict(items)
    spec = make_spec(folder, workload={"concurrency": max(depths)}, speculation="auto")

    def forced(*asked: Any) -> Decided:
        decided = resolve(*asked)
        knobs = replace(decided.knobs, depth=max(depths.values()))
        return replace(decided, depths=depths, knobs=knobs, rollback=rollback)

    with patch.object(decide, "resolve", forced):
        return compile_plan(spec, find_model(spec))


# Sequences that end one by one, so that the last one runs in every bucket.
ENDS = [[*prompt, *range(index)] for index, prompt in enumerate(PROMPTS)]


def answers(engine: Engine) -> list[list[tuple[int, ...]]]:
    """Of short and long sequences, greedy and sampled."""
    hot = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    asked = [tokens_of(engine, most=most, **params) for params in ({}, hot) for most in (8, 40)]
    return [*asked, tokens_of(engine, ENDS, 24)]


@cache
def without_drafts(folder: Path) -> list[list[tuple[int, ...]]]:
    """The answers of a plan with the same buckets."""
    return answers(Engine.from_plan(plan_of(folder, dict.fromkeys(MIXED, 0)), folder))


@pytest.mark.slow
@pytest.mark.parametrize("rollback", get_args(RollbackWord))
@pytest.mark.parametrize("depths", MIXES, ids=str)
def test_any_mix_of_depths_says_the_same(
    depths: dict[int, int], rollback: RollbackWord, folder: Path
) -> None:
    mixed = Engine.from_plan(plan_of(folder, depths, rollback), folder)
    assert {(p.bucket, p.depth) for p in mixed.plan.pool.programs if p.phase == "decode"} == set(
        depths.items()
    )
    wanted = without_drafts(folder)
    assert answers(mixed) == wanted
    assert mixed.accept_counts[1] > 0
    ahead = Engine.from_plan(captured(mixed.plan), folder, launch=LateLaunch())
    assert tokens_of(ahead, ENDS, 24) == wanted[-1]


def keys_of(
    depths: dict[int, int], folder: Path, prompt: list[int], most: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The draft layer's keys and values by page after one sequence, and the sequence's tokens."""
    engine = Engine.from_plan(plan_of(folder, depths), folder, cache=False)
    (ids,) = tokens_of(engine, [prompt], most)
    name = f"L{engine.plan.model.num_layers}.kv_cache"
    return engine.executor.buffer(name, 0, 0).clone(), ids


@pytest.mark.slow
def test_steps_without_drafts_write_the_draft_layers_keys(folder: Path) -> None:
    """A later step that drafts finds the keys that it would have written itself."""
    prompt = list(range(5, 25))
    (without, ids), (drafting, same) = (
        keys_of({1: depth, 2: 1}, folder, prompt, 30) for depth in (0, 1)
    )
    assert ids == same
    known = len(prompt) + len(ids) - 1
    # [page, 2, position, ...] -> [position, 2, ...]
    keys = [cache.transpose(1, 2).flatten(0, 1) for cache in (without, drafting)]
    written = [int(key.flatten(1).any(1).sum()) for key in keys]
    assert min(written) >= known
    first = next(index for index in range(len(keys[0])) if keys[0][index].any())
    span = slice(first, first + known - 1)
    torch.testing.assert_close(keys[0][span], keys[1][span])
