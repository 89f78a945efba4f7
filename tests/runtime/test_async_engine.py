"""Many callers on one loop: answers are right whoever leaves, reads slowly or is refused."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import ROOT

from tokenspeed_plan.plans.errors import EngineStopped, RankError, RequestError, RequestFailed
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import AsyncEngine, Completion, Engine, Request, SamplingParams
from tokenspeed_plan.runtime.serving.async_engine import Gather
from tokenspeed_plan.runtime.streaming import Delta

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
FREE = (0, 0, 0, 0)


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan, checkpoint: Any) -> Engine:
    return Engine.from_plan(tiny_plan, checkpoint("moe"))


def taken(engine: Engine) -> tuple[int, ...]:
    used = engine.usage
    return used.waiting, used.running, used.state_slots, used.pages


def with_served(engine: Engine, work: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with AsyncEngine(engine) as served, asyncio.timeout(60):
            await work(served)

    asyncio.run(run())
    assert taken(engine) == FREE


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(400) for _ in range(rng.choice((1, 17, 90)))] for _ in range(count)]


@pytest.mark.slow
def test_everybody_gets_their_own_answer(engine: Engine) -> None:
    """Forty callers; a third leave the block after a few deltas, a third are cancelled."""
    requested = prompts(40, 0)
    wanted = engine.generate(requested, PARAMS)

    async def caller(served: AsyncEngine, index: int) -> None:
        text, seen = "", 0
        async with served.stream(requested[index], PARAMS) as stream:
            async for delta in stream:
                text, seen = text + delta.text, seen + 1
                if index % 3 == 0 and seen > index % 5:
                    return
        assert text == wanted[index].text

    async def work(served: AsyncEngine) -> None:
        tasks = [asyncio.create_task(caller(served, index)) for index in range(len(requested))]
        await asyncio.sleep(0.02)
        for task in tasks[1::3]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [
            item
            for item in found
            if item is not None and not isinstance(item, asyncio.CancelledError)
        ]
        assert served.num_open == 0
        assert (await served.generate(requested[7], PARAMS)).text == wanted[7].text

    with_served(engine, work)


def test_a_stream_of_several_requests(engine: Engine) -> None:
    requested = [Request(str(index), tuple(ids), PARAMS) for index, ids in enumerate(prompts(5, 1))]
    wanted = engine.generate([request.prompt_ids for request in requested], PARAMS)

    async def work(served: AsyncEngine) -> None:
        found = await served.submit(requested).completions()
        assert [(done.request_id, done.token_ids) for done in found] == [
            (request.request_id, done.token_ids)
            for request, done in zip(requested, wanted, strict=True)
        ]

    with_served(engine, work)


def test_a_slow_reader_holds_up_nobody(engine: Engine) -> None:
    """It later reads in one piece what has come meanwhile."""

    async def work(served: AsyncEngine) -> None:
        async with served.stream([5], PARAMS) as slow:
            first = await anext(slow)
            done = await asyncio.gather(*(served.generate([index], PARAMS) for index in range(20)))
            assert len(done) == 20
            rest = [delta async for delta in slow]
            assert (
                len(rest) <= 2
                and len(first.token_ids) + sum(len(delta.token_ids) for delta in rest) == 12
            )

    with_served(engine, work)


@pytest.mark.parametrize("refused", [0.0, 0.5, 1.0])
def test_what_is_written_or_read_comes_once_and_in_order(engine: Engine, refused: float) -> None:
    """Deltas that cannot be written are the reader's; what ends an answer always is."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    rng, wanted = random.Random(1), engine.generate([[5]], params)[0]

    async def work(served: AsyncEngine) -> None:
        gained, written = list[Delta](), list[Delta]()

        def write(gather: Gather) -> bool:
            if rng.random() < refused:
                return False
            deltas = gather()
            gained.extend(deltas)
            written.extend(deltas)
            return True

        stream = served.stream([5], params)
        stream.write = write
        async for delta in stream:
            gained.append(delta)
        assert "".join(delta.text for delta in gained) == wanted.text
        assert sum((delta.token_ids for delta in gained), ()) == wanted.token_ids
        assert [bool(delta.completion) for delta in gained] == [False] * (len(gained) - 1) + [True]
        assert bool(written) == (refused < 1)

    with_served(engine, work)


