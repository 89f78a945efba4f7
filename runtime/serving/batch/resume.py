"""Finished lines of an earlier run, so that no answer is computed twice.

Finished lines are kept in two files: the output itself, and `OUTPUT.resume` beside it. A run first
appends the output's complete lines to `OUTPUT.resume` and syncs it to disk. Only then does it write
the output anew, with lines from `OUTPUT.resume` where their key fits. A kill at any moment leaves
every finished line in at least one of the files; a line that is in both does no harm, since lines
are found by key. A line's key is its `id`: the digest of plan and row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, Self

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import STDIO
from tokenspeed_plan.runtime.serving.batch.lines import KEY_PREFIX
from tokenspeed_plan.runtime.serving.batch.notebook import Notebook
from tokenspeed_plan.runtime.serving.batch.writers import (
    LineWriter,
    file_writer,
    has_name,
    is_stream,
    open_locked,
    open_writer,
    read_whole_lines,
    unwritable,
    whole_lines,
)

_LINE_START = b'{"custom_id": '


def sidecar_path(output: Path) -> Path:
    """The file of finished lines beside an output; links share that of the file they lead to."""
    output = Path(os.path.realpath(output))
    return output.with_name(f"{output.name}.resume")


class FinishedLines:
    """Finished lines of an output that cannot be read back: there are none, and none are kept.

    Attributes:
        complete: set it once the output holds everything.
    """

    complete = False

    def __init__(self, output: Path) -> None:
        self._output = output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open_output(self) -> LineWriter:
        """The output, empty.

        Raises:
            RequestError: it cannot be written.
        """
        return open_writer(self._output)

    def line(self, key: str) -> bytes | None:
        """The finished line of a key."""
        return None

    def save(self, key: str, line: bytes) -> None:
        """Keep a finished line."""

    def rescue(self, lines: Iterable[bytes]) -> str:
        """Keep lines of an output that lost its name; returns what the user can do."""
        return "name another output"

    def close(self) -> None:
        """Release the files."""


def open_finished(output: Path, notebook: Notebook) -> FinishedLines:
    """Finished lines of an output; both files are locked until they are closed.

    Raises:
        RequestError: another run is writing, or the files hold something else.
    """
    if is_stream(output):
        return FinishedLines(output)
    return Sidecar(output, notebook)


class Sidecar(FinishedLines):
    """The file of finished lines beside an output; it and the output are locked during a run.

    An output that exists is locked before it is read: it may have several names, and each has
    finished lines of its own beside it.
    """

    def __init__(self, output: Path, notebook: Notebook) -> None:
        super().__init__(output)
        self.path = sidecar_path(output)
        self._notebook = notebook
        self._target: BinaryIO | None = None
        self._file = open_locked(self.path, output)
        with ExitStack() as undo:
            undo.callback(self.close)
            if output.exists():
                self._target = open_locked(output)
            self._recover()
            self._take_over()
            undo.pop_all()

    def open_output(self) -> LineWriter:
        """The output, empty.

        Raises:
            RequestError: another run has written it meanwhile, or it cannot be written.
        """
        if self._target is None:
            self._target = open_locked(self._output)
            if os.fstat(self._target.fileno()).st_size:
                raise RequestError(
                    f"another run has written `{self._output}`", "run the same command again"
                )
        return file_writer(self._output, self._target)

    def _recover(self) -> None:
        """Index what an interrupted run saved; cut off an incomplete last line.

        Raises:
            RequestError: the file holds something else, or answers to other rows.
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

    def _take_over(self) -> None:
        """Copy the output's finished lines here and sync them to disk.

        Raises:
            RequestError: the output holds something else, or answers to other rows.
        """
        size_before = os.fstat(self._file.fileno()).st_size
        try:
            self._read_output()
            self._sync()
        except RequestError:
            with suppress(OSError):
                self._file.truncate(size_before)
            raise

    def _read_output(self) -> None:
        if self._target is None or os.fstat(self._target.fileno()).st_size == 0:
            return
        ours = False
        for line in whole_lines(self._target, self._output):
            ours = ours or _is_ours(line)
            self._keep(line)
        if not ours and not _is_torn_start(self._output):
            raise RequestError(
                f"`{self._output}` exists and is not the output of a batch",
                "name another output, or delete it",
            )

    def _keep(self, line: bytes) -> None:
        """Save a line of an output if it is an answer."""
        key = self._finished(line)
        if key:
            self.save(key, line)

    def rescue(self, lines: Iterable[bytes]) -> str:
        """Keep lines of an output that lost its name; returns what the user can do."""
        for line in lines:
            self._keep(line)
        self._sync()
        if has_name(self._file, self.path):
            return f"run the same command again: the answers are kept in `{self.path}`"
        return f"run the same command again; the answers are lost, as `{self.path}` is gone, too"

    def _sync(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _finished(self, line: bytes) -> str | None:
        """The key of a line that holds an answer; None of any other line.

        Raises:
            RequestError: the input has no row for this answer. It would be lost.
        """
        data = _object(line)
        key, custom_id = data.get("id"), data.get("custom_id")
        if not isinstance(key, str) or not key.startswith(KEY_PREFIX):
            return None
        if not isinstance(data.get("response"), dict):
            return None
        if not self._notebook.knows(str(custom_id)):
            raise RequestError(
                f"`{self._output}` holds the answer to {custom_id!a:.80}, "
                "which the input does not have",
                "name another output, or delete it",
            )
        return key

    def save(self, key: str, line: bytes) -> None:
        """Keep a finished line.

        Raises:
            RequestError: it cannot be written.
        """
        start = self._file.seek(0, os.SEEK_END)
        if not self._notebook.add_saved(key, start, len(line)):
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def line(self, key: str) -> bytes | None:
        """The finished line of a key."""
        found = self._notebook.saved(key)
        if found is None:
            return None
        start, size = found
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        """Release the files; delete this one if the output is complete, or if it holds nothing."""
        with suppress(OSError):  # what a full disk did not take was told when it was written
            self._file.flush()
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        if (self.complete or is_empty) and has_name(self._file, self.path):
            self.path.unlink(missing_ok=True)
        for file in (self._file, self._target):
            with suppress(OSError):
                if file is not None:
                    file.close()


def _object(line: bytes) -> dict[str, object]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if isinstance(data, dict):
        return data
    return {}


def _is_ours(line: bytes, torn: bool = False) -> bool:
    """Whether a line is of a batch output; with `torn`, an incomplete line counts if it fits."""
    if torn and not line.endswith(b"\n"):
        return line.startswith(_LINE_START) or _LINE_START.startswith(line)
    return str(_object(line).get("id", "")).startswith(KEY_PREFIX)


def _is_torn_start(output: Path) -> bool:
    """Whether the file is only the beginning of a batch output's first line, as after a kill."""
    if output.suffix == ".gz":
        return output.stat().st_size < 32 or next(iter(read_whole_lines(output)), None) is None
    with output.open("rb") as file:
        head = file.read(1 << 16)
    return b"\n" not in head and _is_ours(head, torn=True)


def check_paths(
    source: Path, output: Path, errors: Path | None, summary: Path | None = None
) -> None:
    """Refuse paths with which a run would overwrite a file that it needs.

    Raises:
        RequestError: two of input, output, its sidecar, errors and summary are one file; the input
            or a folder is missing.
    """
    if source != STDIO and (not source.exists() or source.is_dir()):
        raise RequestError(
            f"there is no file `{source}`", "name a JSONL file, or `-` for standard input"
        )
    written = {"output": output, "errors": errors, "summary": summary}
    if not is_stream(output):
        written["finished lines"] = sidecar_path(output)
    for path in _real_files(written).values():
        if not path.parent.is_dir() or path.is_dir():
            raise RequestError(f"cannot write `{path}`", "name a file in a folder that exists")
    files = _real_files({"input": source} | written)
    for (role, path), (other, second) in combinations(files.items(), 2):
        if _is_same_file(path, second):
            raise RequestError(f"`{second}` is named for {role} and for {other}", "name two files")


def _real_files(named: Mapping[str, Path | None]) -> dict[str, Path]:
    """Paths that are given and are no standard stream."""
    return {role: path for role, path in named.items() if path is not None and path != STDIO}


def _is_same_file(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    return first.exists() and second.exists() and first.samefile(second)
