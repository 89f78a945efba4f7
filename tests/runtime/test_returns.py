"""Answers go back to the prefill pool: the next turn computes its own tokens there alone."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conversations import replay, squeezed
from drafting import conversations_of, plan_of, tokens_of
from pool_pairs import Gated, Pools, Spoiled, nothing_is_held, plan_of_two, pools, wait_for
from pool_pairs import returning as with_returns

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.pools import return_receiver, return_sender
from tokenspeed_plan.runtime.pools.handovers import Handovers
from tokenspeed_plan.runtime.pools.nixl_transport import load_nixl

FIRST = list(range(40, 140))
NEW = [[7, 300, 20, 11, 5] * count for count in (4, 5, 9)]  # tokens that each later turn adds
COUNT = 24  # tokens of each answer
WAYS = [(0, "snapshot"), (2, "snapshot"), (2, "recompute")]


def talk(made: Pools, prefill: Engine) -> tuple[list[tuple[int, ...]], list[int]]:
    """The answers of a conversation, and what the prefill pool has computed for each turn.

    Its user reads an answer before the next turn comes.
    """
    ids, answers, computed = FIRST, [], []
    for new in [[], *NEW]:
        ids, before = [*ids, *new], prefill.metrics.computed_tokens
        answers += tokens_of(made.engine, [ids], COUNT)
        wait_for(lambda: made.engine.is_idle, made.engine)
        computed.append(prefill.metrics.computed_tokens - before)
        ids = [*ids, *answers[-1]]
    return answers, computed


def of_one_pool(folder: Path) -> list[tuple[int, ...]]:
    """The answers of the same conversation from one pool without a cache."""
    engine = Engine.from_plan(plan_of(folder, 0), folder, cache=False)
    ids, answers = FIRST, []
    for new in [[], *NEW]:
        ids = [*ids, *new]
        answers += tokens_of(engine, [ids], COUNT)
        ids = [*ids, *answers[-1]]
    return answers


@pytest.mark.parametrize(("depth", "rollback"), WAYS)
def test_a_turn_computes_its_own_tokens(depth: int, rollback: str, checkpoint: Any) -> None:
    """Where inputs are kept, the state is up to one step older than the end."""
    folder = checkpoint("moe")
    with pools(with_returns(plan_of_two(folder, depth, rollback)), folder) as made:
        handovers = made.connect([made.add_prefill()])
        answers, computed = talk(made, made.prefills[0])
        assert answers == of_one_pool(folder)
        kept = depth + 1 if rollback == "recompute" else 0
        assert computed[0] == len(FIRST) - 1
        for count, new in zip(computed[1:], NEW, strict=True):
            assert len(new) <= count <= len(new) + kept
        counts = handovers.counts
        assert counts.offered == counts.returned == 1 + len(NEW)
        assert counts.returned_tokens >= len(NEW) * (COUNT - kept) and counts.returned_bytes
        assert made.engine.metrics.computed_tokens == 1 + len(NEW)  # the last of each prompt
        nothing_is_held(made)


def test_answers_stay_where_the_plan_says_so(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    with pools(plan_of_two(folder), folder) as made:
        handovers = made.connect([made.add_prefill()])
        _, computed = talk(made, made.prefills[0])
        assert computed[1:] == [COUNT + len(new) for new in NEW]
        assert not handovers.counts.offered and not handovers.counts.returned_tokens


def test_the_next_turn_waits_for_the_answer_before_it(checkpoint: Any) -> None:
    """It comes while that is on its way, and is ordered once it is there."""
    folder, gate = checkpoint("moe"), threading.Event()
    with pools(with_returns(plan_of_two(folder)), folder) as made:
        handovers = made.connect([made.add_prefill()], spoil=partial(Gated, gate=gate))
        (answer,) = tokens_of(made.engine, [FIRST], COUNT)
        before = made.prefills[0].metrics.computed_tokens
        made.engine.add(Request("next", (*FIRST, *answer, *NEW[1]), SamplingParams(max_tokens=2)))
        made.engine.add(Request("other", tuple(range(90)), SamplingParams(max_tokens=2)))
        wait_for(lambda: handovers.counts.done == 2, made.engine)  # the other one does not wait
        assert handovers.counts.ordered == 2 and handovers.is_open
        gate.set()
        wait_for(lambda: not made.engine.num_unfinished, made.engine)
        computed = made.prefills[0].metrics.computed_tokens - before
        assert computed == len(NEW[1]) + 89
        nothing_is_held(made)


def test_it_does_not_wait_longer_than_computing_takes(checkpoint: Any) -> None:
    folder, gate = checkpoint("moe"), threading.Event()
    plan = with_returns(plan_of_two(folder), token_us=10.0)
    with pools(plan, folder) as made:
        handovers = made.connect([made.add_prefill()], spoil=partial(Gated, gate=gate))
        (answer,) = tokens_of(made.engine, [FIRST], COUNT)
        prompt = [*FIRST, *answer, *NEW[1]]
        assert tokens_of(made.engine, [prompt], 5) == tokens_of(
            Engine.from_plan(plan_of(folder, 0), folder), [prompt], 5
        )
        assert handovers.counts.done == 2 and not handovers.counts.returned
        gate.set()
        nothing_is_held(made)


def test_others_do_not_wait_for_a_link_that_is_stuck(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt needs the pages of an answer that is being sent; that one is nobody's then."""
    folder, gate = checkpoint("moe"), threading.Event()
    monkeypatch.setattr(return_sender, "_HOLD_S", 0.05)
    plan = squeezed(with_returns(plan_of_two(folder)), num_pages=22, max_seqs=4, num_checkpoints=6)
    with pools(plan, folder) as made:
        handovers = made.connect([made.add_prefill()], spoil=partial(Gated, gate=gate))
        tokens_of(made.engine, [FIRST], COUNT)
        wait_for(lambda: bool(made.engine.scheduler.reservations.lent), made.engine)
        tokens_of(made.engine, [list(range(200, 460))], 2)
        assert handovers.counts.done == 2 and not handovers.counts.alone
        gate.set()
        wait_for(lambda: handovers.counts.dropped == 1, made.engine)
        nothing_is_held(made)


