"""A streamed answer as bytes: what begins it, the events of each delta, and what ends it.

Deltas in the middle may be written by the engine's loop itself, without waking the response's task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.isolation import owned
from tokenspeed_plan.runtime.serving.async_engine import Gather, Stream, Write
from tokenspeed_plan.runtime.serving.http.connections import CONNECTION, Connection
from tokenspeed_plan.runtime.streaming import Delta

# Proxies must pass on each event at once.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventWriter(Protocol):
    """Writes the events of one answer, in the words of an API. It gets each delta once."""

    def begin(self) -> bytes:
        """What comes before the first delta."""

    def events_of(self, delta: Delta) -> bytes:
        """The events of a delta."""

    def end(self) -> bytes:
        """What comes after the last delta."""

    def fail(self, error: EngineStopped | RequestFailed) -> bytes:
        """What ends an answer of which there is no more."""


async def event_stream(writer: EventWriter, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
    """The events of an answer, up to its end or an error; those of a delta together."""
    try:
        begun = owned(writer.begin)
        if begun:
            yield begun
        async for delta in deltas:
            data = owned(partial(writer.events_of, delta))
            if data:
                yield data
        last = owned(writer.end)
    except (EngineStopped, RequestFailed) as error:
        last = writer.fail(error)
    yield last


def streamed(request: Request, stream: Stream, writer: EventWriter) -> StreamingResponse:
    """A response of events, which the loop writes itself where the connection lets it."""
    connection = request.scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        stream.write = _write_at_once(connection, writer)
    events = event_stream(writer, stream)
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)


def _write_at_once(connection: Connection, writer: EventWriter) -> Write:
    """What writes deltas into the response that has begun, without waking its task."""

    def write(gather: Gather) -> bool:
        return connection.write_part(lambda: b"".join(map(writer.events_of, gather())))

    return write
