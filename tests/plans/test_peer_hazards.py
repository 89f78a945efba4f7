"""What `peer_hazards` proves of slots agrees with trying every order of what two ranks do."""

from __future__ import annotations

import pytest

from tokenspeed_plan.plans.ops import ShapeError
from tokenspeed_plan.plans.peer_hazards import PushCall, check_pushes
from tokenspeed_plan.plans.peer_memory import COUNT_LIMIT, GENERATIONS, explain

CALLS = 6
ACTIONS = ("push", "empty", "read")  # of a call, in any order; a call ends when all are done

# A rank: its call, what is still to do in it, and what its slots hold by generation (a call or -1).
Rank = tuple[int, tuple[str, ...], tuple[int, ...]]
State = tuple[Rank, Rank]


def advanced(state: State, rank: int, action: str, generations: int) -> State | str | None:
    """The state after one action of a rank, None where it has to wait, or what went wrong."""
    ranks = list(state)
    call, todo, slots = ranks[rank]
    peer_call, peer_todo, peer_slots = ranks[1 - rank]
    now, before = call % generations, (call - 1) % generations
    if action == "push":
        if peer_slots[now] != -1:
            return "pushed over a part that is still needed"
        peer_slots = (*peer_slots[:now], call, *peer_slots[now + 1 :])
    elif action == "empty":
        slots = (*slots[:before], -1, *slots[before + 1 :])
    elif slots[now] == -1:
        return None
    elif slots[now] != call:
        return "read the part of another call"
    left = tuple(each for each in todo if each != action)
    ranks[1 - rank] = (peer_call, peer_todo, peer_slots)
    ranks[rank] = (call, left, slots)
    if not left:
        ranks[rank] = (call + 1, ACTIONS, slots)
    return ranks[0], ranks[1]


def fault(generations: int) -> str:
    """The first fault in any order of the actions of two ranks, empty where there is none."""
    start: Rank = (0, ACTIONS, (-1,) * generations)
    seen: set[State] = set()
    waiting: list[State] = [(start, start)]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        ways = 0
        for rank, (call, todo, _) in enumerate(state):
            for action in todo if call < CALLS else ():
                found = advanced(state, rank, action, generations)
                if isinstance(found, str):
                    return found
                if found is not None:
                    ways += 1
                    waiting.append(found)
        if not ways and any(call < CALLS for call, _, _ in state):
            return "ranks wait for each other"
    return ""


@pytest.mark.parametrize("generations", [1, 2, 3, 4])
def test_the_proof_agrees_with_all_orders(generations: int) -> None:
    calls = [PushCall("slots", "counts", generations)] * CALLS
    try:
        check_pushes(calls, 2)
        proved = True
    except ShapeError:
        proved = False
    assert proved == (not fault(generations)) == (generations >= 3)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_three_generations_suffice_for_any_number_of_calls(count: int, num_ranks: int) -> None:
    check_pushes([PushCall("slots", "counts", GENERATIONS)] * count, num_ranks)


def test_no_calls_are_no_race() -> None:
    check_pushes([], 2)


def test_the_running_number_begins_again_where_generations_do() -> None:
    assert COUNT_LIMIT % GENERATIONS == 0 and COUNT_LIMIT < 1 << 31


@pytest.mark.parametrize(
    ("stop", "error", "says"),
    [
        (0, 0, ""),
        (1, 0, "another rank gave up, or was told to"),
        (1, 1 << 16, "rank 0 sent nothing"),
        (1, (2 << 16) + 5, "rank 1 replays program 4 of the plan, this rank another one"),
    ],
)
def test_signals_are_explained(stop: int, error: int, says: str) -> None:
    assert explain(stop, error) == says
