"""What `quantization_config` says of each matrix, in the words of whoever wrote it.

FP8 in blocks is Qwen's, ModelOpt writes NVFP4 and FP8 with one scale a matrix (one algorithm, or
one for each layer), compressed-tensors NVFP4 alone is planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tokenspeed_plan.plans.encodings import GROUP, Encoding
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.fp8_format import BLOCK, is_fp8_matrix, is_unconverted, module_of
from tokenspeed_plan.plans.shown import shown

if TYPE_CHECKING:
    from tokenspeed_plan.planner.models.config_reader import ConfigReader

CONFIG_KEY = "quantization_config"
_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "scale_fmt": "float",
    "expert_dtype": "fp8",
}
_NEEDED = ("quant_method", "weight_block_size")
KEPT_KEY = "modules_to_not_convert"
_FP8_LISTS = (KEPT_KEY, "ignored_layers")  # transformers' word, and vLLM's
_MODELOPT_LISTS = ("ignore", "exclude_modules")  # of config.json, and of hf_quant_config.json
_ALGORITHMS: dict[str, Encoding] = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "FP8": "fp8_tensor",
}
_MIXED = "MIXED_PRECISION"
_PACKED = "nvfp4-pack-quantized"
_WEIGHTS = {"num_bits": 4, "type": "float", "group_size": GROUP, "symmetric": True}
_METHODS = ("fp8", "modelopt", "compressed-tensors")
HINT = (
    "use the model's BF16 checkpoint, one in FP8 blocks as Qwen publishes it, or one in NVFP4 of "
    "ModelOpt or compressed-tensors"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a config says of quantised weights.

    Attributes:
        encoding: of the matrices that are converted.
        kept: modules that are not: names for FP8 blocks, else patterns.
        kept_key: the list that names them, for messages.
        layers: with one algorithm for each layer, a pattern of modules and their encoding.
    """

    encoding: Encoding = "fp8_blocks"
    kept: tuple[str, ...] = ()
    kept_key: str = KEPT_KEY
    layers: tuple[tuple[str, Encoding], ...] | None = None

    def keeps(self, name: str) -> bool:
        """Whether the config lists the module of a tensor among those that are not converted."""
        if self.encoding == "fp8_blocks":
            return is_unconverted(name, self.kept)
        return any(_matches(pattern, module_of(name)) for pattern in self.kept)

    def encoding_of(self, name: str) -> Encoding | None:
        """The encoding of the matrix of this name, by the config alone."""
        if not is_fp8_matrix(name) or self.keeps(name):
            return None
        if self.layers is None:
            return self.encoding
        module = module_of(name)
        found = [item for item in self.layers if _matches(item[0], module)]
        if not found:
            return None
        _, encoding = max(found, key=lambda item: len(item[0]))  # the one that says most
        return encoding


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern means a module, or one that it lies in."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return (
        fnmatchcase(module, pattern)
        or module.startswith(f"{pattern}.")
        or module.endswith(f".{pattern}")
    )


def read_quantization(readers: Iterable[ConfigReader]) -> Quantization | None:
    """What a config says of quantised weights, None where they are not.

    Raises:
        SpecError: they are in a format that is not planned; it says both values.
    """
    found: Quantization | None = None
    for reader in readers:
        data = reader.get(CONFIG_KEY)
        if data is None:
            continue
        if not isinstance(data, Mapping):
            raise reader.error(f"`{CONFIG_KEY}` is {shown(data)}, not an object")
        made = _read(_Section(reader.name, data))
        if found not in (None, made):
            raise reader.error(f"`{CONFIG_KEY}` is given twice, and differs")
        found = made
    return found


@dataclass(frozen=True, slots=True)
class _Section:
    """A mapping of the config; `path` is where it lies, for messages."""

    model: str
    data: Mapping[str, Any]
    path: str = CONFIG_KEY

    def require(self, key: str, planned: Any, needed: bool = False) -> None:
        """Refuse another value than the planned one; one that is missing only where needed."""
        given = self.data.get(key)
        if given != planned and (given is not None or needed):
            raise self.refusal(key, shown(planned))

    def refusal(self, key: str, planned: str) -> SpecError:
        """An error that says both values."""
        value = "missing" if key not in self.data else shown(self.data[key])
        return SpecError(
            f"`{self.model}` has `{self.path}.{key}` {value}, only {planned} is planned", HINT
        )

    def names(self, keys: Iterable[str]) -> tuple[str, ...]:
        """All names that some lists hold.

        Raises:
            SpecError: one is no list of names.
        """
        found: list[str] = []
        for key in keys:
            names = self.data.get(key)
            if names is None:
                continue
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SpecError(
                    f"`{self.model}` has `{self.path}.{key}` {shown(names)}, not names", HINT
                )
            found += names
        return tuple(found)

    def child(self, key: str) -> _Section:
        """The mapping under a key.

        Raises:
            SpecError: there is none.
        """
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise self.refusal(key, "an object")
        return _Section(self.model, value, f"{self.path}.{key}")


def _read(section: _Section) -> Quantization:
    method = section.data.get("quant_method")
    if method == "modelopt":
        return _modelopt(section)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    if method != "fp8":
        raise section.refusal("quant_method", " or ".join(f"'{each}'" for each in _METHODS))
    for key, planned in _FP8.items():
        section.require(key, planned, key in _NEEDED)
    return Quantization("fp8_blocks", section.names(_FP8_LISTS))


def _modelopt(section: _Section) -> Quantization:
    """One algorithm for all but what is ignored, or a map of layers."""
    section.require("group_size", GROUP)
    kept = section.names(_MODELOPT_LISTS)
    word = section.data.get("quant_algo")
    if word == _MIXED:
        layers = section.child("quantized_layers")
        algorithms = {name: _algorithm(layers.child(name)) for name in layers.data}
        return Quantization("nvfp4", kept, "ignore", tuple(sorted(algorithms.items())))
    return Quantization(_algorithm(section), kept, "ignore")


def _algorithm(section: _Section) -> Encoding:
    word = section.data.get("quant_algo")
    if word not in _ALGORITHMS:
        raise section.refusal("quant_algo", " or ".join(f"'{each}'" for each in _ALGORITHMS))
    section.require("group_size", GROUP)
    return _ALGORITHMS[word]


def _compressed_tensors(section: _Section) -> Quantization:
    """Linear layers in NVFP4, all alike."""
    section.require("format", _PACKED, needed=True)
    groups = section.child("config_groups")
    for name in groups.data:
        group = groups.child(name)
        group.require("targets", ["Linear"], needed=True)
        group.require("format", _PACKED)
        weights = group.child("weights")
        for key, planned in _WEIGHTS.items():
            weights.require(key, planned, needed=key != "symmetric")
    return Quantization("nvfp4_packed", section.names(("ignore",)), "ignore")
