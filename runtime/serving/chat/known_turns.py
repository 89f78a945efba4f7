"""The tokens of earlier turns, so that a conversation that comes back is found in the prefix cache.

A client sends an answer back as text, and its tokens need not be those that the model chose: a text
can be cut in many ways. Where a prompt begins with the very text of a prompt and its answer, their
own tokens are taken, and only what follows is cut anew.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from tokenspeed_plan.runtime.request import Completion

Key = TypeVar("Key")
Value = TypeVar("Value")

MAX_CHARS = 1 << 25  # of conversations that are remembered, and of prompts without an answer yet


class TurnTokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out."""


class KnownTurns:
    """Conversations of late, as texts with their tokens; any thread may ask.

    Args:
        tokenizer: of the model.
        stop_ids: tokens that end an answer; a conversation is known up to one.
    """

    def __init__(self, tokenizer: TurnTokenizer, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._lock = threading.Lock()
        # Tokens are packed: as Python's integers they would take more than the texts.
        self._prompts = _Latest[bytes, str](MAX_CHARS)
        self._known = _Latest[str, bytes](MAX_CHARS)

    def encode(self, text: str) -> list[int]:
        """The tokens of the text of a chat, which its template has written with all tokens."""
        begin, ids = self._longest(text)
        rest = self._tokenizer.encode(text[len(begin) :], add_special_tokens=False)
        found = [*array("i", ids), *rest]
        with self._lock:
            self._prompts.put(_packed(found), text, len(text))
        return found

    def _longest(self, text: str) -> tuple[str, bytes]:
        """The longest known conversation that a text begins with."""
        with self._lock:
            begins = [known for known in self._known.entries if text.startswith(known)]
            if not begins:
                return "", b""
            longest = max(begins, key=len)
            return longest, self._known.get(longest) or b""

    def note(self, completion: Completion) -> None:
        """Remember a chat whose answer has ended by itself."""
        ids = completion.token_ids
        if not ids or ids[-1] not in self._stop_ids:
            return
        with self._lock:
            prompt = self._prompts.get(_packed(completion.prompt_ids))
        if prompt is None:
            return
        text = prompt + self._tokenizer.spell(ids)
        with self._lock:
            self._known.put(text, _packed((*completion.prompt_ids, *ids)), len(text))


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


class _Latest(Generic[Key, Value]):
    """Entries of bounded size in all; those that were not asked for longest are dropped."""

    def __init__(self, max_size: int) -> None:
        self.entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._max_size = max_size
        self._size = 0

    def put(self, key: Key, value: Value, size: int) -> None:
        """Add or replace an entry."""
        _, before = self.entries.pop(key, (None, 0))
        self.entries[key] = value, size
        self._size += size - before
        while self._size > self._max_size and len(self.entries) > 1:
            _, (_, freed) = self.entries.popitem(last=False)
            self._size -= freed

    def get(self, key: Key) -> Value | None:
        """The value of a key."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]
