"""Which replica gets a request: who knows it, unless that one has far more to do."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed_plan.runtime.serving.router import affinity as module
from tokenspeed_plan.runtime.serving.router.affinity import (
    EXCESS_TOKENS,
    MAX_LOAD,
    Affinity,
    RouteKey,
    page_digests,
)

PAGE = 16


def key_of(tokens: list[int]) -> RouteKey:
    return RouteKey(None, len(tokens), page_digests(tokens, PAGE))


def test_digests_are_chained() -> None:
    first, second = page_digests(range(40), PAGE), page_digests([9, *range(1, 40)], PAGE)
    assert len(first) == 2 and not set(first) & set(second)
    assert page_digests(range(47), PAGE) == first != page_digests(range(48), PAGE)


def test_the_longest_known_prefix_decides() -> None:
    affinity = Affinity(3, PAGE, 1000)
    tokens = list(range(200))
    affinity.note(key_of(tokens[:64]), 0)
    affinity.note(key_of(tokens[:160]), 2)
    assert affinity.choose(key_of(tokens), range(3)) == 2
    assert affinity.known_tokens(key_of(tokens), 2) == 160
    assert affinity.choose(key_of(tokens), (0, 1)) == 0
    affinity.forget(2)
    assert affinity.choose(key_of(tokens), range(3)) == 0


def test_load_outweighs_a_short_prefix_and_not_a_long_one() -> None:
    for num_tokens, wanted in ((EXCESS_TOKENS, 1), (100 * EXCESS_TOKENS, 0)):
        affinity = Affinity(2, PAGE, 10**6)
        key = key_of([token % 251 for token in range(num_tokens)])
        affinity.note(key, 0)
        assert affinity.choose(key, range(2)) == 0
        affinity.in_flight[0] = 20
        assert affinity.choose(key, range(2)) == wanted


def test_a_session_stays_where_it_was() -> None:
    affinity = Affinity(4, PAGE, 10)
    homes = {}
    for number in range(100):
        key = RouteKey(f"session-{number}", 5000)
        homes[number] = affinity.choose(key, range(4))
        affinity.note(key, homes[number])
    for _ in range(3):
        for number, home in homes.items():
            assert affinity.choose(RouteKey(f"session-{number}", 6000), range(4)) == home
    affinity.forget(2)
    moved = [n for n, home in homes.items() if home == 2]
    assert all(affinity.known_tokens(RouteKey(f"session-{n}", 1), 2) == 0 for n in moved)


@pytest.mark.parametrize("gone", range(5))
def test_a_replica_that_goes_moves_only_its_own(gone: int) -> None:
    affinity = Affinity(5, PAGE, 10)
    keys = [RouteKey(f"s{number}", 1) for number in range(500)]
    before = [affinity.choose(key, range(5)) for key in keys]
    left = [replica for replica in range(5) if replica != gone]
    after = [affinity.choose(key, left) for key in keys]
    assert all(new == old for new, old in zip(after, before, strict=True) if old != gone)
    counts = Counter(before)
    assert all(60 < counts[replica] < 150 for replica in range(5))


@pytest.mark.slow
@given(st.integers(1, 6), st.lists(st.text(max_size=4), max_size=60), st.integers(0, 10**6))
def test_new_sessions_keep_the_loads_within_bounds(n: int, names: list[str], seed: int) -> None:
    affinity, rng = Affinity(n, PAGE, 10), random.Random(seed)
    for name in names:
        if any(affinity.in_flight) and rng.random() < 0.3:
            done = rng.choice([r for r in range(n) if affinity.in_flight[r]])
            affinity.in_flight[done] -= 1
        replica = affinity.choose(RouteKey(name), range(n))
        total = sum(affinity.in_flight) + 1
        affinity.in_flight[replica] += 1
        assert affinity.in_flight[replica] <= math.ceil(MAX_LOAD * total / n)


def test_without_anything_known_the_idlest_gets_it() -> None:
    affinity = Affinity(3, PAGE, 10)
    affinity.in_flight[:] = [2, 1, 3]
    assert affinity.choose(RouteKey(), range(3)) == 1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 8)
    affinity = Affinity(1, PAGE, 4)
    for number in range(100):
        affinity.note(RouteKey(f"s{number}", 1), 0)
        affinity.note(key_of([number] * 64), 0)
    assert len(affinity._sessions) == 8 and len(affinity._pages[0]) == 4
    assert affinity.known_tokens(key_of([99] * 64), 0) == 64


@pytest.mark.parametrize("kind", ["sessions", "prompts"])
def test_conversations_are_shared_out(kind: str) -> None:
    """Each replica gets its share of new conversations: they stay, and need its cache."""
    affinity = Affinity(4, PAGE, 1000)
    for number in range(64):
        key = RouteKey(f"s{number}", 100) if kind == "sessions" else key_of([number] * 64)
        replica = affinity.choose(key, range(4))
        affinity.in_flight[replica] += 1
        affinity.note(key, replica)
        affinity.note(key, replica)  # its next turn
    assert [affinity._num_held(replica) for replica in range(4)] == [16] * 4
    affinity.forget(1)
    assert [affinity._num_held(replica) for replica in range(4)] == [16, 0, 16, 16]
