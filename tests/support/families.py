"""Small random checkpoints of Qwen3, Qwen3 MoE and Qwen3-Next, and transformers as their oracle.

Names and shapes come from transformers' own model. Its fused experts are written one tensor an
expert, as published checkpoints have them, and Qwen3-Next gets the `mtp.*` tensors that
transformers ignores. Values are scaled so that mistakes show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB, write_tokenizer
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": VOCAB - 3,
    "eos_token_id": VOCAB - 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
_DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "sliding_window": None,
    "max_window_layers": 3,
}
_EXPERTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_MOE: dict[str, Any] = {
    **_EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 192,
    "num_hidden_layers": 3,
}
_NEXT: dict[str, Any] = {
    **_EXPERTS,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 64,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# `uneven`: three value heads a key head, and key dims unlike value dims.
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": _DENSE,
    "qwen3_tied": {**_DENSE, "tie_word_embeddings": True},
    "qwen3_moe": _MOE,
    "qwen3_next": _NEXT,
    "qwen3_next_uneven": {**_NEXT, "linear_value_head_dim": 48, "linear_num_value_heads": 6},
}
FAMILIES = tuple(_FAMILIES)
# Greedy ids of these are decided by more than 0.02 (fp32 rounding is about 1e-5).
SEEDS = {"qwen3_next": 3, "qwen3_next_uneven": 3}


def tiny_config(family: str, **sizes: Any) -> dict[str, Any]:
    """`config.json` with the published fields and small numbers; `sizes` replace some of them."""
    return {**_COMMON, **_FAMILIES[family], **sizes}


def write_family(folder: Path, family: str, with_mtp: bool = True, **sizes: Any) -> Path:
    """A complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **sizes)
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, SEEDS.get(family, 1))
    if not with_mtp:
        weights = {name: x for name, x in weights.items() if not name.startswith("mtp.")}
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """fp32 tensors under the published names."""
    torch.manual_seed(seed)
    plain = config["model_type"] != "qwen3_next"
    shapes = published_shapes(config)
    return {name: _values(name, shape, plain) for name, shape in sorted(shapes.items())}


def published_shapes(config: dict[str, Any]) -> Shapes:
    """transformers' own tensors, experts one by one, and the MTP layer of Qwen3-Next."""
    state = _empty_model(config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    if config["model_type"] == "qwen3_next":
        shapes |= _mtp_shapes(config, shapes)
    split: Shapes = {}
    for name, shape in shapes.items():
        split |= _split_experts(name, shape)
    return split


def _split_experts(name: str, shape: tuple[int, ...]) -> Shapes:
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        parts = {"gate_proj": half, "up_proj": half}
    elif last == "down_proj":
        parts = {"down_proj": shape[1:]}
    else:
        return {name: shape}
    return {
        f"{stem}.{expert}.{key}.weight": part
        for expert in range(shape[0])
        for key, part in parts.items()
    }


def _mtp_shapes(config: dict[str, Any], shapes: Shapes) -> Shapes:
    """One layer of full attention and experts, what leads into it, and the norm behind it."""
    hidden = config["hidden_size"]
    prefix = f"model.layers.{config['full_attention_interval'] - 1}."
    made: Shapes = {"mtp.fc.weight": (hidden, 2 * hidden)}
    for name, shape in shapes.items():
        if name.startswith(prefix):
            made[f"mtp.layers.0.{name.removeprefix(prefix)}"] = shape
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        made[f"mtp.{norm}.weight"] = (hidden,)
    return made


def _values(name: str, shape: tuple[int, ...], plain: bool) -> torch.Tensor:
    """`plain` norms multiply by w, the others by 1 + w."""
    if name.endswith("A_log"):
        slow = torch.arange(shape[0]) % 2 == 0
        steps = torch.where(slow, torch.rand(shape) * 0.02 + 0.002, torch.rand(shape) * 2 + 0.1)
        return steps.log()
    if len(shape) == 1:
        return _vector(name, shape, plain)
    gain = 1.0
    if name.endswith("mlp.gate.weight"):
        gain = 2.0
    if name.endswith("lm_head.weight"):
        gain = 3.0
    scale = gain * shape[-1] ** -0.5
    if "embed_tokens" in name:
        scale = 0.25
    return torch.randn(shape) * scale


def _vector(name: str, shape: tuple[int, ...], plain: bool) -> torch.Tensor:
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return (1.5 if plain else 0.5) + 0.2 * torch.randn(shape)
    if name.endswith("norm.weight") or "layernorm" in name or "pre_fc_norm" in name:
        return (1.0 if plain else 0.0) + 0.2 * torch.randn(shape)
    return torch.randn(shape)  # dt_bias


def _empty_model(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    fields.pop("architectures")
    with torch.device("meta"):
        own = AutoConfig.for_model(config["model_type"], **fields)
        return AutoModelForCausalLM.from_config(own)


def load_oracle(folder: Path) -> Any:
    """transformers' model of a folder: fp32, eager attention, experts one by one."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(info["missing_keys"]) <= tied, info["missing_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])
    return model.eval()


@torch.no_grad()
def oracle_ids(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy ids after each prompt, each alone, all of it computed again for each id."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers
