"""Work for a request that somebody may stop waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

_T = TypeVar("_T")


async def unless(work: Awaitable[_T], *ends: Coroutine[Any, Any, object]) -> _T | None:
    """Result of the work; None if one of the others ends first, then the work is cancelled."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    result = asyncio.ensure_future(work)
    try:
        await asyncio.wait((result, *tasks), return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        return None
    finally:
        for task in (result, *tasks):
            task.cancel()


async def client_leaves(request: Request) -> None:
    """Wait until the client of a request has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
