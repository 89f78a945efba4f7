"""A scratch database on disk, so that memory does not grow with the number of rows."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenspeed_plan.runtime.serving.batch.files import no_scratch

_SETUP = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA cache_size = -32000",  # KiB
    "CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID",
    "CREATE TABLE rows (line INTEGER PRIMARY KEY, selected INTEGER, start INTEGER, size INTEGER,"
    " key TEXT, fault TEXT)",
    "CREATE TABLE saved (key TEXT PRIMARY KEY, start INTEGER, size INTEGER) WITHOUT ROWID",
    "BEGIN",
)
_HAS_WORK = (
    "SELECT 1 FROM rows LEFT JOIN saved USING (key)"
    " WHERE selected AND fault IS NULL AND saved.key IS NULL LIMIT 1"
)


class CheckedLine(NamedTuple):
    """What the scan found out about a line.

    Attributes:
        line: its number, from 1.
        selected: whether its answer was asked for.
        start: its offset in the (decompressed) input, in bytes.
        size: in bytes, without the line's end.
        key: `id` of its answer; empty where `fault` says why the line cannot be run.
        fault: what is wrong with it, None where nothing is.
    """

    line: int
    selected: bool
    start: int
    size: int
    key: str
    fault: str | None = None


class Notebook:
    """Ids seen, all lines of the input as the scan found them, and where finished lines are saved.

    The database is deleted with the object.

    Raises:
        RequestError: the folder of temporary files is full; each method may raise it.
    """

    def __init__(self) -> None:
        try:
            with tempfile.NamedTemporaryFile(prefix="tokenspeed-", suffix=".sqlite") as file:
                self._db = sqlite3.connect(file.name, isolation_level=None)
                for statement in _SETUP:
                    self._run(statement)
                # The end deletes the name: no other process can open the file, and a kill leaves
                # none behind.
        except OSError as error:
            raise no_scratch(error) from error

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement.

        Raises:
            RequestError: the folder of temporary files is full.
        """
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise no_scratch(error) from error

    def first_line_of(self, custom_id: str, line: int) -> int:
        """Remember that a line has an id; returns the first line that had it."""
        insert = "INSERT OR IGNORE INTO ids VALUES (?, ?)"
        if self._run(insert, (custom_id, line)).rowcount == 1:
            return line
        found = self._run("SELECT line FROM ids WHERE id = ?", (custom_id,)).fetchone()
        return int(found[0])

    def knows(self, custom_id: str) -> bool:
        """Whether a row has this id."""
        found = self._run("SELECT 1 FROM ids WHERE id = ?", (custom_id,)).fetchone()
        return found is not None

    def add_line(self, line: CheckedLine) -> None:
        """Remember a line of the input."""
        self._run("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", line)

    def lines(self) -> Iterator[CheckedLine]:
        """All lines, in the order of the input."""
        columns = "line, selected, start, size, key, fault"
        rows = self._run(f"SELECT {columns} FROM rows ORDER BY line")
        try:
            for found in rows:
                yield CheckedLine(*found)
        except sqlite3.Error as error:
            raise no_scratch(error) from error

    def has_work(self) -> bool:
        """Whether a selected row can be run and has no finished line."""
        return self._run(_HAS_WORK).fetchone() is not None

    def add_saved(self, key: str, start: int, size: int) -> bool:
        """Remember where a finished line is in the sidecar, in bytes; False if its key is known."""
        insert = "INSERT OR IGNORE INTO saved VALUES (?, ?, ?)"
        return self._run(insert, (key, start, size)).rowcount == 1

    def saved(self, key: str) -> tuple[int, int] | None:
        """(start, size) of a finished line in the sidecar, in bytes."""
        select = "SELECT start, size FROM saved WHERE key = ?"
        found = self._run(select, (key,)).fetchone()
        if found is None:
            return None
        return found[0], found[1]

    def close(self) -> None:
        """Delete the database."""
        self._db.close()
