"""What an earlier run left behind, so that no answer is computed twice.

Finished lines live in two files: the output itself, and `OUTPUT.resume` beside it. When a run starts it first appends
the output's whole lines to `OUTPUT.resume` and makes that safe on the disk, and only then writes the output anew,
taking lines from `OUTPUT.resume` where their key fits. A kill between any two of these leaves every finished line in
at least one of the files; keys make doubles harmless. A line's key is its `id`: the digest of plan and row.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.batch.check import Notebook
from tokenspeed_plan.runtime.batch.files import STDIO, read_whole_lines


class Sidecar:
    """The file of finished lines; locked while a run goes on."""

    def __init__(self, output: Path, notebook: Notebook) -> None:
        self.path = output.with_name(f"{output.name}.resume")
        self._notebook = notebook
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RequestError(f"another run is writing `{output}`", "wait for it, or name another output") from error
        self._recover()
        self._take_over(output)

    def _recover(self) -> None:
        """Index what an interrupted run saved; cut a torn end."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            key = finished_key(line)
            if not line.endswith(b"\n"):
                break
            if key:
                self._notebook.add_saved(key, end, len(line))
            end += len(line)
        self._file.truncate(end)

    def _take_over(self, output: Path) -> None:
        """Move the output's finished lines here.

        Raises:
            RequestError: the output is somebody else's file.
        """
        if not output.exists() or output.stat().st_size == 0:
            return
        ours = False
        for line in read_whole_lines(output):
            key = finished_key(line)
            ours = ours or key is not None or _is_error_line(line)
            if key:
                self.save(key, line)
        if not ours and not _is_torn_start(output):
            self.close()
            raise RequestError(
                f"`{output}` exists and is not the output of a batch", "name another output, or delete it"
            )
        self._file.flush()
        os.fsync(self._file.fileno())

    def save(self, key: str, line: bytes) -> None:
        """Keep a finished line."""
        start = self._file.seek(0, os.SEEK_END)
        if self._notebook.add_saved(key, start, len(line)):
            self._file.write(line)
            self._file.flush()

    def line(self, key: str) -> bytes | None:
        """The finished line of a key."""
        place = self._notebook.saved(key)
        if place is None:
            return None
        self._file.seek(place[0])
        return self._file.read(place[1])

    def close(self, done: bool = False) -> None:
        """Release the file; delete it when the output holds everything, or there is nothing in it."""
        self._file.flush()
        if done or os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()


def finished_key(line: bytes) -> str | None:
    """The key of a line of ours that holds an answer."""
    data = _object(line)
    key = data.get("id")
    if isinstance(key, str) and key.startswith("batch_req_") and isinstance(data.get("response"), dict):
        return key
    return None


def _is_error_line(line: bytes) -> bool:
    return str(_object(line).get("id", "")).startswith("batch_req_")


def _object(line: bytes) -> dict[str, object]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_torn_start(output: Path) -> bool:
    """Whether the file is the beginning of our first line: a kill can leave that too."""
    if output.suffix == ".gz":
        return output.stat().st_size < 32 or next(iter(read_whole_lines(output)), None) is None
    start = b'{"custom_id": '
    with output.open("rb") as file:
        head = file.read(1 << 16)
    return b"\n" not in head and (head.startswith(start) or start.startswith(head))


def check_paths(source: Path, output: Path, errors: Path | None) -> None:
    """Refuse paths that would destroy something.

    Raises:
        RequestError: input and output are one file, or a folder is missing.
    """
    targets = [path for path in (output, errors) if path is not None and path != STDIO]
    if source != STDIO and not source.is_file():
        raise RequestError(f"there is no file `{source}`", "name a JSONL file, or `-` for standard input")
    for path in targets:
        if source != STDIO and path.exists() and path.samefile(source):
            raise RequestError(f"`{path}` is the input", "name another output")
        if not path.parent.is_dir() or path.is_dir():
            raise RequestError(f"cannot write `{path}`", "name a file in a folder that exists")
    if len({path.resolve() for path in targets}) < len(targets):
        raise RequestError(f"`{output}` is named for answers and for errors", "name two files")
