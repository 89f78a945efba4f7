"""Whether the weights of a model are those that were planned: digests of their files.

The digest of a header is of the names, dtypes, shapes and places of its tensors. It is read in no
time, and tells a file of another model or in another dtype. Only the digest of all bytes, at a few
seconds for 10 GB, tells other values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.plans.errors import CheckpointError, PlanError
from tokenspeed_plan.plans.schema import Plan, Shard
from tokenspeed_plan.plans.weight_files import HINT, weight_files

# What is compared: the headers, also the bytes where all files together are small, or all bytes.
Depth = Literal["headers", "small", "all"]
SMALL_BYTES = 1 << 30  # read and digested within a second

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_HINT = "restore the files, name the planned ones with `--weights DIR`, or plan again"


def header_digests(folder: Path) -> dict[str, Shard]:
    """The files of weights in a folder with the digests of their headers; empty without weights.

    Raises:
        CheckpointError: a file is damaged.
    """
    return {
        file.path.name: Shard(header_sha256=_header_digest(file.path))
        for file in weight_files(folder)
    }


def all_digests(folder: Path) -> dict[str, Shard]:
    """The same with the digests of all bytes."""
    shards = header_digests(folder)
    digests = _file_digests(folder / name for name in shards)
    return {
        name: shard.model_copy(update={"file_sha256": digest})
        for (name, shard), digest in zip(shards.items(), digests, strict=True)
    }


def check_headers(plan: Plan, folder: Path) -> None:
    """The weights in a folder must have the headers that were planned, where the plan knows them.

    Raises:
        PlanError: a file is missing, is new, or is another one.
    """
    planned = plan.model.shards
    if not planned:
        return
    found = header_digests(folder)
    if found.keys() != planned.keys():
        raise PlanError(
            f"`{folder}` has the weights {_listed(found)}, planned were {_listed(planned)}", _HINT
        )
    for name, shard in planned.items():
        if found[name].header_sha256 != shard.header_sha256:
            raise PlanError(
                f"`{folder / name}` is not what was planned: it has other tensors, or the same in "
                "another dtype, shape or order",
                _HINT,
            )


def check_weight_files(plan: Plan, folder: Path, depth: Depth) -> None:
    """The weights must have the planned headers, and the planned bytes as far as `depth` asks.

    Raises:
        PlanError: a file was changed; or the plan has no digests, and `depth` is `all`.
    """
    check_headers(plan, folder)
    shards = plan.model.shards
    known = [folder / name for name, shard in shards.items() if shard.file_sha256]
    if depth == "all" and not known:
        raise PlanError(
            "the plan has no digests of its weights",
            "plan again from the checkpoint: `model: {path: ...}`",
        )
    if depth == "headers" or (depth == "small" and _size_bytes(known) > SMALL_BYTES):
        return
    for path, digest in zip(known, _file_digests(known), strict=True):
        if digest != shards[path.name].file_sha256:
            raise PlanError(f"`{path}` was changed after planning: its bytes differ", _HINT)


def _listed(names: Mapping[str, Shard]) -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    if more:
        first.append(f"{more} more")
    return ", ".join(first) or "none"


def _size_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _header_digest(path: Path) -> str:
    """Digest of what the header of a safetensors file says of its tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
        header.pop("__metadata__", None)
        return sha256(canonical(header))
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", HINT) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is not a safetensors file", HINT) from error


def _file_digests(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, several at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_file_digest, paths))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", HINT) from error
