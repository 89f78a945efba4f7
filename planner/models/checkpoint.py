"""What a checkpoint folder holds: names, shapes, dtypes, and digests of its small files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenspeed_plan.planner.graph import Source, Weight
from tokenspeed_plan.planner.models.quantization import check_stored, header_encoding
from tokenspeed_plan.planner.models.quantization_config import Quantization
from tokenspeed_plan.planner.models.tensor_header import TensorHeader, read_header
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.encodings import ENCODED_FORMATS, NVFP4_ENCODINGS, elements_name
from tokenspeed_plan.plans.errors import PlanError, SpecError
from tokenspeed_plan.plans.tokenizer_files import (
    TOKENIZER_FILES,
    read_tokenizer_files,
    template_names,
)
from tokenspeed_plan.plans.weight_files import HINT as _HINT
from tokenspeed_plan.plans.weight_files import add_tensors, weight_files

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    *TOKENIZER_FILES,
)
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a model's folder; empty where it has no weights.

    Raises:
        SpecError: a file is damaged.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        add_tensors(headers, file, read_header(file.path))
    return headers


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the small files that a plan depends on."""
    return {
        name: sha256((folder / name).read_bytes())
        for name in (*SMALL_FILES, *template_names(folder))
        if (folder / name).is_file()
    }


def num_valid_tokens(folder: Path, vocab_size: int) -> int:
    """Vocabulary rows that stand for a token: the tables of published models are padded.

    Raises:
        SpecError: the tokenizer has more tokens than the table rows, or cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return vocab_size
    try:
        count = read_tokenizer_files(folder).num_ids()
    except PlanError as error:
        raise SpecError(error.message, error.hint) from error
    if count < 1:
        raise SpecError(f"`{path}` has no id over {count - 1}", _HINT)
    if count > vocab_size:
        raise SpecError(
            f"`{path}` has ids up to {count - 1}, the model has {vocab_size} rows", _HINT
        )
    return count


def check_sources(
    weights: Mapping[str, Weight],
    headers: Mapping[str, TensorHeader],
    quantization: Quantization | None = None,
) -> None:
    """Every source of every weight must be there, with its shape, in a dtype that is planned.

    Raises:
        SpecError: naming the first tensor that is not.
    """
    for weight in weights.values():
        for source in weight.sources:
            for name, shape in _files_of(source):
                encoding = header_encoding(name, headers)
                stored = name
                if encoding is not None:
                    stored = elements_name(name, encoding)
                if encoding in NVFP4_ENCODINGS:
                    shape = (*shape[:-1], shape[-1] // 2)
                header = _check_tensor(stored, shape, headers.get(stored))
                check_stored(name, headers, quantization)
                if encoding is None:
                    _check_dtype(name, header)
                elif ENCODED_FORMATS[encoding] != weight.spec.format:
                    raise _mixed(stored, header, weight)


def missing_source(
    weights: Mapping[str, Weight], headers: Mapping[str, TensorHeader]
) -> str | None:
    """The first tensor that weights are made of and the checkpoint does not have."""
    for weight in weights.values():
        for source in weight.sources:
            for name, _ in _files_of(source):
                if name not in headers and header_encoding(name, headers) is None:
                    return name
    return None


def _files_of(source: Source) -> list[tuple[str, tuple[int, ...]]]:
    if "{expert}" not in source.name:
        return [(source.name, source.shape)]
    count, *shape = source.shape
    return [(source.name.replace("{expert}", str(index)), tuple(shape)) for index in range(count)]


def _mixed(name: str, header: TensorHeader, weight: Weight) -> SpecError:
    """Of the tensors that a weight is made of, the first decides its format."""
    return SpecError(
        f"`{name}` is stored as {header.dtype}, where {weight.spec.format} is planned",
        "use a checkpoint that stores all experts alike, as the published ones do",
    )


def _check_dtype(name: str, header: TensorHeader) -> None:
    if header.dtype not in FLOAT_DTYPES:
        others = " or ".join(FLOAT_DTYPES)
        raise SpecError(
            f"`{name}` is stored as {header.dtype}, where {others} is planned",
            "use the BF16 checkpoint, or a published one in FP8 or NVFP4",
        )


def _check_tensor(name: str, shape: tuple[int, ...], header: TensorHeader | None) -> TensorHeader:
    if header is None:
        raise SpecError(f"the checkpoint has no tensor `{name}`", _HINT)
    if header.shape != shape:
        raise SpecError(
            f"`{name}` is {list(header.shape)}, its config says {list(shape)}",
            "`config.json` and the weights must be of one model, as they were published",
        )
    return header
