"""Files of a batch run: plain, gzipped or standard streams; readers that tolerate a torn end."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self, cast

from tokenspeed_plan.plans.errors import RequestError

STDIO = Path("-")
_CHUNK_BYTES = 1 << 20


class LineWriter(Protocol):
    """Takes whole lines; each has been handed to the operating system when `write` returns."""

    def write(self, line: bytes) -> None:
        """Append one line, its newline included."""

    def close(self) -> None:
        """Flush and close."""


class PlainWriter:
    """Writes to a file or a standard stream; a standard stream stays open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: bytes) -> None:
        """Append one line, its newline included."""
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Flush, and close a file."""
        self._file.flush()
        is_standard_stream = self._file.fileno() <= 2
        if not is_standard_stream:
            self._file.close()


class GzipWriter:
    """One gzip stream, flushed after each line, so that all lines before a torn end can be read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._zip = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, mtime=0)

    def write(self, line: bytes) -> None:
        """Append one line, its newline included."""
        self._zip.write(line)
        self._zip.flush(zlib.Z_SYNC_FLUSH)
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._zip.close()
        self._file.close()


def open_writer(path: Path) -> LineWriter:
    """Open a new, empty file; `-` is standard output.

    Raises:
        RequestError: standard output is closed.
    """
    if path == STDIO:
        if sys.stdout is None:
            raise RequestError("standard output is closed", "name a file to write")
        return PlainWriter(sys.stdout.buffer)
    if path.suffix == ".gz":
        return GzipWriter(path)
    return PlainWriter(path.open("wb"))


class InputLine(NamedTuple):
    """A line that is not blank: number from 1, offset in the (decompressed) file, bytes."""

    number: int
    offset: int
    raw: bytes


class InputFile:
    """A batch file that is read once from its beginning; single lines can be read again by offset.

    A stream cannot be sought, so it is copied to a temporary file first. A gzip file is sought by
    decompressing up to the offset, so offsets are best read in ascending order.

    Raises:
        RequestError: the file cannot be read, or standard input is closed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = _open_seekable(path)
        except OSError as error:
            raise self._unreadable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[InputLine]:
        """All lines that are not blank, without their ends (LF, CR LF).

        Raises:
            RequestError: the file cannot be read.
        """
        offset = 0
        try:
            for number, line in enumerate(self._file, 1):
                if line.strip():
                    yield InputLine(number, offset, line.rstrip(b"\r\n"))
                offset += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(error) from error

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Some bytes of the (decompressed) file.

        Raises:
            RequestError: the file cannot be read.
        """
        try:
            self._file.seek(offset)
            return self._file.read(size_bytes)
        except (OSError, EOFError, zlib.error) as error:
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
        file = tempfile.TemporaryFile(prefix="tokenspeed-")  # noqa: SIM115
        shutil.copyfileobj(stream, file)
    file.seek(0)
    return cast(BinaryIO, file)


def _open_stream(path: Path) -> AbstractContextManager[BinaryIO]:
    if path != STDIO:
        return path.open("rb")  # a pipe
    if sys.stdin is None:
        raise RequestError("standard input is closed", "name a JSONL file")
    return nullcontext(sys.stdin.buffer)


def read_whole_lines(path: Path) -> Iterator[bytes]:
    """Lines with their newline; an incomplete last line is left out, compressed or not."""
    chunks = _read_chunks(path)
    if path.suffix == ".gz":
        chunks = _decompress(chunks)
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _decompress(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The text of gzip members, up to the first byte that cannot be decompressed."""
    stream = zlib.decompressobj(wbits=31)
    for compressed in chunks:
        while compressed:
            try:
                yield stream.decompress(compressed)
            except zlib.error:
                return
            compressed = stream.unused_data
            if compressed:  # another gzip member begins
                stream = zlib.decompressobj(wbits=31)
