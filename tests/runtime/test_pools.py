"""Prompts that another pool computes get the answers of one pool, whatever happens to it."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conversations import check_all_is_given_back, replay, squeezed
from drafting import conversations_of, tokens_of
from pool_pairs import (
    Gated,
    Spoiled,
    nothing_is_held,
    plan_of_two,
    pools,
    squeezed_prefill,
    wait_for,
)

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.pools.nixl_transport import load_nixl
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

LONG = list(range(40, 240))
WAYS = [(0, "snapshot"), (2, "snapshot"), (2, "recompute")]


def answers(plan: Plan, folder: Path, prompts: Any, **params: Any) -> list[tuple[int, ...]]:
    """Of the same plan without its prefill pool."""
    return tokens_of(Engine.from_plan(plan, folder), prompts, **params)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "rollback"), WAYS)
def test_conversations_get_the_answers_of_one_pool(
    depth: int, rollback: str, checkpoint: Any
) -> None:
    """Sequences come at random, some are cancelled, and there is room for few of them."""
    folder = checkpoint("moe")
    plan = plan_of_two(folder, depth, rollback)
    tight = squeezed(plan, num_pages=60, max_seqs=4, num_checkpoints=6)
    with pools(tight, folder) as made:
        handovers = made.connect([made.add_prefill(plan) for _ in range(2)])
        talks = conversations_of(folder, 8, depth)
        replay(made.engine, talks, seed=1, cancel=0.02)
        assert handovers.counts.done > 10
        assert not handovers.counts.refused and not handovers.counts.failed
        nothing_is_held(made)


def test_only_the_last_token_is_computed_again(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    with pools(plan, folder) as made:
        handovers = made.connect([made.add_prefill()])
        assert tokens_of(made.engine, [LONG]) == answers(plan, folder, [LONG])
        assert handovers.counts.done == 1
        assert made.engine.metrics.computed_tokens == 1
        assert made.prefills[0].metrics.computed_tokens == len(LONG) - 1
        bytes_once = handovers.counts.size_bytes
        (done,) = made.engine.generate([[*LONG, *range(90)]], SamplingParams(max_tokens=2))
        assert handovers.counts.done == 2
        assert done.num_cached_tokens == len(LONG) - 1
        # Of the second prompt only pages after the first one's last whole page are sent.
        assert handovers.counts.size_bytes - bytes_once < bytes_once
        nothing_is_held(made)


@pytest.mark.slow
def test_nixl_hands_over(checkpoint: Any) -> None:
    try:
        load_nixl()
    except PoolError as error:
        assert "pip install 'tokenspeed-plan[pools]'" in error.hint
        pytest.skip("NIXL is not installed")
    folder = checkpoint("moe")
    plan = plan_of_two(folder, 2, "recompute")
    prompts = [LONG[start:] for start in range(0, 160, 20)]
    with pools(plan, folder, transport="nixl") as made:
        handovers = made.connect([made.add_prefill()])
        assert tokens_of(made.engine, prompts) == answers(plan, folder, prompts)
        assert handovers.counts.done == len(prompts)
        nothing_is_held(made)


def test_sampling_depends_on_the_request_alone(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    with pools(plan, folder) as made:
        made.connect([made.add_prefill()])
        assert tokens_of(made.engine, [LONG], **params) == answers(plan, folder, [LONG], **params)


@pytest.mark.parametrize("fails", [True, False])
def test_a_bad_link_changes_no_answer(fails: bool, checkpoint: Any) -> None:
    """Pushes fail, or write other bytes than they should."""
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    spoil = partial(Spoiled, chance=0.4, fails=fails)
    prompts = [LONG[start:] for start in range(0, 160, 10)]
    with pools(plan, folder, spoil) as made:
        # All of a prompt at once: a digest of samples cannot see one page of many.
        handovers = made.connect([made.add_prefill(chunk=512)])
        assert tokens_of(made.engine, prompts, 5) == answers(plan, folder, prompts, most=5)
        counts = handovers.counts
        assert (counts.lost if fails else counts.refused) > 0 and counts.alone > 0
        wait_for(lambda: handovers.num_peers == 1, made.engine)  # it has come back
        nothing_is_held(made)


def test_what_is_sent_keeps_its_pages_from_others(checkpoint: Any) -> None:
    """A state on its way keeps all pages before it: a prompt that needs them waits till then.

    The decode pool has the first pages of it already, so that these are not sent.
    """
    folder, gate = checkpoint("moe"), threading.Event()
    gate.set()
    plan = squeezed_prefill(plan_of_two(folder), 22)
    others = list(range(240, 430))
    with pools(plan, folder, partial(Gated, gate=gate)) as made:
        handovers = made.connect([made.add_prefill(chunk=512)])
        cache = made.engine.scheduler.cache
        tokens_of(made.engine, [LONG], 2)
        for node in cache.checkpoints:
            cache.forget_checkpoint(node.state_slot)
        tokens_of(made.engine, [LONG[:150]], 2)
        gate.clear()
        for name, prompt in (("again", LONG), ("other", others)):
            made.engine.add(Request(name, tuple(prompt), SamplingParams(max_tokens=2)))
        wait_for(lambda: made.prefills[0].scheduler.is_blocked, made.engine)
        assert handovers.counts.done == 2
        gate.set()
        wait_for(lambda: not made.engine.num_unfinished, made.engine)
        assert handovers.counts.done == 4 and not handovers.counts.alone
        nothing_is_held(made)


def test_a_frozen_pool_is_not_waited_for(checkpoint: Any) -> None:
    """What it may still write is kept until it goes on and says that it has stopped."""
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    gate = threading.Event()
    with pools(plan, folder) as made:
        address = made.add_prefill()
        step = made.prefills[0].step

        def frozen_step() -> Any:
            gate.wait(20)
            return step()

        made.prefills[0].step = frozen_step  # type: ignore[method-assign]
        handovers = made.connect([address], timeout_s=0.3)
        assert tokens_of(made.engine, [LONG]) == answers(plan, folder, [LONG])
        assert handovers.counts.lost == 1 and handovers.lost.num_pages > 10
        assert handovers.num_peers == 0
        gate.set()
        wait_for(lambda: handovers.num_peers == 1, made.engine)
        nothing_is_held(made)


def test_a_decode_pool_that_leaves_frees_the_other(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    with pools(plan, folder) as made:
        handovers = made.connect([made.add_prefill()])
        params = SamplingParams(max_tokens=4)
        for index in range(6):
            made.engine.add(Request(str(index), (index, *LONG), params))
        wait_for(lambda: handovers.num_jobs > 0, made.engine)
        made.engine.loop.close()
        wait_for(lambda: not made.prefills[0].num_unfinished)
        check_all_is_given_back(made.prefills[0].scheduler.cache)
        done = []
        while made.engine.num_unfinished:
            done += made.engine.step()
        assert len(done) == 6
        nothing_is_held(made)


def test_what_is_reserved_leaves_room_to_finish(checkpoint: Any) -> None:
    """There are pages for the longest answer of each, one after the other."""
    plan = squeezed(plan_of_two(checkpoint("moe")), num_pages=20, num_checkpoints=3)
    scheduler = Scheduler(plan)
    held = scheduler.reservations
    params = SamplingParams(max_tokens=28)  # 8 pages in all, 7 of them for the prompt
    asked = [Request(str(i), tuple(range(i, i + 100)), params) for i in range(3)]
    first, second, third = (Sequence(each, 0.0, list(each.prompt_ids)) for each in asked)
    assert held.reserve(first, [])
    assert held.reserve(second, [])
    assert held.reserve(third, []) is None  # 21 pages
    held.drop("0")
    assert held.reserve(first, [third]) is None  # it runs, and may need 8 beside the others' 14
    reservation = held.reserve(third, [])
    assert reservation and len(set(reservation.pages)) == 7 and reservation.state_slot
    assert held.abandon("1") is not None and held.reserve(first, []) is None
    held.settle(held.abandoned[0])
    held.drop("2")
    check_all_is_given_back(scheduler.cache)


def test_others_are_refused(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of_two(folder)
    with pools(plan, folder) as made:
        address = made.add_prefill()
        with pytest.raises(PoolError, match="the token of this pool is another one"):
            made.connect([address], token="other")
        other = plan.model_copy(update={"digest": "0" * 64})
        with pytest.raises(PoolError, match="a peer has the digest 000"):
            made.connect([made.add_prefill(other)])
        tokens_of(made.engine, [LONG], 2)
