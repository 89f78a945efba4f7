"""The first pass: every line is looked at before a weight is read. What it finds goes to a file, not to memory."""

from __future__ import annotations

import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import read_lines
from tokenspeed_plan.runtime.serving.openai.requests import (
    Row,
    RowError,
    RowLimits,
    Tokenizer,
    check_row,
    parse_row,
)

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of the file are asked for: shard `index` of `count` (from 1), of the first `limit`."""

    limit: int | None = None
    index: int = 1
    count: int = 1

    def holds(self, number: int) -> bool:
        """Whether row `number` (from 0, blank lines not counted) is asked for."""
        return (self.limit is None or number < self.limit) and number % self.count == self.index - 1


@dataclass
class Checked:
    """What the first pass found."""

    num_rows: int = 0
    num_selected: int = 0
    num_bad: int = 0
    shown: list[str] = field(default_factory=list)


class Notebook:
    """A scratch database: ids seen, bad lines, and lines saved by an earlier run. It is deleted with the object."""

    def __init__(self) -> None:
        file = tempfile.NamedTemporaryFile(prefix="tokenspeed-", suffix=".sqlite")  # noqa: SIM115
        self._db = sqlite3.connect(file.name, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA cache_size = -32000",
            "CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID",
            "CREATE TABLE bad (line INTEGER PRIMARY KEY, id TEXT, message TEXT)",
            "CREATE TABLE saved (key TEXT PRIMARY KEY, start INTEGER, size INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._db.execute(statement)
        # deletes the name: the database is ours alone, and a kill leaves nothing behind
        file.close()

    def first_line_of(self, custom_id: str, line: int) -> int:
        """Remember an id; the line that had it first."""
        self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (custom_id, line))
        return int(
            self._db.execute("SELECT line FROM ids WHERE id = ?", (custom_id,)).fetchone()[0]
        )

    def knows(self, custom_id: str) -> bool:
        """Whether a row has this id."""
        return (
            self._db.execute("SELECT 1 FROM ids WHERE id = ?", (custom_id,)).fetchone() is not None
        )

    def add_bad(self, line: int, custom_id: str | None, message: str) -> None:
        """Remember a bad line."""
        self._db.execute("INSERT OR REPLACE INTO bad VALUES (?, ?, ?)", (line, custom_id, message))

    def bad(self, line: int) -> tuple[str | None, str] | None:
        """(custom_id, message) of a bad line."""
        row = self._db.execute("SELECT id, message FROM bad WHERE line = ?", (line,)).fetchone()
        return (row[0], row[1]) if row else None

    def add_saved(self, key: str, start: int, size: int) -> bool:
        """Remember where a finished line lies; False when it was known."""
        return (
            self._db.execute(
                "INSERT OR IGNORE INTO saved VALUES (?, ?, ?)", (key, start, size)
            ).rowcount
            == 1
        )

    def saved(self, key: str) -> tuple[int, int] | None:
        """(start, size) of a finished line."""
        row = self._db.execute("SELECT start, size FROM saved WHERE key = ?", (key,)).fetchone()
        return (row[0], row[1]) if row else None

    def close(self) -> None:
        """Delete the database."""
        self._db.close()


def src_state_slots(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(row number from 0, line number from 1, bytes) of every line that is not blank.

    Raises:
        RequestError: the file cannot be read.
    """
    number = 0
    try:
        for line, raw in enumerate(read_lines(path), 1):
            if raw.strip():
                yield number, line, raw
                number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(
            f"cannot read `{path}`: {error}", "name a JSONL file, or `-` for standard input"
        ) from error


def check_file(
    path: Path,
    selection: Selection,
    digest: str,
    tokenizer: Tokenizer,
    limits: RowLimits,
    notebook: Notebook,
) -> Checked:
    """Look at every line of the file; bad ones go to the notebook."""
    found = Checked()
    for number, line, raw in src_state_slots(path):
        found.num_rows += 1
        found.num_selected += selection.holds(number)
        try:
            row = parse_row(raw, line, digest)
            _check_unique(row, notebook)
            check_row(row, tokenizer, limits)
        except RowError as error:
            found.num_bad += 1
            notebook.add_bad(line, None, str(error))
            if len(found.shown) < MAX_SHOWN:
                found.shown.append(f"line {line}: {error}")
    return found


def _check_unique(row: Row, notebook: Notebook) -> None:
    first = notebook.first_line_of(row.custom_id, row.line)
    if first != row.line:
        raise RowError(f"custom_id {row.custom_id!a:.80} was used on line {first}")


def refuse_bad(found: Checked, max_errors: int) -> None:
    """Stop before anything runs when more lines are bad than allowed.

    Raises:
        RequestError: with the first lines and what is wrong with them.
    """
    if found.num_bad <= max_errors:
        return
    rest = found.num_bad - len(found.shown)
    lines = "".join(f"\n  {text}" for text in found.shown) + (
        f"\n  and {rest} more" if rest else ""
    )
    raise RequestError(
        f"{found.num_bad} of {found.num_rows} lines cannot be run{lines}",
        f"mend them, or run the others with `--max-errors {found.num_bad}`",
    )
