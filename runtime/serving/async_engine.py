"""An engine for many callers on an asyncio loop: one thread steps it, tokens come back to whoever asked for them."""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from tokenspeed_plan.plans.errors import EngineStopped, RequestError, TokenspeedError
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, NewToken, Request, SamplingParams
from tokenspeed_plan.runtime.serving.streaming import AnswerText, Delta

Order = Callable[[], object]


class Stream:
    """The answers to some requests as they grow, for one reader on the loop.

    What the engine says waits here as bare tokens until it is read, and all that has gathered is
    read as one delta. So a slow reader holds up nobody, and what waits for it is never more than
    its own answers.
    """

    def __init__(self, engine: AsyncEngine, requests: Seq[Request]) -> None:
        self._engine = engine
        self._texts = {
            request.request_id: AnswerText(request, engine.tokenizer) for request in requests
        }
        self._tokens: dict[str, list[NewToken]] = {}
        self._completions: dict[str, Completion] = {}
        self._news = asyncio.Event()
        self.error: EngineStopped | None = None

    @property
    def num_open(self) -> int:
        """Requests whose answers are not read to their end."""
        return len(self._texts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """What one of the requests has gained.

        Raises:
            EngineStopped: the engine has failed, or was closed.
        """
        while self._texts:
            delta = self._read()
            if delta:
                return delta
            if self.error:
                raise self.error
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    async def completions(self) -> list[Completion]:
        """Read to the end: the answers, in the order of the requests."""
        names = list(self._texts)
        done = {delta.request_id: delta.completion async for delta in self if delta.completion}
        return [done[name] for name in names]

    def cancel(self) -> None:
        """Drop what is not answered yet; nothing more comes."""
        self._engine.cancel(*self._texts)
        self._texts.clear()
        self._news.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def put(self, news: NewToken | Completion) -> None:
        """Take over what the engine said; on the loop."""
        if isinstance(news, Completion):
            self._completions[news.request_id] = news
        else:
            self._tokens.setdefault(news.request_id, []).append(news)
        self._news.set()

    def fail(self, error: EngineStopped) -> None:
        """There will be no more; on the loop."""
        self.error = error
        self._news.set()

    def _read(self) -> Delta | None:
        """The gathered news of one request, if they make up any text."""
        while self._completions:
            name, completion = self._completions.popitem()
            self._tokens.pop(name, None)
            return self._texts.pop(name).finish(completion)
        while self._tokens:
            name = next(iter(self._tokens))
            delta = self._texts[name].push(self._tokens.pop(name))
            if delta.token_ids:
                return delta
        return None


class AsyncEngine:
    """One engine, its thread, and the streams of its requests.

    Attributes:
        on_completion: is told, on the loop, each answer that somebody still wanted.
        error: what ended the thread before its time.

    Example:
        async with AsyncEngine(Engine.load(bundle)) as engine:
            async with engine.stream(ids, SamplingParams(max_tokens=64)) as answer:
                async for delta in answer:
                    print(delta.text, end="", flush=True)
    """

    def __init__(self, engine: Engine) -> None:
        self.tokenizer = engine.tokenizer
        self.on_completion: Callable[[Completion], object] | None = None
        self.error: BaseException | None = None
        self._engine = engine
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._news: list[NewToken] = []
        self._streams: dict[str, Stream] = {}
        self._names = itertools.count()
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
        """Requests that are not finished."""
        return len(self._streams)

    def stream(self, prompt_ids: Seq[int], params: SamplingParams = SamplingParams()) -> Stream:  # noqa: B008
        """Continue one prompt (token ids). Leave the stream's `async with` to cancel.

        Raises:
            RequestError: see `Engine.check`.
            EngineStopped: the engine has failed, or was closed.
        """
        return self.submit([Request(f"stream-{next(self._names)}", tuple(prompt_ids), params)])

    async def generate(
        self, prompt_ids: Seq[int], params: SamplingParams = SamplingParams()
    ) -> Completion:
        """Continue one prompt to its end; raises as `stream` does. A caller that is cancelled cancels the request."""
        async with self.stream(prompt_ids, params) as answer:
            (completion,) = await answer.completions()
            return completion

    def submit(self, requests: Seq[Request]) -> Stream:
        """Start some requests, all or none; one stream tells of all. Raises as `stream` does."""
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
            self._orders.put(partial(self._engine.add, request))
        self._idle.clear()
        return stream

    def cancel(self, *request_ids: str) -> None:
        """Drop requests; those that are finished or unknown are left alone."""
        for name in request_ids:
            if self._streams.pop(name, None):
                self._orders.put(partial(self._engine.cancel, name))
        self._note_idle()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all requests are finished, at most so long; whether they are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._streams

    async def close(self) -> None:
        """Cancel what is not finished, and end the thread."""
        self._closed = True
        open_streams = dict(self._streams)
        self.cancel(*open_streams)
        for stream in open_streams.values():
            stream.fail(self._stopped())
        self._orders.put(None)
        await asyncio.wait({self._thread})
        self._pool.shutdown()

    def _work(self) -> None:
        """On the thread: carry out orders, step, send the news to the loop."""
        self._engine.on_token = self._news.append
        while self._take_orders():
            finished = self._engine.step()
            news: tuple[NewToken | Completion, ...] = (*self._news, *finished)
            self._news.clear()
            if news:
                self._loop.call_soon_threadsafe(self._deliver, news)

    def _take_orders(self) -> bool:
        """Carry out what was asked for since the last step; waits while there is nothing to step. False: it is over."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.num_unfinished)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _deliver(self, news: tuple[NewToken | Completion, ...]) -> None:
        """On the loop. What was cancelled meanwhile has no stream any more."""
        for item in news:
            stream = self._streams.get(item.request_id)
            if stream:
                stream.put(item)
                if isinstance(item, Completion):
                    del self._streams[item.request_id]
                    if self.on_completion:
                        self.on_completion(item)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams:
            self._idle.set()

    def _end(self, thread: asyncio.Future[None]) -> None:
        """On the loop, once the thread is over: if by an error, nobody may wait for it any longer."""
        self.error = thread.exception()
        for stream in self._streams.values():
            stream.fail(self._stopped())
        self._streams.clear()
        self._idle.set()

    def _stopped(self) -> EngineStopped:
        if self.error is None:
            return EngineStopped("the engine was closed", "start it again")
        text = self.error.message if isinstance(self.error, TokenspeedError) else repr(self.error)
        return EngineStopped(f"the engine has failed: {text}", "start it again; its log says more")
