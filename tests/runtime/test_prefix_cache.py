"""The prefix cache changes no answer, also under memory pressure, preemption and cancellation."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from conftest import ROOT, make_spec
from conversations import (
    check_all_is_given_back,
    converse,
    poisoned,
    replay,
    squeezed,
)
from drafting import plan_with_two_slots
from launches import captured
from planning import planned

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.cache.eviction import Checkpoints
from tokenspeed_plan.runtime.cache.held import Held
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.cache.prefix_tree import Node, PrefixTree
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots
from tokenspeed_plan.runtime.metrics import Metrics

PRESSURES: dict[str, dict[str, int]] = {
    "roomy": {
        "num_pages": 184,
        "num_checkpoints": 16,
        "checkpoint_interval": 64,
        "min_checkpoint_tokens": 16,
    },
    "few_pages": {
        "num_pages": 22,
        "num_checkpoints": 16,
        "checkpoint_interval": 32,
        "min_checkpoint_tokens": 16,
    },
    "few_rows": {
        "num_pages": 184,
        "num_checkpoints": 0,
        "checkpoint_interval": 32,
        "min_checkpoint_tokens": 32,
    },
    "few_of_both": {
        "num_pages": 23,
        "num_checkpoints": 1,
        "checkpoint_interval": 16,
        "min_checkpoint_tokens": 16,
        "interleaved_tokens": 16,
    },
}

# Chances that a step cancels a request, which comes again: most of a run is that. Fewer would
# preempt none, or hit little.
CANCELS = {"roomy": 0.05, "few_pages": 0.1, "few_rows": 0.1, "few_of_both": 0.05}


@pytest.fixture(scope="module")
def conversations(tiny_plan: Plan, checkpoint: Any) -> Any:
    """conversations(seed) -> 24 conversations, by a plan that writes no state in place."""
    plan = plan_with_two_slots(checkpoint("moe"))
    assert tiny_plan.pool.limits.in_place
    return cache(lambda seed: converse(plan, checkpoint("moe"), 24, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "pressure"), [*zip((0, 1, 0, 1), PRESSURES, strict=True)])
def test_answers_do_not_depend_on_the_cache(
    seed: int, pressure: str, conversations: Any, tiny_plan: Plan, checkpoint: Any
) -> None:
    engine = Engine.from_plan(squeezed(tiny_plan, **PRESSURES[pressure]), checkpoint("moe"))
    replay(engine, conversations(seed), seed, cancel=CANCELS[pressure])
    check_all_is_given_back(engine.scheduler.cache)
    assert engine.metrics.hit_tokens > 1000
    assert engine.metrics.evicted_checkpoints > 30
    assert engine.metrics.preemptions or "pages" not in pressure


@pytest.mark.slow
@pytest.mark.parametrize("pressure", PRESSURES)
def test_what_the_cache_holds_is_never_written(
    pressure: str, conversations: Any, tiny_plan: Plan, checkpoint: Any
) -> None:
    """Steps are launched ahead and padded, and all free memory is poisoned."""
    plan = captured(squeezed(tiny_plan, **PRESSURES[pressure]))
    engine = poisoned(plan, checkpoint("moe"), late=True)
    replay(engine, conversations(0)[:12], 1, cancel=0.05)
    check_all_is_given_back(engine.scheduler.cache)


@pytest.mark.slow
def test_the_demo_model_answers_alike_with_and_without_a_cache() -> None:
    """This model has trained weights and a plan of its own."""
    folder = ROOT / "examples" / "demo" / "model"
    spec = make_spec(
        folder, workload={"first_turn_tokens": 300, "output_tokens": 64, "concurrency": 4}
    )
    plan = planned(spec)
    made = converse(plan, folder, 10, 5)
    engine = Engine.from_plan(
        squeezed(plan, num_pages=30, num_checkpoints=4, checkpoint_interval=32), folder
    )
    replay(engine, made, 5, cancel=0.05)
    check_all_is_given_back(engine.scheduler.cache)
    assert engine.metrics.hit_tokens > 200


def test_the_last_turn_of_the_longest_conversation_is_cached(checkpoint: Any) -> None:
    """It goes on inside a page, and needs all pages that the plan has."""
    talk = {
        "kind": "agentic",
        "first_turn_tokens": 600,
        "turn_tokens": 256,
        "turns": 3,
        "output_tokens": 8,
    }
    spec = make_spec(checkpoint("moe"), workload=talk | {"concurrency": 1})
    engine = Engine.from_plan(planned(spec), checkpoint("moe"))
    history, cached = [i % 300 for i in range(600)], []
    for turn in range(3):
        (done,) = engine.generate([history], SamplingParams(max_tokens=8, ignore_eos=True))
        cached.append((len(history), done.num_cached_tokens))
        history += [*done.token_ids, *((7 * i + turn) % 300 for i in range(256))]
    assert cached == [(600, 0), (864, 607), (1128, 871)]


@pytest.mark.slow
def test_what_is_cheap_to_compute_is_evicted_first(tiny_plan: Plan, checkpoint: Any) -> None:
    """A long prompt outlives later short ones, and is evicted in the end if nobody uses it."""
    limits = {
        "num_pages": 184,
        "num_checkpoints": 0,
        "checkpoint_interval": 1024,
        "min_checkpoint_tokens": 16,
    }
    engine = Engine.from_plan(squeezed(tiny_plan, **limits), checkpoint("moe"))
    room = engine.plan.pool.limits.num_state_slots

    def hits(prompt: list[int]) -> int:
        before = engine.metrics.hit_tokens
        engine.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True))
        return engine.metrics.hit_tokens - before

    def ask(count: int, first: int) -> list[list[int]]:
        prompts = [[first + index] * 20 for index in range(count)]
        assert not any(map(hits, prompts))
        return prompts

    long, short = [7] * 300, [8] * 20
    assert not hits(long) and not hits(short)
    ask(room, 10)
    assert engine.metrics.evicted_checkpoints > 0
    assert not hits([*short, 9]) and hits([*long, 9]) > 250
    for index in range(20):
        ask(room, 100 + room * index)
    assert not hits([*long, 9])


def chains(rng: random.Random, count: int) -> tuple[Checkpoints, list[Node]]:
    """A checkpoint at the end of each of some chains of pages, which nobody uses."""
    pages, slots = SharedSlots(range(20 * count)), SharedSlots(range(1, 2 * count))
    tree = PrefixTree(b"", pages)
    made = Checkpoints(tree, slots, page_bytes=3, slot_bytes=50)
    for number in range(count):
        node = tree.root
        for depth in range(rng.randrange(1, 12)):
            page = pages.take()
            digest = bytes([depth]) + number.to_bytes(2)
            node = tree.insert_page(node, digest, tuple(range(rng.randrange(1, 9))), page)
            pages.drop(page)
        slot = slots.take()
        made.add(node, slot)
        slots.drop(slot)
    return made, list(made.nodes)


def test_the_heap_of_checkpoints_gives_up_what_is_worth_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if all were looked at each time; which are few."""
    rng, looks = random.Random(0), list[Node]()
    made, nodes = chains(rng, 300)
    worth = Checkpoints._worth

    def counted(self: Checkpoints, node: Node) -> float:
        looks.append(node)
        return worth(self, node)

    monkeypatch.setattr(Checkpoints, "_worth", counted)
    for _ in range(250):
        for node in rng.sample(nodes, 3):
            if node.state_slot:  # used once more, and given back
                made.use(node)
                made.state_slots.drop(node.state_slot)
        wanted = min(made.nodes, key=lambda node: worth(made, node))
        assert made.evict(lambda node: True)
        assert not wanted.state_slot
    assert len(looks) < 250 * 20


def test_a_whole_page_is_given_up_by_who_held_it_as_a_tail(tiny_plan: Plan) -> None:
    """A sequence went on in a tail's page; the whole page loses its checkpoint meanwhile."""
    cache = PrefixCache(tiny_plan.pool.limits, b"seed", 1, 1, Metrics())
    tokens = range(cache.page_size)
    digests: list[bytes] = []
    cache.extend(digests, tokens, len(tokens))
    page = cache.take_page()
    assert page is not None
    slots = [cache.take_state_slot() for _ in range(2)]
    tail = cache.add_checkpoint(cache.root, tokens, len(tokens) - 1, slots[0], [page])
    whole = cache.add_pages(cache.root, digests, tokens, len(tokens), [page])
    cache.add_checkpoint(whole, tokens, len(tokens), slots[1], [page])
    for slot in slots:
        cache.state_slots.drop(slot)
    cache.drop_pages([page])
    copied = Held.of(cache, tail)
    cache.forget_checkpoint(slots[1])
    assert whole in cache.tree
    copied.drop()
    assert list(cache.tree) == [tail]
    check_all_is_given_back(cache)
