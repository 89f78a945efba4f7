"""The index of a job: which rows each shard has, and what identifies them.

One worker makes it. It checks the lines of the input as a single run does, so that nothing is run
of a file that has to be refused; many of them are left to all workers (`row_checks.py`). Shards are
rows that follow each other, so that those with a common prefix stay together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.lines import Row, custom_id_of, parse_row
from tokenspeed_plan.runtime.serving.batch.notebook import Notebook
from tokenspeed_plan.runtime.serving.batch.options import BatchPlan, TextTokenizer
from tokenspeed_plan.runtime.serving.batch.scan import Fault, ScanResult, refuse_bad
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput, Shard
from tokenspeed_plan.runtime.serving.leases.known_chats import KnownChat
from tokenspeed_plan.runtime.serving.leases.row_checks import Found, RowChecker, Unchecked
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError

INDEX = "index"  # the unit that makes it
Moved = Callable[[], None]
_encode = json.JSONEncoder(allow_nan=False).encode  # `json.dumps` makes one each time


@dataclass(frozen=True, slots=True)
class JobIndex:
    """A job: what all its workers must agree on, and its shards.

    Attributes:
        plans: the digests of all in a plan that decides an answer, of each plan that may answer.
        num_shards: into which the rows were to be split.
        limit: of the rows.
        shards: all of them.
        lines: of the input that are not blank.
        bad: those of them in which a fault was found.
        faults: the first ones, by line; rows that are unchecked may have others.
    """

    plans: tuple[str, ...]
    num_shards: int
    limit: int | None
    shards: tuple[Shard, ...]
    lines: int
    bad: int
    faults: tuple[Fault, ...]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def names(self) -> list[str]:
        """The units of all shards."""
        return [shard.name for shard in self.shards]

    def shard(self, name: str) -> Shard:
        """The shard of a unit."""
        return self.shards[int(name)]

    def found(self) -> ScanResult:
        """What is known of its lines; the faults of shards that are checked do not count twice."""
        again = sum(shard.bad for shard in self.shards if shard.unchecked)
        return ScanResult(self.lines, self.rows, self.bad - again, shown=list(self.faults))

    def as_result(self) -> dict[str, object]:
        """What its unit comes to."""
        return asdict(self)

    @classmethod
    def parse(cls, text: bytes) -> JobIndex:
        """Read it again."""
        data = json.loads(text)
        shards = tuple(Shard(**each) for each in data["shards"])
        faults = tuple(Fault(*each) for each in data["faults"])
        rest = shards, data["lines"], data["bad"], faults
        return cls(tuple(data["plans"]), data["num_shards"], data["limit"], *rest)


class _Draft:
    """A shard whose rows are being read."""

    def __init__(self, start: int, first_line: int) -> None:
        self.start = start
        self.first_line = first_line
        self.rows = self.unchecked = self.bad = 0
        self._lines = sha256()
        self._ids = sha256()

    def add(self, raw: bytes, id_line: bytes, found: Found) -> None:
        """Take the next row."""
        self.rows += 1
        self.unchecked += isinstance(found, Unchecked)
        self.bad += isinstance(found, InvalidRequestError)
        self._lines.update(raw + b"\n")
        self._ids.update(id_line)

    def finish(self, number: int, end: int) -> Shard:
        """The shard, which ends at this offset."""
        return Shard(
            f"{number:05d}",
            self.start,
            end - self.start,
            self.first_line,
            self.rows,
            self._lines.hexdigest(),
            self._ids.hexdigest(),
            self.unchecked,
            self.bad,
        )


def id_line(custom_id: str | None) -> bytes:
    """What a row adds to the digest of its shard's ids."""
    return _encode(custom_id).encode() + b"\n"


def make_index(job: JobInput, plan: BatchPlan, tokenizer: TextTokenizer, moved: Moved) -> JobIndex:
    """Check the lines of the input, and split its rows.

    Args:
        job: what to read.
        plan: its digest and limits.
        tokenizer: for the checks.
        moved: called every few lines.

    Raises:
        RequestError: the input cannot be read, or more lines are bad than are allowed.
    """
    num_rows = _count_rows(job, moved)
    if job.limit is not None:
        num_rows = min(num_rows, job.limit)
    num_shards = min(job.num_shards, num_rows)
    ends = [num_rows * (number + 1) // num_shards for number in range(num_shards)]
    checker = RowChecker(plan, tokenizer, moved)
    split = _Split(checker)
    shards = split.shards_of(job, ends)
    if checker.seen.may_repeat():
        with closing(Notebook()) as notebook:
            split = _Split(RowChecker(plan, tokenizer, moved, notebook))
            shards = split.shards_of(job, ends)
    found = split.result
    refuse_bad(found, job.max_errors)
    faults = tuple(found.shown)
    return JobIndex(
        (plan.digest,), job.num_shards, job.limit, shards, found.num_rows, found.num_bad, faults
    )


def _count_rows(job: JobInput, moved: Moved) -> int:
    num_rows = 0
    with job.reader() as source:
        for _ in source.lines():
            num_rows += 1
            moved()
    return num_rows


class _Split:
    """Splits the rows of an input, and checks each that it has to look into."""

    def __init__(self, checker: RowChecker) -> None:
        self.result = ScanResult()
        self._checker = checker

    def shards_of(self, job: JobInput, ends: list[int]) -> tuple[Shard, ...]:
        """The shards, which end with so many rows; the lines after the last are checked, too.

        Raises:
            RequestError: the input cannot be read, or an id comes again in another shard.
        """
        with job.reader() as source:
            return tuple(self._shards(source, ends))

    def _shards(self, source: InputFile, ends: list[int]) -> Iterator[Shard]:
        draft: _Draft | None = None
        number, num_open = 0, max(ends, default=0)
        for line, found in self._checker.check(source.lines(), num_open):
            if draft is not None and self.result.num_rows == ends[number]:
                yield draft.finish(number, line.offset)
                draft, number = None, number + 1
            if draft is None and number < len(ends):
                draft = _Draft(line.offset, line.number)
            id_line = self._id_line(line, found, draft)
            if draft is not None:
                draft.add(line.raw, id_line, found)
            self.result.num_rows += 1
            self.result.num_unchecked += isinstance(found, Unchecked)
        if draft is not None:
            yield draft.finish(number, source.end)

    def _id_line(self, line: InputLine, found: Found, draft: _Draft | None) -> bytes:
        """Note what a line was found to be; what it adds to the digest of its shard's ids."""
        if isinstance(found, bytes):
            return b'"%b"\n' % found
        if isinstance(found, (Row, KnownChat, Unchecked)):
            return id_line(found.custom_id)
        self.result.add_fault(line.number, str(found))
        if self._checker.notebook is not None and draft is not None:
            _refuse_duplicate(line, draft.first_line, self._checker.notebook)
        return id_line(custom_id_of(line.raw))


def _refuse_duplicate(line: InputLine, first_line: int, notebook: Notebook) -> None:
    """Refuse a row whose `custom_id` was used before a line.

    Who runs the rows from there on alone could not see that it was.

    Raises:
        RequestError: with both lines.
    """
    with suppress(InvalidRequestError):
        row = parse_row(line.raw, line.number, None)
        first = notebook.first_line_of(row.custom_id, row.line)
        if first < first_line:
            raise RequestError(
                f"line {row.line}: custom_id {row.custom_id!a:.80} was used on line {first}, "
                "in another shard",
                "give each row an id of its own",
            )
