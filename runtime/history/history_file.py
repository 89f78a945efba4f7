"""The file of the history: one line of JSON a run, which several processes append at once.

Its folder and itself are the user's alone. It is kept small: when it is full it becomes the older
file, in place of the one before. A line is written in one piece under a lock, and only to a file
that still has its name; whatever stands there besides whole lines is passed over by readers.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tokenspeed_plan.runtime.history.run_record import RunRecord

VARIABLE = "TOKENSPEED_HISTORY"
OFF = "off"
MAX_BYTES = 4 << 20  # of each of the two files
MAX_READ_BYTES = 64 << 20  # of a file that somebody else has made
_TRIES, _PAUSE_S = 50, 0.01
# A pipe without a reader would block.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


def history_path() -> Path | None:
    """The file that `$TOKENSPEED_HISTORY` names, else that of the user's state folder.

    None where it is `off`, or the user has no home.
    """
    stated = os.environ.get(VARIABLE, "")
    if stated.lower() == OFF:
        return None
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.expanduser("~/.local/state")
    path = os.path.expanduser(stated or f"{state}/tokenspeed/history.jsonl")
    if not stated and not os.path.isabs(path):
        return None
    return Path(path)


def append_record(path: Path, record: RunRecord, max_bytes: int = MAX_BYTES) -> None:
    """Write a line.

    Raises:
        OSError: the file cannot be written, or somebody else has locked it.
    """
    line = record.model_dump_json(exclude_none=True).encode() + b"\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path) as file:
        size_bytes = os.fstat(file).st_size
        if not size_bytes or size_bytes + len(line) <= max_bytes:
            _write(file, size_bytes, line)
            return
        os.replace(path, older_path(path))
    with _locked(path) as file:
        _write(file, os.fstat(file).st_size, line)


def older_path(path: Path) -> Path:
    """The file that was full before this one."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def _write(file: int, size_bytes: int, line: bytes) -> None:
    """Add a line; one that was cut off before it is ended first."""
    if size_bytes and os.pread(file, 1, size_bytes - 1) != b"\n":
        line = b"\n" + line
    os.write(file, line)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file that has this name, locked.

    Raises:
        TimeoutError: others lock it for longer than a line takes.
    """
    for _ in range(_TRIES):
        file = os.open(path, _FLAGS, 0o600)
        try:
            if _lock(file) and _has_name(file, path):
                yield file
                return
        finally:
            os.close(file)
        time.sleep(_PAUSE_S)
    raise TimeoutError(f"`{path}` is locked")


def _lock(file: int) -> bool:
    """Lock an open file; False where another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(file: int, path: Path) -> bool:
    """Whether it was not renamed since it was opened."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class History:
    """The records of a history, the oldest first, and the lines that are none."""

    records: tuple[RunRecord, ...]
    damaged: int


def read_history(path: Path) -> History:
    """All that is known of earlier runs; none where there are no files.

    Raises:
        OSError: one of the files cannot be read.
    """
    records: list[RunRecord] = []
    damaged = 0
    for part in (older_path(path), path):
        if not part.exists():
            continue
        with part.open("rb") as file:
            lines = file.read(MAX_READ_BYTES).split(b"\n")
        for line in filter(bytes.strip, lines):
            try:
                records.append(RunRecord.model_validate_json(line))
            except ValidationError:
                damaged += 1
    return History(tuple(records), damaged)
