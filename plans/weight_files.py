"""Which files of a model's folder hold its weights. The planner and the runtime ask here.

The rule is transformers': `model.safetensors` alone, else the files that
`model.safetensors.index.json` names. Whatever else lies in the folder is not the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenspeed_plan.plans.errors import CheckpointError
from tokenspeed_plan.plans.shown import shown
from tokenspeed_plan.plans.text import printable_line, read_utf8

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HINT = "the folder must hold the complete checkpoint, as it was published"
_MAX_JSON_BYTES = 256 << 20
_ADAPTER = "adapter_config.json"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.bin.index.json", "*.gguf", "*.pt", "*.pth")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights, and the tensors that the index puts into it."""

    path: Path
    promised: tuple[str, ...] = field(default=())


def weight_files(folder: Path) -> tuple[WeightFile, ...]:
    """The files that hold the weights, in the order of their names; empty where there are none.

    Raises:
        CheckpointError: the index is damaged or names a file that is missing or elsewhere; or
            weights are there in another form.
    """
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"`{folder}` has an adapter beside its weights (`{_ADAPTER}`)",
            "merge the adapter into the weights, or move its files elsewhere",
        )
    if (folder / SINGLE_FILE).is_file():
        return (WeightFile(folder / SINGLE_FILE),)
    if (folder / INDEX_FILE).is_file():
        return _indexed(folder)
    _refuse_other_weights(folder)
    return ()


def _refuse_other_weights(folder: Path) -> None:
    for pattern in _OTHER_WEIGHTS:
        found = min(folder.glob(pattern), default=None)
        if found is not None:
            raise CheckpointError(
                f"`{folder}` has `{found.name}`, but neither `{SINGLE_FILE}` nor `{INDEX_FILE}`",
                "save the model with transformers' `save_pretrained`, or add the index",
            )


def _indexed(folder: Path) -> tuple[WeightFile, ...]:
    promised: dict[str, list[str]] = {}
    for tensor, name in _weight_map(folder / INDEX_FILE).items():
        promised.setdefault(_checked_name(folder, name), []).append(tensor)
    files = []
    for name, tensors in sorted(promised.items()):
        if not (folder / name).is_file():
            raise CheckpointError(f"`{folder / name}` is missing, which `{INDEX_FILE}` names", HINT)
        files.append(WeightFile(folder / name, tuple(tensors)))
    return tuple(files)


def _weight_map(path: Path) -> dict[str, Any]:
    names = read_json_object(path, HINT).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"`{path}` has no `weight_map` that names files", HINT)
    return names


def _checked_name(folder: Path, name: object) -> str:
    """The name of a file beside the index."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or not _is_plain(name):
        raise CheckpointError(
            f"`{folder / INDEX_FILE}` names {shown(name)}, "
            "which is not a safetensors file beside it",
            HINT,
        )
    return name


def _is_plain(name: str) -> bool:
    """Whether a name leads to no other folder."""
    return name.isprintable() and not any(mark in name for mark in "/\\:")


def add_tensors(all_tensors: dict[str, T], file: WeightFile, tensors: Mapping[str, T]) -> None:
    """Add the tensors of a file to those of the files before it.

    Raises:
        CheckpointError: the file lacks one that the index puts into it, or has one that another
            file has too.
    """
    for name in file.promised:
        if name not in tensors:
            raise CheckpointError(
                f"`{file.path}` has no tensor `{printable_line(name)}`, "
                f"which `{INDEX_FILE}` puts there",
                HINT,
            )
    for name in tensors:
        if name in all_tensors:
            raise CheckpointError(
                f"`{file.path}` has the tensor `{printable_line(name)}`, and so has another file",
                HINT,
            )
    all_tensors.update(tensors)


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or another value.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("too large")
        value = json.loads(read_utf8(path))
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read `{path}`: it is not JSON", hint) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` is not a JSON object", hint)
    return value
