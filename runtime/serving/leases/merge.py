"""The end of a job: the parts of all shards one after the other, in the order of the input.

What is written at which offset follows from the parts alone. So a merge goes on where another one
was ended, once it has compared what is there; and two that write the same file write the same.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import CHUNK_BYTES
from tokenspeed_plan.runtime.serving.batch.writers import sync_folder
from tokenspeed_plan.runtime.serving.leases.job_index import JobIndex, id_line
from tokenspeed_plan.runtime.serving.leases.job_input import Shard
from tokenspeed_plan.runtime.serving.leases.job_store import Store, is_url, open_files
from tokenspeed_plan.runtime.serving.leases.shard_lease import done_name
from tokenspeed_plan.runtime.serving.leases.shard_parts import part_name

MERGE = "merge"  # the unit that does it
COUNTS = ("rows", "failed", "prompt_tokens", "generated_tokens")  # of a part, and of the job
Moved = Callable[[], None]


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What identifies the whole part of a shard.

    Attributes:
        generation: of the lease that wrote it.
        rows: its lines.
        failed: those without an answer.
        size_bytes: of the file.
        sha256: of the file.
        ids_sha256: of the `custom_id` of each line.
        prompt_tokens: of all answers.
        generated_tokens: the same.
    """

    generation: int
    rows: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    size_bytes: int
    sha256: str
    ids_sha256: str

    @classmethod
    def of_result(cls, text: bytes) -> PartFacts:
        """Read what a shard has come to."""
        data = json.loads(text)
        return cls(*(data[name] for name in cls.__slots__))


def measure(path: Path, generation: int) -> PartFacts:
    """Read a whole part."""
    counts: Counter[str] = Counter()
    digest, ids = sha256(), sha256()
    with path.open("rb") as file:
        for line in file:
            data = json.loads(line)
            counts["size_bytes"] += len(line)
            counts["rows"] += 1
            digest.update(line)
            ids.update(id_line(data["custom_id"]))
            if data["response"] is None:
                counts["failed"] += 1
                continue
            usage = data["response"]["body"]["usage"]
            counts["prompt_tokens"] += usage["prompt_tokens"]
            counts["generated_tokens"] += usage["completion_tokens"]
    return PartFacts(
        generation=generation,
        sha256=digest.hexdigest(),
        ids_sha256=ids.hexdigest(),
        **{name: counts[name] for name in COUNTS},
        size_bytes=counts["size_bytes"],
    )


def check_part(facts: PartFacts, shard: Shard) -> None:
    """Refuse a part that has not one line for each row, in their order.

    Raises:
        RequestError: it has not.
    """
    if (facts.rows, facts.ids_sha256) != (shard.rows, shard.ids_sha256):
        raise RequestError(
            f"shard {shard.name} has {facts.rows} answers to {shard.rows} rows, or others",
            f"delete `{done_name(shard.name)}` in the lease folder and start a worker again",
        )


class Merge:
    """Merges the parts of a job.

    Args:
        store: of the job.
        index: its shards, all of them done.
        moved: called for each piece; it may raise, where another worker has taken over.

    Raises:
        RequestError: a shard has answers to other rows.
    """

    def __init__(self, store: Store, index: JobIndex, moved: Moved) -> None:
        self._store = store
        self._index = index
        self._moved = moved
        self.parts = [self._facts(shard) for shard in index.shards]

    @property
    def size_bytes(self) -> int:
        """Size of the output."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def failed(self) -> int:
        """Rows without an answer."""
        return sum(part.failed for part in self.parts)

    def write(self, output: str) -> None:
        """Write the output, and give it its name when it is whole.

        Raises:
            RequestError: a part is damaged, or another file has the output's name.
        """
        if is_url(output):
            self._write_object(output)
            return
        path = Path(output)
        if path.exists():
            self._check_is_ours(path)
            return
        draft = path.with_name(f"{path.name}.merging")
        with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            os.ftruncate(file.fileno(), min(self.size_bytes, file.seek(0, os.SEEK_END)))
            self._fill(file)
            os.fsync(file.fileno())
        if draft.exists() or not path.exists():
            os.replace(draft, path)
        sync_folder(path)

    def _write_object(self, url: str) -> None:
        """An object gets its name when all of it is uploaded."""
        files, path = open_files(url)
        with files.open(path, "wb") as file:
            for number in range(len(self.parts)):
                for piece in self._pieces(number):
                    file.write(piece)

    def _check_is_ours(self, path: Path) -> None:
        with path.open("rb") as file:
            is_ours = file.seek(0, os.SEEK_END) == self.size_bytes
            if not is_ours or not all(self._is_there(file, *each) for each in self._placed()):
                raise RequestError(
                    f"`{path}` exists and is not the output of this job",
                    "name another output, or delete it",
                )

    def _fill(self, file: BinaryIO) -> None:
        """Write the parts that are not there yet."""
        for number, (start, part) in enumerate(self._placed()):
            if self._is_there(file, start, part):
                continue
            at = start
            for piece in self._pieces(number):
                at += os.pwrite(file.fileno(), piece, at)

    def _placed(self) -> Iterator[tuple[int, PartFacts]]:
        """Each part with its offset in the output."""
        start = 0
        for part in self.parts:
            yield start, part
            start += part.size_bytes

    def _is_there(self, file: BinaryIO, start: int, part: PartFacts) -> bool:
        """Whether the file has a part at its offset."""
        if os.fstat(file.fileno()).st_size < start + part.size_bytes:
            return False
        digest = sha256()
        for at in range(start, start + part.size_bytes, CHUNK_BYTES):
            self._moved()
            size = min(CHUNK_BYTES, start + part.size_bytes - at)
            digest.update(os.pread(file.fileno(), size, at))
        return digest.hexdigest() == part.sha256

    def _pieces(self, number: int) -> Iterator[bytes]:
        """The bytes of a part.

        Raises:
            RequestError: they are not those that its worker has measured.
        """
        name, part = self._index.shards[number].name, self.parts[number]
        digest = sha256()
        with closing(self._store.reader(part_name(name, part.generation))) as file:
            while piece := file.read(CHUNK_BYTES):
                self._moved()
                digest.update(piece)
                yield piece
        if digest.hexdigest() != part.sha256:
            raise RequestError(
                f"the answers of shard {name} are damaged",
                f"delete `{done_name(name)}` in the lease folder and start a worker again",
            )

    def _facts(self, shard: Shard) -> PartFacts:
        text = self._store.read(done_name(shard.name))
        assert text is not None
        facts = PartFacts.of_result(text)
        check_part(facts, shard)
        return facts


def summary(store: Store, names: Sequence[str]) -> dict[str, int]:
    """Rows and tokens of the shards that are done."""
    total = dict.fromkeys(COUNTS, 0)
    for name in names:
        text = store.read(done_name(name))
        if text is not None:
            data = json.loads(text)
            total = {key: value + data[key] for key, value in total.items()}
    return total
