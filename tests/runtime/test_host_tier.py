"""Checkpoints on the host: no answer changes, whatever is copied there and back, however late."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from conversations import Conversation, check_all_is_given_back, converse, replay, squeezed
from drafting import plan_of, plan_with_two_slots
from families import write_family
from host_tiers import late, with_host
from launches import captured

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.plans.errors import EngineStopped, PlanError, SpecError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.cache.prefix_cache import Hit
from tokenspeed_plan.runtime.cache.slot_copies import SlotCopy
from tokenspeed_plan.runtime.execution.host_slots import HostSlots
from tokenspeed_plan.runtime.output import NO_NUMBERS

TINY = {  # of the device
    "num_pages": 23,
    "num_checkpoints": 2,
    "checkpoint_interval": 32,
    "min_checkpoint_tokens": 16,
    "interleaved_tokens": 16,
}
HOSTS = {"roomy": (400, 80), "few pages": (40, 80), "few states": (400, 12)}
KINDS = {"in place": (0, "snapshot"), "snapshot": (3, "snapshot"), "recompute": (3, "recompute")}


@pytest.fixture(scope="module")
def conversations(checkpoint: Any) -> list[Conversation]:
    """By a plan that writes no state in place, without a cache."""
    return converse(plan_with_two_slots(checkpoint("moe")), checkpoint("moe"), 16, 3)


def plan_for(folder: Any, kind: str) -> Plan:
    return squeezed(plan_of(folder, *KINDS[kind]), **TINY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "host", "ahead"),
    [
        ("in place", "roomy", True),
        ("in place", "few pages", False),
        ("snapshot", "few states", True),
        ("recompute", "roomy", True),
        ("recompute", "few pages", False),
    ],
)
def test_answers_do_not_depend_on_the_host(
    kind: str, host: str, ahead: bool, conversations: list[Conversation], checkpoint: Any
) -> None:
    """A device for one or two conversations, copies that end late, and cancellations."""
    plan = with_host(plan_for(checkpoint("moe"), kind), *HOSTS[host])
    engine = Engine.from_plan(captured(plan) if ahead else plan, checkpoint("moe"))
    slots = late(engine)
    replay(engine, conversations, 1, cancel=0.05)
    tier = engine.scheduler.host_tier
    while slots.open:
        tier.poll(is_idle=True)
    check_all_is_given_back(engine.scheduler.cache)
    check_all_is_given_back(tier.tier)
    assert not engine.scheduler.reservations.pages()
    found = engine.metrics
    assert found.host_hits > 4 and found.host_hit_tokens > 20 * found.host_hits
    assert found.evicted_checkpoints > 20
    assert (found.host_evicted_checkpoints > 0) == (host != "roomy")


def turns(engine: Engine, talks: list[list[int]], more: int) -> list[int]:
    """One more turn of each conversation, one after the other; how much of each was cached."""
    cached = []
    for talk in talks:
        (done,) = engine.generate([talk], SamplingParams(max_tokens=8, ignore_eos=True))
        talk += [*done.token_ids, *(number % 300 for number in range(more, more + 24))]
        cached.append(done.num_cached_tokens)
    return cached


@pytest.fixture(scope="module")
def stateless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without recurrent state."""
    return write_family(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "qwen3"])
def test_conversations_in_turn_come_back_from_the_host(
    kind: str, stateless: Path, checkpoint: Any
) -> None:
    """Six that share no prefix, on a device for one; also of a model without recurrent state."""
    folder, checkpoints = (checkpoint("moe"), 2) if kind == "moe" else (stateless, 0)
    plan = squeezed(plan_of(folder, 0), num_pages=23, num_checkpoints=checkpoints)
    engine = Engine.from_plan(with_host(plan, 200, 20), folder)
    talks = [[start] * 2 + list(range(start, start + 200)) for start in range(6)]
    assert turns(engine, talks, 0) == [0] * 6
    assert turns(engine, talks, 1) == [209] * 6  # all but the last token of the answer
    assert turns(engine, talks, 2) == [241] * 6
    found = engine.metrics
    assert (found.host_hits, found.host_hit_tokens) == (12, 6 * (209 + 241))
    page_bytes, state_bytes = (plan.pool.slot_bytes(name) for name in ("kv_cache", "state"))
    assert found.host_loaded_bytes == 6 * (30 * page_bytes + 2 * state_bytes)  # 14 and 16 pages
    check_all_is_given_back(engine.scheduler.cache)


