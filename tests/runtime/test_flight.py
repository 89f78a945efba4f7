"""The flight: steps launched before the last ones are committed, while sequences come and go."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversations import check_all_is_given_back, squeezed
from drafting import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import LateLaunch, captured
from symbolic import VOCAB, SymbolicExecutor, after, answer

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime import Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.arenas import Arenas
from tokenspeed_plan.runtime.execution.input_block import DEVICE_ONLY
from tokenspeed_plan.runtime.execution.inputs import InputWriter, write_inputs
from tokenspeed_plan.runtime.execution.plan_memory import PlanMemory
from tokenspeed_plan.runtime.scheduling.batch import Batch, keep_rows
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


class LateExecutor(SymbolicExecutor):
    """Counts the outputs that were not read when a program was launched."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.launched: list[tuple[str, int]] = []  # phase, and steps in flight before it

    def run(
        self,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: object = None,
        part: object = "whole",
    ) -> None:
        self.launched.append((program.phase, len(self.host_outputs)))
        super().run(program, num_tokens, num_seqs, change, part)


def engine_of(plan: Plan, ahead: bool = True, **limits: int) -> Engine:
    """With pages of four tokens and four sequences, unless `limits` say otherwise."""
    few = {"page_size": 4, "max_seq_len": 64, "max_tokens": 16, "interleaved_tokens": 8}
    few |= {"max_seqs": 4, "num_pages": 80, "num_checkpoints": 4, "checkpoint_interval": 8}
    few |= {"min_checkpoint_tokens": 4}
    made = squeezed(plan, **(few | limits))
    if ahead:
        made = captured(made)
    return Engine(made, LateExecutor(made))  # type: ignore[arg-type]


def launches(engine: Engine) -> list[tuple[str, int]]:
    executor = engine.executor
    assert isinstance(executor, LateExecutor)
    return executor.launched


def request_of(name: str, prompt: tuple[int, ...], most: int, **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=most, ignore_eos=True, **params))


def expected(request: Request) -> tuple[tuple[int, ...], str]:
    """The right tokens of a request, and why they end."""
    tokens = answer(request.prompt_ids, request.params.max_tokens)
    for count, token in enumerate(tokens, start=1):
        if token in request.params.stop_token_ids:
            return tokens[:count], "stop"
    return tokens, "length"


def drawn(rng: random.Random, name: str) -> Request:
    """A request with any length; the host alone sees some of its stop tokens."""
    prompt = tuple(rng.randrange(3) for _ in range(rng.choice((1, 2, 5, 9, 20, 33))))
    stops = rng.sample(range(VOCAB), rng.choice((0, 0, 1, 20)))
    most = rng.choice((1, 2, 3, 9, 25))
    logprobs = rng.choice((None, None, 0))
    return request_of(name, prompt, most, stop_token_ids=tuple(stops), num_logprobs=logprobs)


def run_at_random(engine: Engine, rng: random.Random, count: int) -> None:
    """Requests come and are cancelled at random moments, also by a callback; checks each answer."""
    left = [drawn(rng, str(number)) for number in range(count)]
    open_requests: dict[str, Request] = {}
    told: dict[str, list[int]] = {}

    def on_token(token: Any) -> None:
        told.setdefault(token.request_id, []).append(token.token_id)
        if open_requests and rng.random() < 0.01:
            cancel(rng.choice(sorted(open_requests)))

    def cancel(name: str) -> None:
        if engine.cancel(name):  # else it has ended in this step
            del open_requests[name]

    engine.on_token = on_token
    while left or engine.num_unfinished or engine.has_step_in_flight:
        for _ in range(min(rng.choice((0, 0, 1, 4)), len(left))):
            request = left.pop()
            open_requests[request.request_id] = request
            engine.add(request)
        if open_requests and rng.random() < 0.05:
            cancel(rng.choice(sorted(open_requests)))
        for done in engine.step():
            request = open_requests.pop(done.request_id)
            assert (done.token_ids, done.finish_reason) == expected(request)
            assert (*told.get(done.request_id, []), done.token_ids[-1]) == done.token_ids
    assert not open_requests
    check_all_is_given_back(engine.scheduler.cache)
    check_cached_states(engine)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "rollback"), [(0, ""), (2, "snapshot"), (3, "recompute")])
