"""An engine for many callers on an asyncio loop.

One thread steps the engine; each stream gets the tokens of its requests on the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from tokenspeed_plan.plans.errors import (
    EngineStopped,
    RequestError,
    RequestFailed,
    TokenspeedError,
)
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.isolation import describe, owned
from tokenspeed_plan.runtime.request import (
    Completion,
    NewToken,
    Request,
    SamplingParams,
    failed,
)
from tokenspeed_plan.runtime.streaming import AnswerText, Delta

Command = Callable[[], object]
Gather = Callable[[], Seq[Delta]]
Write = Callable[[Gather], bool]
Step = tuple[tuple[NewToken | Completion, ...], float]  # what it gave, and when
_GREEDY = SamplingParams()


class Stream:
    """Growing answers to some requests, for one reader on the loop.

    Tokens are buffered here until they are read, and all that have gathered are read as one delta.
    So a slow reader does not block others, and the buffer never holds more than its own answers.

    Attributes:
        write: in the place of the reader, while that waits, it gathers the deltas that there are
            and writes them at once; or it gathers none and returns False, and the reader gets
            them. What ends an answer comes to the reader alone.
        wants_parts: whether anybody looks at an answer before its end. Where nobody does, its
            tokens do not wake the loop, which has the interpreter's lock while the engine waits.
    """

    def __init__(self, engine: AsyncEngine, requests: Seq[Request]) -> None:
        self._engine = engine
        self._texts = {
            request.request_id: AnswerText(request, engine.tokenizer) for request in requests
        }
        self._tokens: dict[str, list[NewToken]] = {}
        self._completions: dict[str, Completion] = {}
        self._reader: asyncio.Future[None] | None = None  # it waits until this has a result
        self.write: Write | None = None
        self.wants_parts = True
        self.error: EngineStopped | RequestFailed | None = None

    @property
    def num_open(self) -> int:
        """Number of requests whose answers are not read to their end."""
        return len(self._texts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta of one of the requests.

        Raises:
            RequestFailed: one of the requests could not be answered.
            EngineStopped: the engine has failed, or was closed.
        """
        while self._texts:
            delta = self._read()
            if delta:
                return delta
            if self.error:
                raise self.error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        raise StopAsyncIteration

    async def completions(self) -> list[Completion]:
        """Read to the end; returns the completions in the order of the requests."""
        self.wants_parts = False
        names = list(self._texts)
        completions = {}
        async for delta in self:
            if delta.completion:
                completions[delta.request_id] = delta.completion
        return [completions[name] for name in names]

    def cancel(self) -> None:
        """Cancel the requests that are not finished; the stream ends."""
        self._engine.cancel(*self._texts)
        self._texts.clear()
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def put(self, item: NewToken | Completion) -> None:
        """Buffer a token or a completion; called on the loop, which then calls `tell`."""
        if isinstance(item, Completion):
            self._completions[item.request_id] = item
        elif self.wants_parts:
            self._tokens.setdefault(item.request_id, []).append(item)

    def tell(self) -> None:
        """Write what has come, or wake the reader; called on the loop."""
        if not self._is_waited_for or self._completions or not self._is_written():
            self._wake()

    @property
    def _is_waited_for(self) -> bool:
        return self._reader is not None and not self._reader.done()

    def _is_written(self) -> bool:
        """Write the deltas that there are; returns whether the reader need not look at them."""
        if self.write is None:
            return False
        try:
            return owned(partial(self.write, self._gather)) and self.error is None
        except RequestFailed as error:
            self.error = error
            return False

    def _gather(self) -> list[Delta]:
        """All deltas that there are; one that cannot be made is the error of the stream."""
        deltas: list[Delta] = []
        try:
            while delta := self._read():
                deltas.append(delta)
        except RequestFailed as error:
            self.error = error
        return deltas

    def fail(self, error: EngineStopped) -> None:
        """End the stream with an error; called on the loop."""
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _read(self) -> Delta | None:
        """A delta of all that is buffered for one request; None if that makes no text yet."""
        if self._completions:
            name, completion = self._completions.popitem()
            self._tokens.pop(name, None)
            text = self._texts.pop(name)
            completion.check()
            return owned(partial(text.finish, completion))
        while self._tokens:
            name = next(iter(self._tokens))
            text, tokens = self._texts[name], self._tokens.pop(name)
            delta = owned(partial(text.push, tokens))
            if delta.token_ids:
                return delta
        return None


