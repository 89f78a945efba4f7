"""The model's own facts. This is the only file that knows Hugging Face's spellings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tokenspeed_plan.planner.models.config_reader import ConfigReader
from tokenspeed_plan.planner.models.registry import FAMILIES, Family
from tokenspeed_plan.plans.errors import SpecError

LayerType = Literal["linear_attention", "full_attention"]
_FULL_ATTENTION: LayerType = "full_attention"
_LINEAR_ATTENTION: LayerType = "linear_attention"
MAX_LAYERS = 4096
PRESETS = "tokenspeed_plan.planner.models.presets"
MAX_VOCAB = 1 << 20  # sampling packs a token and its logit into 64 bits
_DEFAULT_POSITIONS = 32768
_WRAPPED_PREFIX = "model.language_model."
_FLAT_PREFIX = "model."
_MTP_TENSOR = "mtp.fc.weight"


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
        prefix: what the decoder's tensor names begin with.
        plain_norms: norms multiply by `w`, not by `1 + w`.
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
    prefix: str = field(default=_WRAPPED_PREFIX)
    plain_norms: bool = False

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
        text, prefix = reader, _FLAT_PREFIX
        if "text_config" in config:
            text, prefix = reader.child("text_config"), _WRAPPED_PREFIX
        family = _family(reader)
        _refuse_unsupported(reader, text, family)
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            name=name,
            hidden_size=text.integer("hidden_size"),
            vocab_size=_vocab_size(text),
            layer_types=_layer_types(text, family),
            attention=_attention(text, family),
            delta_net=_delta_net(text, family),
            moe=_moe(text, family),
            intermediate_size=0 if family.is_moe else text.integer("intermediate_size"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(tied),
            max_positions=text.integer("max_position_embeddings", _DEFAULT_POSITIONS),
            num_mtp_layers=text.integer("mtp_num_hidden_layers", family.default_mtp_layers),
            eos_token_ids=_eos(text),
            mtp_acceptance=reader.shares("mtp_acceptance"),
            prefix=prefix,
            plain_norms=family.has_plain_norms,
        )


def _family(reader: ConfigReader) -> Family:
    model_type = reader.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SpecError(
            f"`{reader.name}` has model_type {model_type!r}, which is not planned",
            f"supported: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def _refuse_unsupported(reader: ConfigReader, text: ConfigReader, family: Family) -> None:
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
    if text.get("use_sliding_window"):
        raise text.error("`use_sliding_window` is true, sliding windows are not planned")
    if family.has_output_gate and text.get("attn_output_gate", True) is not True:
        raise text.error(
            f"`attn_output_gate` is not true, {family.title} without an output gate is not planned"
        )
    if family.is_moe:
        _refuse_unsupported_experts(text, family)


def _refuse_unsupported_experts(text: ConfigReader, family: Family) -> None:
    if text.get("mlp_only_layers"):
        raise text.error(
            f"`mlp_only_layers` is {text.get('mlp_only_layers')!r}, "
            "dense layers among experts are not planned"
        )
    if text.get("decoder_sparse_step", 1) != 1:
        raise text.error(
            f"`decoder_sparse_step` is {text.get('decoder_sparse_step')!r}, only 1 is planned"
        )
    if text.get("norm_topk_prob", family.normalizes_top_k) is not True:
        raise text.error(
            "`norm_topk_prob` is not true, experts' shares that do not add up to 1 are not planned"
        )


def _vocab_size(text: ConfigReader) -> int:
    size = text.integer("vocab_size")
    if size > MAX_VOCAB:
        raise text.error(f"`vocab_size` is {size}, the most is {MAX_VOCAB}")
    return size


def _layer_types(text: ConfigReader, family: Family) -> tuple[LayerType, ...]:
    num_layers = text.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise text.error(f"`num_hidden_layers` is {num_layers}, the most is {MAX_LAYERS}")
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
            raise text.error(f"`layer_types` names {kind!r}: {family.title} has {known}")
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


def _attention(text: ConfigReader, family: Family) -> AttentionConfig:
    rope = text
    if "rope_parameters" in text.data:
        rope = text.child("rope_parameters")
    kind = _rope_type(text)
    head_dim = text.integer("head_dim")
    heads, kv_heads = text.integer("num_attention_heads"), text.integer("num_key_value_heads")
    if heads % kv_heads:
        raise text.error(f"{heads} attention heads do not share {kv_heads} kv heads evenly")
    theta = text.get("rope_theta", family.rope_theta)
    factor = 1.0
    if kind == "yarn":
        factor = rope.number("factor", 1.0)
    positions = text.integer("max_position_embeddings", _DEFAULT_POSITIONS)
    return AttentionConfig(
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(text, rope, family, head_dim),
        rope_theta=rope.number("rope_theta", theta),
        rope_factor=factor,
        rope_original_max_positions=rope.integer("original_max_position_embeddings", positions),
        gated=family.has_output_gate,
    )


def _rotary_dim(text: ConfigReader, rope: ConfigReader, family: Family, head_dim: int) -> int:
    """Rotated channels of a head: all of them in families without DeltaNet, as in transformers."""
    if not family.has_delta_net:
        return head_dim
    default = text.get("partial_rotary_factor", family.rotary_share)
    share = rope.get("partial_rotary_factor", default)
    if not isinstance(share, (int, float)) or not 2 <= head_dim * share <= head_dim:
        raise text.error(
            f"`partial_rotary_factor` is {share!r}, which turns {share!r} x {head_dim} channels"
        )
    return int(head_dim * share) // 2 * 2


# The values that these settings must have where they are given: others would change the angles.
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


def _rope_type(text: ConfigReader) -> str:
    """The kind of rotary embedding.

    Raises:
        SpecError: a setting that is not planned; it would change every angle.
    """
    if text.get("rope_scaling") is not None:
        raise text.error(
            f"`rope_scaling` is {text.get('rope_scaling')!r}, only `rope_parameters` is read"
        )
    rope = ConfigReader(text.name, {})
    if "rope_parameters" in text.data:
        rope = text.child("rope_parameters")
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
    # transformers 5 saves the number of experts under the second name.
    experts_key = "num_experts"
    if experts_key not in text.data and "num_local_experts" in text.data:
        experts_key = "num_local_experts"
    shared_size = 0
    if family.has_shared_expert:
        shared_size = text.integer("shared_expert_intermediate_size")
    config = MoeConfig(
        num_experts=text.integer(experts_key),
        num_experts_per_token=text.integer("num_experts_per_tok"),
        intermediate_size=text.integer("moe_intermediate_size"),
        shared_intermediate_size=shared_size,
        fused=family.has_fused_experts,
    )
    if config.num_experts_per_token > config.num_experts:
        raise text.error(f"top {config.num_experts_per_token} of {config.num_experts} experts")
    return config


def _eos(text: ConfigReader) -> tuple[int, ...]:
    value = text.get("eos_token_id")
    values = value
    if value is None:
        values = []
    elif not isinstance(value, list):
        values = [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
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


def load_model_config(folder: Path, tensors: Collection[str] = ()) -> ModelConfig:
    """From a checkpoint folder; `generation_config.json`, where there is one, adds its stop tokens.

    `tensors` are the names in the checkpoint: published configs do not say whether Qwen3-Next has
    its MTP layer, its tensors do.

    Raises:
        SpecError: unreadable, not JSON, or not a model that can be planned.
    """
    data = _read_json(folder / "config.json")
    config = ModelConfig.from_hf(data, folder.name)
    tensors_decide = bool(tensors) and FAMILIES[data["model_type"]].default_mtp_layers > 0
    if tensors_decide and _MTP_TENSOR not in tensors:
        config = replace(config, num_mtp_layers=0)
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    extra = _eos(ConfigReader(folder.name, _read_json(generation)))
    return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *extra})))


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
