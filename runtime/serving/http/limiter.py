"""Admission: how many choices are in flight, and that each is released however its request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenspeed_plan.plans.errors import EngineStopped, RequestError
from tokenspeed_plan.runtime.request import Request
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine, Stream
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, shutting_down, try_later


class Lease:
    """The share of the limit that one HTTP request holds.

    Nothing until its body is there, one while it is parsed, then one for each of its choices.
    """

    def __init__(self, limiter: AdmissionLimiter) -> None:
        self._limiter = limiter
        self._stream: Stream | None = None
        self.size = 0

    def take(self) -> None:
        """Take a place; the body is there.

        Raises:
            ApiError: the limit is reached, or the server drains.
        """
        self._limiter.check()
        self._limiter.grow(self, 1)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Start the requests on the engine, one for each choice.

        Raises:
            ApiError: they are over the limit, or the engine refuses them.
        """
        self._limiter.grow(self, len(requests))
        try:
            self._stream = self._limiter.engine.submit(requests)
        except RequestError as error:
            raise ApiError(400, error.message) from None
        except EngineStopped as error:
            raise try_later(503, error.message, "engine_stopped") from None
        return self._stream

    @property
    def num_unread(self) -> int:
        """Number of choices whose answer was not read to its end."""
        if self._stream is None:
            return 0
        return self._stream.num_open

    def cancel(self) -> None:
        """Cancel the choices that are not answered."""
        if self._stream:
            self._stream.cancel()


class AdmissionLimiter:
    """Admits up to `limit` choices at once, and none while the server drains.

    Attributes:
        drain: set once the server takes no more requests.
        stop: set once it also waits no longer for those that it has.
    """

    def __init__(self, engine: AsyncEngine, limit: int) -> None:
        self.engine = engine
        self.drain = asyncio.Event()
        self.stop = asyncio.Event()
        self.num_in_flight = 0
        self._limit = limit

    @property
    def draining(self) -> bool:
        """Whether the server takes no more requests."""
        return self.drain.is_set()

    def check(self) -> None:
        """Refuse a request before anything is done for it.

        Raises:
            ApiError: the limit is reached, or the server drains.
        """
        if self.draining:
            raise shutting_down()
        self._check_limit(1)

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """A lease until the response is sent or its client is gone.

        Raises:
            ApiError: see `check`.
        """
        self.check()
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.num_in_flight -= lease.size
            lease.cancel()

    def grow(self, lease: Lease, size: int) -> None:
        """Grow a lease to `size` choices.

        Raises:
            ApiError: there is no room for them.
        """
        if size > self._limit:
            raise ApiError(
                400,
                f"the request has {size} choices, at most {self._limit} may be in flight",
                param="n",
            )
        num_more = size - lease.size
        self._check_limit(num_more)
        self.num_in_flight += num_more
        lease.size = size

    def _check_limit(self, num_more: int) -> None:
        if self.num_in_flight + num_more > self._limit:
            raise try_later(
                429,
                f"{self.num_in_flight} of {self._limit} requests are in flight",
                "rate_limit_exceeded",
            )
