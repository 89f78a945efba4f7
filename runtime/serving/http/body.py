"""The body of a request: it comes in time, and all that are coming have a bounded size together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, try_later

SMALL_BYTES = 64 << 10  # a body of this size always has room
_LARGE_BODIES = 8  # bodies of the largest size that have room at once


class Body:
    """One body, while it comes and until it is parsed."""

    def __init__(self, memory: BodyMemory) -> None:
        self.held_bytes = 0
        self._memory = memory

    async def read(self, request: Request) -> bytes:
        """Read it. One that says itself that it is too large is refused before it comes.

        Raises:
            ApiError: it is too large, does not come in time, or there is no room for it now.
        """
        self._memory.check_size(int(request.headers.get("content-length", 0)))
        data = bytearray()
        timeout_s = self._memory.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    data += chunk
                    self._memory.hold(self, len(data))
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {timeout_s:g} s", "request_timeout"
            ) from None
        return bytes(data)


class BodyMemory:
    """Bounds the bodies that the server holds, each and together.

    Attributes:
        timeout_s: time within which a body must come.
    """

    def __init__(self, limit_bytes: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._limit_bytes = limit_bytes
        self._free_bytes = _LARGE_BODIES * limit_bytes

    @contextmanager
    def body(self) -> Iterator[Body]:
        """A body that is held until the block ends."""
        body = Body(self)
        try:
            yield body
        finally:
            self.release(body)

    def hold(self, body: Body, size_bytes: int) -> None:
        """Let a body grow.

        Raises:
            ApiError: it is too large, or there is no room for it now.
        """
        self.check_size(size_bytes)
        num_more = max(size_bytes - SMALL_BYTES, 0) - body.held_bytes
        if num_more > self._free_bytes:
            self.release(body)  # at once, else all that come together are refused
            raise try_later(503, "too many large bodies come at once", "overloaded")
        self._free_bytes -= num_more
        body.held_bytes += num_more

    def check_size(self, size_bytes: int) -> None:
        """Refuse a body that is larger than any may be.

        Raises:
            ApiError: it is.
        """
        if size_bytes > self._limit_bytes:
            raise ApiError(
                413, f"the body is larger than {self._limit_bytes} bytes", "request_too_large"
            )

    def release(self, body: Body) -> None:
        """Give its room to others."""
        self._free_bytes += body.held_bytes
        body.held_bytes = 0
