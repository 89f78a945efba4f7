"""Server-sent events, and those of which all but a text is written ahead."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]
_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # made once
# They stand for what is not known while an event is written ahead.
TEXT, NUMBER = "\0", "\1"
_TEXT, _NUMBER = _ENCODE(TEXT).encode(), _ENCODE(NUMBER).encode()


def event(body: Json, name: str | None = None) -> bytes:
    """A server-sent event, with its name where it has one."""
    data = _ENCODE(body).encode()
    head = b""
    if name is not None:
        head = f"event: {name}\n".encode()
    return head + b"data: " + data + b"\n\n"


class Frame:
    """An event with a text that is left open, the last one in it, or that and a number before it.

    Args:
        body: with `TEXT` where the text goes, and `NUMBER` where the number does.
        name: of the event.
    """

    def __init__(self, body: Json, name: str | None = None) -> None:
        before, _, self._after = event(body, name).rpartition(_TEXT)
        self._before, self._middle = before, b""
        if NUMBER in body.values():
            self._before, _, self._middle = before.partition(_NUMBER)

    def written(self, text: str) -> bytes:
        """The event with its text."""
        return self._before + _ENCODE(text).encode() + self._after

    def numbered(self, number: int, text: str) -> bytes:
        """The event with its number and its text."""
        data = _ENCODE(text).encode()
        return b"%b%d%b%b%b" % (self._before, number, self._middle, data, self._after)
