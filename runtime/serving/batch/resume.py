"""What an earlier run left behind, so that no answer is computed twice.

Finished lines live in two files: the output itself, and `OUTPUT.resume` beside it. When a run
starts it first appends the output's whole lines to `OUTPUT.resume` and makes that safe on the disk,
and only then writes the output anew, taking lines from `OUTPUT.resume` where their key fits. A kill
between any two of these leaves every finished line in at least one of the files; keys make doubles
harmless. A line's key is its `id`: the digest of plan and row.
"""

from __future__ import annotations

import fcntl
import json
import os
from itertools import combinations
from pathlib import Path

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import STDIO, read_whole_lines
from tokenspeed_plan.runtime.serving.batch.scan import Notebook

_LINE_START = b'{"custom_id": '


def sidecar_path(output: Path) -> Path:
    """The file of finished lines beside an output."""
    return output.with_name(f"{output.name}.resume")


class Sidecar:
    """The file of finished lines; locked while a run goes on."""

    def __init__(self, output: Path, notebook: Notebook) -> None:
        self.path, self._output = sidecar_path(output), output
        self._notebook = notebook
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RequestError(
                f"another run is writing `{output}`", "wait for it, or name another output"
            ) from error
        try:
            self._recover()
        except RequestError:
            self._file.close()
            raise
        self._take_over(output)

    def _recover(self) -> None:
        """Index what an interrupted run saved; cut a torn end.

        Raises:
            RequestError: it is somebody else's file, or of other rows.
        """
        self._file.seek(0)
        if not _is_ours(self._file.readline(), torn=True):
            raise RequestError(
                f"`{self.path}` exists and holds no answers of a batch",
                "name another output, or delete it",
            )
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            key = self._finished(line)
            if key:
                self._notebook.add_saved(key, end, len(line))
            end += len(line)
        self._file.truncate(end)

    def _take_over(self, output: Path) -> None:
        """Move the output's finished lines here.

        Raises:
            RequestError: the output is somebody else's file, or of other rows.
        """
        before = os.fstat(self._file.fileno()).st_size
        try:
            self._read_output(output)
        except RequestError:
            self._file.truncate(before)
            self.close()
            raise
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read_output(self, output: Path) -> None:
        if not output.exists() or output.stat().st_size == 0:
            return
        ours = False
        for line in read_whole_lines(output):
            key = self._finished(line)
            ours = ours or _is_ours(line)
            if key:
                self.save(key, line)
        if not ours and not _is_torn_start(output):
            raise RequestError(
                f"`{output}` exists and is not the output of a batch",
                "name another output, or delete it",
            )

    def _finished(self, line: bytes) -> str | None:
        """The key of a line that holds an answer.

        Raises:
            RequestError: to a row that the input does not have: nobody asked to forget it.
        """
        data = _object(line)
        key, custom_id = data.get("id"), data.get("custom_id")
        if (
            not isinstance(data.get("response"), dict)
            or not isinstance(key, str)
            or not key.startswith("batch_req_")
        ):
            return None
        if not self._notebook.knows(str(custom_id)):
            raise RequestError(
                f"`{self._output}` holds the answer to {custom_id!a:.80}, which the input does not have",
                "name another output, or delete it",
            )
        return key

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


def _object(line: bytes) -> dict[str, object]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_ours(line: bytes, torn: bool = False) -> bool:
    """Whether a line is one of ours, or with `torn` the beginning of one."""
    if torn and not line.endswith(b"\n"):
        return line.startswith(_LINE_START) or _LINE_START.startswith(line)
    return str(_object(line).get("id", "")).startswith("batch_req_")


def _is_torn_start(output: Path) -> bool:
    """Whether the file is the beginning of our first line: a kill can leave that too."""
    if output.suffix == ".gz":
        return output.stat().st_size < 32 or next(iter(read_whole_lines(output)), None) is None
    with output.open("rb") as file:
        head = file.read(1 << 16)
    return b"\n" not in head and _is_ours(head, torn=True)


def check_paths(
    source: Path, output: Path, errors: Path | None, summary: Path | None = None
) -> None:
    """Refuse paths that would destroy something: of input, output, its sidecar, errors and summary no two are one.

    Raises:
        RequestError: two are one file, or a folder is missing.
    """
    named = {"input": source, "output": output, "errors": errors, "summary": summary}
    if output != STDIO:
        named["finished lines"] = sidecar_path(output)
    files = {role: path for role, path in named.items() if path is not None and path != STDIO}
    if source != STDIO and (not source.exists() or source.is_dir()):
        raise RequestError(
            f"there is no file `{source}`", "name a JSONL file, or `-` for standard input"
        )
    for role, path in files.items():
        if role != "input" and (not path.parent.is_dir() or path.is_dir()):
            raise RequestError(f"cannot write `{path}`", "name a file in a folder that exists")
    for (role, path), (other, second) in combinations(files.items(), 2):
        if path.resolve() == second.resolve() or (
            path.exists() and second.exists() and path.samefile(second)
        ):
            raise RequestError(f"`{second}` is named for {role} and for {other}", "name two files")
