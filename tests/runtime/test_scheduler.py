"""Scheduler and cache by themselves: thousands of random operations, every page and row counted, nobody starved."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from conversations import check_all_is_given_back, squeezed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from symbolic import SymbolicExecutor, after, answer
from test_ahead import captured
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime import cache as cache_module
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.sequence import TRANSITIONS, IllegalTransition, Sequence, State

PATIENCE = 5  # steps: prefill and decode take turns, prompts take turns, and one step may be in flight


def engine_of(plan: Plan, cache: bool = True) -> Engine:
    return Engine(plan, SymbolicExecutor(plan), cache=cache)  # type: ignore[arg-type]


def small(plan: Plan, **limits: int) -> Plan:
    """Pages of four tokens, chunks of at most sixteen, two sequences, unless told otherwise."""
    few = {"page_size": 4, "max_seq_len": 64, "max_tokens": 16, "interleaved_tokens": 8, "max_seqs": 2,
           "num_pages": 20, "num_checkpoints": 2, "checkpoint_interval": 8, "min_checkpoint_tokens": 4}  # fmt: skip
    return squeezed(plan, **(few | limits))


def holders(engine: Engine) -> tuple[Counter[int], Counter[int]]:
    """Pages and rows as often as running sequences and the tree hold them."""
    scheduler = engine._scheduler
    nodes = list(scheduler.cache._index.values())
    nodes += [tail for node in (*nodes, scheduler.cache.root) for tail in node.tails]
    pages = Counter(node.page for node in nodes)
    rows = Counter(node.row for node in nodes if node.row)
    for sequence in scheduler._running:
        pages.update(sequence.pages)
        pages.update([] if sequence.copy_from is None else [sequence.copy_from])
        rows.update([*sequence.write_rows, *([sequence.row] if sequence.row else [])])
    return pages, rows


class Machine(RuleBasedStateMachine):
    """Requests come, go on from each other, are cut off; the engine steps."""

    plan: Plan

    @initialize(
        pages=st.integers(16, 40), checkpoints=st.integers(0, 6), seqs=st.integers(1, 4), ahead=st.booleans(),
        interval=st.sampled_from((4, 8, 32)), worth=st.sampled_from((1, 4, 12)),
    )  # fmt: skip
    def start(self, pages: int, checkpoints: int, seqs: int, ahead: bool, interval: int, worth: int) -> None:
        plan = small(self.plan, num_pages=pages, num_checkpoints=checkpoints, max_seqs=seqs,
                     checkpoint_interval=interval, min_checkpoint_tokens=worth)  # fmt: skip
        self.engine = engine_of(captured(plan) if ahead else plan)
        self.sequences: dict[str, Sequence] = {}
        self.texts: list[tuple[int, ...]] = [()]
        self.oldest, self.progress, self.stuck = "", -1, 0
        self.running: set[int] = set()

    @rule(
        text=st.integers(0, 1 << 16), cut=st.integers(0, 3), more=st.lists(st.integers(0, 2), min_size=0, max_size=30),
        most=st.sampled_from((1, 2, 6, 20)), logprobs=st.sampled_from((None, None, None, 0)),
    )  # fmt: skip
    def add(self, text: int, cut: int, more: list[int], most: int, logprobs: int | None) -> None:
        base = self.texts[text % len(self.texts)]
        prompt = (base[: len(base) - cut] + tuple(more))[: 64 - most] or (1,)
        name = str(len(self.sequences))
        params = SamplingParams(max_tokens=most, ignore_eos=True, num_logprobs=logprobs)
        self.engine.add(Request(name, prompt, params))
        self.sequences[name] = self.engine._scheduler._waiting[-1]

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            for done in self.engine.step():
                self.check_answer(done)
            self.check_progress()

    @rule(which=st.integers(0, 1 << 16))
    def cancel(self, which: int) -> None:
        if self.sequences:
            sequence = self.sequences[sorted(self.sequences)[which % len(self.sequences)]]
            self.engine._scheduler.cancel(sequence)
            assert sequence.state in ("cancelled", "finished")

    def check_answer(self, done: Completion) -> None:
        request = self.sequences[done.request_id].request
        assert done.token_ids == answer(request.prompt_ids, request.params.max_tokens)
        assert 0 <= done.num_cached_tokens < len(request.prompt_ids)
        self.texts.append(request.prompt_ids + done.token_ids)

    def check_progress(self) -> None:
        """The oldest request goes on; where it waits for those that run, no other gets in before it. So each ends."""
        left = [s for s in self.sequences.values() if s.state not in ("finished", "cancelled")]
        if not left:
            return
        first = min(left, key=lambda s: s.number)
        progress = first.num_computed + len(first.token_ids)
        running = {s.number for s in self.engine._scheduler._running}
        same = (first.request.request_id, progress) == (self.oldest, self.progress)
        self.stuck = self.stuck + 1 if same and first.is_running else 0
        assert self.stuck <= PATIENCE, f"request {self.oldest} does not go on"
        assert not same or first.is_running or (running and running <= self.running), f"{self.oldest} is passed by"
        self.oldest, self.progress, self.running = first.request.request_id, progress, running

    @invariant()
    def all_is_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        cache = self.engine._scheduler.cache
        for pool, held in zip((cache.pages, cache.rows), holders(self.engine), strict=True):
            assert {place: count for place, count in pool._holders.items() if count} == dict(held)
            assert sorted([*pool._free, *held]) == sorted(pool._holders)

    @invariant()
    def what_is_cached_is_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        cache, executor = self.engine._scheduler.cache, self.engine.executor
        assert isinstance(executor, SymbolicExecutor)
        stack = [(cache.root, 0)]
        while stack:
            node, value = stack.pop()
            for place, token in enumerate(node.token_ids):
                assert executor.keys[node.page, place] == (value, token)
                value = after(value, token)
            assert not node.row or executor.state[node.row] == value
            stack += [(child, value) for child in (*node.children.values(), *node.tails)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.num_unfinished or self.engine._flying:
            self.step(1)
        assert {s.state for s in self.sequences.values()} <= {"finished", "cancelled"}
        check_all_is_given_back(self.engine._scheduler.cache)


def test_thousands_of_random_operations(tiny_plan: Plan) -> None:
    Machine.plan = tiny_plan
    Machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Machine.TestCase("runTest").runTest()


@pytest.mark.parametrize("before", get_args(State))
@pytest.mark.parametrize("after", get_args(State))
def test_only_the_table_says_what_may_come_next(before: State, after: State) -> None:
    sequence = Sequence(Request("0", (1,), SamplingParams()), 0.0, state=before)
    if after in TRANSITIONS[before]:
        sequence.move_to(after)
        assert sequence.state == after
    else:
        with pytest.raises(IllegalTransition, match=f"from {before} to {after}"):
            sequence.move_to(after)


def test_a_digest_that_collides_changes_no_answer(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names for all pages there are: what the cache finds must still be compared."""
    monkeypatch.setattr(cache_module, "chain_digest", lambda parent, ids: bytes([sum(ids) % 2]))
    engine = engine_of(small(tiny_plan))
    prompts = [tuple(i % 3 for i in range(start, start + 30)) for start in range(6)]
    done = engine.generate(prompts * 2, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [d.token_ids for d in done] == [answer(prompt, 5) for prompt in prompts * 2]
