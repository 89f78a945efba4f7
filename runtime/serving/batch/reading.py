"""The rows of a scanned file in its order: each is answered already, or faulty, or ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.serving.batch.files import InputFile
from tokenspeed_plan.runtime.serving.batch.kept_rows import KeptRows
from tokenspeed_plan.runtime.serving.batch.lines import Row, custom_id_of, parse_row
from tokenspeed_plan.runtime.serving.batch.notebook import CheckedLine, Notebook
from tokenspeed_plan.runtime.serving.batch.resume import FinishedLines
from tokenspeed_plan.runtime.serving.openai.bodies import MAX_JSON_BYTES, InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import Encoder, RequestLimits, to_requests


@dataclass(frozen=True, slots=True)
class Answered:
    """A row that an earlier run answered; `line` is its output line."""

    line: bytes
    selected: bool


@dataclass(frozen=True, slots=True)
class Faulty:
    """A row that cannot be run."""

    line: int
    fault: str
    custom_id: str | None = None


@dataclass(slots=True, eq=False)
class ActiveRow:
    """A row that runs or is about to.

    Attributes:
        requests: one for each choice.
        choices: those that are finished, by index.
        line: its output line, once all choices are finished.
    """

    row: Row
    requests: tuple[Request, ...]
    choices: dict[int, Completion] = field(default_factory=dict)
    line: bytes | None = None

    def add(self, completion: Completion) -> bool:
        """Take one finished choice; returns whether all are finished."""
        index = int(completion.request_id.rpartition(":")[2])
        self.choices[index] = completion
        return len(self.choices) == len(self.requests)

    def completions(self) -> list[Completion]:
        """Finished choices in order."""
        return [self.choices[index] for index in sorted(self.choices)]


class RowReader:
    """Goes through the notebook; a line that has to run and was not kept is read again."""

    def __init__(
        self,
        source: InputFile,
        notebook: Notebook,
        kept: KeptRows,
        finished: FinishedLines,
        digest: str,
        tokenizer: Encoder,
        limits: RequestLimits,
    ) -> None:
        self._source = source
        self._notebook = notebook
        self._kept = kept
        self._finished = finished
        self._digest = digest
        self._tokenizer = tokenizer
        self._limits = limits

    def __iter__(self) -> Iterator[Answered | Faulty | ActiveRow]:
        """Rows that are selected, and rows that are not but were answered by an earlier run."""
        for line in self._notebook.lines():
            row = self._kept.pop(line.line)
            if line.fault is not None:
                if line.selected:
                    yield Faulty(line.line, line.fault, self._name_of(line))
                continue
            finished = self._finished.line(line.key)
            if finished is not None:
                yield Answered(finished, line.selected)
            elif line.selected:
                yield self._prepare(line, row)

    def _name_of(self, line: CheckedLine) -> str | None:
        """The `custom_id` of a line that cannot be run, if it can be read."""
        size = min(line.size, MAX_JSON_BYTES)
        return custom_id_of(self._source.read(line.start, size))

    def _prepare(self, line: CheckedLine, row: Row | None) -> Faulty | ActiveRow:
        custom_id = None
        try:
            if row is None:
                row = self._read(line)
            custom_id = row.custom_id
            requests = to_requests(row.body, row.key, self._tokenizer, self._limits)
        except InvalidRequestError as error:  # more than the scan's quick check could see
            return Faulty(line.line, str(error), custom_id)
        return ActiveRow(row, requests)

    def _read(self, line: CheckedLine) -> Row:
        """Parse a line again.

        Raises:
            InvalidRequestError: it is not what the scan saw.
        """
        raw = self._source.read(line.start, line.size)
        with suppress(InvalidRequestError):
            row = parse_row(raw, line.line, self._digest)
            if row.key == line.key:
                return row
        raise InvalidRequestError("the line was changed after it was checked")