def test_a_hit_is_partly_on_the_device(checkpoint: Any) -> None:
    """Pages that the device has still are not copied: those of a prefix that others share."""
    plan = squeezed(plan_of(checkpoint("moe"), 0), num_pages=40, num_checkpoints=3)
    engine = Engine.from_plan(with_host(plan, 200, 20), checkpoint("moe"))
    shared = list(range(96))
    turns(engine, [list(shared)], 0)
    talk = shared + [7] * 96
    turns(engine, [talk], 1)
    turns(engine, [[start] * 200 for start in range(10, 16)], 2)  # its state and last pages go
    turns(engine, [[*shared, 9]], 3)
    loaded = engine.metrics.host_loaded_bytes
    assert turns(engine, [talk], 4) == [199]
    page_bytes, state_bytes = (plan.pool.slot_bytes(name) for name in ("kv_cache", "state"))
    assert engine.metrics.host_loaded_bytes - loaded == 7 * page_bytes + state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_those_that_are_preempted_go_on(kind: str, checkpoint: Any) -> None:
    """Four that came back grow until there is no page left; the host has what they began with."""
    folder = checkpoint("moe")
    talks = [[start, 9] * 24 for start in range(4)]
    plan = squeezed(plan_of(folder, *KINDS[kind]), num_pages=26, num_checkpoints=3)
    engine = Engine.from_plan(captured(with_host(plan, 200, 20)), folder)
    late(engine)
    turns(engine, talks, 0)
    turns(engine, [[start] * 200 for start in range(10, 14)], 1)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    alone = Engine.from_plan(plan_with_two_slots(folder), folder, cache=False)
    wanted = [done.token_ids for done in alone.generate(talks, params)]
    assert [done.token_ids for done in engine.generate(talks, params)] == wanted
    assert engine.metrics.preemptions and engine.metrics.host_hits >= 4


@pytest.mark.parametrize("num_pages", [1, 2, 3, 8])
def test_slots_go_there_and_back(num_pages: int, tiny_plan: Plan, checkpoint: Any) -> None:
    """In parts of three pages, to other places; nothing else is written."""
    plan = with_host(tiny_plan, 20, 4)
    engine = Engine.from_plan(plan, checkpoint("moe"))
    memory, slots = engine.executor.memory, engine.executor._host
    assert isinstance(slots, HostSlots)
    for state in (*memory.states("kv_cache"), *memory.states("state")):
        state.copy_(torch.randn(state.shape))
    pages, host = tuple(range(2, 2 + num_pages)), (9, 10, 3, 4, 5, 19, 0, 7)[:num_pages]
    targets = tuple(range(30, 30 - 2 * num_pages, -2))
    before = [state.clone() for state in (*memory.states("kv_cache"), *memory.states("state"))]
    slots.start(SlotCopy(False, pages, host, 2, 3))
    slots.start(SlotCopy(True, targets, host, 5, 3))
    after = (*memory.states("kv_cache"), *memory.states("state"))
    for old, new, arena in zip(before, after, _arenas(memory), strict=True):
        sources, places = (pages, targets) if arena == "kv_cache" else ((2,), (5,))
        old[list(places)] = old[list(sources)]
        assert torch.equal(old, new)


def _arenas(memory: Any) -> list[str]:
    return [name for name in ("kv_cache", "state") for _ in memory.states(name)]


def test_what_a_failure_may_have_spoilt_is_given_up(tiny_plan: Plan, checkpoint: Any) -> None:
    """NaN in a checkpoint spreads to all that begin there; what is proven stays."""
    engine = Engine.from_plan(with_host(tiny_plan, 200, 20), checkpoint("moe"))
    tier, talk = engine.scheduler.host_tier, [list(range(100))]
    turns(engine, talk, 0)
    turns(engine, talk, 1)
    assert [node.proven for node in tier.tier.checkpoints] == [True, False]
    for state in engine.executor.memory.states("state"):
        state[1:] = float("nan")
    engine.add(Request("bad", tuple(talk[0]), SamplingParams(max_tokens=4, ignore_eos=True)))
    (done,) = [done for _ in range(9) for done in engine.step()]
    assert done.error == NO_NUMBERS
    assert [node.position for node in tier.tier.checkpoints] == [107]


def test_one_that_leaves_while_it_waits(tiny_plan: Plan, checkpoint: Any) -> None:
    """Its name may come again before its copy is over."""
    plan = squeezed(tiny_plan, num_pages=30, num_checkpoints=2)
    engine = Engine.from_plan(with_host(plan, 200, 20), checkpoint("moe"))
    talks = [[start] * 200 for start in range(4)]
    turns(engine, talks, 0)
    slots, params = late(engine), SamplingParams(max_tokens=4, ignore_eos=True)
    answers = []
    for _ in range(3):
        engine.add(Request("name", tuple(talks[0]), params))
        engine.step()
        assert engine.scheduler.waiting[0].is_elsewhere and slots.open
        engine.cancel("name")
        assert not engine.num_unfinished
    engine.add(Request("name", tuple(talks[0]), params))
    while engine.num_unfinished:
        answers += engine.step()
    (done,) = answers
    assert done.num_cached_tokens == 207
    while slots.open:
        engine.scheduler.host_tier.poll(is_idle=True)
    assert not engine.scheduler.reservations.abandoned
    check_all_is_given_back(engine.scheduler.cache)