def test_what_cannot_be_written_is_one_requests_error(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        def write(gather: Gather) -> bool:
            gather()
            raise ValueError("no events of this")

        broken = served.stream([1], SamplingParams(max_tokens=200, ignore_eos=True))
        broken.write = write
        good = asyncio.create_task(served.generate([2], PARAMS))
        with pytest.raises(RequestFailed, match="no events of this"):
            async for _ in broken:
                pass
        broken.cancel()
        assert len((await good).token_ids) == 12

    with_served(engine, work)


def test_a_busy_loop_is_not_woken_for_each_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it does something else the engine answers a request; it then gets its steps at once."""

    async def work(served: AsyncEngine) -> None:
        loop, woken = asyncio.get_running_loop(), list[object]()
        wake = loop.call_soon_threadsafe

        def count(work: Callable[..., object], *args: Any) -> object:
            woken.append(work)
            return wake(work, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        first = engine.metrics.steps
        stream = served.stream([5], PARAMS)
        while engine.metrics.steps < first + PARAMS.max_tokens or engine.num_unfinished:
            time.sleep(0.01)
        (done,) = await stream.completions()
        assert len(done.token_ids) == PARAMS.max_tokens
        assert len(woken) <= 2, "the last step may come after the look at the engine"

    with_served(engine, work)


def test_tokens_of_whole_answers_wake_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is woken once for an answer that is read whole, for each token of a stream."""

    async def work(served: AsyncEngine) -> None:
        gaps: list[int] = []
        served.on_gap = lambda seconds, number: gaps.append(number)
        woken = [0]
        deliver = served._deliver

        def counted() -> None:
            woken[0] += 1
            deliver()

        monkeypatch.setattr(served, "_deliver", counted)
        answer = await served.generate([5], PARAMS)
        assert len(answer.token_ids) == 12
        assert woken[0] <= 2 and sum(gaps) == 11  # the first token may come before its reader
        async with served.stream([5], PARAMS) as stream:
            assert [token async for delta in stream for token in delta.token_ids] == list(
                answer.token_ids
            )
        assert woken[0] > 6

    with_served(engine, work)


def test_what_is_refused_harms_nobody(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        going = asyncio.create_task(served.generate([1, 2], PARAMS))
        await asyncio.sleep(0)
        for bad in (
            Request("a", ()),
            Request("a", (10**6,)),
            Request("a", (1,), SamplingParams(top_k=1 << 40)),
        ):
            with pytest.raises(RequestError):
                served.submit([Request("good", (1,), PARAMS), bad])
        with pytest.raises(RequestError, match="not finished"):
            served.submit([Request("twin", (1,), PARAMS), Request("twin", (1,), PARAMS)])
        assert served.num_open == 1, "all or none"
        assert len((await going).token_ids) == 12

    with_served(engine, work)


def test_on_completion_gets_each_completion(engine: Engine) -> None:
    seen: list[Completion] = []

    async def work(served: AsyncEngine) -> None:
        served.on_completion = seen.append
        done = await served.generate([4], PARAMS)
        assert seen == [done]

    with_served(engine, work)


def test_closing_ends_every_stream(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        streams = [
            served.stream([index], SamplingParams(max_tokens=300, ignore_eos=True))
            for index in range(12)
        ]
        first = await anext(streams[0])
        assert first.token_ids
        assert not await served.drain(0.01)
        await served.close()
        for stream in streams:
            with pytest.raises(EngineStopped, match="closed"):
                await stream.completions()
        with pytest.raises(EngineStopped):
            served.stream([1])

    with_served(engine, work)


def test_draining_waits_for_answers(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        stream = served.stream([3], PARAMS)
        assert await served.drain(30)
        await served.close()
        (done,) = await stream.completions()
        assert len(done.token_ids) == 12, "what was finished can still be read"

    with_served(engine, work)


@pytest.mark.parametrize(
    "error", [RankError("the link broke", "start again"), ZeroDivisionError("in a kernel")]
)
def test_an_engine_that_fails_says_so_to_all(
    error: Exception, tiny_plan: Plan, checkpoint: Any
) -> None:
    engine, steps = Engine.from_plan(tiny_plan, checkpoint("moe")), 0

    def step() -> list[Completion]:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise error
        return Engine.step(engine)

    engine.step = step  # type: ignore[method-assign]

    async def run() -> None:
        async with AsyncEngine(engine) as served, asyncio.timeout(60):
            streams = [served.stream([index], PARAMS) for index in range(3)]
            for stream in streams:
                with pytest.raises(
                    EngineStopped, match=r"the engine has failed: .*(the link broke|in a kernel)"
                ):
                    await stream.completions()
            assert served.error is error
            with pytest.raises(EngineStopped):
                served.stream([1])
            assert await served.drain(1)

    asyncio.run(run())


def test_one_bad_text_is_one_callers_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the decoder reaches only the reader of that text."""

    class Broken:
        joins_bytes = False

        def decode(self, ids: list[int]) -> str:
            raise ValueError("not a text")

        def is_special(self, token_id: int) -> bool:
            return False

    async def work(served: AsyncEngine) -> None:
        served.tokenizer = Broken()  # type: ignore[assignment]
        broken = served.stream([1], PARAMS)
        served.tokenizer = engine.tokenizer
        good = asyncio.create_task(served.generate([2], PARAMS))
        with pytest.raises(RequestFailed, match="not a text"):
            await anext(broken)
        broken.cancel()
        assert len((await good).token_ids) == 12

    with_served(engine, work)


def test_an_engine_without_a_tokenizer_streams_ids(tiny_plan: Plan, checkpoint: Any) -> None:
    engine = Engine(tiny_plan, Engine.from_plan(tiny_plan, checkpoint("moe")).executor)

    async def work(served: AsyncEngine) -> None:
        async with served.stream([1, 2], PARAMS) as stream:
            deltas: list[Delta] = [delta async for delta in stream]
        assert len(deltas) > 1 and sum(len(delta.token_ids) for delta in deltas) == 12
        assert not any(delta.text for delta in deltas)

    with_served(engine, work)


@pytest.mark.slow
def test_the_example_runs() -> None:
    command = [sys.executable, ROOT / "examples/streaming.py", ROOT / "plans/frozen/demo-cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    first = Engine.load(ROOT / "plans/frozen/demo-cpu")
    assert first.tokenizer
    (wanted,) = first.generate(
        [first.tokenizer.encode("def add(a, b):")], SamplingParams(max_tokens=24, stop=("\n\n",))
    )
    assert lines[0] == f"'def add(a, b):' -> {wanted.text!r} ({wanted.finish_reason})"
    assert wanted.text in done.stdout.split("\n", 3)[3]
    assert done.stdout.count("tokens, first after") == 2
