"""Checkpoints in FP8, made of ones in BF16: round to nearest, in the layout that Qwen publishes.

A shard is read, converted and written before the next one, so that a checkpoint of any size needs
the memory of one shard. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenspeed_plan.plans.errors import CheckpointError, RequestError
from tokenspeed_plan.plans.fp8_format import BLOCK, is_fp8_matrix, module_of, scale_name
from tokenspeed_plan.plans.tokenizer_files import TOKENIZER_FILES, template_names
from tokenspeed_plan.plans.weight_files import (
    HINT,
    INDEX_FILE,
    SINGLE_FILE,
    WeightFile,
    read_json_object,
    weight_files,
)
from tokenspeed_plan.runtime.execution.fp8_blocks import quantise_blocks

Report = Callable[[str, int, int], None]
_CONFIG = "config.json"
_KEY = "quantization_config"
_MODE = 0o644
_COPIED = ("generation_config.json", *TOKENIZER_FILES)
_FLOATS = ("BF16", "F16", "F32", "F64")
_SCALE_DTYPE = torch.bfloat16  # as published
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass
class Quantized:
    """What was written.

    Attributes:
        shard_of: the file of each tensor.
        size_bytes: of all tensors.
        converted: matrices in FP8, each expert's by itself.
        kept: modules whose matrices are not.
    """

    shard_of: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    converted: int = 0
    kept: set[str] = field(default_factory=set)


def quantize_checkpoint(source: Path, target: Path, report: Report) -> Quantized:
    """Write `source` to the new folder `target`, its matrices in FP8.

    `config.json` is written last: until then `target` is no model.

    Raises:
        CheckpointError: the source is no checkpoint, is quantised already, or holds a matrix that
            is not whole blocks or not finite.
        RequestError: the target is there already.
    """
    config = read_json_object(
        source / _CONFIG, "name the folder of a model in Hugging Face's layout"
    )
    files = weight_files(source)
    _check(source, config, files)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"`{target}` is there already", "name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    made = Quantized()
    for done, file in enumerate(files):
        report("quantizing files", done, len(files))
        _convert(file.path, target / file.path.name, made)
    for name in (*_COPIED, *template_names(source)):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if files[0].path.name != SINGLE_FILE:
        index = {"metadata": {"total_size": made.size_bytes}, "weight_map": made.shard_of}
        _write_json(target / INDEX_FILE, index)
    _write_json(target / _CONFIG, config | {_KEY: _quantization(made.kept)})
    return made


def _quantization(kept: Iterable[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(kept),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def _check(source: Path, config: dict[str, Any], files: tuple[WeightFile, ...]) -> None:
    """Refuse what cannot be converted before a byte is written."""
    text = config.get("text_config")
    if config.get(_KEY) is not None or (isinstance(text, dict) and text.get(_KEY) is not None):
        raise CheckpointError(
            f"`{source}` is quantised already: its `{_CONFIG}` has `{_KEY}`",
            "convert the BF16 checkpoint",
        )
    if not files:
        raise CheckpointError(f"there are no weights in `{source}`", HINT)
    found = False
    for file in files:
        with ExitStack() as stack:
            for name, tensor in _tensors(file.path, stack):
                if is_fp8_matrix(name):
                    found = True
                    _check_matrix(name, tensor.get_shape(), tensor.get_dtype())
    if not found:
        raise CheckpointError(
            f"`{source}` has no matrix that FP8 checkpoints quantise",
            "name a checkpoint of a family that is planned",
        )


def _check_matrix(name: str, shape: list[int], dtype: str) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"`{name}` is stored as {dtype}, not one of {', '.join(_FLOATS)}",
            "convert the BF16 checkpoint",
        )
    halves = 2 if name.endswith("gate_up_proj") else 1
    is_matrix = len(shape) >= 2 and shape[-2] % (halves * BLOCK) == 0 and shape[-1] % BLOCK == 0
    if not is_matrix:
        raise CheckpointError(
            f"`{name}` is {shape}, which is not whole blocks of {BLOCK} x {BLOCK}",
            "this model cannot be planned in FP8; keep it in BF16",
        )


def _tensors(path: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """The tensors of a file by name, not read yet.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        file = stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"`{path}` is not a safetensors file: {error}", HINT) from error
    for name in sorted(file.keys()):
        yield name, file.get_slice(name)


def _convert(source: Path, target: Path, made: Quantized) -> None:
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, tensor in _tensors(source, stack):
            if not is_fp8_matrix(name):
                tensors[name] = tensor[:]
                if len(tensor.get_shape()) > 1:
                    made.kept.add(module_of(name))
                continue
            for own_name, matrix in _matrices(name, tensor):
                tensors |= _in_blocks(own_name, matrix)
                made.converted += 1
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(_MODE)  # the library writes a file for its owner alone
    made.shard_of |= dict.fromkeys(tensors, target.name)
    made.size_bytes += sum(tensor.nbytes for tensor in tensors.values())


def _matrices(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a tensor; one of all experts becomes those of each, as they are published."""
    prefix, _, key = name.rpartition(".")
    if len(tensor.get_shape()) == 2:
        yield name, tensor[:]
        return
    for expert in range(tensor.get_shape()[0]):
        halves = tensor[expert].chunk(len(_FUSED[key]))
        for own_key, half in zip(_FUSED[key], halves, strict=True):
            yield f"{prefix}.{expert}.{own_key}.weight", half


def _in_blocks(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The elements of a matrix in FP8, and their factors.

    Raises:
        CheckpointError: an element is no finite number.
    """
    if not matrix.isfinite().all():
        raise CheckpointError(f"`{name}` has elements that are not finite", HINT)
    elements, scales = quantise_blocks(matrix, _SCALE_DTYPE)
    return {name: elements, scale_name(name): scales}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