def test_those_that_begin_alike_wait_for_one_copy(tiny_plan: Plan, checkpoint: Any) -> None:
    """Where the first of them leaves, the next one asks again."""
    plan = squeezed(tiny_plan, num_pages=40, num_checkpoints=2)
    engine = Engine.from_plan(with_host(plan, 200, 20), checkpoint("moe"))
    talks, params = [[start] * 200 for start in range(4)], SamplingParams(max_tokens=2)
    turns(engine, talks, 0)
    slots = late(engine)
    for name in "abc":
        engine.add(Request(name, (*talks[0], ord(name)), params))
    engine.step()
    assert engine.metrics.host_hits == 1
    assert all(sequence.is_elsewhere for sequence in engine.scheduler.waiting)
    engine.cancel("a")
    done = []
    while engine.num_unfinished:
        done += engine.step()
    assert [each.num_cached_tokens for each in done] == [207] * 2
    assert engine.metrics.host_hits == 2
    while slots.open:
        engine.scheduler.host_tier.poll(is_idle=True)
    check_all_is_given_back(engine.scheduler.cache)


def test_one_for_which_a_checkpoint_has_come_asks_for_no_other(
    tiny_plan: Plan, checkpoint: Any
) -> None:
    """It holds what came until it starts."""
    plan = squeezed(tiny_plan, num_pages=40, num_checkpoints=2)
    engine = Engine.from_plan(with_host(plan, 200, 20), checkpoint("moe"))
    talks = [[start] * 200 for start in range(4)]
    turns(engine, talks, 0)
    engine.add(Request("name", tuple(talks[0]), SamplingParams(max_tokens=2)))
    late(engine)
    engine.step()
    (sequence,) = engine.scheduler.waiting
    tier, held = engine.scheduler.host_tier, engine.scheduler.reservations.held
    (before,) = held.values()
    while sequence.is_elsewhere:
        tier.poll(is_idle=True)
    cache = engine.scheduler.cache
    assert not tier.fetch(sequence, Hit(cache.root, 0), ()) and [*held.values()] == [before]


def test_a_device_that_has_failed_is_asked_for_nothing_more(
    tiny_plan: Plan, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy on its way, whose end cannot be awaited either."""
    engine = Engine.from_plan(with_host(tiny_plan, 200, 20), checkpoint("moe"))
    slots, talk = late(engine), [list(range(100))]
    while not slots.open:
        turns(engine, talk, 0)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    for name in ("run", "end_copies"):
        monkeypatch.setattr(engine.executor, name, fails)
    with pytest.raises(EngineStopped, match="illegal memory access"):
        turns(engine, talk, 1)


AGENT = {
    "kind": "agentic",
    "first_turn_tokens": 200,
    "turn_tokens": 40,
    "turns": 3,
    "output_tokens": 16,
    "concurrency": 1,
}


@cache
def planned(folder: Any, gib: float | None) -> Plan:
    spec = make_spec(folder, workload=AGENT, serving={"host_cache_gib": gib})
    return compile_plan(spec, find_model(spec))


def test_a_plan_says_what_the_host_holds(checkpoint: Any) -> None:
    plan = planned(checkpoint("moe"), 0.25)
    cache = plan.pool.host_cache
    assert cache is not None
    assert 0 <= (1 << 28) - cache.size_bytes < cache.page_bytes
    talk_pages = -(-328 // plan.pool.limits.page_size)
    assert abs(cache.num_pages / talk_pages - cache.num_states / 2) < 2
    (found,) = [each for each in plan.decisions if each.name == "host_cache"]
    assert found.value.startswith("0.25 GiB on each rank")
    assert "328 tokens of a conversation come back in" in found.reason
    without = planned(checkpoint("moe"), None)
    assert without.pool.host_cache is None
    (found,) = [each for each in without.decisions if each.name == "host_cache"]
    assert found.value == "off"


def test_what_cannot_be_planned(checkpoint: Any) -> None:
    with pytest.raises(SpecError, match="a conversation of 328 tokens takes"):
        planned(checkpoint("moe"), 1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"page_bytes": 8}, "the host has slots of"),
        ({"state_bytes": 8}, "the host has slots of"),
        ({"num_states": 0}, "0 states of"),
        ({"least_tokens": 1}, "less than a page"),
    ],
)
def test_a_plan_whose_host_cannot_be_right(
    changes: dict[str, int], says: str, checkpoint: Any
) -> None:
    plan = planned(checkpoint("moe"), 0.25)
    assert plan.pool.host_cache is not None
    wrong = plan.pool.host_cache.model_copy(update=changes)
    with pytest.raises(PlanError, match=says):
        validate(plan.with_pool(host_cache=wrong))
