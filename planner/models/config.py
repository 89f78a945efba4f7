"""A model's own facts. Only this file, `rope.py` and `stop_tokens.py` know Hugging Face's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tokenspeed_plan.planner.models.config_reader import ConfigReader
from tokenspeed_plan.planner.models.folder import model_name
from tokenspeed_plan.planner.models.preset_names import find_preset
from tokenspeed_plan.planner.models.quantization_config import (
    CONFIG_KEY,
    Quantization,
    read_quantization,
)
from tokenspeed_plan.planner.models.registry import FAMILIES, Family
from tokenspeed_plan.planner.models.rope import Rope, read_rope
from tokenspeed_plan.planner.models.stop_tokens import stop_tokens
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.shown import shown
from tokenspeed_plan.plans.weight_files import read_json_object

LayerType = Literal["linear_attention", "full_attention"]
_FULL_ATTENTION: LayerType = "full_attention"
_LINEAR_ATTENTION: LayerType = "linear_attention"
PRESETS = "tokenspeed_plan.planner.models.presets"
WRAPPED_PREFIX = "model.language_model."
FLAT_PREFIX = "model."
_HINT = "`model.path` names a Hugging Face model folder"
_MODELOPT_FILE = "hf_quant_config.json"
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# These change how transformers reads a model, and have no counterpart here.
_REFUSED = ("per_layer_config", "transformers_weights")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Full attention.

    `rotary_dim` of each `head_dim` channels are rotated, by YaRN's angles where `rope_factor` is
    over 1. `gated`: each query head has a gate for its output.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_factor: float
    rope_original_max_positions: int
    gated: bool = True


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """Gated DeltaNet. `packed`: the checkpoint interleaves its input projections by key head."""

    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_kernel_size: int
    packed: bool = False

    @property
    def value_channels(self) -> int:
        """Channels of all value heads."""
        return self.num_v_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels under the convolution: queries, keys, values."""
        return 2 * self.num_k_heads * self.key_dim + self.value_channels


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed experts, and one shared expert where `shared_intermediate_size` is not 0.

    `fused`: published checkpoints hold all experts of a decoder layer in one tensor.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    fused: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A text model.

    Attributes:
        layer_types: the mixer of each decoder layer.
        delta_net: None where no layer has linear attention.
        moe: None where the feed-forward block is dense and `intermediate_size` wide.
        mtp_acceptance: for each draft of a step, how often it is right if those before it were.
        no_drafts_reason: why nothing drafts although the config says so; empty elsewhere.
        prefix: what the decoder's tensor names begin with.
        has_two_prefixes: whether checkpoints of the family are saved with either prefix.
        plain_norms: norms multiply by `w`, not by `1 + w`.
        quantization: of the checkpoint; None where it is not quantised.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layer_types: tuple[LayerType, ...]
    attention: AttentionConfig
    delta_net: DeltaNetConfig | None
    moe: MoeConfig | None
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_positions: int
    num_mtp_layers: int
    eos_token_ids: tuple[int, ...]
    mtp_acceptance: tuple[float, ...] = ()
    no_drafts_reason: str = ""
    prefix: str = field(default=WRAPPED_PREFIX)
    has_two_prefixes: bool = False
    plain_norms: bool = False
    quantization: Quantization | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers, the MTP layer not counted."""
        return len(self.layer_types)

    @property
    def has_state(self) -> bool:
        """Whether sequences have recurrent state, which a position in the cache must keep."""
        return "linear_attention" in self.layer_types

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str = "model") -> ModelConfig:
        """From a `config.json`, wrapped (`text_config`) or flat.

        Raises:
            SpecError: another family, a missing field, or a feature that is not planned yet.
        """
        reader = ConfigReader(name, config)
        family = _family(reader)
        text, prefix = _text(reader, family)
        quantization = read_quantization((reader, text))
        _refuse_unsupported(reader, text, family)
        head_dim = text.integer("head_dim")
        rope = read_rope(text, family, head_dim)
        vocab_size = text.integer("vocab_size")
        num_mtp_layers, no_drafts_reason = _mtp_layers(text, family)
        return cls(
            name=name,
            hidden_size=text.integer("hidden_size"),
            vocab_size=vocab_size,
            layer_types=_layer_types(text, family),
            attention=_attention(text, family, rope, head_dim),
            delta_net=_delta_net(text, family),
            moe=_moe(text, family),
            intermediate_size=0 if family.is_moe else text.integer("intermediate_size"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6, most=1.0),
            tie_word_embeddings=_is_tied(reader, text),
            max_positions=rope.max_positions,
            num_mtp_layers=num_mtp_layers,
            eos_token_ids=stop_tokens((reader, text), vocab_size),
            mtp_acceptance=reader.shares("mtp_acceptance"),
            no_drafts_reason=no_drafts_reason,
            prefix=prefix,
            has_two_prefixes=family.has_two_prefixes,
            plain_norms=family.has_plain_norms,
            quantization=quantization,
        )


def _family(reader: ConfigReader) -> Family:
    model_type = reader.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SpecError(
            f"`{reader.name}` has model_type {shown(model_type)}, which is not planned",
            f"supported: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def _text(reader: ConfigReader, family: Family) -> tuple[ConfigReader, str]:
    """The text model's config, and what its tensors' names begin with by the published files."""
    if family.is_wrapped:
        return reader.child("text_config"), WRAPPED_PREFIX
    if reader.get("text_config") is not None:
        raise reader.error(f"`text_config` inside a `{reader.get('model_type')}` is not planned")
    return reader, FLAT_PREFIX


def _is_tied(reader: ConfigReader, text: ConfigReader) -> bool:
    """Whether a missing head is the embedding table.

    transformers' text model asks the text config, its whole model the one around it. The other
    answer would leave the head to chance.
    """
    flags = [each.flag("tie_word_embeddings") for each in (reader, text)]
    return any(flags)


def _mtp_layers(text: ConfigReader, family: Family) -> tuple[int, str]:
    """MTP layers that can draft, and why there are none of those that the config names."""
    count = text.integer("mtp_num_hidden_layers", family.default_mtp_layers)
    if count and text.flag("mtp_use_dedicated_embeddings"):
        return 0, "drafts from embeddings of their own are not planned"
    return count, ""


def _refuse_unsupported(reader: ConfigReader, text: ConfigReader, family: Family) -> None:
    for each in (reader, text):
        _refuse_anywhere(each)
    for key, allowed in (("output_gate_type", ("swish", "silu")), ("hidden_act", ("silu",))):
        if text.get(key, allowed[0]) not in allowed:
            raise text.error(f"`{key}` is {text.shown(key)}, only {allowed[0]} is planned")
    if text.flag("attention_bias"):
        raise text.error("`attention_bias` is true, biases are not planned")
    if text.flag("use_sliding_window"):
        raise text.error("`use_sliding_window` is true, sliding windows are not planned")
    if family.has_output_gate and not text.flag("attn_output_gate", True):
        raise text.error(
            f"`attn_output_gate` is not true, {family.title} without an output gate is not planned"
        )
    if family.is_moe:
        _refuse_unsupported_experts(text, family)


def _refuse_anywhere(reader: ConfigReader) -> None:
    """Refuse what is not planned wherever a config says it."""
    for key in _REFUSED:
        if reader.get(key) is not None:
            raise reader.error(f"`{key}` is {reader.shown(key)}, which is not planned")
    for key in ("dtype", "torch_dtype"):
        value = reader.get(key)
        if value is not None and value not in _DTYPES:
            raise reader.error(f"`{key}` is {reader.shown(key)}, not one of {', '.join(_DTYPES)}")


def _refuse_unsupported_experts(text: ConfigReader, family: Family) -> None:
    if text.get("mlp_only_layers"):
        raise text.error(
            f"`mlp_only_layers` is {text.shown('mlp_only_layers')}, "
            "dense layers among experts are not planned"
        )
    if text.get("decoder_sparse_step", 1) != 1:
        raise text.error(
            f"`decoder_sparse_step` is {text.shown('decoder_sparse_step')}, only 1 is planned"
        )
    if not text.flag("norm_topk_prob", family.normalizes_top_k):
        raise text.error(
            "`norm_topk_prob` is not true, experts' shares that do not add up to 1 are not planned"
        )


def _layer_types(text: ConfigReader, family: Family) -> tuple[LayerType, ...]:
    num_layers = text.integer("num_hidden_layers")
    given = text.get("layer_types")
    if given is None:
        return _default_layer_types(text, family, num_layers)
    known = ["full_attention"]
    if family.has_delta_net:
        known.append("linear_attention")
    if not isinstance(given, list) or len(given) != num_layers:
        raise text.error(f"`layer_types` does not name {num_layers} layers")
    for kind in given:
        if kind not in known:
            raise text.error(f"`layer_types` names {shown(kind)}: {family.title} has {known}")
    return tuple(given)


def _default_layer_types(
    text: ConfigReader, family: Family, num_layers: int
) -> tuple[LayerType, ...]:
    """Full attention everywhere, or beside DeltaNet in each `full_attention_interval`th layer."""
    if not family.has_delta_net:
        return (_FULL_ATTENTION,) * num_layers
    interval = text.integer("full_attention_interval", 4, minimum=1)
    full, linear = _FULL_ATTENTION, _LINEAR_ATTENTION
    return tuple(linear if (i + 1) % interval else full for i in range(num_layers))


def _attention(text: ConfigReader, family: Family, rope: Rope, head_dim: int) -> AttentionConfig:
    heads, kv_heads = text.integer("num_attention_heads"), text.integer("num_key_value_heads")
    if heads % kv_heads:
        raise text.error(f"{heads} attention heads do not share {kv_heads} kv heads evenly")
    return AttentionConfig(
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        rope_theta=rope.theta,
        rope_factor=rope.factor,
        rope_original_max_positions=rope.original_max_positions,
        gated=family.has_output_gate,
    )


def _delta_net(text: ConfigReader, family: Family) -> DeltaNetConfig | None:
    if not family.has_delta_net:
        return None
    config = DeltaNetConfig(
        num_k_heads=text.integer("linear_num_key_heads"),
        num_v_heads=text.integer("linear_num_value_heads"),
        key_dim=text.integer("linear_key_head_dim"),
        value_dim=text.integer("linear_value_head_dim"),
        conv_kernel_size=text.integer("linear_conv_kernel_dim", 4, minimum=2),
        packed=family.has_packed_projections,
    )
    if config.num_v_heads % config.num_k_heads:
        raise text.error(
            f"{config.num_v_heads} value heads do not share {config.num_k_heads} key heads evenly"
        )
    return config


def _moe(text: ConfigReader, family: Family) -> MoeConfig | None:
    if not family.is_moe:
        return None
    shared_size = 0
    if family.has_shared_expert:
        shared_size = text.integer("shared_expert_intermediate_size")
    config = MoeConfig(
        num_experts=_num_experts(text, family),
        num_experts_per_token=text.integer("num_experts_per_tok"),
        intermediate_size=text.integer("moe_intermediate_size"),
        shared_intermediate_size=shared_size,
        fused=family.has_fused_experts,
    )
    if config.num_experts_per_token > config.num_experts:
        raise text.error(f"top {config.num_experts_per_token} of {config.num_experts} experts")
    return config


def _num_experts(text: ConfigReader, family: Family) -> int:
    known, saved = "num_experts", "num_local_experts"
    if not family.renames_experts or saved not in text.data:
        return text.integer(known)
    if known in text.data and text.data[known] != text.data[saved]:
        raise text.error(f"`{known}` is {text.shown(known)} and `{saved}` is {text.shown(saved)}")
    return text.integer(saved)


def preset_names() -> list[str]:
    """The published sizes."""
    files = resources.files(PRESETS).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_preset(name: str) -> tuple[ModelConfig, str]:
    """A published size, and the text of its config.

    Raises:
        SpecError: no such preset.
    """
    name = find_preset(name, preset_names())
    text = resources.files(PRESETS).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return ModelConfig.from_hf(json.loads(text), name), text


def load_model_config(folder: Path) -> ModelConfig:
    """What the JSON files of a model's folder say; they do not know what the weights are.

    Raises:
        SpecError: unreadable, not JSON, or not a model that can be planned.
    """
    name = model_name(folder)
    data = read_json_object(folder / "config.json", _HINT)
    config = ModelConfig.from_hf(_with_modelopt(folder, data), name)
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    reader = ConfigReader(name, read_json_object(path, _HINT))
    stated = stop_tokens((reader,), config.vocab_size)
    if not stated:
        return config
    return replace(config, eos_token_ids=stated)


def _with_modelopt(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The config with what ModelOpt's own file says, where `config.json` says nothing of it."""
    path = folder / _MODELOPT_FILE
    if CONFIG_KEY in data or not path.is_file():
        return data
    section = read_json_object(path, _HINT).get("quantization")
    if not isinstance(section, dict):
        return data
    return data | {CONFIG_KEY: {"quant_method": "modelopt", **section}}
