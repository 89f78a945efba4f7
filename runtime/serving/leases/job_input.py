"""The input of a job, and the rows of a shard in it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import CHUNK_BYTES, InputFile
from tokenspeed_plan.runtime.serving.leases.job_store import is_url, open_files


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
        unchecked: rows that who made the index has not looked into.
        bad: rows in which it has found a fault.
    """

    name: str
    start: int
    size_bytes: int
    first_line: int
    rows: int
    rows_sha256: str
    ids_sha256: str
    unchecked: int = 0
    bad: int = 0


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
