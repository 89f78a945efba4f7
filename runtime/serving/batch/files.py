"""The input of a batch run: a plain or gzipped file, or a stream; damage is told line by line."""

from __future__ import annotations

import gzip
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self, cast

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.openai.bodies import MAX_JSON_BYTES

STDIO = Path("-")
CHUNK_BYTES = 1 << 20
BEGINNING_BYTES = 1 << 16  # kept of a line that is too long: its `custom_id` may be there
# What reading an archive raises where its bytes are not those that were written.
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)


class InputLine(NamedTuple):
    """A line that is not blank.

    Attributes:
        number: from 1.
        offset: in the (decompressed) file, in bytes.
        raw: its bytes without its end; of a line with a fault at most its beginning.
        fault: what is wrong with it, None where nothing is.
    """

    number: int
    offset: int
    raw: bytes
    fault: str | None = None


class InputFile:
    """A batch file that is read once from its beginning; single lines can be read again by offset.

    `first_line` is the number of its first line: it may be a part of a longer file. `file` is it,
    where it is open already.

    Attributes:
        end: offset behind the last line that was read.

    A stream cannot be sought, so it is copied to a temporary file first. A gzip file is sought by
    decompressing up to the offset, so offsets are best read in ascending order.

    Raises:
        RequestError: the file cannot be read, or standard input is closed.
    """

    def __init__(
        self,
        path: Path,
        max_line_bytes: int = MAX_JSON_BYTES,
        first_line: int = 1,
        file: BinaryIO | None = None,
    ) -> None:
        self._path = path
        self._max_line_bytes = max_line_bytes
        self._first_line = first_line
        self.end = 0
        try:
            self._file = file or _open_seekable(path)
        except OSError as error:
            raise self._unreadable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[InputLine]:
        """All lines that are not blank, without their ends (LF, CR LF).

        A line that is too long is not kept in memory. Where an archive is damaged, what is left of
        it is one line with a fault.

        Raises:
            RequestError: the file cannot be read, or is no archive although its name says so.
        """
        offset = 0
        for number in count(self._first_line):
            try:
                line, size = self._next_line(number, offset)
            except DAMAGE as error:
                if number == self._first_line:
                    raise self._unreadable(error) from error
                yield InputLine(number, offset, b"", f"the archive is damaged here: {error}")
                return
            except OSError as error:
                raise self._unreadable(error) from error
            if not size:
                return
            self.end = offset + size
            if line.raw.strip():
                yield line
            offset = self.end

    def _next_line(self, number: int, offset: int) -> tuple[InputLine, int]:
        """A line, and its size with its end; 0 at the end of the file."""
        raw = self._file.readline(self._max_line_bytes + 1)
        size = len(raw)
        if raw.endswith(b"\n") or size <= self._max_line_bytes:
            return InputLine(number, offset, raw.rstrip(b"\r\n")), size
        while rest := self._file.readline(CHUNK_BYTES):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        fault = f"the line has {size} bytes, the most is {self._max_line_bytes}"
        return InputLine(number, offset, raw[:BEGINNING_BYTES], fault), size

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Some bytes of the (decompressed) file.

        Raises:
            RequestError: the file cannot be read.
        """
        if not size_bytes:
            return b""  # of an archive's damage
        try:
            self._file.seek(offset)
            return self._file.read(size_bytes)
        except (OSError, *DAMAGE) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> RequestError:
        return RequestError(
            f"cannot read `{self._path}`: {error}", "name a JSONL file, or `-` for standard input"
        )


def _open_seekable(path: Path) -> BinaryIO:
    if not path.is_file():
        return _spool(path)
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _spool(path: Path) -> BinaryIO:
    """Copy a stream to a temporary file that has no name, and so is gone when it is closed."""
    with _open_stream(path) as stream:
        file = _temporary_file()
        while chunk := stream.read(CHUNK_BYTES):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise no_scratch(error) from error
    file.seek(0)
    return file


def _temporary_file() -> BinaryIO:
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(prefix="tokenspeed-"))
    except OSError as error:
        raise no_scratch(error) from error


def no_scratch(error: Exception) -> RequestError:
    """The error for a folder of temporary files that is full, missing or not writable."""
    return RequestError(
        f"cannot write a temporary file: {error}",
        "free space in the folder for temporary files, or set TMPDIR to another one",
    )


def _open_stream(path: Path) -> AbstractContextManager[BinaryIO]:
    if path != STDIO:
        return path.open("rb")  # a pipe
    if sys.stdin is None:
        raise RequestError("standard input is closed", "name a JSONL file")
    return nullcontext(sys.stdin.buffer)
