"""Connections of the server: how many there are, and how long each may keep the server waiting.

uvicorn bounds neither, so that clients that say nothing would take every descriptor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.http.api_errors import try_later

_LOG = logging.getLogger("tokenspeed_plan.server")
_BACKLOG = 1024  # connections that the kernel holds until they are accepted
_ACCEPTED_PER_TURN = 8  # of the loop, so that accepted connections are counted in between
_REFUSED_AT_ONCE = 8  # connections that are being told that there is no room
_RESERVED_FILES = 32  # descriptors for those, and for what the process opens beside connections
_REFUSAL_S = 1.0  # time to read a refusal
_RETRY_S = 1.0  # pause after the system had no descriptor
_STALE_S = 1.0  # a connection that waits longer makes room for a new one
CONNECTION = "tokenspeed.connection"  # among the extensions of a request's scope
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_LEAST_BYTES = 64 << 10  # what a client must read within `write_s`


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a client may keep a connection waiting, in seconds.

    Attributes:
        header_s: for a request's header; it begins with the connection, or with the last answer.
        write_s: for reading a part of an answer.
    """

    header_s: float
    write_s: float


class Wire(h11.Connection):
    """HTTP of one connection. A part of a chunked body is written without h11's checks.

    They find the same for each part after the first, and cost more than to write it.
    """

    is_chunked = False

    def send(self, event: Any) -> Any:
        """The bytes of an event of ours."""
        if self.is_chunked and type(event) is h11.Data and event.data:
            return self.part(event.data)
        data: Any = super().send(event)
        self.is_chunked = type(event) is h11.Response and _CHUNKED in data.lower()
        return data

    @staticmethod
    def part(data: bytes | bytearray | memoryview) -> bytes:
        """A part of a chunked body; an empty one would end it."""
        return b"%x\r\n%b\r\n" % (len(data), bytes(data))


class Connection(H11Protocol):
    """A connection that knows since when its client is waited for.

    Attributes:
        waits_since_s: when it was made, or when its last answer was written.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.conn: Wire = Wire(h11.SERVER)
        self._app, self.app = self.app, self._run

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request, which may ask for its connection."""
        scope["extensions"] = {CONNECTION: self}
        await self._app(scope, receive, send)

    def write_part(self, make: Callable[[], bytes]) -> bool:
        """Write a part of the answer that has begun, without a task; returns whether it could be.

        It cannot while the client reads too slowly, nor once it has left.
        """
        cycle = self.cycle
        if self.flow.write_paused or cycle.disconnected or not self.conn.is_chunked:
            return False
        data = make()
        if data:
            self.transport.write(self.conn.part(data))
        return True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.waits_since_s = self.loop.time()
        self._stuck_since_s: float | None = None
        self._stuck_bytes = 0

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self.waits_since_s = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        self._note_stuck()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read what was written."""
        self._stuck_since_s = None
        super().resume_writing()

    @property
    def is_waiting(self) -> bool:
        """Whether the client is to send a request's header; its last request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def is_late(self, deadlines: Deadlines) -> bool:
        """Whether the client has missed a deadline. A body has its own, where it is read."""
        now = self.loop.time()
        if self._stuck_since_s is not None:
            if self.transport.get_write_buffer_size() <= self._stuck_bytes - _LEAST_BYTES:
                self._note_stuck()
            return now - self._stuck_since_s > deadlines.write_s
        if not self.is_waiting:
            return False
        limit_s = deadlines.header_s
        if self.transport.get_write_buffer_size():
            limit_s = deadlines.write_s
        return now - self.waits_since_s > limit_s

    def _note_stuck(self) -> None:
        self._stuck_since_s = self.loop.time()
        self._stuck_bytes = self.transport.get_write_buffer_size()


class Gate:
    """Accepts connections up to a limit; further ones are told to come later.

    When it is full, a connection whose client has said nothing for a second makes room.

    Attributes:
        num_refused: connections that were refused so far.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], Connection],
        connections: Set[Any],
        limit: int,
    ) -> None:
        self.num_refused = 0
        self._listener = listener
        self._make = make
        self._connections = connections
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._joining: set[asyncio.Protocol] = set()  # accepted, and not among the open ones yet
        self._refusals: set[asyncio.Protocol] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Begin to accept."""
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def end(self) -> None:
        """Accept no more."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def drop_late(self, deadlines: Deadlines) -> None:
        """Close the connections of clients that have missed a deadline."""
        for connection in tuple(self._connections):
            if connection.is_late(deadlines):
                connection.transport.abort()

    def _accept(self) -> None:
        """Accept some of the connections that wait in the kernel."""
        for _ in range(_ACCEPTED_PER_TURN):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            client.setblocking(False)
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        """Serve a connection where there is room, or refuse it."""
        if self._num_open >= self._limit and not self._make_room():
            self._refuse(client)
            return
        self._start(self._joining, client, self._make())

    @property
    def _num_open(self) -> int:
        return len(self._joining | self._connections)

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for a request; False if none is stale."""
        stale_s = self._loop.time() - _STALE_S
        stale = [
            connection
            for connection in self._connections
            if connection.is_waiting
            and connection.waits_since_s < stale_s
            and not connection.transport.is_closing()
        ]
        if not stale:
            return False
        min(stale, key=lambda connection: connection.waits_since_s).transport.abort()
        return True

    def _refuse(self, client: socket.socket) -> None:
        self.num_refused += 1
        if self.num_refused == 1:
            _LOG.warning(
                "%d connections are open, which is the limit; more get 503 (said once)", self._limit
            )
        if len(self._refusals) < _REFUSED_AT_ONCE:
            self._start(self._refusals, client, _Refusal())
        else:
            client.close()

    def _start(
        self, among: set[asyncio.Protocol], client: socket.socket, protocol: asyncio.Protocol
    ) -> None:
        """Hand a connection to its protocol, which is counted in the meantime."""
        among.add(protocol)
        task = self._loop.create_task(_join(client, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: among.discard(protocol))

    def _pause(self, error: OSError) -> None:
        """Accept again after a while, as the process or the system has no descriptor left."""
        self.num_refused += 1
        if self.num_refused == 1:
            _LOG.warning("a connection cannot be accepted: %s (said once)", error.strerror)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(_RETRY_S, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)


async def _join(client: socket.socket, protocol: asyncio.Protocol) -> None:
    """Connect a protocol, and wait for its end where that is soon."""
    await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, client)
    if isinstance(protocol, _Refusal):
        await protocol.ended.wait()


class _Refusal(asyncio.Protocol):
    """Says that there is no room, and reads what comes: else the client may not see the answer."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_refusal())
        transport.write_eof()
        asyncio.get_running_loop().call_later(_REFUSAL_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def _refusal() -> bytes:
    """The whole response to a connection that is one too many."""
    error = try_later(503, "the server has no room for another connection", "overloaded")
    body = json.dumps(error.body, allow_nan=False).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
        "\r\n",
    )
    return "\r\n".join(head).encode() + body


def connection_limit(wanted: int) -> int:
    """How many connections may be open: what is wanted, or what the limit of files leaves.

    Raises:
        RequestError: it leaves nothing.
    """
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return wanted
    room = num_files - len(os.listdir("/dev/fd")) - _RESERVED_FILES
    if room < 1:
        raise RequestError(
            f"the limit of {num_files} open files leaves none for connections",
            "raise it: `ulimit -n 1024`",
        )
    return min(wanted, room)
