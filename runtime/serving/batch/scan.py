"""The scan of a batch file: every line is checked and noted before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.kept_rows import KeptRows
from tokenspeed_plan.runtime.serving.batch.lines import Row, parse_row
from tokenspeed_plan.runtime.serving.batch.notebook import CheckedLine, Notebook
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import Encoder, RequestLimits, check_bodies

MAX_SHOWN = 20
# Lines whose chats are rendered together.
GROUP_LINES = 64
GROUP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that are answered: of the first `limit` rows, shard `index` of `count` (from 1)."""

    limit: int | None = None
    index: int = 1
    count: int = 1

    def holds(self, number: int) -> bool:
        """Whether row `number` (from 0, blank lines not counted) is answered."""
        if self.limit is not None and number >= self.limit:
            return False
        return number % self.count == self.index - 1


class Fault(NamedTuple):
    """What is wrong with a line."""

    line: int
    reason: str


@dataclass
class ScanResult:
    """Counts of a scan, and the first faults; others have still to look into the unchecked rows."""

    num_rows: int = 0
    num_selected: int = 0
    num_bad: int = 0
    num_unchecked: int = 0
    shown: list[Fault] = field(default_factory=list)

    def add_fault(self, line: int, fault: str) -> None:
        """Count a bad line."""
        self.num_bad += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(Fault(line, fault))


class Ids(Protocol):
    """Knows the ids of earlier rows."""

    def first_line_of(self, custom_id: str, line: int) -> int:
        """Remember that a line has an id; returns the first line that had it."""


def line_groups(lines: Iterable[InputLine]) -> Iterator[list[InputLine]]:
    """Lines that follow each other, few at first, then as many as are fast to check together."""
    group: list[InputLine] = []
    most, size_bytes = 1, 0
    for line in lines:
        group.append(line)
        size_bytes += len(line.raw)
        if len(group) == most or size_bytes > GROUP_BYTES:
            yield group
            group, size_bytes, most = [], 0, min(2 * most, GROUP_LINES)
    if group:
        yield group


def check_lines(
    lines: Sequence[InputLine],
    digest: str | None,
    ids: Ids,
    tokenizer: Encoder,
    limits: RequestLimits,
) -> list[Row | InvalidRequestError]:
    """The row of each line, or what is wrong with it.

    Args:
        lines: what is checked.
        digest: of the plan; None where nobody asks for keys.
        ids: of the lines before.
        tokenizer: for the prompts.
        limits: of the plan.
    """
    found = [_parsed(line, digest, ids) for line in lines]
    rows = {number: row for number, row in enumerate(found) if isinstance(row, Row)}
    faults = check_bodies([row.body for row in rows.values()], tokenizer, limits)
    for number, fault in zip(rows, faults, strict=True):
        if fault is not None:
            found[number] = fault
    return found


def _parsed(line: InputLine, digest: str | None, ids: Ids) -> Row | InvalidRequestError:
    """A row that is none of the lines before, its body not checked yet; else what is wrong."""
    if line.fault is not None:
        return InvalidRequestError(line.fault)
    try:
        row = parse_row(line.raw, line.number, digest)
    except InvalidRequestError as error:
        return error
    first = ids.first_line_of(row.custom_id, row.line)
    if first != row.line:
        return InvalidRequestError(f"custom_id {row.custom_id!a:.80} was used on line {first}")
    return row


class Scanner:
    """Checks the lines of one file, notes them, and keeps the first rows that can be run."""

    def __init__(
        self,
        digest: str,
        tokenizer: Encoder,
        limits: RequestLimits,
        notebook: Notebook,
        kept: KeptRows,
    ) -> None:
        self._digest = digest
        self._tokenizer = tokenizer
        self._limits = limits
        self._notebook = notebook
        self._kept = kept

    def scan(self, source: InputFile, selection: Selection) -> ScanResult:
        """Check every line of the file.

        Raises:
            RequestError: the file cannot be read.
        """
        result = ScanResult()
        facts = self._digest, self._notebook, self._tokenizer, self._limits
        for lines in line_groups(source.lines()):
            for line, found in zip(lines, check_lines(lines, *facts), strict=True):
                selected = selection.holds(result.num_rows)
                result.num_rows += 1
                result.num_selected += selected
                self._note(line, found, selected, result)
        return result

    def _note(
        self, line: InputLine, found: Row | InvalidRequestError, selected: bool, result: ScanResult
    ) -> None:
        """Note a line, and keep its row."""
        size, key, fault = len(line.raw), "", None
        if isinstance(found, Row):
            key = found.key
            if selected:
                self._kept.add(found, size)
        else:
            fault = str(found)
            result.add_fault(line.number, fault)
        self._notebook.add_line(CheckedLine(line.number, selected, line.offset, size, key, fault))


def refuse_bad(result: ScanResult, max_errors: int, mend: str = "mend them") -> None:
    """Stop before anything runs when more lines are bad than allowed; `mend` says how to go on.

    Raises:
        RequestError: with the first bad lines and what is wrong with them.
    """
    if result.num_bad <= max_errors:
        return
    lines = "".join(f"\n  line {fault.line}: {fault.reason}" for fault in result.shown)
    num_hidden = result.num_bad - len(result.shown)
    if num_hidden:
        lines += f"\n  and {num_hidden} more"
    where = f"{result.num_rows} lines"
    if result.num_unchecked:
        where += f" ({result.num_unchecked} were not looked into)"
    raise RequestError(
        f"{result.num_bad} of {where} cannot be run{lines}",
        f"{mend}, or run the others with `--max-errors {result.num_bad}`",
    )
