"""Rows that the scan parsed, kept in memory until they run, so that they are parsed only once."""

from __future__ import annotations

from tokenspeed_plan.runtime.serving.batch.lines import Row

# Raw lines, in bytes. Parsed they take up to six times as much: token ids as Python integers.
MAX_KEPT_BYTES = 64 << 20
# What a parsed row takes besides its text, in bytes; counted too, as lines may be short.
ROW_BYTES = 1 << 10


class KeptRows:
    """The first rows of a file up to a budget; those after them are read and parsed again.

    Args:
        max_bytes: the budget, for raw lines and `ROW_BYTES` each; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._bytes_left = max_bytes
        self._rows: dict[int, Row] = {}

    def add(self, row: Row, size_bytes: int) -> None:
        """Keep a row whose raw line has this size; none from the first on that does not fit."""
        self._bytes_left -= size_bytes + ROW_BYTES
        if self._bytes_left >= 0:
            self._rows[row.line] = row

    def pop(self, line: int) -> Row | None:
        """Hand over the row of a line; None where it is not kept."""
        return self._rows.pop(line, None)
