"""Where the files of a job are: a folder that all workers see, or a bucket of an object store.

All that workers agree on rests on one thing: `create` makes a file with its content or finds it
made, for one caller alone. A folder does it by a hard link (on NFS, too), S3 and Google's storage
by a condition on the upload.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from uuid import uuid4

from tokenspeed_plan.plans.errors import RequestError

# Object stores whose client makes an object only where there is none (`mode="create"`), atomically.
CONDITIONAL = ("gcs", "gs", "s3", "s3a")
_CLUSTER_HINT = "install the extra `cluster`: `pip install 'tokenspeed-plan[cluster]'`"


class Store(Protocol):
    """Small files by name; a name has one folder: `leases/00007.1`."""

    def create(self, name: str, data: bytes) -> bool:
        """Make a file, whole or not at all; False where there is one."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file; readers see the old content or the new one."""

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is none."""

    def reader(self, name: str) -> BinaryIO:
        """A file that is there, to read."""

    def names(self, folder: str) -> list[str]:
        """The names of a folder's files, without the folder."""

    def remove(self, name: str) -> None:
        """Delete a file, if there is one."""


class FolderStore:
    """A folder of this machine, or one that is mounted on all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, name: str, data: bytes) -> bool:
        """Make a file, whole or not at all; False where there is one.

        Raises:
            RequestError: the file system has no hard links.
        """
        path = self._path(name)
        draft = self._draft(path, data, to_disk=True)
        try:
            with suppress(OSError):
                os.link(draft, path)
            # Over NFS the answer to a link that was made can be lost; the count of names is not.
            is_made = draft.stat().st_nlink == 2
        finally:
            draft.unlink()
        if not is_made and not path.exists():
            raise RequestError(
                f"`{self.root}` cannot hold leases: its file system makes no hard links",
                "name a folder of a POSIX file system, or a bucket: `--lease s3://bucket/job`",
            )
        return is_made

    def replace(self, name: str, data: bytes) -> None:
        """Write a file; readers see the old content or the new one."""
        path = self._path(name)
        os.replace(self._draft(path, data, to_disk=False), path)

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is none."""
        with suppress(FileNotFoundError):
            return (self.root / name).read_bytes()
        return None

    def reader(self, name: str) -> BinaryIO:
        """A file that is there, to read."""
        return (self.root / name).open("rb")

    def names(self, folder: str) -> list[str]:
        """The names of a folder's files, without the folder."""
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self.root / folder) if name[0] != "."]
        return []

    def remove(self, name: str) -> None:
        """Delete a file, if there is one."""
        (self.root / name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _draft(self, path: Path, data: bytes, to_disk: bool) -> Path:
        """A file beside another one. What is only a heartbeat need not be on the disk."""
        draft = path.with_name(f".{path.name}.{uuid4().hex}")
        with draft.open("wb") as file:
            file.write(data)
            if to_disk:
                file.flush()
                os.fsync(file.fileno())
        return draft


class ObjectStore:
    """A bucket, or a part of one.

    Args:
        files: a file system of fsspec; its `pipe_file(mode="create")` must be atomic.
        root: the path there.
    """

    def __init__(self, files: Any, root: str) -> None:
        self.files = files
        self.root = root.rstrip("/")

    def create(self, name: str, data: bytes) -> bool:
        """Make an object; False where there is one.

        A client tries again where an answer was lost, and then finds what it has made itself. So
        no two workers make a file with the same content.
        """
        try:
            self.files.pipe_file(f"{self.root}/{name}", data, mode="create")
        except OSError:  # of old clients no FileExistsError
            found = self.read(name)
            if found is None:
                raise
            return found == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Write an object."""
        self.files.pipe_file(f"{self.root}/{name}", data)

    def read(self, name: str) -> bytes | None:
        """What an object holds; None where there is none."""
        with suppress(FileNotFoundError):
            return cast(bytes, self.files.cat_file(f"{self.root}/{name}"))
        return None

    def reader(self, name: str) -> BinaryIO:
        """An object that is there, to read."""
        return cast(BinaryIO, self.files.open(f"{self.root}/{name}", "rb"))

    def upload(self, path: Path, name: str) -> None:
        """Copy a file of this machine."""
        self.files.put_file(str(path), f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        """The names of a folder's objects, without the folder."""
        with suppress(FileNotFoundError):
            found = self.files.ls(f"{self.root}/{folder}", detail=False, refresh=True)
            return [path.rpartition("/")[2] for path in found]
        return []

    def remove(self, name: str) -> None:
        """Delete an object, if there is one."""
        with suppress(FileNotFoundError):
            self.files.rm_file(f"{self.root}/{name}")


def is_url(place: str) -> bool:
    """Whether a place is named by a URL, not by a path."""
    return "://" in place


def open_files(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there.

    Raises:
        RequestError: there is no such file system, or its package is missing.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RequestError(f"cannot open `{url}`: {error}", _CLUSTER_HINT) from error
    return files, str(path)


def open_store(place: str) -> Store:
    """The store at a path or a URL.

    Raises:
        RequestError: this kind of store makes no file for one worker alone.
    """
    if not is_url(place):
        return FolderStore(Path(place).absolute())
    kind = place.partition("://")[0]
    if kind == "file":
        return FolderStore(Path(place.removeprefix("file://")).absolute())
    if kind not in CONDITIONAL:
        raise RequestError(
            f"`{place}` cannot hold leases: a file of `{kind}` may be made by two at once",
            f"name a folder that all workers see, or a bucket: {', '.join(CONDITIONAL)}",
        )
    return ObjectStore(*open_files(place))