class AsyncEngine:
    """One engine, its thread, and the streams of its requests.

    Attributes:
        on_completion: called on the loop with each completion whose request was not cancelled.
        on_gap: called on the loop with the time before a token of a request, in seconds, and how
            many tokens came then: those of one step share the time since the last one.
        error: the error that ended the thread; None while it runs or was closed.

    Example:
        async with AsyncEngine(Engine.load(bundle)) as engine:
            async with engine.stream(ids, SamplingParams(max_tokens=64)) as answer:
                async for delta in answer:
                    print(delta.text, end="", flush=True)
    """

    def __init__(self, engine: Engine) -> None:
        self.tokenizer = engine.tokenizer
        self.on_completion: Callable[[Completion], object] | None = None
        self.on_gap: Callable[[float, int], object] | None = None
        self.error: BaseException | None = None
        self._engine = engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._told_s: dict[str, float] = {}  # when each request got its last token
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._steps: list[Step] = []  # that the loop has not seen
        self._is_woken = False  # it will look at them
        self._closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(1, "engine")
        self._thread = self._loop.run_in_executor(self._pool, self._work)
        self._thread.add_done_callback(self._end)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def num_open(self) -> int:
        """Number of requests that are not finished."""
        return len(self._streams)

    def stream(self, prompt_ids: Seq[int], params: SamplingParams = _GREEDY) -> Stream:
        """Continue one prompt (token ids).

        Leaving the stream's `async with` block cancels the request.

        Raises:
            RequestError: see `Engine.check`.
            EngineStopped: the engine has failed, or was closed.
        """
        return self.submit([Request(f"stream-{next(self._names)}", tuple(prompt_ids), params)])

    async def generate(self, prompt_ids: Seq[int], params: SamplingParams = _GREEDY) -> Completion:
        """Continue one prompt to its end. Cancelling the caller's task cancels the request.

        Raises:
            RequestFailed: the request could not be answered.
            RequestError, EngineStopped: see `stream`.
        """
        async with self.stream(prompt_ids, params) as answer:
            (completion,) = await answer.completions()
        return completion

    def submit(self, requests: Seq[Request]) -> Stream:
        """Start some requests, all or none, with one stream for all of them.

        Raises:
            RequestError, EngineStopped: see `stream`.
        """
        if self._closed or self.error:
            raise self._stopped()
        names = {request.request_id for request in requests}
        if len(names) < len(requests) or names & self._streams.keys():
            raise RequestError(
                "another request of that name is not finished", "give each request its own id"
            )
        for request in requests:
            self._engine.check(request)
        stream = Stream(self, requests)
        for request in requests:
            self._streams[request.request_id] = stream
            self._commands.put(partial(self._add, request))
        self._idle.clear()
        return stream

    def cancel(self, *request_ids: str) -> None:
        """Cancel requests; those that are finished or unknown are ignored."""
        for name in request_ids:
            self._told_s.pop(name, None)
            if self._streams.pop(name, None):
                self._commands.put(partial(self._engine.cancel, name))
        self._note_idle()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all requests are finished, or for `timeout_s`; returns whether they are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._streams

    async def close(self) -> None:
        """Cancel the requests that are not finished, and end the thread."""
        self._closed = True
        open_streams = dict(self._streams)
        self.cancel(*open_streams)
        for stream in open_streams.values():
            stream.fail(self._stopped())
        self._commands.put(None)
        await asyncio.wait({self._thread})
        self._pool.shutdown()

    def _work(self) -> None:
        """On the thread: run commands, step, send tokens and completions to the loop."""
        tokens = list[NewToken]()
        self._engine.on_token = tokens.append
        while self._run_commands():
            completions = self._engine.step()
            items: tuple[NewToken | Completion, ...] = (*tokens, *completions)
            tokens.clear()
            if items:
                self._tell(items)

    def _add(self, request: Request) -> None:
        """On the thread: queue a request. It was checked; what fails even so is its own error."""
        try:
            self._engine.add(request)
        except Exception as error:  # the thread goes on for the others
            self._tell((failed(request, describe(error)),))

    def _tell(self, items: tuple[NewToken | Completion, ...]) -> None:
        """On the thread: hand a step to the loop, which is woken once for all that gather."""
        is_wanted = any(map(self._is_wanted, items))
        with self._lock:
            self._steps.append((items, time.perf_counter()))
            wakes = is_wanted and not self._is_woken
            self._is_woken |= wakes
        if wakes:
            self._loop.call_soon_threadsafe(self._deliver)

    def _is_wanted(self, item: NewToken | Completion) -> bool:
        """On the thread: whether somebody waits for it; a token of a whole answer can wait."""
        stream = self._streams.get(item.request_id)
        return stream is not None and (isinstance(item, Completion) or stream.wants_parts)

    def _run_commands(self) -> bool:
        """Run the commands that came since the last step; blocks while there is nothing to step.

        Returns:
            False once the engine is closed.
        """
        while True:
            try:
                command = self._commands.get(block=self._engine.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _deliver(self) -> None:
        """On the loop: put each item into its stream; a cancelled request has none any more."""
        with self._lock:
            steps, self._steps = self._steps, []
            self._is_woken = False
        completions: list[Completion] = []
        told: dict[Stream, None] = {}
        for items, now_s in steps:
            self._note_gaps(items, now_s)
            for item in items:
                stream = self._streams.get(item.request_id)
                if stream:
                    stream.put(item)
                    told[stream] = None
                    if isinstance(item, Completion):
                        del self._streams[item.request_id]
                        completions.append(item)
        for stream in told:
            stream.tell()
        self._note_idle()
        if self.on_completion:  # last, so that an error in it holds up no answer
            for completion in completions:
                self.on_completion(completion)

    def _note_gaps(self, items: tuple[NewToken | Completion, ...], now_s: float) -> None:
        """Tell the time that each request of a step waited for its tokens."""
        if self.on_gap is None:
            return
        ended = {item.request_id for item in items if isinstance(item, Completion)}
        for name, number in Counter(item.request_id for item in items).items():
            if name not in self._streams:
                continue
            before_s = self._told_s.pop(name, None)
            if before_s is not None:
                self.on_gap((now_s - before_s) / number, number)
            if name not in ended:
                self._told_s[name] = now_s

    def _note_idle(self) -> None:
        if not self._streams:
            self._idle.set()

    def _end(self, thread: asyncio.Future[None]) -> None:
        """On the loop, once the thread has ended: end all streams, so that nobody waits for it."""
        self.error = thread.exception()
        for stream in self._streams.values():
            stream.fail(self._stopped())
        self._streams.clear()
        self._idle.set()

    def _stopped(self) -> EngineStopped:
        if self.error is None:
            return EngineStopped("the engine was closed", "start it again")
        text = repr(self.error)
        if isinstance(self.error, TokenspeedError):
            text = self.error.message
        return EngineStopped(f"the engine has failed: {text}", "start it again; its log says more")
