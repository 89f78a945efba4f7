"""What the prefix cache holds, told as vLLM tells it, so that routers that know vLLM can follow.

A message of ZeroMQ has three frames: a topic, a number that grows by one (8 bytes, big-endian), and
a batch in MessagePack, `[time, events, rank]`. An event is a map with its `type`: BlockStored with
the tokens of some pages that follow each other, BlockRemoved, and AllBlocksCleared, which comes
first. (vLLM's distributed/kv_events.py; since its #42892 events are maps.) A page's hash is the end
of its digest in the prefix cache.
"""

# The packages are of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.runtime.cache.prefix_tree import Node
from tokenspeed_plan.runtime.engine import Engine

Event = dict[str, Any]
Send = Callable[[int, list[Event]], None]  # a message's number and its events
HASH_BYTES = 8  # of a digest: routers take hashes of 64 bits
MAX_CHANGES = 4096  # of the cache, in one message
MAX_WAITING = 100_000  # messages that a slow subscriber may be behind; vLLM's
CLEARED: Event = {"type": "AllBlocksCleared"}
_CONNECT = ">"  # before an endpoint that is another's, as in CZMQ


class Change(NamedTuple):
    """A page that was stored, or removed (without tokens)."""

    block: int
    parent: int | None = None
    token_ids: tuple[int, ...] = ()


def block_hash(digest: bytes) -> int:
    """The hash of a page: the last 64 bits of its digest, big-endian."""
    return int.from_bytes(digest[-HASH_BYTES:], "big")


def events_of(changes: list[Change], page_size: int, medium: str) -> list[Event]:
    """The events of some changes; pages that follow each other share one."""
    events: list[Event] = []
    for change in changes:
        last = events[-1] if events else CLEARED
        if not change.token_ids:
            if last["type"] != "BlockRemoved":
                events.append({"type": "BlockRemoved", "block_hashes": [], "medium": medium})
        elif last["type"] != "BlockStored" or last["block_hashes"][-1] != change.parent:
            events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": [],
                    "parent_block_hash": change.parent,
                    "token_ids": [],
                    "block_size": page_size,
                    "lora_id": None,
                    "medium": medium,
                    "lora_name": None,
                }
            )
        events[-1]["block_hashes"].append(change.block)
        if change.token_ids:
            events[-1]["token_ids"] += change.token_ids
    return events


class KvEvents:
    """Follows a cache; a thread of its own makes the messages.

    Args:
        page_size: of the cache, in tokens.
        medium: where its pages lie: GPU or CPU.
        send: gets each message, on that thread.
    """

    def __init__(self, page_size: int, medium: str, send: Send) -> None:
        self._page_size = page_size
        self._medium = medium
        self._send = send
        self._changes: SimpleQueue[Change | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._publish, name="kv events", daemon=True)

    def stored(self, node: Node) -> None:
        """A page was entered."""
        parent = None
        if node.parent is not None and node.parent.parent is not None:  # the root is no page
            parent = block_hash(node.parent.digest)
        self._changes.put(Change(block_hash(node.digest), parent, node.token_ids))

    def removed(self, node: Node) -> None:
        """A page was given up."""
        self._changes.put(Change(block_hash(node.digest)))

    def begin(self) -> None:
        """Send messages from now on."""
        self._thread.start()

    def end(self) -> None:
        """Send what is left, and no more."""
        self._changes.put(None)
        self._thread.join()

    def _publish(self) -> None:
        self._send(0, [CLEARED])
        number, is_open = 1, True
        while is_open:
            changes, is_open = self._next_changes()
            if changes:
                self._send(number, events_of(changes, self._page_size, self._medium))
                number += 1

    def _next_changes(self) -> tuple[list[Change], bool]:
        """Waits for a change; those that have come with it too, and whether more may come."""
        changes: list[Change] = []
        change = self._changes.get()
        while change is not None:
            changes.append(change)
            if len(changes) == MAX_CHANGES:
                return changes, True
            try:
                change = self._changes.get_nowait()
            except Empty:
                return changes, True
        return changes, False


@contextmanager
def publisher(endpoint: str | None) -> Iterator[Any]:
    """A socket that publishes, until the block ends; None without an endpoint.

    Args:
        endpoint: of ZeroMQ, to which subscribers connect; after `>`, one that this socket
            connects to, as a gateway listens there.

    Raises:
        RequestError: the packages are missing, or the endpoint cannot be opened.
    """
    if endpoint is None:
        yield None
        return
    socket = _open(endpoint)
    try:
        yield socket
    finally:
        socket.close(linger=1000)  # milliseconds


@contextmanager
def kv_events(engine: Engine, socket: Any, topic: str) -> Iterator[None]:
    """Publish what the prefix cache of an engine holds; without a socket nothing.

    Args:
        engine: whose steps have not begun.
        socket: of `publisher`.
        topic: of all messages.
    """
    if socket is None:
        yield
        return
    import msgspec

    def send(number: int, events: list[Event]) -> None:
        batch = msgspec.msgpack.encode([time.time(), events, 0])
        socket.send_multipart((os.fsencode(topic), number.to_bytes(8, "big"), batch))

    medium = "CPU"
    if engine.plan.target.device == "cuda":
        medium = "GPU"
    events = KvEvents(engine.plan.pool.limits.page_size, medium, send)
    engine.scheduler.cache.tree.follow(events)
    events.begin()
    try:
        yield
    finally:
        events.end()


def _open(endpoint: str) -> Any:
    """A socket that publishes.

    Raises:
        RequestError: a package is missing, or the endpoint cannot be opened.
    """
    missing = [name for name in ("zmq", "msgspec") if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"`--kv-events` needs {', '.join(missing)}",
            "install the extra `kv-events`: `pip install 'tokenspeed-plan[kv-events]'`",
        )
    import zmq

    socket: Any = zmq.Context.instance().socket(zmq.PUB)
    socket.set_hwm(MAX_WAITING)
    try:
        if endpoint.startswith(_CONNECT):
            socket.connect(endpoint.removeprefix(_CONNECT))
        else:
            socket.bind(endpoint)
    except (zmq.ZMQError, UnicodeError) as error:
        socket.close()
        shown = printable_line(endpoint[:80])
        raise RequestError(
            f"cannot publish at `{shown}`: {error}", "as in `tcp://127.0.0.1:5557`"
        ) from error
    return socket
