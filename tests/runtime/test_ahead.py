"""Decode steps that are padded and launched before their tokens are known change no answer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import make_spec
from launches import LateLaunch, captured
from planning import planned
from random_requests import answers_at_random

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.backend import ReferenceBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.loading.weights import load_weights
from tokenspeed_plan.runtime.reference.step_inputs import advance


def requests(count: int, seed: int, vocab: int = 400) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            str(index),
            tuple(rng.randrange(vocab) for _ in range(rng.choice((1, 2, 17, 64, 70)))),
            SamplingParams(
                max_tokens=rng.choice((1, 2, 3, 9, 30)),
                ignore_eos=True,
                stop_token_ids=tuple(rng.sample(range(512), rng.choice((0, 0, 60)))),
                temperature=rng.choice((0.0, 0.0, 0.8)),
                seed=index,
                num_logprobs=rng.choice((None, None, None, 2)),
            ),
        )
        for index in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_answers_do_not_depend_on_looking_ahead(
    seed: int, tiny_plan: Plan, checkpoint: Any
) -> None:
    folder, made = checkpoint("moe"), requests(14, seed)
    plain = Engine.from_plan(tiny_plan, folder)
    ahead = Engine.from_plan(captured(tiny_plan), folder, launch=LateLaunch())
    wanted = answers_at_random(plain, made, random.Random(seed + 1))
    assert answers_at_random(ahead, made, random.Random(seed)) == wanted


def test_decode_is_launched_before_its_tokens_are_known(tiny_plan: Plan, checkpoint: Any) -> None:
    launch = LateLaunch()
    engine = Engine.from_plan(captured(tiny_plan), checkpoint("moe"), launch=launch)
    engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=20, ignore_eos=True)))
    seen = []
    while engine.num_unfinished:
        engine.step()
        seen.append(len(launch.waiting))
    assert seen[3:-3] == [1] * len(seen[3:-3])
    assert launch.replays == 20  # No step is in vain, as the length is known beforehand.


def test_the_middle_of_a_prompt_is_not_waited_for(checkpoint: Any) -> None:
    spec = make_spec(checkpoint("moe"), serving={"prefill_chunk": 64})
    plan = captured(planned(spec))
    launch = LateLaunch()
    engine = Engine.from_plan(plan, checkpoint("moe"), launch=launch)
    engine.add(Request("a", (7,) * 130, SamplingParams(max_tokens=2)))
    seen = [(engine.step(), launch.replays, launch.asked) for _ in range(3)]
    assert seen == [([], 1, 0), ([], 2, 0), ([], 3, 1)]


def test_padding_leaves_state_and_pages_alone(tiny_plan: Plan, checkpoint: Any) -> None:
    plan, folder = captured(tiny_plan), checkpoint("moe")
    arenas, weights = load_weights(plan, folder, lambda: Arenas(plan.pool.arenas))
    engine = Engine(plan, Executor(PlanMemory(plan, arenas, weights), ReferenceBackend(plan)))
    engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=6, ignore_eos=True)))
    while engine.num_unfinished:
        engine.step()
    for buffer in plan.pool.buffers:
        if buffer.arena not in ("state", "kv_cache"):
            continue
        view = arenas.view(
            buffer.arena, buffer.offset_bytes, buffer.tensor.bind(0, 0), buffer.tensor.dtype
        )
        used = view.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
        if buffer.arena == "state":
            # One of the two is the checkpoint of the prompt.
            assert set(used) <= {1, 2, plan.pool.limits.pad_state_slot}, buffer.name
        else:
            assert set(used) <= {0, plan.pool.limits.pad_page}, buffer.name


def test_advance_by_hand() -> None:
    """Two sequences and padding: the first outgrows its pages, the second enters a new page."""
    state = [
        torch.tensor(x, dtype=torch.int32)
        for x in ([5, 6, 0], [7, 3, 0], [11, 7, 36], [8, 4, 1], [1, 4, 0], [2, 3, 5], [4, 0, 0])
    ]
    table = torch.tensor([[4, 2], [1, 3], [9, 9]], dtype=torch.int32)
    advance({"page_size": 4}, torch.tensor([50, 60, 70], dtype=torch.int32), table, *state)
    assert [x.tolist() for x in state] == [
        [50, 60, 0],
        [8, 4, 0],
        [8, 12, 36],
        [9, 5, 1],
        [2, 3, 0],
        [1, 4, 5],
        [5, 1, 0],
    ]
