"""The scan of a batch file: every line is checked and noted before a weight is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

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
                row = self.check(line)
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

    def check(self, line: InputLine) -> Row:
        """Check one line.

        Raises:
            InvalidRequestError: what is wrong with it.
        """
        if line.fault is not None:
            raise InvalidRequestError(line.fault)
        row = parse_row(line.raw, line.number, self._digest)
        first = self._notebook.first_line_of(row.custom_id, row.line)
        if first != row.line:
            raise InvalidRequestError(f"custom_id {row.custom_id!a:.80} was used on line {first}")
        check_body(row.body, self._tokenizer, self._limits)
        return row

    def refuse_duplicate(self, line: InputLine, first_line: int) -> None:
        """Refuse a checked row whose `custom_id` was used before a line.

        Who runs the rows from there on alone could not see that it was.

        Raises:
            RequestError: with both lines.
        """
        with suppress(InvalidRequestError):
            row = parse_row(line.raw, line.number, self._digest)
            first = self._notebook.first_line_of(row.custom_id, row.line)
            if first < first_line:
                raise RequestError(
                    f"line {row.line}: custom_id {row.custom_id!a:.80} was used on line {first}, "
                    "in another shard",
                    "give each row an id of its own",
                )


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
