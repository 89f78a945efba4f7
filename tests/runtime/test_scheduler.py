"""Scheduler and cache under random operations: all memory is accounted for, and nobody starves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import count as count_from
from typing import Any, get_args

import pytest
from conversations import check_all_is_given_back, squeezed
from drafting import plan_of, plan_with_two_slots
from host_tiers import TieredExecutor, with_host
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from launches import captured
from symbolic import SPOILT, Form, SymbolicExecutor, after, answer

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.cache import prefix_cache as cache_module
from tokenspeed_plan.runtime.cache.prefix_cache import PrefixCache
from tokenspeed_plan.runtime.output import NO_NUMBERS
from tokenspeed_plan.runtime.request import Completion, NewToken
from tokenspeed_plan.runtime.scheduling.host_tier import _Move
from tokenspeed_plan.runtime.scheduling.sequence import (
    TRANSITIONS,
    IllegalTransition,
    Sequence,
    State,
)

# steps: prefill and decode take turns, prompts take turns, and one step may be in flight
PATIENCE = 5
GRAMMAR = {"grammar": True}


def engine_of(plan: Plan, cache: bool = True) -> Engine:
    return Engine(plan, TieredExecutor(plan), cache=cache)  # type: ignore[arg-type]


def small(plan: Plan, **limits: int) -> Plan:
    """The plan with pages of four tokens, chunks of sixteen and two sequences, unless given."""
    few = {
        "page_size": 4,
        "max_seq_len": 64,
        "max_tokens": 16,
        "interleaved_tokens": 8,
        "max_seqs": 2,
        "num_pages": 20,
        "num_checkpoints": 2,
        "checkpoint_interval": 8,
        "min_checkpoint_tokens": 4,
    }
    return squeezed(plan, **(few | limits))


def holders(engine: Engine) -> tuple[Counter[int], Counter[int]]:
    """How often running sequences, copies and the tree hold each page and each state slot."""
    cache, tier = engine.scheduler.cache, engine.scheduler.host_tier
    nodes = tuple(cache.tree)
    pages = Counter(node.page for node in nodes)
    state_slots = Counter(node.state_slot for node in nodes if node.state_slot)
    for sequence in engine.scheduler.running:
        pages.update(sequence.pages)
        state_slots.update({*sequence.own_slots, sequence.state_slot} - {0})
    reservations = engine.scheduler.reservations
    for reservation in reservations._all():
        pages.update(reservation.pages)
        state_slots.update([reservation.state_slot])
    for store in tier._stores:
        pages.update(store.here.pages)
        state_slots.update([store.here.state_slot])
    return pages, state_slots


def host_holders(engine: Engine) -> tuple[Counter[int], Counter[int]]:
    """The same of pages and state slots of the host."""
    tier = engine.scheduler.host_tier
    nodes = tuple(tier.tier.tree)
    pages = Counter(node.page for node in nodes)
    state_slots = Counter(node.state_slot for node in nodes if node.state_slot)
    moves: list[_Move] = [*tier._stores, *tier._loads]
    for move in moves:
        pages.update(move.there.pages)
        state_slots.update([move.there.state_slot])
    return pages, state_slots


def check_tree(
    cache: PrefixCache, keys: dict[tuple[int, int], Any], states: dict[int, int]
) -> None:
    """What a cache holds is of the tokens that it says, in pages and in states.

    What is no number nobody has got an answer from.
    """
    stack = [(cache.root, 0)]
    while stack:
        node, value = stack.pop()
        pairs = list[tuple[int, int]]()
        for place, token in enumerate(node.token_ids):
            name, known = keys[node.page, place]
            assert known == token
            pairs.append((name, value))
            value = after(value, token)
        if node.state_slot:
            pairs.append((states[node.state_slot], value))
        wrong = [name for name, right in pairs if name != right]
        assert set(wrong) <= {SPOILT}
        assert not (node.proven and wrong), "numbers that are none are kept for ever"
        stack += [(child, value) for child in (*node.children.values(), *node.tails)]


def end_copies(engine: Engine) -> None:
    """Wait for all copies between the device and the host."""
    tier = engine.scheduler.host_tier
    while tier._stores or tier._loads:
        tier.poll(is_idle=True)


class Machine(RuleBasedStateMachine):
    """Random requests, which continue each other's texts, cancellations, faults and steps."""

    plan: Plan
    fine = False  # before the start, and after a step that failed

    @initialize(
        pages=st.integers(16, 40),
        checkpoints=st.integers(0, 6),
        seqs=st.integers(1, 4),
        ahead=st.booleans(),
        interval=st.sampled_from((4, 8, 32)),
        worth=st.sampled_from((1, 4, 12)),
        filled=st.sampled_from((0, 2, 6)),
        host=st.sampled_from((0, 8, 20, 80)),
        spoils=st.booleans(),
    )
    def start(
        self,
        pages: int,
        checkpoints: int,
        seqs: int,
        ahead: bool,
        interval: int,
        worth: int,
        filled: int,
        host: int,
        spoils: bool,
    ) -> None:
        plan = small(
            self.plan,
            num_pages=pages,
            num_checkpoints=checkpoints,
            max_seqs=seqs,
            checkpoint_interval=interval,
            min_checkpoint_tokens=worth,
            filled_tokens=filled,
        )
        plan = with_host(plan, host, 1 + host // 8, least_tokens=4)
        self.engine = engine_of(captured(plan) if ahead else plan)
        self.engine.on_token = self.on_token
        self.spoils, self.victim = spoils, ""
        self.sequences: dict[str, Sequence] = {}
        self.texts: list[tuple[int, ...]] = [()]
        self.oldest, self.progress, self.stuck = "", -1, 0
        self.fine = True
        self.may_run: set[int] = set()

    @rule(
        text=st.integers(0, 7),
        cut=st.integers(0, 3),
        more=st.lists(st.integers(0, 1), min_size=0, max_size=30),
        most=st.sampled_from((1, 2, 6, 40)),
        logprobs=st.sampled_from((None, None, None, 0)),
        formed=st.booleans(),
    )
    def add(
        self,
        text: int,
        cut: int,
        more: list[int],
        most: int,
        logprobs: int | None,
        formed: bool,
    ) -> None:
        base = self.texts[-1 - text % len(self.texts)]
        prompt = (base[: len(base) - cut] + tuple(more))[: 64 - most] or (1,)
        name = str(len(self.sequences))
        params = SamplingParams(max_tokens=most, ignore_eos=True, num_logprobs=logprobs)
        self.engine.add(Request(name, prompt, params, Form() if formed else None))
        self.sequences[name] = self.engine.scheduler.waiting[-1]

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.fine = False
            for done in self.engine.step():
                self.check_answer(done)
            self.check_progress()
            self.fine = True

    @rule(which=st.integers(0, 1 << 16))
    def cancel(self, which: int) -> None:
        if self.sequences:
            name = sorted(self.sequences)[which % len(self.sequences)]
            self.engine.cancel(name)
            assert self.sequences[name].state in ("cancelled", "finished")

    @rule(which=st.integers(0, 1 << 16))
    def cancel_when_told(self, which: int) -> None:
        """As soon as any request gets a token, in the middle of a commit."""
        if self.sequences:
            self.victim = sorted(self.sequences)[which % len(self.sequences)]

    def on_token(self, token: NewToken) -> None:
        victim, self.victim = self.victim, ""
        self.engine.cancel(victim)

    @precondition(lambda self: self.fine and self.spoils)
    @rule(row=st.integers(0, 3))
    def spoil(self, row: int) -> None:
        """One sequence of the next step is computed wrong."""
        assert isinstance(self.engine.executor, TieredExecutor)
        self.engine.executor.spoils = row

    def check_answer(self, done: Completion) -> None:
        request = self.sequences[done.request_id].request
        if self.spoils and done.error:
            assert done.error == NO_NUMBERS
            return
        formed = request.grammar is not None
        assert done.token_ids == answer(request.prompt_ids, request.params.max_tokens, formed)
        assert 0 <= done.num_cached_tokens < len(request.prompt_ids)
        self.texts.append(request.prompt_ids + done.token_ids)

    def check_progress(self) -> None:
        """The oldest request goes on, or waits and no other is admitted before it; so each ends."""
        left = [s for s in self.sequences.values() if s.state not in ("finished", "cancelled")]
        if not left:
            return
        first = min(left, key=lambda s: s.number)
        progress = first.num_computed + len(first.token_ids)
        running = {s.number for s in self.engine.scheduler.running}
        same = (first.request.request_id, progress) == (self.oldest, self.progress)
        same &= not first.is_elsewhere  # what it waits for comes soon
        self.stuck = self.stuck + 1 if same and (first.is_running or not running) else 0
        assert self.stuck <= PATIENCE, f"request {self.oldest} does not go on"
        assert not same or first.is_running or running <= self.may_run, (
            f"{self.oldest} is passed by"
        )
        self.oldest, self.progress = first.request.request_id, progress
        held = self.engine.scheduler.reservations.held  # they start whoever waits before them
        self.may_run = running | {s.number for s in left if s.request.request_id in held}

    @invariant()
    def all_is_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        cache, tier = self.engine.scheduler.cache, self.engine.scheduler.host_tier.tier
        both = (cache.pages, cache.state_slots, tier.pages, tier.state_slots)
        found = (*holders(self.engine), *host_holders(self.engine))
        for slots, held in zip(both, found, strict=True):
            assert {slot: slots.holders(slot) for slot in slots if slots.holders(slot)} == held
            assert sorted([*slots.free, *held]) == sorted(slots)

    @invariant()
    def what_is_cached_is_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler, executor = self.engine.scheduler, self.engine.executor
        assert isinstance(executor, TieredExecutor)
        check_tree(scheduler.cache, executor.keys, executor.state)
        check_tree(scheduler.host_tier.tier, executor.host_keys, executor.host_state)
        for tree in (scheduler.cache.tree, scheduler.host_tier.tier.tree):
            ends = [node for node in tree if node.is_leaf and not node.state_slot]
            assert all(tree.is_in_use(node.page) for node in ends), "pages that no hit can use"

    def teardown(self) -> None:
        if not self.fine:
            return
        for _ in range(200 * len(self.sequences)):
            self.step(1)
            if not (self.engine.num_unfinished or self.engine.has_step_in_flight):
                break
        assert {s.state for s in self.sequences.values()} <= {"finished", "cancelled"}
        end_copies(self.engine)
        check_all_is_given_back(self.engine.scheduler.cache)
        check_all_is_given_back(self.engine.scheduler.host_tier.tier)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "rollback"),
    [
        (0, "in place"),
        (0, "two slots"),
        (1, "snapshot"),
        (3, "snapshot"),
        (3, "recompute"),
    ],
)
def test_thousands_of_random_operations(depth: int, rollback: str, checkpoint: Any) -> None:
    if rollback == "two slots":
        Machine.plan = plan_with_two_slots.__wrapped__(checkpoint("moe"), serving=GRAMMAR)
    else:
        Machine.plan = plan_of.__wrapped__(checkpoint("moe"), depth, rollback, serving=GRAMMAR)
    Machine.TestCase.settings = settings(
        max_examples=25 if depth else 40,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Machine.TestCase("runTest").runTest()


@pytest.mark.parametrize(
    ("depth", "rollback"),
    [
        pytest.param(0, "in place", marks=pytest.mark.slow),
        pytest.param(3, "snapshot", marks=pytest.mark.slow),
        (3, "recompute"),
    ],
)
def test_a_crowd_gets_the_answers_of_plain_decoding(
    depth: int, rollback: str, checkpoint: Any
) -> None:
    """Hosts, preemptions, drafts, grammars, faults and cancellations at once, more of each."""
    Machine.plan = plan_of.__wrapped__(checkpoint("moe"), depth, rollback, serving=GRAMMAR)
    for seed in range(2):
        crowd(random.Random(seed), Machine())


def crowd(rng: random.Random, machine: Machine) -> None:
    """Drive the machine at random, with a host and more requests than its memory holds."""
    machine.start(
        pages=rng.randrange(16, 34),
        checkpoints=rng.randrange(1, 7),
        seqs=rng.randint(2, 4),
        ahead=True,
        interval=rng.choice((4, 8, 32)),
        worth=rng.choice((1, 4, 12)),
        filled=rng.choice((0, 2, 6)),
        host=rng.choice((8, 20, 80)),
        spoils=True,
    )
    for _ in range(120):
        match rng.choices(range(5), (6, 9, 1, 1, 2))[0]:
            case 0:
                machine.add(
                    text=rng.randrange(8),
                    cut=rng.randrange(4),
                    more=rng.choices((0, 1), k=rng.choice((0, 1, 5, 12, 30))),
                    most=rng.choice((1, 2, 6, 24, 40)),
                    logprobs=rng.choice((None, None, None, 0)),
                    formed=rng.random() < 0.5,
                )
            case 1:
                machine.step(rng.choice((1, 1, 2, 4, 12)))
            case 2:
                machine.cancel(rng.randrange(1 << 16))
            case 3:
                machine.cancel_when_told(rng.randrange(1 << 16))
            case 4:
                machine.spoil(rng.randrange(4))
        machine.all_is_accounted_for()
        machine.what_is_cached_is_right()
    machine.teardown()


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


def test_a_digest_that_collides_changes_no_answer(
    tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With only two digests for all pages, the cache must still compare the tokens it finds."""
    monkeypatch.setattr(cache_module, "chain_digest", lambda parent, ids: bytes([sum(ids) % 2]))
    engine = engine_of(small(tiny_plan, checkpoint_interval=4, num_checkpoints=12))
    # All first pages have the same digest.
    prompts = [tuple(range(start, start + 30)) for start in range(0, 24, 4)]
    done = engine.generate(prompts * 2, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [d.token_ids for d in done] == [answer(prompt, 5) for prompt in prompts * 2]
    check_all_is_given_back(engine.scheduler.cache)


def request_of(name: str, prompt: tuple[int, ...], most: int) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=most, ignore_eos=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_more_than_fits_is_preempted_and_goes_on(ahead: bool, tiny_plan: Plan) -> None:
    """Four sequences grow to eleven pages each, with sixteen in all; the oldest ends first."""
    plan = small(tiny_plan, max_seqs=4, num_pages=16)
    engine, ended = engine_of(captured(plan) if ahead else plan), []
    for index in range(4):
        engine.add(request_of(str(index), (index, 1, 2), 40))
    while engine.num_unfinished:
        ended += engine.step()
    assert [int(done.request_id) for done in ended] == [0, 1, 2, 3]
    assert all(done.token_ids == answer((int(done.request_id), 1, 2), 40) for done in ended)
    assert engine.metrics.preemptions >= 3
    assert engine.metrics.computed_tokens < 4 * 3 + 3 * 40  # a preempted one does not begin anew
    check_all_is_given_back(engine.scheduler.cache)


@pytest.mark.parametrize("most", [5, 6])
def test_a_checkpoint_that_goes_before_the_first_token_leaves_the_state_right(
    most: int, tiny_plan: Plan
) -> None:
    """The sequence has parted from it, and holds two slots of a plan that writes in place."""
    plan = captured(small(tiny_plan, num_checkpoints=4))
    assert plan.pool.limits.in_place
    engine = engine_of(plan)
    engine.add(request_of("0", tuple(range(9)), most))
    (sequence,) = engine.scheduler.waiting
    while sequence.state != "decoding":
        engine.step()
    assert sequence.own_slots != [sequence.state_slot]
    cache, executor = engine.scheduler.cache, engine.executor
    cache.forget_checkpoint(sequence.state_slot)
    assert not engine.scheduler.is_simple(sequence)
    sequence.is_plain = True  # as of one that was preempted and has come back
    while engine.num_unfinished:
        engine.step()
    assert isinstance(executor, SymbolicExecutor)
    known, values = sequence.token_ids, [0]
    for token in known:
        values.append(after(values[-1], token))
    states = [executor.state[node.state_slot] for node in cache.checkpoints]
    assert states and set(states) <= set(values[len(known) - 1 :])


def test_a_wrong_state_is_given_up_where_its_page_is_proven(tiny_plan: Plan) -> None:
    """Others have got answers from the page, and none from the state that has come to it since."""
    engine = engine_of(small(tiny_plan, num_checkpoints=4))
    cache, executor = engine.scheduler.cache, engine.executor
    engine.generate([tuple(range(20))], SamplingParams(max_tokens=5, ignore_eos=True))
    for node in cache.checkpoints[:-1]:
        cache.forget_checkpoint(node.state_slot)
    assert [node.proven for node in cache.tree if node.position == 8] == [True]
    prompt = (*range(16), 60, 61)
    assert isinstance(executor, SymbolicExecutor)
    executor.spoils = 0
    for error in (NO_NUMBERS, None):
        engine.add(request_of("again", prompt, 3))
        done = []
        while engine.num_unfinished:
            done += engine.step()
        assert [each.error for each in done] == [error]
    assert done[0].token_ids == answer(prompt, 3)


def test_who_waits_for_a_state_slot_starts_when_the_cache_can_give_one_up(tiny_plan: Plan) -> None:
    """Those that have only just computed their prompts hold two, one of them with the cache."""
    engine = engine_of(captured(small(tiny_plan, max_seqs=4, num_pages=80)))
    for number in range(3):
        engine.add(request_of(str(number), (number, 1, 2, 3, 4), 40))
    engine.step()
    while any(sequence.state != "decoding" for sequence in engine.scheduler.running):
        engine.step()
    assert not engine.scheduler.cache.state_slots.num_free
    engine.add(request_of("late", (9, 1, 2, 3, 4), 40))
    while len(engine.scheduler.running) < 4:
        assert not engine.step(), "it waits until another one ends"
    while engine.num_unfinished:
        engine.step()


def steps_until(engine: Engine, name: str, flood: Iterator[Request]) -> int:
    """Steps until a request ends, while one more of the flood comes in each."""
    for count in range(1, 10_000):
        engine.add(next(flood))
        if name in [done.request_id for done in engine.step()]:
            return count
    raise AssertionError(f"{name} starves")


def prompts_of(rng: random.Random, length: int, most: int) -> Iterator[Request]:
    return (
        request_of(f"flood {i}", tuple(rng.randrange(90) for _ in range(length)), most)
        for i in count_from(0)
    )


def test_a_short_prompt_does_not_wait_for_long_ones(tiny_plan: Plan) -> None:
    """It runs beside three prompts of four chunks, in every other step, as it has least to do."""
    engine = engine_of(small(tiny_plan, max_seqs=4, num_pages=64))
    flood = prompts_of(random.Random(0), 60, 1)
    for _ in range(3):
        engine.add(next(flood))
    engine.step()
    engine.add(request_of("short", (1, 2, 3), 1))
    assert steps_until(engine, "short", flood) <= 4


def test_a_long_prompt_does_not_wait_for_short_ones(tiny_plan: Plan) -> None:
    """Short ones come and go all the time; every other step belongs to the oldest, the long one."""
    engine = engine_of(small(tiny_plan, max_seqs=4, num_pages=64))
    engine.add(request_of("long", tuple(range(60)), 2))
    assert steps_until(engine, "long", prompts_of(random.Random(1), 16, 1)) <= 4 * (60 // 8 + 2)


def test_one_that_waits_gets_its_turn_in_a_flood(tiny_plan: Plan) -> None:
    """Requests before it end, and none that came later is admitted before it."""
    engine = engine_of(small(tiny_plan, max_seqs=2, num_pages=20))
    flood = prompts_of(random.Random(2), 40, 10)
    for _ in range(6):
        engine.add(next(flood))
    engine.add(request_of("last", (5,), 1))
    assert steps_until(engine, "last", flood) <= 6 * (2 * 5 + 2 * 10)


def chunks(plan: Plan, lengths: dict[str, int]) -> list[dict[str, int]]:
    """The tokens of each prompt in each step, of prompts that come together."""
    engine = engine_of(captured(plan))
    for first, (name, length) in enumerate(lengths.items()):
        engine.add(request_of(name, (first, *range(1, length)), 1))
    seen, last = list[dict[str, int]](), None
    while engine.num_unfinished:
        engine.step()
        batch = engine.loop.last_batch
        if batch is not None and batch is not last:
            names = [sequence.request.request_id for sequence in batch.sequences]
            seen.append(dict(zip(names, batch.counts, strict=True)))
        last = batch
    return seen


def test_prompts_that_come_together_end_one_after_the_other(tiny_plan: Plan) -> None:
    """Who shares a step with the end of another prompt goes on before that step is over."""
    plan = small(tiny_plan, max_seqs=4, num_pages=64, interleaved_tokens=16, checkpoint_interval=64)
    assert chunks(plan, {"a": 20, "b": 20, "c": 20}) == [
        {"a": 16},
        {"a": 4, "b": 12},
        {"b": 8, "c": 8},
        {"c": 12},
    ]


def test_a_step_in_which_a_prompt_ends_is_filled_as_planned(tiny_plan: Plan) -> None:
    """A part of another prompt comes with it up to the limit; one that ends in it, too, always."""
    plan = small(tiny_plan, max_seqs=4, num_pages=64, interleaved_tokens=16, checkpoint_interval=64)
    plan = squeezed(plan, filled_tokens=6)
    assert chunks(plan, {"a": 20, "b": 20, "c": 9}) == [
        {"a": 16},
        {"a": 4, "c": 9},
        {"b": 16},
        {"b": 4},
    ]
    assert chunks(plan, {"a": 20, "b": 20, "c": 20})[1] == {"a": 4, "b": 2}


def test_prompts_between_decode_steps_are_cut_as_planned(tiny_plan: Plan) -> None:
    plan = small(tiny_plan, interleaved_tokens=4)
    engine = engine_of(plan)
    engine.add(request_of("decodes", (1, 2, 3), 30))
    engine.step()
    engine.add(request_of("prefills", tuple(range(50)), 1))
    seen = []
    while engine.num_unfinished == 2:
        engine.step()
        assert engine.loop.last_batch is not None
        seen.append((engine.loop.last_batch.program.phase, engine.loop.last_batch.num_tokens))
    assert {tokens for phase, tokens in seen if phase == "prefill"} <= {2, 4}
    phases = [phase for phase, _ in seen]
    assert "prefill prefill" not in " ".join(phases)


def test_equal_prompts_are_computed_once(tiny_plan: Plan) -> None:
    """Three at once: the others wait for the first one's checkpoint, then share its pages."""
    engine = engine_of(small(tiny_plan, max_seqs=4, num_pages=64, num_checkpoints=8))
    prompt = tuple(range(40))
    most = max(
        len(used) for used in watch(engine, [request_of(str(i), (*prompt, i), 8) for i in range(3)])
    )
    assert engine.metrics.computed_tokens == 41 + 1 + 1
    assert engine.metrics.hit_tokens == 80
    assert most == 10 + 3 * 2  # pages: the prefix once, and for each its own nine tokens


def watch(engine: Engine, requests: list[Request]) -> Iterator[set[int]]:
    """The pages that running sequences hold, step by step."""
    for request in requests:
        engine.add(request)
    while engine.num_unfinished:
        for done in engine.step():
            prompt = next(r for r in requests if r.request_id == done.request_id).prompt_ids
            assert done.token_ids == answer(prompt, len(done.token_ids))
        yield {page for sequence in engine.scheduler.running for page in sequence.pages}


def test_the_next_turn_goes_on_where_the_last_one_ended(tiny_plan: Plan) -> None:
    engine = engine_of(small(tiny_plan, num_checkpoints=8))
    (first,) = engine.generate([tuple(range(21))], SamplingParams(max_tokens=5, ignore_eos=True))
    before = engine.metrics.computed_tokens
    prompt = (*range(21), *first.token_ids, 7, 8)
    (second,) = engine.generate([prompt], SamplingParams(max_tokens=3, ignore_eos=True))
    # The last generated token is not computed, and so not cached.
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 25)
    assert engine.metrics.computed_tokens - before == 3
    assert second.token_ids == answer(prompt, 3)


def test_decoding_copies_nothing(tiny_plan: Plan) -> None:
    """A hit at the end of a page copies nothing either; one inside a page copies that page once."""
    engine = engine_of(small(tiny_plan, num_checkpoints=8))
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    (done,) = engine.generate([tuple(range(20))], params)
    assert engine.metrics.copied_bytes == 0
    engine.generate([(*range(20), *done.token_ids, 1), (*range(20), 50, 51)], params)
    assert engine.metrics.copied_bytes == 0  # both at the end of a page: 28 tokens, 20 tokens
    engine.generate([tuple(range(22))], params)
    engine.generate([(*range(22), 60)], params)
    assert engine.metrics.copied_bytes == 1
