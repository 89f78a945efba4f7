"""Random conversations that share prefixes, their answers, and engines under pressure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from launches import LateLaunch
from torch import Tensor

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.execution.bound_programs import BoundPrograms, Part
from tokenspeed_plan.runtime.execution.launch import AroundLaunch, EagerLaunch
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory

VOCAB = 480


@dataclass(frozen=True)
class Turn:
    """One request, and its right answer."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    answer: tuple[int, ...]


Conversation = list[Turn]


def squeezed(plan: Plan, **limits: int) -> Plan:
    """The plan with lower limits; its buffers stay as large as they were."""
    changed = plan.pool.limits.model_copy(update=limits)
    slots = 2 + changed.max_seqs * changed.state_slots_per_seq + changed.num_checkpoints
    assert slots <= plan.pool.limits.num_state_slots
    return plan.with_pool(limits=changed.model_copy(update={"num_state_slots": slots}))


def converse(plan: Plan, folder: Path, count: int, seed: int) -> list[Conversation]:
    """Conversations of one to four turns, with the answers of an engine without a cache.

    Some begin alike, some branch off others, some repeat or edit a turn.
    """
    rng, oracle = random.Random(seed), Engine.from_plan(plan, folder, cache=False)
    systems = [draw(rng, size) for size in (5, 33, 64, 90)]
    made: list[Conversation] = [[] for _ in range(count)]
    for _ in range(4):
        asked = {
            index: next_prompt(rng, made, index, systems)
            for index in range(count)
            if rng.random() < 0.8
        }
        for index, (prompt, most) in asked.items():
            oracle.add(
                Request(str(index), prompt, SamplingParams(max_tokens=most, ignore_eos=True))
            )
        while oracle.num_unfinished:
            for done in oracle.step():
                index = int(done.request_id)
                made[index].append(Turn(*asked[index], done.token_ids))
    return [turns for turns in made if turns]


def next_prompt(
    rng: random.Random, made: list[Conversation], index: int, systems: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], int]:
    """The next prompt of a conversation, and its `max_tokens`."""
    most = rng.choice((1, 2, 5, 9, 40))
    turns = made[index]
    if not turns and rng.random() < 0.3:
        turns = rng.choice(made)  # branch off another conversation
    if not turns:
        return rng.choice(systems) + draw(rng, rng.choice((0, 1, 7, 40))), most
    last = turns[-1]
    if rng.random() < 0.15:
        return last.prompt_ids, most  # once more
    whole = last.prompt_ids + last.answer
    if rng.random() < 0.2:
        whole = whole[: rng.randrange(1, len(whole))]  # edited
    return (whole + draw(rng, rng.choice((1, 3, 16, 30))))[:280], most


def draw(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


def replay(
    engine: Engine, conversations: list[Conversation], seed: int, cancel: float = 0.0
) -> None:
    """Run all conversations at once and check each answer.

    Args:
        engine: answers the requests.
        conversations: what `converse` made.
        seed: of the moments at which requests come.
        cancel: the chance that a step cancels a request, which comes again later.
    """
    rng = random.Random(seed)
    left = [list(turns) for turns in conversations]
    running: dict[str, tuple[int, Turn]] = {}
    number = 0
    while running or any(left):
        ready = [
            i
            for i, turns in enumerate(left)
            if turns and not any(f[0] == i for f in running.values())
        ]
        for index in rng.sample(ready, min(len(ready), rng.choice((0, 1, 4)))):
            turn, number = left[index][0], number + 1
            params = SamplingParams(max_tokens=turn.max_tokens, ignore_eos=True)
            engine.add(Request(str(number), turn.prompt_ids, params))
            running[str(number)] = (index, turn)
        if running and rng.random() < cancel:
            name = rng.choice(sorted(running))
            del running[name]
            engine.cancel(name)
        for done in engine.step():
            index, turn = running.pop(done.request_id)
            assert done.token_ids == turn.answer, (
                f"conversation {index}, prompt of {len(turn.prompt_ids)} tokens"
            )
            left[index].pop(0)
    while engine.num_unfinished or engine.has_step_in_flight:
        engine.step()


def check_all_is_given_back(cache: PrefixCache) -> None:
    """With nothing running, each page and state slot is free or in the tree, and counted right."""
    nodes, stack = [], [cache.root]
    while stack:
        node = stack.pop()
        below = [*node.children.values(), *node.tails]
        assert all(child.parent is node for child in below)
        assert node is cache.root or not node.is_leaf or node.state_slot, (
            "a leaf that no hit can use"
        )
        nodes += below
        stack += below
    pages = [node.page for node in nodes]
    state_slots = [node.state_slot for node in (*nodes, cache.root) if node.state_slot]
    for slots, held in ((cache.pages, pages), (cache.state_slots, state_slots)):
        for slot in slots:
            assert slots.holders(slot) == held.count(slot)
        assert sorted(slots.free) == sorted(set(slots) - set(held))
    assert {node for node in nodes if node.state_slot} == set(cache.checkpoints)
    assert set(nodes) == set(cache.tree) and len(nodes) == len(list(cache.tree))
    found = {node.digest: cache.tree.find(node.digest) for node in nodes if node.digest}
    assert found == {node.digest: node for node in nodes if node.digest}


class PoisonLaunch(AroundLaunch):
    """Overwrites free memory before each step, and checks that no step changes the cache's."""

    def __init__(self) -> None:
        super().__init__(EagerLaunch())
        self.cache: PrefixCache | None = None

    def run(
        self,
        programs: BoundPrograms,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        part: Part = "whole",
    ) -> None:
        self._poison(programs.memory)
        before = [(_bits(view).clone(), view, held) for view, held in self._held(programs.memory)]
        self.inner.run(programs, program, num_tokens, num_seqs, part)
        for bits, view, held in before:
            changed = (_bits(view) != bits).flatten(held.ndim).any(held.ndim)
            assert not (changed & held).any(), "a step wrote what the cache holds"

    def _poison(self, memory: PlanMemory) -> None:
        assert self.cache is not None
        for view in memory.states("kv_cache"):
            view[self.cache.pages.free] = float("nan")
        for view in memory.states("state"):
            view[self.cache.state_slots.free] = float("nan")

    def _held(self, memory: PlanMemory) -> Iterator[tuple[Tensor, Tensor]]:
        """(memory, where it is held): whole pages, the tokens in tails, and checkpoints."""
        assert self.cache is not None
        nodes = list(self.cache.tree)
        for view in memory.states("kv_cache"):  # [page, keys or values, position, ...]
            held = torch.zeros(len(view), 1, view.shape[2], dtype=torch.bool)
            held[[node.page for node in nodes if node.digest]] = True
            for node in nodes:
                if not node.digest:
                    held[node.page, :, : len(node.token_ids)] = True
            yield view, held
        for view in memory.states("state"):
            held = torch.zeros(len(view), dtype=torch.bool)
            held[[node.state_slot for node in self.cache.checkpoints]] = True
            yield view, held


def _bits(x: Tensor) -> Tensor:
    """As integers: NaN equals itself then."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def poisoned(plan: Plan, folder: Path, chunk: int | None = None, late: bool = False) -> Engine:
    """An engine with a `PoisonLaunch`; with `late`, outputs are handed out as by a GPU."""
    poison = PoisonLaunch()
    launch = LateLaunch(poison) if late else poison
    engine = Engine.from_plan(plan, folder, launch=launch, chunk=chunk)
    poison.cache = engine.scheduler.cache
    return engine
