"""Files of a batch run: plain, gzip, standard streams; lines that survive a torn end."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol

from tokenspeed_plan.plans.errors import RequestError

STDIO = Path("-")
_CHUNK_BYTES = 1 << 20


class LineWriter(Protocol):
    """Takes whole lines; each is on its way to the file when `write` returns."""

    def write(self, line: bytes) -> None:
        """Append one line, its newline included."""

    def close(self) -> None:
        """Flush and close."""


class _Plain:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        if self._file.fileno() > 2:  # not a standard stream
            self._file.close()


class _Gzip:
    """One stream, flushed so that every line can be read back even when the end is torn off."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._zip = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, mtime=0)

    def write(self, line: bytes) -> None:
        self._zip.write(line)
        self._zip.flush(zlib.Z_SYNC_FLUSH)
        self._file.flush()

    def close(self) -> None:
        self._zip.close()
        self._file.close()


def open_writer(path: Path) -> LineWriter:
    """A new, empty file; `-` is standard output."""
    if path == STDIO:
        if sys.stdout is None:
            raise RequestError("standard output is closed", "name a file to write")
        return _Plain(sys.stdout.buffer)
    return _Gzip(path) if path.suffix == ".gz" else _Plain(path.open("wb"))


def spool(path: Path) -> tuple[Path, tempfile._TemporaryFileWrapper[bytes] | None]:
    """A path that can be read twice: a stream is copied to a temporary file, which is also returned."""
    if path.is_file():
        return path, None
    file = tempfile.NamedTemporaryFile(prefix="tokenspeed-", suffix=".jsonl")  # noqa: SIM115
    with _stream(path) as stream:
        shutil.copyfileobj(stream, file)
    file.flush()
    return Path(file.name), file


def _stream(path: Path) -> AbstractContextManager[BinaryIO]:
    if path != STDIO:
        return path.open("rb")  # a pipe
    if sys.stdin is None:
        raise RequestError("standard input is closed", "name a JSONL file")
    return nullcontext(sys.stdin.buffer)


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines without their newline; the last one need not have any."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def read_whole_lines(path: Path) -> Iterator[bytes]:
    """Only lines that end in a newline, each with it; a torn end, compressed or not, is left out."""
    rest = b""
    for chunk in _inflate(path) if path.suffix == ".gz" else _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _inflate(path: Path) -> Iterator[bytes]:
    """As much as can be decompressed."""
    stream = zlib.decompressobj(wbits=31)
    for chunk in _chunks(path):
        while chunk:
            try:
                yield stream.decompress(chunk)
            except zlib.error:
                return
            chunk = stream.unused_data
            if chunk:
                stream = zlib.decompressobj(wbits=31)
