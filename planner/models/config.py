"""The model's own facts. This is the only file that knows Hugging Face's spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tokenspeed_plan.plans.errors import SpecError

LayerType = Literal["linear_attention", "full_attention"]
MAX_LAYERS = 4096
PRESETS = "tokenspeed_plan.planner.models.presets"
MAX_VOCAB = 1 << 20  # sampling packs a token and its logit into 64 bits
_MODEL_TYPES = {
    "qwen3_5": False,
    "qwen3_5_text": False,
    "qwen3_5_moe": True,
    "qwen3_5_moe_text": True,
}


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Gated attention: `rotary_dim` of each `head_dim` is rotated; YaRN where `rope_factor` is over 1."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_factor: float
    rope_original_max_positions: int


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """Gated DeltaNet."""

    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_kernel_size: int

    @property
    def conv_channels(self) -> int:
        """Channels under the convolution: queries, keys, values."""
        return 2 * self.num_k_heads * self.key_dim + self.num_v_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed experts and one shared expert."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Qwen3.5 text model. `moe` is None where the FFN is dense and `intermediate_size` wide.

    `prefix` is what tensor names of the decoder begin with.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layer_types: tuple[LayerType, ...]
    attention: AttentionConfig
    delta_net: DeltaNetConfig
    moe: MoeConfig | None
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_positions: int
    num_mtp_layers: int
    eos_token_ids: tuple[int, ...]
    mtp_acceptance: tuple[
        float, ...
    ] = ()  # by place, the share of drafts that are right if those before were
    prefix: str = field(default="model.language_model.")

    @property
    def num_layers(self) -> int:
        """Decoder layers, the MTP layer not counted."""
        return len(self.layer_types)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str = "model") -> ModelConfig:
        """From a `config.json`, wrapped (`text_config`) or flat.

        Raises:
            SpecError: another family, a missing field, or a feature that is not planned yet.
        """
        reader = _Reader(name, config)
        text = reader.child("text_config") if "text_config" in config else reader
        is_moe = _family(reader)
        _refuse_unsupported(reader, text)
        return cls(
            name=name,
            hidden_size=text.integer("hidden_size"),
            vocab_size=_vocab_size(text),
            layer_types=_layer_types(text),
            attention=_attention(text),
            delta_net=_delta_net(text),
            moe=_moe(text) if is_moe else None,
            intermediate_size=0 if is_moe else text.integer("intermediate_size"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            max_positions=text.integer("max_position_embeddings", 32768),
            num_mtp_layers=text.integer("mtp_num_hidden_layers", 0),
            eos_token_ids=_eos(text),
            mtp_acceptance=_shares(reader, "mtp_acceptance"),
            prefix="model.language_model." if "text_config" in config else "model.",
        )


class _Reader:
    """A config mapping that names the field it misses."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.data = data

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def child(self, key: str) -> _Reader:
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise self.error(f"`{key}` is {value!r}, not an object")
        return _Reader(self.name, value)

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        value = self.data.get(key, default)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < max(least, default is None)
        ):
            raise self.error(f"`{key}` is {value!r}, not a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.error(f"`{key}` is {value!r}, not a positive number")
        return float(value)

    def error(self, what: str) -> SpecError:
        return SpecError(
            f"config of `{self.name}`: {what}",
            "use the `config.json` that was published with the model",
        )


def _shares(reader: _Reader, key: str) -> tuple[float, ...]:
    """Numbers from 0 to 1; it is ours, published configs have none."""
    found = reader.get(key, [])
    if not isinstance(found, list) or not all(
        type(x) in (int, float) and 0 <= x <= 1 for x in found
    ):
        raise reader.error(f"`{key}` must be a list of numbers from 0 to 1")
    return tuple(map(float, found))


def _family(reader: _Reader) -> bool:
    model_type = reader.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise SpecError(
            f"`{reader.name}` has model_type {model_type!r}, not a Qwen3.5 text model",
            f"supported: {', '.join(_MODEL_TYPES)}",
        )
    return _MODEL_TYPES[model_type]


def _refuse_unsupported(reader: _Reader, text: _Reader) -> None:
    if reader.get("quantization_config") or text.get("quantization_config"):
        raise SpecError(
            f"`{reader.name}` is a quantised checkpoint, which is not planned yet",
            "use the BF16 checkpoint of the model",
        )
    for key, allowed in (("output_gate_type", ("swish", "silu")), ("hidden_act", ("silu",))):
        value = text.get(key, allowed[0])
        if value not in allowed:
            raise text.error(f"`{key}` is {value!r}, only {allowed[0]} is planned")
    if text.get("attention_bias"):
        raise text.error("`attention_bias` is true, biases are not planned")
    if text.get("attn_output_gate", True) is not True:
        raise text.error("`attn_output_gate` is not true, attention without a gate is not planned")


def _vocab_size(text: _Reader) -> int:
    size = text.integer("vocab_size")
    if size > MAX_VOCAB:
        raise text.error(f"`vocab_size` is {size}, the most is {MAX_VOCAB}")
    return size


def _layer_types(text: _Reader) -> tuple[LayerType, ...]:
    num_layers = text.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise text.error(f"`num_hidden_layers` is {num_layers}, the most is {MAX_LAYERS}")
    interval = text.integer("full_attention_interval", 4, least=1)
    given = text.get("layer_types")
    if given is None:
        return tuple(
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(num_layers)
        )
    known = isinstance(given, list) and all(
        kind in ("linear_attention", "full_attention") for kind in given
    )
    if not known or len(given) != num_layers:
        raise text.error(f"`layer_types` does not name {num_layers} layers")
    return tuple(given)


def _attention(text: _Reader) -> AttentionConfig:
    rope = text.child("rope_parameters") if "rope_parameters" in text.data else text
    kind = _rope_type(text)
    head_dim = text.integer("head_dim")
    factor = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    if not isinstance(factor, (int, float)) or not 2 <= head_dim * factor <= head_dim:
        raise text.error(
            f"`partial_rotary_factor` is {factor!r}, which turns {factor!r} x {head_dim} channels"
        )
    heads, kv_heads = text.integer("num_attention_heads"), text.integer("num_key_value_heads")
    if heads % kv_heads:
        raise text.error(f"{heads} attention heads do not share {kv_heads} kv heads evenly")
    return AttentionConfig(
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * factor) // 2 * 2,
        rope_theta=rope.number("rope_theta", text.number("rope_theta", 1e7)),
        rope_factor=rope.number("factor", 1.0) if kind == "yarn" else 1.0,
        rope_original_max_positions=rope.integer(
            "original_max_position_embeddings", text.integer("max_position_embeddings", 32768)
        ),
    )


