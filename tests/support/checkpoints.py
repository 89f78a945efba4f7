"""Small random Qwen3.5 checkpoints on disk, and the same model in transformers: the oracle.

Names and shapes come from transformers' own model, so that a name we got wrong cannot agree with
itself. Values are scaled so that mistakes show: norms away from one, slow and fast heads, decided
routers, logits of a few units.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512


@dataclass(frozen=True)
class Kind:
    """A variety of checkpoint."""

    moe: bool = True
    tied: bool = False
    flat: bool = False  # text-only config and names
    fused_mtp: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)


# The pattern of the published models; other kinds have one layer of each sort.
DEEP = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
KERNEL = {
    "hidden_size": 256,
    "head_dim": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "mrope_section": [11, 11, 10],
}
# For 8 ranks, with 2 KV heads.
WIDE = {
    "num_attention_heads": 8,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
}
THREE = {
    "num_attention_heads": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}  # v:k ratio 3, as the 27B
YARN = {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
KINDS = {
    "moe": Kind(),
    "dense": Kind(moe=False),
    "deep": Kind(sizes=DEEP),
    "kernel": Kind(sizes=KERNEL),
    "wide": Kind(sizes=WIDE),
    "tied": Kind(moe=False, tied=True),
    "flat": Kind(flat=True, fused_mtp=True),
    "ratio3": Kind(moe=False, sizes=THREE),
    "yarn": Kind(moe=False, sizes=YARN),
}


def text_config(kind: Kind) -> dict[str, Any]:
    """`text_config` of a kind."""
    sizes = dict(kind.sizes)
    mrope, layers, rope = (
        sizes.pop("mrope_section", [2, 1, 1]),
        sizes.get("num_hidden_layers", 2),
        sizes.pop("rope", {}),
    )
    config = {
        "model_type": "qwen3_5_moe_text" if kind.moe else "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "mtp_num_hidden_layers": 1,
        "tie_word_embeddings": kind.tied,
        "eos_token_id": VOCAB - 1,
        "attn_output_gate": True,
        "dtype": "float32",
        "layer_types": [
            "full_attention" if i + 1 == layers else "linear_attention" for i in range(layers)
        ],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": mrope,
            "mrope_interleaved": True,
        }
        | rope,
    }
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    return config | (experts if kind.moe else {"intermediate_size": 256}) | sizes


def write_checkpoint(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """A complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = text_config(kind)
    weights = random_weights(kind, config, seed)
    names = sorted(weights)
    shard_of = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in sorted(set(shard_of.values())):
        part = {name: weights[name].contiguous() for name in names if shard_of[name] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    wrapped = {
        "model_type": "qwen3_5_moe" if kind.moe else "qwen3_5",
        "text_config": config,
        "tie_word_embeddings": kind.tied,
    }
    (folder / "config.json").write_text(json.dumps(config if kind.flat else wrapped))
    write_tokenizer(folder)
    return folder


def oracle_config(kind: Kind) -> Any:
    """transformers' config."""
    import transformers

    cls = transformers.Qwen3_5MoeTextConfig if kind.moe else transformers.Qwen3_5TextConfig
    config = cls(**text_config(kind))
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def empty_oracle(kind: Kind) -> Any:
    """transformers' model, with weights of its own."""
    import transformers

    cls = transformers.Qwen3_5MoeForCausalLM if kind.moe else transformers.Qwen3_5ForCausalLM
    return cls(oracle_config(kind)).float().eval()


def random_weights(kind: Kind, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """fp32 tensors under the published names."""
    torch.manual_seed(seed)
    shapes = {name: value.shape for name, value in empty_oracle(kind).state_dict().items()}
    if kind.tied:
        shapes.pop("lm_head.weight")
    layer = next(i for i, t in enumerate(config["layer_types"]) if t == "full_attention")
    prefix = f"model.layers.{layer}."
    mtp = {
        f"mtp.layers.0.{n.removeprefix(prefix)}": s
        for n, s in shapes.items()
        if n.startswith(prefix)
    }
    hidden = config["hidden_size"]
    mtp |= {"mtp.fc.weight": (hidden, 2 * hidden)} | {
        f"mtp.{n}.weight": (hidden,)
        for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    named = {
        name if kind.flat else name.replace("model.", "model.language_model.", 1): s
        for name, s in shapes.items()
    }
    weights = {name: _values(name, tuple(shape)) for name, shape in (named | mtp).items()}
    return weights if kind.fused_mtp else _split_mtp_experts(weights)


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("A_log"):
        slow = torch.arange(shape[0]) % 2 == 0
        return torch.where(
            slow, torch.rand(shape) * 0.02 + 0.002, torch.rand(shape) * 2 + 0.1
        ).log()
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5 + 0.2 * torch.randn(shape)
    if len(shape) == 1:
        return torch.randn(shape) * (1.0 if name.endswith("dt_bias") else 0.2)
    gain = {"mlp.gate.weight": 2.0, "lm_head.weight": 3.0, "conv1d.weight": 1.0}
    scale = (
        next((value for end, value in gain.items() if name.endswith(end)), 1.0) * shape[-1] ** -0.5
    )
    return torch.randn(shape) * (0.5 if "embed_tokens" in name else scale)


def _split_mtp_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stem = "mtp.layers.0.mlp.experts."
    if f"{stem}gate_up_proj" not in weights:
        return weights
    gate_up, down = weights.pop(f"{stem}gate_up_proj"), weights.pop(f"{stem}down_proj")
    for expert in range(len(down)):
        gate, up = gate_up[expert].chunk(2)
        for key, value in (("gate", gate), ("up", up), ("down", down[expert])):
            weights[f"{stem}{expert}.{key}_proj.weight"] = value
    return weights


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with a padded tail of the table, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = Path(json.__file__).read_text()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=VOCAB - 16, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def load_oracle(folder: Path, kind: Kind) -> Any:
    """transformers' model with the folder's weights."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    plain = {
        name.replace("model.language_model.", "model."): value
        for name, value in weights.items()
        if not name.startswith("mtp.")
    }
    oracle = empty_oracle(kind)
    missing, unexpected = oracle.load_state_dict(plain, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if kind.tied else set())
    assert not unexpected
    oracle.tie_weights()
    return oracle


@torch.no_grad()
def oracle_greedy(oracle: Any, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation."""
    from transformers import DynamicCache

    cache, ids, out = DynamicCache(config=oracle.config), prompt, []
    for _ in range(steps):  # By position: transformers 5.24 gives the cache another name.
        logits = oracle(torch.tensor([ids]), None, None, cache, use_cache=True).logits[0, -1]
        ids = [int(logits.argmax())]
        out += ids
    return out
