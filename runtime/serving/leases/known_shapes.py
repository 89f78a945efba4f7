"""Rows that are alike but for ids, prompt and seed: of these only the first is checked in full.

Rows of a batch come from one program, so most lines are the same bytes around other texts. What is
left of a line without these texts is its shape. A line of a known shape is JSON of the same fields:
no check looks into its texts, but for their lengths, as long as they are plain ASCII.
"""

from __future__ import annotations

import json
import re
from array import array

import numpy as np

from tokenspeed_plan.runtime.serving.batch.files import InputLine
from tokenspeed_plan.runtime.serving.batch.lines import MAX_NAME_CHARS, Row
from tokenspeed_plan.runtime.serving.openai.bodies import MAX_JSON_BYTES, CompletionBody

MAX_SHAPES = 4096
# A text without escapes of code points: half of a pair is the one thing that may be wrong with it.
_PLAIN = rb'[^"\\\x00-\x1f\x7f-\xff]*'
_TEXT = rb"%b(?:\\[\"\\/bfnrt]%b)*" % (_PLAIN, _PLAIN)
_FIELD = re.compile(
    rb'"(custom_id|prompt|user|safety_identifier|prompt_cache_key)"[ \t]*:[ \t]*"(%b)"'
    rb'|"seed"[ \t]*:[ \t]*(0|[1-9]\d{0,17})(?![\d.eE])' % _TEXT
)
Shape = tuple[bytes | None, ...]


class KnownShapes:
    """The shapes of completions that have passed all checks.

    Args:
        max_seq_len: of the plan, in tokens. ASCII text has at most one for each character.
    """

    def __init__(self, max_seq_len: int) -> None:
        self._max_seq_len = max_seq_len
        self._rooms: dict[Shape, int] = {}  # the most characters of a prompt

    def id_of(self, line: InputLine) -> bytes | None:
        """The `custom_id` of a line that passes all checks of a single line; None: not known."""
        found = _taken_apart(line)
        if found is None:
            return None
        shape, custom_id, prompt = found
        if 0 < len(prompt) <= self._rooms.get(shape, 0):
            return custom_id
        return None

    def learn(self, line: InputLine, row: Row) -> None:
        """Note the shape of a line that has passed."""
        body, found = row.body, _taken_apart(line)
        if found is None or len(self._rooms) == MAX_SHAPES:
            return
        shape, custom_id, prompt = found
        is_plain = isinstance(body, CompletionBody) and body.response_format is None
        texts = json.loads(b'["%b", "%b"]' % (custom_id, prompt))
        # Else the texts are others of the same name, inside of another field.
        if is_plain and texts == [row.custom_id, getattr(body, "prompt", None)]:
            self._rooms[shape] = self._max_seq_len - (body.max_tokens or 1)


def _taken_apart(line: InputLine) -> tuple[Shape, bytes, bytes] | None:
    """The shape, the `custom_id` and the prompt of a line that has each of them once."""
    if line.fault is not None or len(line.raw) > MAX_JSON_BYTES or b'"prompt"' not in line.raw:
        return None
    parts = _FIELD.split(line.raw)
    names, texts = parts[1::4], parts[2::4]  # None, None is a seed
    if names.count(b"custom_id") != 1 or names.count(b"prompt") != 1:
        return None
    custom_id = texts[names.index(b"custom_id")]
    if not custom_id or len(custom_id) > MAX_NAME_CHARS or b"\\" in custom_id:
        return None
    return (*parts[::4], *names), custom_id, texts[names.index(b"prompt")]


class SeenIds:
    """The ids of many rows, as eight bytes each."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, custom_id: bytes) -> None:
        """Note the id of a row."""
        self._hashes.append(hash(custom_id))

    def first_line_of(self, custom_id: str, line: int) -> int:
        """Note the id of a row; here each counts as new."""
        self.add(custom_id.encode())
        return line

    def may_repeat(self) -> bool:
        """Whether two rows seem to have one id."""
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.int64))
        return bool((hashes[1:] == hashes[:-1]).any())
