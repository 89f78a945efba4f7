"""Plans whose buckets draft differently deep, and one that does not: all say the same, whatever a sequence passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import make_spec
from drafting import PROMPTS, say
from torch import Tensor
from trained import write_trained

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.advisor import resolve as decide
from tokenspeed_plan.planner.advisor.resolve import Decided, resolve
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.engine import Engine

MIXED = {1: 3, 2: 0, 4: 1}
MIXES = [MIXED, {1: 0, 2: 2, 4: 3}, {1: 2, 2: 1, 4: 0}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("trained") / "moe", "moe")


def plan_of(folder: Path, depths: dict[int, int], recomputes: bool = False) -> Plan:
    """A plan of those depths by bucket, whatever the planner would choose."""
    spec = make_spec(folder, workload={"concurrency": max(depths)}, speculation="auto")

    def forced(*asked: Any) -> Decided:
        decided = resolve(*asked)
        knobs = replace(decided.knobs, depth=max(depths.values()))
        return replace(decided, depths=depths, knobs=knobs, recomputes=recomputes)

    with patch.object(decide, "resolve", forced):
        return compile_plan(spec, find_model(spec))


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("depths", MIXES, ids=str)
def test_any_mix_of_depths_says_the_same(
    depths: dict[int, int], recomputes: bool, folder: Path
) -> None:
    """Sequences end one by one, so that each passes through all buckets."""
    plain = Engine.from_plan(plan_of(folder, dict.fromkeys(depths, 0)), folder)
    mixed = Engine.from_plan(plan_of(folder, depths, recomputes), folder)
    assert {(p.bucket, p.depth) for p in mixed.plan.pool.programs if p.phase == "decode"} == set(
        depths.items()
    )
    for params in ({}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}):
        for most in (8, 40):
            assert say(mixed, most=most, **params) == say(plain, most=most, **params)
    ends = [[*prompt, *range(index)] for index, prompt in enumerate(PROMPTS)]
    assert say(mixed, ends, 24) == say(plain, ends, 24)
    assert mixed.accept_counts[1] > 0


def keys_of(
    depths: dict[int, int], folder: Path, prompt: list[int], most: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Keys and values of the layer that drafts, after one sequence, by page."""
    engine = Engine.from_plan(plan_of(folder, depths), folder, cache=False)
    (ids,) = say(engine, [prompt], most)
    name = f"L{engine.plan.model.num_layers}.kv_cache"
    return engine.executor.buffer(name, 0, 0).clone(), ids


@pytest.mark.slow
def test_rows_that_draft_nothing_leave_their_keys(folder: Path) -> None:
    """Those who draft after them find what they would have written themselves."""
    prompt = list(range(5, 25))
    (without, ids), (drafting, same) = (
        keys_of({1: depth, 2: 1}, folder, prompt, 30) for depth in (0, 1)
    )
    assert ids == same
    known = len(prompt) + len(ids) - 1
    rows = [
        cache.transpose(1, 2).flatten(0, 1) for cache in (without, drafting)
    ]  # pages and places in one
    written = [int(row.flatten(1).any(1).sum()) for row in rows]
    assert min(written) >= known
    first = next(index for index in range(len(rows[0])) if rows[0][index].any())
    torch.testing.assert_close(
        rows[0][first : first + known - 1], rows[1][first : first + known - 1]
    )