@pytest.mark.parametrize("ahead", [True, False])
def test_answers_are_right_whatever_comes_and_goes(
    ahead: bool, depth: int, rollback: str, checkpoint: Any
) -> None:
    plan = plan_of(checkpoint("moe"), depth, rollback or "snapshot")
    for seed in range(12):
        rng = random.Random(seed)
        size = rng.choice((4, 8, 16))
        pages = 64 // size + rng.choice((4, 12, 60))
        seqs = rng.choice((1, 2, 4))
        engine = engine_of(plan, ahead, page_size=size, num_pages=pages, max_seqs=seqs)
        run_at_random(engine, rng, 25)


def check_cached_states(engine: Engine) -> None:
    """Each checkpoint of the cache is the state of its prefix."""
    executor = engine.executor
    assert isinstance(executor, LateExecutor)
    stack = [(engine.scheduler.cache.root, 0)]
    while stack:
        node, value = stack.pop()
        for token in node.token_ids:
            value = after(value, token)
        assert not node.state_slot or executor.state[node.state_slot] == value
        stack += [(child, value) for child in (*node.children.values(), *node.tails)]


def test_a_callback_that_cancels_leaves_no_wrong_state(tiny_plan: Plan) -> None:
    """Two steps are launched for the third sequence when the first one's token is told."""
    engine = engine_of(tiny_plan, num_checkpoints=8)
    told: list[str] = []

    def on_token(token: Any) -> None:
        told.append(token.request_id)
        if told.count("0") == 9 and token.request_id == "0":
            assert engine.cancel("2")

    engine.on_token = on_token
    for number, logprobs in enumerate((None, None, 0)):
        prompt = (number, 1, 2)
        engine.add(request_of(str(number), prompt, 30, num_logprobs=logprobs))
    assert [one.request_id for one in finish(engine)] == ["0", "1"]
    check_cached_states(engine)


def finish(engine: Engine, *waiting: Request) -> list[Completion]:
    """Step to the end; one of `waiting` is added whenever one ends."""
    left, done = list(waiting), list[Completion]()
    while engine.num_unfinished:
        ended = engine.step()
        for _ in ended[: len(left)]:
            engine.add(left.pop(0))
        done += ended
    return done


@pytest.mark.parametrize("logprobs", [None, 0])
def test_pages_and_logprobs_do_not_end_the_flight(logprobs: int | None, tiny_plan: Plan) -> None:
    """Each sequence crosses a page in every fourth step."""
    engine = engine_of(tiny_plan)
    for number in range(3):
        prompt = (number,) * (number + 3)
        engine.add(request_of(str(number), prompt, 40, num_logprobs=logprobs))
    done = finish(engine)
    assert {len(one.token_ids) for one in done} == {40}
    assert all(in_flight == 1 for _, in_flight in launches(engine)[8:])
    phases = [phase for phase, _ in launches(engine)]
    assert phases.count("decode") <= 39 + 4, "a sequence sits steps out when it gets a page"


def test_sequences_are_exchanged_in_the_flight(tiny_plan: Plan) -> None:
    """One of three ends every few steps, and another begins with a prompt of two chunks."""
    engine = engine_of(tiny_plan, max_seqs=3)
    requests = [request_of(str(n), (n, *range(20)), 12 + 5 * (n % 4)) for n in range(12)]
    for request in requests[:3]:
        engine.add(request)
    done = {one.request_id: one for one in finish(engine, *requests[3:])}
    assert all(done[one.request_id].token_ids == expected(one)[0] for one in requests)
    phases = [phase for phase, _ in launches(engine)]
    late = [in_flight for _, in_flight in launches(engine)[8:]]
    assert phases.count("prefill") >= 12
    # The middle of a prompt has no outputs to wait for, so that the step after it finds none.
    assert late.count(0) <= 18 and len(late) > 80


