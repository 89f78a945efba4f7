"""The header of a safetensors file: a length in 8 bytes, then JSON, then the tensors' bytes.

It is held to what the safetensors library refuses too, so that what is planned can be loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.errors import CheckpointError
from tokenspeed_plan.plans.shown import shown
from tokenspeed_plan.plans.weight_files import HINT

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's limit
_MAX_DIM = 1 << 40
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file.

    Raises:
        CheckpointError: it is damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            text = file.read(length)
        return _tensors(text, path.stat().st_size - _LENGTH_BYTES - length)
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", HINT) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is not a safetensors file: {shown(str(error))[1:-1]}", HINT
        ) from error


def _tensors(text: bytes, data_bytes: int) -> dict[str, TensorHeader]:
    """The tensors of a header; together they must fill the rest of the file."""
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once_each)
    if not isinstance(header, dict):
        raise ValueError("header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        raise ValueError("`__metadata__` is not an object of texts")
    places = sorted(_place(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop, name in places:
        if begin != end:
            raise ValueError(f"{name} begins at byte {begin}, not {end}")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{data_bytes} bytes of tensors, not {end}")
    return {
        name: TensorHeader(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()
    }


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is given twice")
    return made


def _place(name: str, entry: Any) -> tuple[int, int, str]:
    """The first byte of a tensor, the byte after its last one, and its name."""
    name.encode()  # half of a surrogate pair is a ValueError
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is not an object")
    shape, dtype = _sizes(name, entry, "shape"), entry.get("dtype")
    begin, end = _offsets(name, entry)
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has dtype {shown(dtype)}")
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes for {dtype} {shown(shape)}")
    return begin, end, name


def _offsets(name: str, entry: Mapping[str, Any]) -> list[int]:
    offsets = _sizes(name, entry, "data_offsets")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"{name} has data_offsets {shown(offsets)}")
    return offsets


def _sizes(name: str, entry: Mapping[str, Any], key: str) -> list[int]:
    values = entry.get(key)
    if not isinstance(values, list) or not all(map(_is_size, values)):
        raise ValueError(f"{name} has {key} {shown(values)}")
    return values


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_DIM
