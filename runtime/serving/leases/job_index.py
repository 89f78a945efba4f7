"""The index of a job: which rows each shard has, and what identifies them.

One worker makes it, checking every line of the input as a single run does, so that nothing is run
of a file that has to be refused. Shards are rows that follow each other, so that those with a
common prefix stay together.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import CHUNK_BYTES, InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.lines import custom_id_of, parse_row
from tokenspeed_plan.runtime.serving.batch.notebook import Notebook
from tokenspeed_plan.runtime.serving.batch.options import BatchPlan, TextTokenizer
from tokenspeed_plan.runtime.serving.batch.scan import ScanResult, check_line, refuse_bad
from tokenspeed_plan.runtime.serving.leases.job_store import is_url, open_files
from tokenspeed_plan.runtime.serving.leases.known_shapes import KnownShapes, SeenIds
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError

INDEX = "index"  # the unit that makes it
Moved = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of the input that follow each other.

    Attributes:
        name: its unit.
        start: offset of its first row in the (decompressed) input, in bytes.
        size_bytes: from there to the first row of the next shard.
        first_line: number of its first row's line, from 1.
        rows: how many there are.
        rows_sha256: of its lines that are not blank.
        ids_sha256: of the `custom_id` of each row.
    """

    name: str
    start: int
    size_bytes: int
    first_line: int
    rows: int
    rows_sha256: str
    ids_sha256: str


@dataclass(frozen=True, slots=True)
class JobIndex:
    """A job: what all its workers must agree on, and its shards.

    `plans` are the digests of all in a plan that decides an answer, of each plan that may answer.
    """

    plans: tuple[str, ...]
    num_shards: int
    limit: int | None
    shards: tuple[Shard, ...]

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

    def as_result(self) -> dict[str, object]:
        """What its unit comes to."""
        return asdict(self)

    @classmethod
    def parse(cls, text: bytes) -> JobIndex:
        """Read it again."""
        data = json.loads(text)
        shards = tuple(Shard(**each) for each in data["shards"])
        return cls(tuple(data["plans"]), data["num_shards"], data["limit"], shards)


@dataclass(frozen=True, slots=True)
class JobInput:
    """The input of a job: the path of a file, or a URL, and how much of it is answered.

    Attributes:
        limit: rows from the first one on; None is all.
        num_shards: into which they are split.
        max_errors: number of bad lines up to which the other rows still run.
    """

    place: str
    num_shards: int
    limit: int | None = None
    max_errors: int = 0

    def reader(self) -> InputFile:
        """Open it.

        Raises:
            RequestError: it cannot be read.
        """
        if not is_url(self.place):
            path = Path(self.place)
            if not path.is_file():
                raise RequestError(
                    f"there is no file `{path}`", "name a JSONL file that can be read twice"
                )
            return InputFile(path)
        files, path_there = open_files(self.place)
        try:
            file = io.BufferedReader(files.open(path_there, "rb"), CHUNK_BYTES)
        except OSError as error:
            raise RequestError(
                f"cannot read `{self.place}`: {error}", "name a file of the bucket"
            ) from error
        return InputFile(Path(path_there), file=cast(BinaryIO, file))


class _Draft:
    """A shard whose rows are being read."""

    def __init__(self, start: int, first_line: int) -> None:
        self.start = start
        self.first_line = first_line
        self.rows = 0
        self._lines = sha256()
        self._ids = sha256()

    def add(self, raw: bytes, id_line: bytes) -> None:
        """Take the next row."""
        self.rows += 1
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
        )


def id_line(custom_id: str | None) -> bytes:
    """What a row adds to the digest of its shard's ids."""
    return json.dumps(custom_id, allow_nan=False).encode() + b"\n"


