"""Quantised checkpoints: what `quantization_config` says, held against the tensors.

FP8 as Qwen publishes it is planned: e4m3 elements in blocks of 128 x 128, with a factor for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenspeed_plan.planner.models.tensor_header import TensorHeader
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.fp8_format import (
    BLOCK,
    STORED_FP8,
    STORED_SCALES,
    blocks,
    is_fp8_matrix,
    is_unconverted,
    module_of,
    scale_name,
)
from tokenspeed_plan.plans.shown import shown

if TYPE_CHECKING:
    from tokenspeed_plan.planner.models.config_reader import ConfigReader

_KEY = "quantization_config"
_PLANNED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "scale_fmt": "float",
    "expert_dtype": "fp8",
}
_NEEDED = ("quant_method", "weight_block_size")
_LISTS = ("modules_to_not_convert", "ignored_layers")  # transformers' word, and vLLM's
_HINT = "use the model's BF16 checkpoint, or one in FP8 blocks as Qwen publishes it"
_BROKEN = "the checkpoint is damaged or mixed; get it anew, or make it with `tokenspeed quantize`"


@dataclass(frozen=True, slots=True)
class Quantization:
    """An FP8 checkpoint. `unconverted` are the modules that it keeps as they were."""

    unconverted: tuple[str, ...] = ()

    def converts(self, name: str) -> bool:
        """Whether the tensor of this name is in FP8, by its name and the config alone."""
        return is_fp8_matrix(name) and not is_unconverted(name, self.unconverted)


def read_quantization(readers: Iterable[ConfigReader]) -> Quantization | None:
    """What a config says of quantised weights, None where they are not.

    Raises:
        SpecError: they are in a format that is not planned; it says both values.
    """
    found: Quantization | None = None
    for reader in readers:
        data = reader.get(_KEY)
        if data is None:
            continue
        if not isinstance(data, Mapping):
            raise reader.error(f"`{_KEY}` is {shown(data)}, not an object")
        made = _read(reader.name, data)
        if found not in (None, made):
            raise reader.error(f"`{_KEY}` is given twice, and differs")
        found = made
    return found


def _read(model: str, data: Mapping[str, Any]) -> Quantization:
    for key, planned in _PLANNED.items():
        given = data.get(key)
        if given != planned and (given is not None or key in _NEEDED):
            value = "missing" if key not in data else shown(given)
            raise SpecError(
                f"`{model}` has `{_KEY}.{key}` {value}, only {shown(planned)} is planned", _HINT
            )
    unconverted: list[str] = []
    for key in _LISTS:
        names = data.get(key)
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SpecError(f"`{model}` has `{_KEY}.{key}` {shown(names)}, not names", _HINT)
        unconverted += names
    return Quantization(tuple(unconverted))


def check_stored(
    name: str,
    header: TensorHeader,
    headers: Mapping[str, TensorHeader],
    quantization: Quantization | None,
) -> None:
    """A tensor, its factors and the config must say the same of its format.

    Raises:
        SpecError: they contradict each other; it says both values.
    """
    scale = headers.get(scale_name(name))
    if header.dtype != STORED_FP8:
        _check_plain(name, header, scale, quantization)
        return
    if quantization is None:
        raise SpecError(
            f"`{name}` is stored as {STORED_FP8}, and `config.json` has no `{_KEY}`", _BROKEN
        )
    if is_unconverted(name, quantization.unconverted):
        raise SpecError(
            f"`{name}` is stored as {STORED_FP8}, and `{_KEY}` lists `{module_of(name)}` among "
            "the modules that are not converted",
            _BROKEN,
        )
    if scale is None:
        raise SpecError(
            f"`{name}` is stored as {STORED_FP8}, and there is no `{scale_name(name)}`", _BROKEN
        )
    _check_scale(name, header, scale)


def _check_plain(
    name: str,
    header: TensorHeader,
    scale: TensorHeader | None,
    quantization: Quantization | None,
) -> None:
    if scale is not None:
        raise SpecError(
            f"`{name}` is stored as {header.dtype}, and `{scale_name(name)}` is there too", _BROKEN
        )
    if quantization is not None and quantization.converts(name):
        raise SpecError(
            f"`{name}` is stored as {header.dtype}, and `{_KEY}` does not list "
            f"`{module_of(name)}` in `{_LISTS[0]}`",
            _BROKEN,
        )


def _check_scale(name: str, header: TensorHeader, scale: TensorHeader) -> None:
    wanted = blocks(header.shape)
    if scale.shape != wanted:
        raise SpecError(
            f"`{scale_name(name)}` is {list(scale.shape)}, {list(header.shape)} in blocks of "
            f"{BLOCK} x {BLOCK} needs {list(wanted)}",
            _BROKEN,
        )
    if scale.dtype not in STORED_SCALES:
        raise SpecError(
            f"`{scale_name(name)}` is stored as {scale.dtype}, "
            f"only {', '.join(STORED_SCALES)} are planned",
            _BROKEN,
        )
    if any(size % BLOCK for size in header.shape[-2:]):
        raise SpecError(
            f"`{name}` is {list(header.shape)}, only whole blocks of {BLOCK} x {BLOCK} are planned",
            "use the model's BF16 checkpoint",
        )


def stored_word(asked: str, quantization: Quantization | None) -> str:
    """The format of the weights, a key of `FORMATS`: what was asked, or what `auto` stands for."""
    if asked != "auto":
        return asked
    if quantization is None:
        return "bf16"
    return "fp8"


def check_word(asked: str, quantization: Quantization | None, has_tensors: bool, name: str) -> None:
    """A plan reads the weights as they are stored.

    Args:
        asked: `model.weights` of the spec.
        quantization: of the config.
        has_tensors: whether a checkpoint is there.
        name: of the model.

    Raises:
        SpecError: the spec asks for another format than the checkpoint has.
    """
    word = stored_word(asked, quantization)
    if quantization is not None and word != "fp8":
        raise SpecError(
            f"`model.weights` is {asked}, `{name}` is an FP8 checkpoint",
            "write `weights: fp8`, or leave it out; or use the BF16 checkpoint",
        )
    if quantization is None and has_tensors and word == "fp8":
        raise SpecError(
            f"`model.weights` is fp8, the tensors of `{name}` are not quantised",
            "`tokenspeed quantize SRC DST --to fp8` makes an FP8 checkpoint of it",
        )
