"""Text that is read from its beginning while it grows, so that every split of it reads the same."""

from __future__ import annotations

import re

MAX_SPACE = 64  # characters between two tags
MAX_NAME = 256  # characters of a name in a tag
_SPACE = re.compile(rf"\s{{0,{MAX_SPACE}}}")
_NAME = re.compile(rf"[^<>\n]{{0,{MAX_NAME}}}")


class NeedMore(Exception):
    """What comes next decides."""


class GrowingText:
    """The part of a text that is not read yet.

    A question about it is answered only if nothing that may still come changes the answer; else it
    raises NeedMore.

    Attributes:
        text: what has come and is not dropped.
        ended: no more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def drop(self, end: int) -> str:
        """Forget the text up to a place; returns it."""
        dropped, self.text = self.text[:end], self.text[end:]
        return dropped

    def is_end(self, at: int) -> bool:
        """Whether the text ends there."""
        if at < len(self.text):
            return False
        if not self.ended:
            raise NeedMore
        return True

    def literal(self, at: int, wanted: str) -> int | None:
        """The place after a literal; None if it is not there."""
        if self.text.startswith(wanted, at):
            return at + len(wanted)
        if not self.ended and wanted.startswith(self.text[at : at + len(wanted)]):
            raise NeedMore
        return None

    def space(self, at: int) -> int:
        """The place after the space that is there."""
        return self._end_of(_SPACE, at, MAX_SPACE)

    def tag(self, at: int, begin: str) -> tuple[str, int] | None:
        """The name in a tag such as `<function=NAME>` and the place after it; None without one."""
        start = self.literal(at, begin)
        if start is None:
            return None
        end = self._end_of(_NAME, start, MAX_NAME)
        name = self.text[start:end].strip()
        if not name or not self.text.startswith(">", end):
            return None
        return name, end + 1

    def _end_of(self, pattern: re.Pattern[str], at: int, most: int) -> int:
        found = pattern.match(self.text, at)
        assert found is not None
        end = found.end()
        if end == len(self.text) and end - at < most and not self.ended:
            raise NeedMore
        return end
