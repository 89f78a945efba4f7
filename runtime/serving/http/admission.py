"""How much is in flight: who comes in, and that everything is given back however a request ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenspeed_plan.plans.errors import EngineStopped, RequestError
from tokenspeed_plan.runtime.request import Request
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine, Stream
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, try_later


class Lease:
    """One HTTP request's place; it counts as many as it has choices."""

    def __init__(self, gate: AdmissionLimiter) -> None:
        self._gate = gate
        self._stream: Stream | None = None
        self.size = 1

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Start its requests on the engine.

        Raises:
            ApiError: they are more than there is room for.
        """
        self._gate.widen(self, len(requests))
        try:
            self._stream = self._gate.engine.submit(requests)
        except RequestError as error:
            raise ApiError(400, error.message) from None
        except EngineStopped as error:
            raise try_later(503, error.message, "engine_stopped") from None
        return self._stream

    @property
    def num_unread(self) -> int:
        """Choices whose answer has not been read to its end."""
        return self._stream.num_open if self._stream else 0

    def leave(self) -> None:
        """Cancel what is not answered."""
        if self._stream:
            self._stream.cancel()


class AdmissionLimiter:
    """Lets in up to `limit` choices at once, and none while the server drains."""

    def __init__(self, engine: AsyncEngine, limit: int) -> None:
        self.engine = engine
        self.draining = False
        self.num_held = 0
        self._limit = limit

    @contextmanager
    def ticket(self) -> Iterator[Lease]:
        """A place, until the response is sent or its client is gone.

        Raises:
            ApiError: there is none.
        """
        if self.draining:
            raise try_later(503, "the server is shutting down", "shutting_down")
        self._make_room(1)
        ticket = Lease(self)
        self.num_held += 1
        try:
            yield ticket
        finally:
            self.num_held -= ticket.size
            ticket.leave()

    def widen(self, ticket: Lease, size: int) -> None:
        """A place for each choice instead of one."""
        if size > self._limit:
            raise ApiError(
                400,
                f"{size} choices are asked for, at most {self._limit} may be in flight",
                param="n",
            )
        self._make_room(size - ticket.size)
        self.num_held += size - ticket.size
        ticket.size = size

    def _make_room(self, more: int) -> None:
        if self.num_held + more > self._limit:
            raise try_later(
                429,
                f"{self.num_held} of {self._limit} requests are in flight",
                "rate_limit_exceeded",
            )