@pytest.mark.parametrize("fails", [True, False])
def test_a_bad_link_changes_no_answer(fails: bool, checkpoint: Any) -> None:
    """What was written is not what was said, or is not written at all."""
    folder = checkpoint("moe")
    spoil = partial(Spoiled, chance=1.0, fails=fails)
    with pools(with_returns(plan_of_two(folder)), folder) as made:
        handovers = made.connect([made.add_prefill()], spoil=spoil)
        answers, computed = talk(made, made.prefills[0])
        assert answers == of_one_pool(folder)
        counts = handovers.counts
        assert not counts.returned and not counts.returned_tokens
        assert counts.dropped if fails else counts.unwanted
        assert fails or computed[1:] == [COUNT + len(new) for new in NEW]
        wait_for(lambda: handovers.num_peers == 1, made.engine)  # it has come back
        nothing_is_held(made)


def frozen(handovers: Handovers) -> None:
    """Let the decode pool forget an answer once it was told where to, and say nothing."""
    returns = handovers._returns
    returns._send = lambda each: returns._open.pop(each.number)  # type: ignore[method-assign]


def test_a_frozen_decode_pool_keeps_what_it_may_write_alone(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the lease the cache may give up what it had; the rest when the pool is gone."""
    folder = checkpoint("moe")
    monkeypatch.setattr(return_receiver, "_LEASE_S", 0.1)
    with pools(with_returns(plan_of_two(folder), slots=1), folder) as made:
        handovers = made.connect([made.add_prefill()])
        frozen(handovers)
        held = made.prefills[0].scheduler.reservations
        tokens_of(made.engine, [FIRST], COUNT)
        wait_for(lambda: len(held.held) == 1, made.engine)
        (reservation,) = held.held.values()
        assert reservation.num_known == len(FIRST) // 16
        wait_for(lambda: len(held.abandoned) == 1, made.engine)
        assert not held.held and reservation.pages == reservation.new_pages
        assert len(reservation.pages) == 2  # 123 tokens, of which 6 pages were known
        tokens_of(made.engine, [list(range(200, 300))], COUNT)  # its answer finds no room
        wait_for(lambda: handovers.counts.unwanted == 1, made.engine)
        made.engine.loop.close()
        wait_for(lambda: not held.abandoned)
        nothing_is_held(made)


def test_an_answer_that_the_cache_gave_up_is_dropped(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    with pools(with_returns(plan_of_two(folder)), folder) as made:
        handovers = made.connect([made.add_prefill()])
        tokens_of(made.engine, [FIRST], COUNT)
        cache = made.engine.scheduler.cache
        for node in cache.checkpoints:
            cache.forget_checkpoint(node.state_slot)
        wait_for(lambda: handovers.counts.dropped == 1, made.engine)
        nothing_is_held(made)


def test_an_answer_that_is_there_is_not_sent_again(checkpoint: Any) -> None:
    folder = checkpoint("moe")
    with pools(with_returns(plan_of_two(folder)), folder) as made:
        handovers = made.connect([made.add_prefill()])
        for _ in range(2):
            tokens_of(made.engine, [FIRST], COUNT)
            wait_for(lambda: made.engine.is_idle, made.engine)
        handovers._peers[0]._known.clear()
        tokens_of(made.engine, [FIRST], COUNT)
        wait_for(lambda: made.engine.is_idle, made.engine)
        assert handovers.counts.returned == handovers.counts.known == 1
        nothing_is_held(made)


def test_an_idle_server_ends_what_is_on_its_way(checkpoint: Any) -> None:
    """Nobody asks for anything more, and the engine has a thread of its own."""
    import asyncio

    from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine

    folder = checkpoint("moe")
    with pools(with_returns(plan_of_two(folder)), folder) as made:
        handovers = made.connect([made.add_prefill()])

        async def ask() -> None:
            async with AsyncEngine(made.engine) as engine:
                await engine.generate(FIRST, SamplingParams(max_tokens=COUNT, ignore_eos=True))
                until = time.monotonic() + 5
                while not handovers.counts.returned and time.monotonic() < until:
                    await asyncio.sleep(0.005)

        asyncio.run(ask())
        assert handovers.counts.returned == 1
        nothing_is_held(made)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "rollback"), WAYS)
def test_conversations_get_the_answers_of_one_pool(
    depth: int, rollback: str, checkpoint: Any
) -> None:
    """Sequences come at random, some are cancelled, and there is room for few of them."""
    folder = checkpoint("moe")
    plan = with_returns(plan_of_two(folder, depth, rollback))
    tight = squeezed(plan, num_pages=60, max_seqs=4, num_checkpoints=6)
    with pools(tight, folder) as made:
        handovers = made.connect([made.add_prefill(plan) for _ in range(2)])
        talks = conversations_of(folder, 8, depth)
        replay(made.engine, talks, seed=1, cancel=0.02)
        assert handovers.counts.returned > 2
        assert not handovers.counts.refused and not handovers.counts.failed
        nothing_is_held(made)


@pytest.mark.slow
def test_nixl_sends_answers_back(checkpoint: Any) -> None:
    try:
        load_nixl()
    except PoolError:
        pytest.skip("NIXL is not installed")
    folder = checkpoint("moe")
    plan = with_returns(plan_of_two(folder, 2))
    with pools(plan, folder, transport="nixl") as made:
        made.connect([made.add_prefill()])
        answers, computed = talk(made, made.prefills[0])
        assert answers == of_one_pool(folder)
        assert computed[1:] == [len(new) for new in NEW]
        nothing_is_held(made)
