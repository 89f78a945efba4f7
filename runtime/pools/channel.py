"""Messages between the pools of a plan: JSON, each after its length, over one TCP connection.

Both sides prove that they know the token without saying it, and tell the plan and the version that
they run: others are refused before anything else is said.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
import socket
import struct
import threading
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan

Message = dict[str, Any]
MAX_BYTES = 1 << 26  # of a message: a prompt and its pages
_GREETING_BYTES = 1 << 14  # before the other side is known
GREETING_S = 5.0
_SEND_S = 10.0  # a peer that reads nothing for so long is lost
# A connection that is cut is noticed on both sides within 20 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
CUT_S = 60.0  # then neither side goes on with it
_LENGTH = struct.Struct("!I")


class ChannelClosed(Exception):
    """The other side has closed the connection, or cannot be reached.

    Attributes:
        ended: whether it has closed it itself, or its process is gone: it writes no more here.
    """

    def __init__(self, reason: str, ended: bool) -> None:
        super().__init__(reason)
        self.ended = ended


@dataclass(frozen=True, slots=True)
class Facts:
    """What two pools must have in common."""

    digest: str
    version: str
    transport: str

    @classmethod
    def of(cls, plan: Plan, transport: str) -> Facts:
        """Those of this process."""
        return cls(plan.digest, version("tokenspeed-plan"), transport)


class Channel:
    """One connection; any thread may send, one receives.

    Args:
        connection: a socket that is connected.
        timeout_s: for each message, until `open_up`.
    """

    def __init__(self, connection: socket.socket, timeout_s: float = GREETING_S) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout_s)
        self._connection = connection
        self._sending = threading.Lock()
        self._max_bytes = _GREETING_BYTES

    def open_up(self) -> None:
        """The other side is known: it may be silent, and send large messages."""
        self._max_bytes = MAX_BYTES
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        timeout = struct.pack("ll", int(_SEND_S), 0)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            ChannelClosed: the other side does not take it.
        """
        text = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(text)) + text)
        except OSError as error:
            raise ChannelClosed(error.strerror or str(error), ended=False) from error

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            ChannelClosed: there is none.
        """
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if size > self._max_bytes:
            raise ChannelClosed(f"a message of {size} bytes", ended=False)
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError) as error:
            raise ChannelClosed(f"a message that is no JSON: {error}", ended=False) from error
        if not isinstance(message, dict):
            raise ChannelClosed("a message that is no object", ended=False)
        return message

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._connection.recv(min(size - len(parts), 1 << 20))
            except OSError as error:
                ended = isinstance(error, ConnectionResetError)
                raise ChannelClosed(error.strerror or str(error), ended) from error
            if not part:
                raise ChannelClosed("it has ended", ended=True)
            parts += part
        return bytes(parts)

    def hang_up(self) -> None:
        """Say that nothing more comes; what the other side says can still be read."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the connection; who receives is told so."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def packed(token_ids: Sequence[int]) -> str:
    """Token ids as a message has them: JSON of so many numbers would stop all threads for ms."""
    return base64.b64encode(array("i", token_ids).tobytes()).decode()


def unpacked(text: str) -> tuple[int, ...]:
    """The token ids of a message.

    Raises:
        TypeError, ValueError: it has none.
    """
    ids = array("i")
    ids.frombytes(base64.b64decode(text, validate=True))
    return tuple(ids)


def greet_caller(channel: Channel, token: str, own: Facts) -> None:
    """As the side that listens: let in only who knows the token and runs the same plan.

    Raises:
        ChannelClosed, PoolError: it is somebody else.
    """
    nonce = secrets.token_hex(16)
    channel.send({"nonce": nonce})
    answer = channel.receive()
    theirs = str(answer.get("nonce"))
    if not _is_proof(answer, _proof(token, "caller", nonce, theirs)):
        channel.send({"error": "the token of this pool is another one"})
        raise PoolError("a caller has another token", "give both pools the same `--peer-token`")
    channel.send({"proof": _proof(token, "listener", nonce, theirs), "facts": asdict(own)})
    _compare(own, answer.get("facts"))
    channel.open_up()


def greet_listener(channel: Channel, token: str, own: Facts) -> None:
    """As the side that calls.

    Raises:
        ChannelClosed, PoolError: the listener does not know the token, or runs another plan.
    """
    nonce, theirs = secrets.token_hex(16), str(channel.receive().get("nonce"))
    proof = _proof(token, "caller", theirs, nonce)
    channel.send({"nonce": nonce, "proof": proof, "facts": asdict(own)})
    answer = channel.receive()
    if "error" in answer:
        raise PoolError(str(answer["error"]), "give both pools the same `--peer-token`")
    expected = _proof(token, "listener", theirs, nonce)
    if not _is_proof(answer, expected):
        raise PoolError("a listener has another token", "give both pools the same `--peer-token`")
    _compare(own, answer.get("facts"))
    channel.open_up()


def _proof(token: str, side: str, *nonces: str) -> str:
    return hmac.new(token.encode(), _bytes("/".join([side, *nonces])), sha256).hexdigest()


def _is_proof(answer: Message, expected: str) -> bool:
    return hmac.compare_digest(_bytes(str(answer.get("proof"))), expected.encode())


def _bytes(text: str) -> bytes:
    """Of whatever a stranger may send, half a character included."""
    return text.encode(errors="backslashreplace")


def _compare(own: Facts, other: object) -> None:
    """Refuse a peer that is not alike.

    Raises:
        PoolError: naming the first difference.
    """
    theirs = other if isinstance(other, dict) else {}
    for name, value in asdict(own).items():
        if theirs.get(name) != value:
            raise PoolError(
                f"a peer has the {name} {theirs.get(name)!s:.80}, this pool has {value:.80}",
                "start both pools with one version, one bundle and one `--transport`",
            )
