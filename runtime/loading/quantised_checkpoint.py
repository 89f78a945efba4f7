"""Quantised checkpoints, made of ones in BF16: round to nearest, in a published layout.

A shard is read, converted and written before the next one, so that a checkpoint of any size needs
the memory of one shard. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.errors import CheckpointError, RequestError
from tokenspeed_plan.plans.fp8_format import module_of
from tokenspeed_plan.plans.tokenizer_files import TOKENIZER_FILES, template_names
from tokenspeed_plan.plans.weight_files import (
    HINT,
    INDEX_FILE,
    SINGLE_FILE,
    WeightFile,
    read_json_object,
    weight_files,
)
from tokenspeed_plan.runtime.loading.loading_report import Report
from tokenspeed_plan.runtime.loading.recipes import Recipe, find_recipe, unit_of

_CONFIG = "config.json"
_KEY = "quantization_config"
_MODE = 0o644
_COPIED = ("generation_config.json", *TOKENIZER_FILES)
_FLOATS = ("BF16", "F16", "F32", "F64")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass
class Quantized:
    """What was written.

    Attributes:
        shard_of: the file of each tensor.
        size_bytes: of all tensors.
        converted: the encoding of each matrix, each expert's by itself.
        kept: modules whose matrices stay as they were.
    """

    shard_of: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    converted: dict[str, Encoding] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)


def quantize_checkpoint(source: Path, target: Path, word: str, report: Report) -> Quantized:
    """Write `source` to the new folder `target`, its matrices as a recipe says.

    `config.json` is written last: until then `target` is no model.

    Args:
        source: a checkpoint in Hugging Face's layout.
        target: a new folder.
        word: of the recipe.
        report: is told of the progress.

    Raises:
        CheckpointError: the source is no checkpoint, is quantised already, or holds a matrix that
            is not whole blocks or not finite.
        RequestError: the target is there already, or there is no such recipe.
    """
    config = read_json_object(
        source / _CONFIG, "name the folder of a model in Hugging Face's layout"
    )
    files = weight_files(source)
    recipe = find_recipe(word, _has_experts(config))
    _check(source, config, files, recipe)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"`{target}` is there already", "name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    made = Quantized()
    for done, file in enumerate(files):
        report("quantizing files", done, len(files))
        _convert(file.path, target / file.path.name, recipe, made)
    for name in (*_COPIED, *template_names(source)):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if files[0].path.name != SINGLE_FILE:
        index = {"metadata": {"total_size": made.size_bytes}, "weight_map": made.shard_of}
        _write_json(target / INDEX_FILE, index)
    _write_json(target / _CONFIG, config | {_KEY: recipe.config(made.kept, made.converted)})
    return made


def _has_experts(config: dict[str, Any]) -> bool:
    """Whether a config counts routed experts."""
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, dict) else [config]
    keys = ("num_experts", "num_local_experts")
    return any(section.get(key) for section in sections for key in keys)


def _check(
    source: Path, config: dict[str, Any], files: tuple[WeightFile, ...], recipe: Recipe
) -> None:
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
                encoding = recipe.encoding(name)
                if encoding is not None:
                    found = True
                    _check_matrix(name, tensor.get_shape(), tensor.get_dtype(), encoding)
    if not found:
        raise CheckpointError(
            f"`{source}` has no matrix that published checkpoints quantise",
            "name a checkpoint of a family that is planned",
        )


def _check_matrix(name: str, shape: list[int], dtype: str, encoding: Encoding) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"`{name}` is stored as {dtype}, not one of {', '.join(_FLOATS)}",
            "convert the BF16 checkpoint",
        )
    halves = 2 if name.endswith("gate_up_proj") else 1
    rows, columns = unit_of(encoding)
    is_matrix = len(shape) >= 2 and shape[-2] % (halves * rows) == 0 and shape[-1] % columns == 0
    if not is_matrix:
        raise CheckpointError(
            f"`{name}` is {shape}, which is not whole blocks of {rows} x {columns}",
            "this model cannot be planned in this format; keep it in BF16",
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


def _convert(source: Path, target: Path, recipe: Recipe, made: Quantized) -> None:
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        found = dict(_tensors(source, stack))
        for name, tensor in found.items():
            if recipe.encoding(name) is None:
                tensors[name] = tensor[...]
                if len(tensor.get_shape()) > 1:
                    made.kept.add(module_of(name))
                continue
            for own_name, matrix, largest in _matrices(name, found):
                encoding = recipe.encoding(own_name)
                assert encoding is not None
                tensors |= recipe.quantise(own_name, matrix, largest)
                made.converted[own_name] = encoding
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(_MODE)  # the library writes a file for its owner alone
    made.shard_of |= dict.fromkeys(tensors, target.name)
    made.size_bytes += sum(tensor.nbytes for tensor in tensors.values())


def _matrices(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, float]]:
    """The matrices of a tensor; one of all experts becomes those of each, as they are published.

    With each comes the largest size of an element of it, and of the other half where gate and up
    are read together: engines want one factor for both.
    """
    prefix, _, key = name.rpartition(".")
    tensor = found[name]
    if len(tensor.get_shape()) == 2:
        matrix = tensor[...]
        largest = _largest(name, matrix)
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            beside = name.replace(one, other)
            if one in name and beside in found:
                largest = max(largest, _largest(beside, found[beside][...]))
        yield name, matrix, largest
        return
    for expert in range(tensor.get_shape()[0]):
        matrix = tensor[expert]
        largest = _largest(name, matrix)
        halves = matrix.chunk(len(_FUSED[key]))
        for own_key, half in zip(_FUSED[key], halves, strict=True):
            yield f"{prefix}.{expert}.{own_key}.weight", half, largest


def _largest(name: str, matrix: Tensor) -> float:
    """The largest size of an element.

    Raises:
        CheckpointError: an element is no finite number.
    """
    largest = float(matrix.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(f"`{name}` has elements that are not finite", HINT)
    return largest


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
