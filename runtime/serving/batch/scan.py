"""The scan of a batch file: every line is checked and noted before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.kept_rows import KeptRows
from tokenspeed_plan.runtime.serving.batch.lines import Row, parse_row
from tokenspeed_plan.runtime.serving.batch.notebook import CheckedLine, Notebook
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import Encoder, RequestLimits, check_body

MAX_SHOWN = 20


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


@dataclass
class ScanResult:
    """Counts of a scan, and the first faults as text."""

    num_rows: int = 0
    num_selected: int = 0
    num_bad: int = 0
    shown: list[str] = field(default_factory=list)

    def add_fault(self, line: int, fault: str) -> None:
        """Count a bad line."""
        self.num_bad += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(f"line {line}: {fault}")


class Ids(Protocol):
    """Knows the ids of earlier rows."""

    def first_line_of(self, custom_id: str, line: int) -> int:
        """Remember that a line has an id; returns the first line that had it."""


def check_line(
    line: InputLine, digest: str, ids: Ids, tokenizer: Encoder, limits: RequestLimits
) -> Row:
    """Check one line of a file.

    Args:
        line: what is checked.
        digest: of the plan.
        ids: of the lines before.
        tokenizer: for its prompt.
        limits: of the plan.

    Raises:
        InvalidRequestError: what is wrong with it.
    """
    if line.fault is not None:
        raise InvalidRequestError(line.fault)
    row = parse_row(line.raw, line.number, digest)
    first = ids.first_line_of(row.custom_id, row.line)
    if first != row.line:
        raise InvalidRequestError(f"custom_id {row.custom_id!a:.80} was used on line {first}")
    check_body(row.body, tokenizer, limits)
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
        for line in source.lines():
            selected = selection.holds(result.num_rows)
            result.num_rows += 1
            result.num_selected += selected
            size = len(line.raw)
            key, fault = "", None
            try:
                row = check_line(line, self._digest, self._notebook, self._tokenizer, self._limits)
                key = row.key
                if selected:
                    self._kept.add(row, size)
            except InvalidRequestError as error:
                fault = str(error)
                result.add_fault(line.number, fault)
            self._notebook.add_line(
                CheckedLine(line.number, selected, line.offset, size, key, fault)
            )
        return result


def refuse_bad(result: ScanResult, max_errors: int) -> None:
    """Stop before anything runs when more lines are bad than allowed.

    Raises:
        RequestError: with the first bad lines and what is wrong with them.
    """
    if result.num_bad <= max_errors:
        return
    lines = "".join(f"\n  {text}" for text in result.shown)
    num_hidden = result.num_bad - len(result.shown)
    if num_hidden:
        lines += f"\n  and {num_hidden} more"
    raise RequestError(
        f"{result.num_bad} of {result.num_rows} lines cannot be run{lines}",
        f"mend them, or run the others with `--max-errors {result.num_bad}`",
    )
