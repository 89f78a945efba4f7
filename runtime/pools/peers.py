"""A prefill pool, as a decode pool sees it: its connection, its orders, and what its cache has."""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.pools.channel import (
    GREETING_S,
    Channel,
    ChannelClosed,
    Facts,
    Message,
    greet_listener,
)
from tokenspeed_plan.runtime.pools.pool_ranks import Event
from tokenspeed_plan.runtime.scheduling.reservations import Reservation
from tokenspeed_plan.runtime.scheduling.sequence import Sequence as Progress


@dataclass(slots=True, eq=False)
class Handover:
    """A sequence whose prompt is computed elsewhere.

    Attributes:
        order: its number among the orders of this pool; a request may come again.
        tried: the peers that did not compute it.
        begun_s: when it was ordered.
        num_known: tokens that this pool had already.
        message: the order, until it is posted.
        after: the steps before are over, which may still write its pages.
    """

    sequence: Progress
    order: int = -1
    tried: set[str] = field(default_factory=set)
    begun_s: float = 0.0
    num_known: int = 0
    message: Message | None = None
    after: Event | None = None

    @property
    def name(self) -> str:
        """The id of its request."""
        return self.sequence.request.request_id


@dataclass(frozen=True, slots=True)
class Events:
    """What the threads of a peer say to the engine's thread."""

    joined: Callable[[Peer, Channel], None]
    said: Callable[[Peer, Message], None]
    left: Callable[[Peer, bool], None]


class Peer:
    """One prefill pool; all but its threads belongs to the engine's thread.

    Args:
        address: host and port.
        max_known: pages that its cache may have.
        retry_s: after which it is called again where it was lost.

    Attributes:
        link: its connection; None while there is none.
        is_silent: whether nothing was heard of it for too long.
        heard_s: when it was heard last. num_heard: how often.
        route: the number by which its memory was opened; 0 where answers cannot go back to it.
        jobs: its orders by their numbers.
        abandoned: what it may still write, by the number of the order.
    """

    def __init__(self, address: tuple[str, int], max_known: int, retry_s: float) -> None:
        self.address = address
        self.link: Channel | None = None
        self.is_silent = False
        self.heard_s = 0.0
        self.num_heard = 0
        self.route = 0
        self.jobs: dict[int, Handover] = {}
        self.abandoned: dict[int, Reservation] = {}
        self._max_known = max_known
        self._retry_s = retry_s
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._channel: Channel | None = None  # of the reader, who may be ahead
        self._posts: queue.SimpleQueue[tuple[Channel, Message] | None] = queue.SimpleQueue()
        self._refusal = ""
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def name(self) -> str:
        """Its address in words."""
        return f"{self.address[0]}:{self.address[1]}"

    @property
    def is_usable(self) -> bool:
        """Whether it takes orders."""
        return self.link is not None and not self.is_silent

    @property
    def num_tokens(self) -> int:
        """Tokens of its orders that nobody has yet."""
        return sum(len(job.sequence.token_ids) - job.num_known for job in self.jobs.values())

    def num_known(self, digests: Sequence[bytes]) -> int:
        """Pages that a prompt begins with and that it has computed before."""
        count = 0
        while count < len(digests) and digests[count] in self._known:
            count += 1
        return count

    def learn(self, digests: Sequence[bytes]) -> None:
        """Note the pages that it has computed."""
        for digest in digests:
            self._known[digest] = None
            self._known.move_to_end(digest)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def connect(
        self, token: str, facts: Facts, memory: list[dict[str, Any]], timeout_s: float
    ) -> None:
        """Connect, and say where the caches are.

        Raises:
            PoolError: it runs another plan, or has another token.
            ChannelClosed: it cannot be reached.
        """
        try:
            connection = socket.create_connection(self.address, timeout=GREETING_S)
        except OSError as error:
            raise ChannelClosed(error.strerror or str(error), ended=True) from error
        channel = Channel(connection, timeout_s)
        try:
            greet_listener(channel, token, facts)
            channel.send({"type": "memory", "memory": memory})
        except (ChannelClosed, PoolError):
            channel.close()
            raise
        self._channel = channel

    def watch(self, connect: Callable[[], None], events: Events) -> None:
        """Read what it says, and connect again whenever it was lost."""
        reader = threading.Thread(target=self._read, args=(connect, events), daemon=True)
        writer = threading.Thread(target=self._write, daemon=True)
        self._threads = [reader, writer]
        for thread in self._threads:
            thread.start()

    def post(self, message: Message) -> None:
        """Send a message; a peer that takes none is noticed by the reader.

        It goes to the connection that the engine's thread knows, never to a later one: memory that
        it names may be somebody else's by then.
        """
        if self.link is not None:
            self._posts.put((self.link, message))

    def hang_up(self) -> None:
        """Leave it, as it says what cannot be: it is called again."""
        if self.link is not None:
            self.link.hang_up()

    def stop(self, timeout_s: float) -> None:
        """Hang up, and wait for it to do the same."""
        self._stopped.set()
        self._posts.put(None)
        if self._channel is not None:
            self._channel.hang_up()
        for thread in self._threads:
            thread.join(timeout_s)

    def _read(self, connect: Callable[[], None], events: Events) -> None:
        while not self._stopped.is_set():
            channel = self._channel
            if channel is not None:
                events.joined(self, channel)
                events.left(self, self._listen(channel, events))
                channel.close()
                self._channel = None
            if self._stopped.wait(self._retry_s):
                return
            try:
                connect()
            except ChannelClosed:
                continue
            except PoolError as error:
                if error.message != self._refusal:  # else it has been said
                    print(f"{self.name} is refused: {error.message}", file=sys.stderr)
                self._refusal = error.message

    def _listen(self, channel: Channel, events: Events) -> bool:
        """Pass on what it says until it is lost; whether it has ended by itself."""
        try:
            while True:
                message = channel.receive()
                self.heard_s = time.monotonic()
                self.num_heard += 1
                if message.get("type") != "beat" or self.is_silent:
                    events.said(self, message)
        except ChannelClosed as closed:
            return closed.ended

    def _write(self) -> None:
        while (post := self._posts.get()) is not None:
            channel, message = post
            try:
                channel.send(message)
            except ChannelClosed:
                channel.hang_up()


def events_into(put: Callable[[Callable[[], None]], None], to: Events) -> Events:
    """Events that are put into a queue, and handled by whoever takes them out."""
    return Events(
        joined=lambda peer, channel: put(partial(to.joined, peer, channel)),
        said=lambda peer, message: put(partial(to.said, peer, message)),
        left=lambda peer, ended: put(partial(to.left, peer, ended)),
    )


def nearest(peers: Sequence[Peer], digests: Sequence[bytes], page_size: int) -> Peer:
    """The peer that has the fewest tokens to compute until a prompt of these pages is done."""

    def num_tokens(peer: Peer) -> int:
        return peer.num_tokens - peer.num_known(digests) * page_size

    return min(peers, key=num_tokens)
