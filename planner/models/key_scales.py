"""The scales of FP8 keys and values that a checkpoint was calibrated with: one number a layer."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from tokenspeed_plan.planner.models.tensor_header import read_header
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.weight_files import weight_files

# ModelOpt's names, then those of compressed-tensors, behind the name of a layer's attention.
KEY_NAMES = ("k_proj.k_scale", "k_scale")
VALUE_NAMES = ("v_proj.v_scale", "v_scale")
_ENDINGS = (".k_scale", ".v_scale")


def read_key_scales(folder: Path) -> dict[str, float]:
    """The numbers by the names of their tensors; the only values of a checkpoint that a plan has.

    Raises:
        SpecError: one is not one number, or not positive and finite.
    """
    found: dict[str, float] = {}
    for file in weight_files(folder):
        names = [name for name in read_header(file.path) if name.endswith(_ENDINGS)]
        if names:
            found |= _numbers(file.path, names)
    return found


def _numbers(path: Path, names: list[str]) -> dict[str, float]:
    """Some tensors of a safetensors file whose header was checked."""
    found: dict[str, float] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in names:
            entry = header[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            found[name] = _number(name, entry["dtype"], file.read(end - begin))
    return found


def _number(name: str, dtype: str, data: bytes) -> float:
    value = math.nan
    if dtype == "F32" and len(data) == 4:
        (value,) = struct.unpack("<f", data)
    elif dtype == "F16" and len(data) == 2:
        (value,) = struct.unpack("<e", data)
    elif dtype == "BF16" and len(data) == 2:
        (value,) = struct.unpack("<f", b"\0\0" + data)
    if not 0.0 < value < math.inf:
        raise SpecError(
            f"`{name}` is stored as {dtype} in {len(data)} bytes and is {value}, one positive "
            "number is planned",
            "write `kv_dtype: bf16`, or get the checkpoint anew",
        )
    return value


def scales_of(source: str, scales: Mapping[str, float]) -> tuple[float, float]:
    """The scales of keys and values of a layer; 1 where the checkpoint has none.

    Args:
        source: what the names of the layer's attention begin with.
        scales: of the checkpoint.
    """

    def find(names: tuple[str, ...]) -> float:
        found = [scales[f"{source}{name}"] for name in names if f"{source}{name}" in scales]
        return next(iter(found), 1.0)

    return find(KEY_NAMES), find(VALUE_NAMES)