def make_index(job: JobInput, plan: BatchPlan, tokenizer: TextTokenizer, moved: Moved) -> JobIndex:
    """Check every line of the input, and split its rows.

    Args:
        job: what to read.
        plan: its digest and limits.
        tokenizer: for the checks.
        moved: called for each line.

    Raises:
        RequestError: the input cannot be read, or more lines are bad than are allowed.
    """
    num_rows = _count_rows(job, moved)
    if job.limit is not None:
        num_rows = min(num_rows, job.limit)
    num_shards = min(job.num_shards, num_rows)
    ends = [num_rows * (number + 1) // num_shards for number in range(num_shards)]
    split = _Split(plan, tokenizer, moved)
    shards = split.shards_of(job, ends)
    if split.seen.may_repeat():
        with closing(Notebook()) as notebook:
            split = _Split(plan, tokenizer, moved, notebook)
            shards = split.shards_of(job, ends)
    refuse_bad(split.result, job.max_errors)
    return JobIndex((plan.digest,), job.num_shards, job.limit, shards)


def _count_rows(job: JobInput, moved: Moved) -> int:
    num_rows = 0
    with job.reader() as source:
        for _ in source.lines():
            num_rows += 1
            moved()
    return num_rows


class _Split:
    """Splits the rows of an input, and checks each.

    Without a notebook, ids are only seen to differ, and most rows to be like others; with one, each
    row is checked alone, and an id that comes twice is found.
    """

    def __init__(
        self,
        plan: BatchPlan,
        tokenizer: TextTokenizer,
        moved: Moved,
        notebook: Notebook | None = None,
    ) -> None:
        self.result = ScanResult()
        self.seen = SeenIds()
        self._plan = plan
        self._tokenizer = tokenizer
        self._moved = moved
        self._notebook = notebook
        self._known = KnownShapes(plan.limits.max_seq_len)

    def shards_of(self, job: JobInput, ends: list[int]) -> tuple[Shard, ...]:
        """The shards, which end with so many rows; the lines after the last are checked, too.

        Raises:
            RequestError: the input cannot be read, or an id comes again in another shard.
        """
        with job.reader() as source:
            return tuple(self._shards(source, ends))

    def _shards(self, source: InputFile, ends: list[int]) -> Iterator[Shard]:
        draft: _Draft | None = None
        number = 0
        for line in source.lines():
            self._moved()
            if draft is not None and self.result.num_rows == ends[number]:
                yield draft.finish(number, line.offset)
                draft, number = None, number + 1
            if draft is None and number < len(ends):
                draft = _Draft(line.offset, line.number)
            id_line = self._id_line(line, draft)
            if draft is not None:
                draft.add(line.raw, id_line)
            self.result.num_rows += 1
        if draft is not None:
            yield draft.finish(number, source.end)

    def _id_line(self, line: InputLine, draft: _Draft | None) -> bytes:
        """Check a line; what it adds to the digest of its shard's ids."""
        if self._notebook is None:
            known = self._known.id_of(line)
            if known is not None:
                self.seen.add(known)
                return b'"%b"\n' % known
        ids = self._notebook or self.seen
        try:
            row = check_line(line, self._plan.digest, ids, self._tokenizer, self._plan.limits)
        except InvalidRequestError as error:
            self.result.add_fault(line.number, str(error))
            if self._notebook is not None and draft is not None:
                _refuse_duplicate(line, draft.first_line, self._notebook)
            return id_line(custom_id_of(line.raw))
        self._known.learn(line, row)
        return id_line(row.custom_id)


def _refuse_duplicate(line: InputLine, first_line: int, notebook: Notebook) -> None:
    """Refuse a row whose `custom_id` was used before a line.

    Who runs the rows from there on alone could not see that it was.

    Raises:
        RequestError: with both lines.
    """
    with suppress(InvalidRequestError):
        row = parse_row(line.raw, line.number, "")
        first = notebook.first_line_of(row.custom_id, row.line)
        if first < first_line:
            raise RequestError(
                f"line {row.line}: custom_id {row.custom_id!a:.80} was used on line {first}, "
                "in another shard",
                "give each row an id of its own",
            )


def copy_rows(job: JobInput, shard: Shard, path: Path) -> None:
    """Copy the rows of a shard to a file.

    Raises:
        RequestError: they are not those that the index was made of.
    """
    with job.reader() as source, path.open("wb") as file:
        for start in range(0, shard.size_bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, shard.size_bytes - start)
            file.write(source.read(shard.start + start, size))
    digest = sha256()
    with InputFile(path) as rows:
        for line in rows.lines():
            digest.update(line.raw + b"\n")
    if digest.hexdigest() != shard.rows_sha256:
        raise RequestError(
            f"the rows of shard {shard.name} in `{job.place}` are not those of this job",
            "give each worker the same input, and each input a lease folder of its own",
        )
