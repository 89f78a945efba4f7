"""The answers of a shard while it is worked at: each worker's in files of its own.

The part of generation g is `parts/SHARD.g.jsonl`. In a folder it is written in place, with its
finished lines beside it, so that whoever takes over goes on at its last line. An object cannot be
appended to: what is new goes into an object of its own with each heartbeat, and the part is
uploaded when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tokenspeed_plan.runtime.serving.batch.resume import sidecar_path
from tokenspeed_plan.runtime.serving.batch.writers import read_whole_lines
from tokenspeed_plan.runtime.serving.leases.job_store import FolderStore, ObjectStore, Store
from tokenspeed_plan.runtime.serving.leases.shard_lease import Lease

PARTS = "parts"


class Part(Protocol):
    """The part of one lease.

    Attributes:
        path: the file that a run writes; finished lines are taken from beside it.
    """

    path: Path

    def save(self) -> None:
        """Save new lines, where they are not safe already."""

    def publish(self) -> None:
        """Put the whole part where the merge finds it."""


def part_name(unit: str, generation: int) -> str:
    """The whole part of a lease."""
    return f"{PARTS}/{unit}.{generation}.jsonl"


def open_part(lease: Lease, scratch: Path) -> Part:
    """The part of a new lease, with the finished lines of the workers before.

    `scratch` is a folder of this machine.
    """
    if isinstance(lease.store, FolderStore):
        return FolderPart(lease.store, lease)
    assert isinstance(lease.store, ObjectStore)
    return ObjectPart(lease.store, lease, scratch)


class FolderPart:
    """A part that is written where all workers see it."""

    def __init__(self, store: FolderStore, lease: Lease) -> None:
        self.path = store.root / part_name(lease.unit, lease.generation)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files = [store.root / PARTS / name for name in parts_of(store, lease.unit)]
        _write_finished(self.path, (line for file in files for line in _lines(file)))

    def save(self) -> None:
        """Every line is there once it is written."""

    def publish(self) -> None:
        """It is in its place."""


class ObjectPart:
    """A part that is written on this machine; its lines are uploaded with each heartbeat."""

    def __init__(self, store: ObjectStore, lease: Lease, scratch: Path) -> None:
        self.path = scratch / "part.jsonl"
        self._store = store
        self._name = part_name(lease.unit, lease.generation)
        self._num_saved = 0
        names = [f"{PARTS}/{name}" for name in parts_of(store, lease.unit)]
        _write_finished(self.path, (line for name in names for line in self._lines(name)))
        # Where each of the two files was last read up to, in bytes.
        sidecar = sidecar_path(self.path)
        self._ends = {self.path: 0, sidecar: sidecar.stat().st_size}

    def save(self) -> None:
        """Upload the lines that are new."""
        found = {path: _new_lines(path, start) for path, start in self._ends.items()}
        lines = b"".join(found.values())
        if not lines:
            return
        self._num_saved += 1
        self._store.replace(f"{self._name}.{self._num_saved:06d}", lines)
        for path, new in found.items():
            self._ends[path] += len(new)

    def publish(self) -> None:
        """Upload the whole part."""
        self._store.files.put_file(str(self.path), f"{self._store.root}/{self._name}")

    def _lines(self, name: str) -> Iterator[bytes]:
        for line in (self._store.read(name) or b"").splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield line


def parts_of(store: Store, unit: str) -> list[str]:
    """The names of all files of a shard's parts."""
    return sorted(name for name in store.names(PARTS) if name.startswith(f"{unit}."))


def remove_parts(store: Store, unit: str, but: int) -> None:
    """Delete what the shard's parts have left behind, but for the whole part of one generation."""
    kept = part_name(unit, but)
    for name in parts_of(store, unit):
        if f"{PARTS}/{name}" != kept:
            store.remove(f"{PARTS}/{name}")


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, which its worker may be deleting."""
    with suppress(FileNotFoundError):
        yield from read_whole_lines(path)


def _write_finished(path: Path, lines: Iterable[bytes]) -> None:
    """Write finished lines to where a run takes them from; it skips those that it has twice."""
    with sidecar_path(path).open("wb") as file:
        file.writelines(lines)


def _new_lines(path: Path, start: int) -> bytes:
    """The whole lines of a growing file from an offset on."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        data = file.read()
        return data[: data.rfind(b"\n") + 1]
    return b""
