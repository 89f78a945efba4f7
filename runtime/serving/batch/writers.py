"""Files that a batch run writes: plain, gzipped or standard output; each is one run's alone."""

from __future__ import annotations

import fcntl
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import CHUNK_BYTES, STDIO

_FULL_HINT = "mend that and run the same command again: finished rows are kept"


class LineWriter(Protocol):
    """Takes whole lines; each has been handed to the operating system when `write` returns."""

    def write(self, line: bytes) -> None:
        """Append one line, its newline included.

        Raises:
            RequestError: it cannot be written.
        """

    def is_intact(self) -> bool:
        """Whether what was written is still there under its name."""

    def written(self) -> Iterator[bytes]:
        """The lines that were written, where they can be read."""

    def close(self) -> None:
        """Write to the disk and close."""


class StreamWriter:
    """Writes to a stream that cannot be read back: standard output, a pipe, a device."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name

    def write(self, line: bytes) -> None:
        """Append one line, its newline included.

        Raises:
            RequestError: it cannot be written.
            BrokenPipeError: nobody reads it any more.
        """
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            discard_rest(self._file)
            if isinstance(error, BrokenPipeError):
                raise
            raise unwritable(self._name, error) from error

    def is_intact(self) -> bool:
        """What was written is with its reader."""
        return True

    def written(self) -> Iterator[bytes]:
        """Nothing: what was written is with its reader."""
        return iter(())

    def close(self) -> None:
        """Leave standard output open."""
        if self._file is not getattr(sys.stdout, "buffer", None):
            self._file.close()


class FileWriter:
    """Writes to a regular file.

    Args:
        path: its name.
        file: it, open and empty.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = 0
        self._is_changed = False  # by another process

    def write(self, line: bytes) -> None:
        """Append one line, its newline included.

        Raises:
            RequestError: it cannot be written.
        """
        if os.fstat(self._file.fileno()).st_size != self._size:
            self._is_changed = True
            return  # whoever asks next whether it is intact ends the run
        try:
            self._append(line)
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error
        self._size = self._file.tell()

    def _append(self, line: bytes) -> None:
        self._file.write(line)

    def is_intact(self) -> bool:
        """Whether the file still has its name and its size."""
        size = os.fstat(self._file.fileno()).st_size
        is_changed = self._is_changed or size != self._size
        return not is_changed and has_name(self._file, self._path)

    def written(self) -> Iterator[bytes]:
        """The lines that were written and are still in the file."""
        return whole_lines(self._file, self._path)

    def close(self) -> None:
        """Write to the disk and close, so that the finished lines beside it may go.

        Raises:
            RequestError: it cannot be written.
        """
        try:
            self._end()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sync_folder(self._path)
        except OSError as error:
            raise unwritable(self._path, error) from error
        finally:
            with suppress(OSError):
                self._file.close()

    def _end(self) -> None:
        """Write what ends the file."""


class GzipWriter(FileWriter):
    """One gzip stream, flushed after each line, so that all lines before a torn end can be read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(path, file)
        self._zip = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        file.flush()
        self._size = file.tell()

    def _append(self, line: bytes) -> None:
        self._zip.write(line)
        self._zip.flush(zlib.Z_SYNC_FLUSH)

    def _end(self) -> None:
        self._zip.close()


def unwritable(name: Path | str, error: OSError) -> RequestError:
    """The error for a file that cannot be written, as its disk is full."""
    return RequestError(f"cannot write `{name}`: {error.strerror or error}", _FULL_HINT)


def discard_rest(stream: BinaryIO | TextIO) -> None:
    """Lead a stream that cannot be written to the null device.

    The interpreter writes again at its end what is pending, and would exit with a code of its own.
    """
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_stream(path: Path) -> bool:
    """Whether a path is standard output, a pipe or a device: nothing that can be read back."""
    return path == STDIO or (path.exists() and not path.is_file() and not path.is_dir())


def open_writer(path: Path) -> LineWriter:
    """Open an empty file that is this run's alone; `-` is standard output.

    Raises:
        RequestError: standard output is closed, or another run writes the file.
    """
    if path == STDIO:
        if sys.stdout is None:
            raise RequestError("standard output is closed", "name a file to write")
        return StreamWriter(sys.stdout.buffer, "standard output")
    if is_stream(path):
        return StreamWriter(path.open("wb"), str(path))
    return file_writer(path, open_locked(path))


def file_writer(path: Path, file: BinaryIO) -> FileWriter:
    """A writer that begins a locked file anew; gzipped where its name says so.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        file.seek(0)
        file.truncate()
        if path.suffix == ".gz":
            return GzipWriter(path, file)
        return FileWriter(path, file)
    except OSError as error:
        raise unwritable(path, error) from error


def open_locked(path: Path, output: Path | None = None) -> BinaryIO:
    """Open a file for reading and writing, make it where it is missing, and lock it.

    `output` is named in the error where the file is only beside it.

    The lock is on the file, not on its name: another name of it is locked, too. A file that lost
    its name while it was being locked belongs to a run that has ended, so the name is opened again.

    Raises:
        RequestError: another run has locked it.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise RequestError(
                f"another run is writing `{output or path}`", "wait for it, or name another output"
            ) from error
        if has_name(file, path):
            return file
        file.close()


def has_name(file: BinaryIO, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def sync_folder(path: Path) -> None:
    """Write the name of a file to the disk, where the file system can."""
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_whole_lines(path: Path) -> Iterator[bytes]:
    """Lines with their newline; an incomplete last line is left out, compressed or not."""
    with path.open("rb") as file:
        yield from whole_lines(file, path)


def whole_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The same of an open file with this name; where it stands stays as it is."""
    chunks = _read_chunks(file)
    if path.suffix == ".gz":
        chunks = _decompress(chunks)
    parts: list[bytes] = []  # of a line that is not whole yet
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts) + b"\n"
            parts = [other]


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(file.fileno(), CHUNK_BYTES, offset):
        yield chunk
        offset += len(chunk)


def _decompress(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The text of gzip members, up to the first byte that cannot be decompressed."""
    stream = zlib.decompressobj(wbits=31)
    for compressed in chunks:
        while compressed:
            try:
                yield stream.decompress(compressed, CHUNK_BYTES)
            except zlib.error:
                return
            compressed = stream.unconsumed_tail or stream.unused_data
            if stream.eof:  # another gzip member begins
                stream = zlib.decompressobj(wbits=31)
    with suppress(zlib.error):
        yield stream.flush()
