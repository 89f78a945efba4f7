"""Quantised checkpoints: what `quantization_config` says, held against the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenspeed_plan.planner.models.quantization_config import CONFIG_KEY, Quantization
from tokenspeed_plan.planner.models.tensor_header import TensorHeader
from tokenspeed_plan.plans.encodings import (
    GROUP,
    NVFP4_ENCODINGS,
    STORED_FP4,
    Encoding,
    elements_name,
    factor_name,
    find_encoding,
    scales_name,
)
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.fp8_format import (
    BLOCK,
    STORED_FP8,
    STORED_SCALES,
    blocks,
    module_of,
)
from tokenspeed_plan.plans.nvfp4_recipe import MIXED, NVFP4_WORDS, recipe_encoding
from tokenspeed_plan.plans.types import FP4_UNIT

if TYPE_CHECKING:
    from tokenspeed_plan.planner.models.config import ModelConfig

Headers = Mapping[str, TensorHeader]
QUANTISED = ("fp8", *NVFP4_WORDS)  # words of the spec
WITH_FP8 = ("fp8", MIXED)  # those with products in FP8
_BROKEN = "the checkpoint is damaged or mixed; get it anew, or make it with `tokenspeed quantize`"


def published_encoding(word: str, config: ModelConfig, name: str) -> Encoding | None:
    """How a matrix is encoded, as far as names and the config say: of a preset, as it is published.

    Args:
        word: the format of the weights.
        config: of the model.
        name: of the matrix; `{expert}` stands for any expert.
    """
    if word not in QUANTISED:
        return None
    if config.quantization is not None:
        return config.quantization.encoding_of(name.replace("{expert}", "0"))
    if word == "fp8":
        return Quantization().encoding_of(name)
    return recipe_encoding(name, config.moe is not None, word == MIXED)


def header_encoding(name: str, headers: Headers) -> Encoding | None:
    """How a tensor of a checkpoint is encoded, None where its elements are plain or missing."""

    def dtype_of(name: str) -> str | None:
        header = headers.get(name)
        if header is None:
            return None
        return header.dtype

    return find_encoding(name, dtype_of)


def check_stored(name: str, headers: Headers, quantization: Quantization | None) -> None:
    """A matrix, its scales and the config must say the same of its format.

    Raises:
        SpecError: they contradict each other; it says both values.
    """
    encoding = header_encoding(name, headers)
    said = None
    if quantization is not None:
        said = quantization.encoding_of(name)
    if encoding is None:
        _check_plain(name, headers, quantization, said)
        return
    header = headers[elements_name(name, encoding)]
    if encoding != said:
        raise _contradiction(name, header, encoding, quantization, said)
    if encoding in NVFP4_ENCODINGS:
        _check_nvfp4(name, header, encoding, headers)
    elif encoding == "fp8_tensor":
        _check_single(scales_name(name, encoding), headers)
        _check_whole(name, header.shape)
    else:
        _check_scales(name, header, headers)
        _check_whole(name, header.shape)


def _contradiction(
    name: str,
    header: TensorHeader,
    encoding: Encoding,
    quantization: Quantization | None,
    said: Encoding | None,
) -> SpecError:
    stored = f"`{elements_name(name, encoding)}` is stored as {header.dtype}"
    if quantization is None:
        return SpecError(f"{stored}, and `config.json` has no `{CONFIG_KEY}`", _BROKEN)
    if quantization.keeps(name):
        return SpecError(
            f"{stored}, and `{CONFIG_KEY}` lists `{module_of(name)}` among the modules that are "
            "not converted",
            _BROKEN,
        )
    return SpecError(
        f"{stored} ({encoding}), and by `{CONFIG_KEY}` it is {said or 'not converted'}", _BROKEN
    )


def _check_plain(
    name: str, headers: Headers, quantization: Quantization | None, said: Encoding | None
) -> None:
    stored = f"`{name}` is stored as {headers[name].dtype}"
    for encoding in ("fp8_blocks", "nvfp4", "nvfp4_packed"):
        for beside in (scales_name(name, encoding), factor_name(name, encoding)):
            if beside in headers:
                raise SpecError(f"{stored}, and `{beside}` is there too", _BROKEN)
    if quantization is not None and said is not None:
        raise SpecError(
            f"{stored}, and `{CONFIG_KEY}` does not list `{module_of(name)}` in "
            f"`{quantization.kept_key}`",
            _BROKEN,
        )


def _find(name: str, beside: str, headers: Headers) -> TensorHeader:
    if beside not in headers:
        raise SpecError(f"there is no `{beside}` beside the elements of `{name}`", _BROKEN)
    return headers[beside]


def _check_single(name: str, headers: Headers) -> None:
    """A factor of a whole matrix: one number."""
    header = _find(module_of(name), name, headers)
    count = 1
    for size in header.shape:
        count *= size
    if count != 1:
        raise SpecError(f"`{name}` is {list(header.shape)}, one number is planned", _BROKEN)
    _check_scale_dtype(name, header)


def _check_scale_dtype(name: str, header: TensorHeader) -> None:
    if header.dtype not in STORED_SCALES:
        raise SpecError(
            f"`{name}` is stored as {header.dtype}, only {', '.join(STORED_SCALES)} are planned",
            _BROKEN,
        )


def _check_scales(name: str, header: TensorHeader, headers: Headers) -> None:
    """The factors of blocks of FP8."""
    beside = scales_name(name, "fp8_blocks")
    scale = _find(name, beside, headers)
    wanted = blocks(header.shape)
    if scale.shape != wanted:
        raise SpecError(
            f"`{beside}` is {list(scale.shape)}, {list(header.shape)} in blocks of "
            f"{BLOCK} x {BLOCK} needs {list(wanted)}",
            _BROKEN,
        )
    _check_scale_dtype(beside, scale)


def _check_whole(name: str, shape: tuple[int, ...]) -> None:
    if any(size % BLOCK for size in shape[-2:]):
        raise SpecError(
            f"`{name}` is {list(shape)}, only whole blocks of {BLOCK} x {BLOCK} are planned",
            "use the model's BF16 checkpoint",
        )


def _check_nvfp4(name: str, header: TensorHeader, encoding: Encoding, headers: Headers) -> None:
    elements = elements_name(name, encoding)
    if header.dtype != STORED_FP4:
        raise SpecError(
            f"`{elements}` is stored as {header.dtype}, NVFP4 has {STORED_FP4}", _BROKEN
        )
    *rows, size_bytes = header.shape
    columns, unit = 2 * size_bytes, FP4_UNIT[1]
    if columns % unit:
        raise SpecError(
            f"`{elements}` has rows of {columns} elements, only multiples of {unit} are planned",
            "use the model's BF16 checkpoint",
        )
    beside = scales_name(name, encoding)
    scale = _find(name, beside, headers)
    wanted = (*rows, columns // GROUP)
    if scale.shape != wanted:
        raise SpecError(
            f"`{beside}` is {list(scale.shape)}, rows of {columns} elements in groups of {GROUP} "
            f"need {list(wanted)}",
            _BROKEN,
        )
    if scale.dtype != STORED_FP8:
        raise SpecError(
            f"`{beside}` is stored as {scale.dtype}, only {STORED_FP8} is planned", _BROKEN
        )
    _check_single(factor_name(name, encoding), headers)


def stored_word(asked: str, quantization: Quantization | None) -> str:
    """The format of the weights: what was asked, or what `auto` stands for."""
    if asked != "auto":
        return asked
    if quantization is None:
        return "bf16"
    if quantization.encoding not in NVFP4_ENCODINGS:
        return "fp8"
    if "fp8_tensor" in dict(quantization.layers or ()).values():
        return MIXED
    return "nvfp4"


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
    word, held = stored_word(asked, quantization), stored_word("auto", quantization)
    if quantization is not None and word != held:
        kind = "an FP8" if held == "fp8" else "an NVFP4"
        raise SpecError(
            f"`model.weights` is {asked}, `{name}` is {kind} checkpoint",
            f"write `weights: {held}`, or leave it out; or use the BF16 checkpoint",
        )
    if quantization is None and has_tensors and word in QUANTISED:
        raise SpecError(
            f"`model.weights` is {word}, the tensors of `{name}` are not quantised",
            f"`tokenspeed quantize SRC DST --to {word}` makes such a checkpoint of it",
        )