# What a rope setting must be where it is given: everything else that transformers knows would
# change the angles.
_ROPE_DEFAULTS: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_ROPE_READ = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "mrope_section",
    "mrope_interleaved",
)
_YARN_READ = ("factor", "original_max_position_embeddings")


def _rope_type(text: _Reader) -> str:
    """The kind of rotary embedding; a setting that is not planned is refused, for it would turn every key."""
    if text.get("rope_scaling") is not None:
        raise text.error(
            f"`rope_scaling` is {text.get('rope_scaling')!r}, only `rope_parameters` is read"
        )
    rope = (
        text.child("rope_parameters") if "rope_parameters" in text.data else _Reader(text.name, {})
    )
    kind = rope.get("rope_type", text.get("rope_type", "default"))
    if kind not in ("default", "yarn") or rope.get("type", kind) != kind:
        raise text.error(f"rope_type {rope.get('type', kind)!r} is not planned")
    for key, value in rope.data.items():
        known = key in _ROPE_READ or (kind == "yarn" and key in _YARN_READ)
        if not known and (key not in _ROPE_DEFAULTS or value != _ROPE_DEFAULTS[key]):
            raise text.error(f"`rope_parameters.{key}` is {value!r}, which is not planned")
    if kind == "yarn" and (rope.number("factor", 1.0) < 1 or rope.number("rope_theta", 1e7) <= 1):
        raise text.error(
            f"YaRN of factor {rope.get('factor')!r} and rope_theta {rope.get('rope_theta')!r}"
        )
    return str(kind)


def _delta_net(text: _Reader) -> DeltaNetConfig:
    config = DeltaNetConfig(
        num_k_heads=text.integer("linear_num_key_heads"),
        num_v_heads=text.integer("linear_num_value_heads"),
        key_dim=text.integer("linear_key_head_dim"),
        value_dim=text.integer("linear_value_head_dim"),
        conv_kernel_size=text.integer("linear_conv_kernel_dim", 4, least=2),
    )
    if config.num_v_heads % config.num_k_heads:
        raise text.error(
            f"{config.num_v_heads} value heads do not share {config.num_k_heads} key heads evenly"
        )
    return config


def _moe(text: _Reader) -> MoeConfig:
    config = MoeConfig(
        num_experts=text.integer("num_experts"),
        num_experts_per_token=text.integer("num_experts_per_tok"),
        intermediate_size=text.integer("moe_intermediate_size"),
        shared_intermediate_size=text.integer("shared_expert_intermediate_size"),
    )
    if config.num_experts_per_token > config.num_experts:
        raise text.error(f"top {config.num_experts_per_token} of {config.num_experts} experts")
    return config


def _eos(text: _Reader) -> tuple[int, ...]:
    value = text.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values
    ):
        raise text.error(f"`eos_token_id` is {value!r}")
    return tuple(values)


def preset_names() -> list[str]:
    """The published sizes."""
    files = resources.files(PRESETS).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_preset(name: str) -> tuple[ModelConfig, str]:
    """A published size, and the text of its config.

    Raises:
        SpecError: no such preset.
    """
    names = preset_names()
    if name not in names:
        raise SpecError(f"there is no preset `{name}`", f"presets: {', '.join(names)}")
    text = resources.files(PRESETS).joinpath(f"{name}.json").read_text()
    return ModelConfig.from_hf(json.loads(text), name), text


def load_model_config(folder: Path) -> ModelConfig:
    """From a checkpoint folder; `generation_config.json`, where there is one, adds its stop tokens.

    Raises:
        SpecError: unreadable, not JSON, or not a Qwen3.5 text model.
    """
    config = ModelConfig.from_hf(_read_json(folder / "config.json"), folder.name)
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    extra = _eos(_Reader(folder.name, _read_json(generation)))
    merged = tuple(sorted({*config.eos_token_ids, *extra}))
    return ModelConfig(
        **{**{key: getattr(config, key) for key in config.__slots__}, "eos_token_ids": merged}
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise SpecError(
            f"cannot read `{path}`: {reason}", "`model.path` names a Hugging Face model folder"
        ) from error
    if not isinstance(value, dict):
        raise SpecError(
            f"`{path}` is not a JSON object", "use the file that was published with the model"
        )
    return value
