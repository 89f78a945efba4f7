"""Where callers of a prefill pool are let in: each is greeted and heard on a thread of its own."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from selectors import EVENT_READ, DefaultSelector

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.runtime.pools.channel import Channel, ChannelClosed

_AGAIN_S = 0.1  # after which callers are taken again, where one could not be
_MAX_STRANGERS = 16  # callers that have not shown that they know the token
Talk = Callable[[Channel], None]


class Reception:
    """Lets callers in until it is closed; then none of its threads is left.

    Args:
        listener: where they call. It is left open, as the process that made it may hand it to
            another pool.
        greet: lets a stranger in, or raises `ChannelClosed` or `PoolError`.
        hear: what a caller says, until it has left.
    """

    def __init__(self, listener: socket.socket, greet: Talk, hear: Talk) -> None:
        self._listener = listener
        self._greet, self._hear = greet, hear
        self._strangers = threading.Semaphore(_MAX_STRANGERS)
        self._lock = threading.Lock()  # of what follows
        self._channels: dict[threading.Thread, Channel] = {}
        self._is_closed = False
        self._waker, self._awoken = socket.socketpair()  # closing a listener wakes nobody
        self._thread = threading.Thread(target=self._accept, name="reception", daemon=True)

    def begin(self) -> None:
        """Begin to listen."""
        self._listener.listen()
        self._listener.setblocking(False)
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody, and wait until all threads have ended."""
        with self._lock:
            self._is_closed = True
            channels = dict(self._channels)
        self._waker.close()
        for channel in channels.values():
            channel.close()
        for thread in (self._thread, *channels):
            thread.join()
        self._awoken.close()

    def _accept(self) -> None:
        """On a thread: take who calls, while there are few strangers."""
        with DefaultSelector() as waiting:
            for place in (self._listener, self._awoken):
                waiting.register(place, EVENT_READ)
            while not self._is_closed:
                self._strangers.acquire()
                waiting.select()
                if self._is_closed or not self._take():
                    self._strangers.release()

    def _take(self) -> bool:
        """Take a caller; returns whether there was one."""
        try:
            connection, _ = self._listener.accept()
            self._talk_to(Channel(connection))
        except BlockingIOError:
            return False  # it has gone
        except OSError:
            time.sleep(_AGAIN_S)  # it has gone, or there are too many files
            return False
        return True

    def _talk_to(self, channel: Channel) -> None:
        """Talk to a caller, unless everybody is leaving."""
        thread = threading.Thread(target=self._talk, args=(channel,), daemon=True)
        with self._lock:
            self._channels[thread] = channel
            if self._is_closed:
                channel.close()
            thread.start()

    def _talk(self, channel: Channel) -> None:
        """On a thread of its own."""
        try:
            if self._is_let_in(channel):
                self._hear(channel)
        finally:
            with self._lock:
                del self._channels[threading.current_thread()]

    def _is_let_in(self, channel: Channel) -> bool:
        try:
            self._greet(channel)
        except (ChannelClosed, PoolError) as error:
            print(f"a caller was refused: {getattr(error, 'message', error)}", file=sys.stderr)
            channel.close()
            return False
        finally:
            self._strangers.release()
        return True