def test_a_step_has_the_same_rows_as_the_one_before() -> None:
    a, b, c, d, e = (Sequence(request_of(name, (1,), 1), 0.0) for name in "abcde")
    assert keep_rows((), [a, b]) == (a, b)
    assert keep_rows((a, b, c), [b, c, d]) == (d, b, c)
    assert keep_rows((a, b, c), [c]) == (c,)
    assert keep_rows((a, b, c, d), [d, b]) == (d, b)
    assert keep_rows((a,), [e, d, a]) == (a, e, d)


class Walk:
    """Batches of decode steps by chance, as no scheduler makes them."""

    def __init__(self, plan: Plan, rng: random.Random) -> None:
        self.plan, self.rng = plan, rng
        self.limits = plan.pool.limits
        self.programs = [one for one in plan.pool.programs if one.phase == "decode"]
        self.rows: tuple[Sequence, ...] = ()
        self.made = 0

    def sequence(self) -> Sequence:
        rng, self.made = self.rng, self.made + 1
        known = rng.randrange(2, 60)
        params = {"temperature": rng.random(), "seed": rng.randrange(1 << 70), "top_k": known}
        request = request_of(str(self.made), tuple(range(known)), 9, **params)
        made = Sequence(request, 0.0, list(range(known)), num_computed=known - 1)
        made.stop_ids = frozenset(rng.sample(range(99), rng.choice((0, 3, 12))))
        made.pages = [rng.randrange(self.limits.num_pages) for _ in range(-(-known // 16))]
        made.state_slot = rng.randrange(1, 9)
        made.own_slots = rng.sample(range(9, 30), self.limits.written_slots_per_seq)
        return made

    def next(self) -> Batch:
        """Some have ended, some begin, some have more pages or other ones."""
        rng = self.rng
        members = [one for one in self.rows if rng.random() < 0.8]
        members += [self.sequence() for _ in range(rng.randrange(3))]
        members = members[: self.limits.max_seqs] or [self.sequence()]
        for one in members:
            if rng.random() < 0.3 and len(one.pages) < 4:
                reach = len(one.token_ids) + self.limits.max_depth
                one.pages_version += len(one.pages) * 16 < reach
                one.pages.append(rng.randrange(self.limits.num_pages))
            if rng.random() < 0.1:
                one.pages[0], one.state_slot = rng.randrange(9), rng.randrange(1, 9)
                one.pages_version += 1
        self.rows = keep_rows(self.rows, members)
        rng.shuffle(members)
        rows = rng.choice((self.rows, tuple(members)))
        self.rows = rows
        fitting = [program for program in self.programs if program.max_seqs >= len(rows)]
        program = rng.choice(fitting)
        return Batch.of(program, rows, (program.query_len,) * len(rows))


def memory_of(plan: Plan) -> PlanMemory:
    return PlanMemory(plan, Arenas(arena for arena in plan.pool.arenas if arena.name == "io"), {})


@pytest.mark.parametrize("depth", [0, 2])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1 << 30))
def test_what_differs_is_all_that_has_to_be_sent(depth: int, seed: int, checkpoint: Any) -> None:
    """A device that got the differences has what one has to which everything is written."""
    plan = captured(plan_of(checkpoint("moe"), depth))
    walk, device, oracle = Walk(plan, random.Random(seed)), memory_of(plan), memory_of(plan)
    writer = InputWriter(plan, device.buffer)
    for _ in range(12):
        batch = walk.next()
        size = (batch.run_tokens, batch.run_seqs)
        writer.write(batch)

        def whole(name: str, size: tuple[int, int] = size) -> torch.Tensor:
            return oracle.buffer(name, *size)

        write_inputs(batch, whole, plan.pool.limits)
        for name in batch.program.inputs:
            if name not in DEVICE_ONLY:
                assert torch.equal(device.buffer(name, *size), oracle.buffer(name, *size)), name


class Spoilt(LateExecutor):
    """From some step on, one sequence's logits are NaN, and its tokens what an argmax makes."""

    victim, since, value = 0, 9, float("nan")

    def run(
        self,
        program: Program,
        num_tokens: int,
        num_seqs: int,
        change: object = None,
        part: object = "whole",
    ) -> None:
        super().run(program, num_tokens, num_seqs, change, part)
        logits = self.buffer("logits", num_tokens, num_seqs)
        logits.zero_()
        if program.phase == "decode" and self.num_runs >= self.since:
            first_page = self.buffer("page_table", num_tokens, num_seqs)[:, 0]
            rows = first_page == self.victim
            logits[rows, 5] = self.value
            self.buffer("next_tokens", num_tokens, num_seqs)[rows] = 0


@pytest.mark.parametrize("stops", [(), (0,)])
def test_numbers_that_are_none_are_found_in_the_flight(
    stops: tuple[int, ...], tiny_plan: Plan
) -> None:
    """In the middle of an answer, whose logits the next step has overwritten already."""
    made = captured(squeezed(tiny_plan, page_size=4, max_seq_len=64, max_seqs=4, num_pages=80))
    executor = Spoilt(made)
    engine = Engine(made, executor, cache=False)  # type: ignore[arg-type]
    told: list[Any] = []
    engine.on_token = told.append
    for number in range(3):
        engine.add(request_of(str(number), (number, 1), 30, stop_token_ids=stops))
    engine.step()
    executor.victim = engine.scheduler.running[1].pages[0]
    done = {one.request_id: one for one in finish(engine)}
    assert done["1"].error == "the model's logits are not numbers"
    assert [done[name].error for name in "02"] == [None, None]
    if not stops:
        assert done["0"].token_ids == answer((0, 1), 30)
    kept = [token.token_id for token in told if token.request_id == "1"]
    assert tuple(kept) == answer((1, 1), 30)[: len(kept)]


@pytest.mark.parametrize("depth", [0, 2])
def test_logprobs_of_the_flight_are_those_of_a_plain_loop(depth: int, checkpoint: Any) -> None:
    folder = checkpoint("moe")
    plan = plan_of(folder, depth)
    params = SamplingParams(max_tokens=20, ignore_eos=True, num_logprobs=2)
    prompts = [[3, 4, 5], [7] * 30, [9, 8]]
    plain = Engine.from_plan(plan, folder).generate(prompts, params)
    launch = LateLaunch()
    ahead = Engine.from_plan(captured(plan), folder, launch=launch).generate(prompts, params)
    for one, other in zip(plain, ahead, strict=True):
        assert one.token_ids == other.token_ids
        for wanted, found in zip(one.logprobs, other.logprobs, strict=True):
            assert found.token_id == wanted.token_id
            assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [token for token, _ in found.top] == [token for token, _ in wanted.top]


def test_one_block_is_not_written_while_it_is_read(tiny_plan: Plan) -> None:
    """Blocks take turns, and each is waited for before it is written again."""
    memory = memory_of(tiny_plan)
    writer = InputWriter(tiny_plan, memory.buffer)
    blocks = writer._blocks._blocks
    waited: list[int] = []
    for number, block in enumerate(blocks):
        event = SimpleNamespace(synchronize=lambda number=number: waited.append(number))
        block._read = event  # type: ignore[assignment]
    walk = Walk(captured(tiny_plan), random.Random(0))
    for _ in range(7):
        writer.write(walk.next())
    assert waited == [1, 2, 0, 1, 2, 0, 1][: len(waited)] and len(waited) >= 4


def test_tokens_of_padding_have_places_of_their_own(checkpoint: Any) -> None:
    """Else the last one to write would win, and a step and its reference would differ."""
    plan = captured(plan_of(checkpoint("moe"), 3, "recompute"))
    program = max(
        (each for each in plan.pool.programs if each.phase == "decode"),
        key=lambda each: each.max_seqs * each.depth,
    )
    memory = PlanMemory(plan, Arenas(plan.pool.arenas), {})
    size = (program.max_tokens, program.max_seqs)
    write_inputs(
        Batch.of(program, [], []), lambda name: memory.buffer(name, *size), plan.pool.limits
    )
    places = memory.buffer("slot_mapping", *size).reshape(program.max_seqs, program.query_len)
    assert program.query_len == 4 and program.max_seqs > 1
    assert all(len(set(row)) == 4 for row in places.tolist())
    assert len(set(map(tuple, places.tolist()))) == 1
