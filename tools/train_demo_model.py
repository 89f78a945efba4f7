"""Train the demo model: a small Qwen3.5-MoE checkpoint, on the sources of Python's own library.

    python tools/train_demo_model.py train --out examples/demo/model
    python tools/train_demo_model.py evaluate --out examples/demo/model

Needs torch, safetensors and tokenizers. Everything is seeded; the text depends on the Python
version, which the log names. The forward pass is written from the model's equations, with
parameters under their published names.

Shapes: B sequences, T tokens, H hidden, A key heads, N value heads, D head size.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

Weights = dict[str, Tensor]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
# The pre-tokeniser of the Qwen3.5 family: words with at most one leading mark, single digits, runs
# of marks, blanks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "__pycache__",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
}
VOCAB_SIZE, PADDED_ROWS = 2048, 32
CHUNK = 64
PREFIX = "model.language_model."

CONFIG = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "full_attention_interval": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 32,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 8192,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 128,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 128,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}


def library_files() -> list[Path]:
    """The standard library's sources, in a stable order."""
    root = Path(os.__file__).parent
    paths = (
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    return sorted(paths, key=lambda path: str(path.relative_to(root)))


def is_held_out(path: Path) -> bool:
    """One file in forty, by its name."""
    return int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 40 == 7


def read_texts(held_out: bool) -> list[str]:
    """The texts of the training or of the held-out files."""
    texts = []
    for path in library_files():
        if is_held_out(path) == held_out:
            try:
                texts.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def chat_examples(texts: list[str]) -> Iterator[str]:
    """A question for each documented function, answered by its source."""
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                source = ast.get_source_segment(text, node) or ""
                if len(source) < 900:
                    question = f"Write the function `{node.name}`."
                    yield (
                        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                        f"{source}<|im_end|>\n<|endoftext|>"
                    )


def make_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    """Byte-level BPE as in the family, trained on the text; the table's last ids stay unused."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - PADDED_ROWS - len(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


class Initial:
    """fp32 parameters under the published names, MTP experts fused until they are written."""

    def __init__(self, seed: int) -> None:
        self.weights: Weights = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden, self.head_dim = int(CONFIG["hidden_size"]), int(CONFIG["head_dim"])  # type: ignore[call-overload]

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def matrix(self, name: str, *shape: int) -> None:
        """Scaled to keep the size of what goes through."""
        self.weights[name] = self.random(*shape) * shape[-1] ** -0.5

    def zeros(self, name: str, size: int) -> None:
        """A zero-centred norm."""
        self.weights[name] = torch.zeros(size)

    def attention(self, name: str) -> None:
        """Gated attention."""
        for key, rows in (
            ("q", 2 * 4 * self.head_dim),
            ("k", 2 * self.head_dim),
            ("v", 2 * self.head_dim),
        ):
            self.matrix(f"{name}{key}_proj.weight", rows, self.hidden)
        self.matrix(f"{name}o_proj.weight", self.hidden, 4 * self.head_dim)
        self.zeros(f"{name}q_norm.weight", self.head_dim)
        self.zeros(f"{name}k_norm.weight", self.head_dim)

    def delta_net(self, name: str) -> None:
        """Gated DeltaNet, with slow and fast heads."""
        for key, rows in (("qkv", 512), ("z", 256), ("b", 8), ("a", 8)):
            self.matrix(f"{name}in_proj_{key}.weight", rows, self.hidden)
        self.weights[f"{name}conv1d.weight"] = self.random(512, 1, 4) * 0.4
        self.weights[f"{name}A_log"] = torch.linspace(math.log(0.02), math.log(2.0), 8)
        self.weights[f"{name}dt_bias"] = torch.full((8,), -1.0)
        self.weights[f"{name}norm.weight"] = torch.ones(32)
        self.matrix(f"{name}out_proj.weight", self.hidden, 256)

    def moe(self, name: str) -> None:
        """Router, experts, shared expert."""
        self.matrix(f"{name}gate.weight", 8, self.hidden)
        self.matrix(f"{name}experts.gate_up_proj", 8, 256, self.hidden)
        self.matrix(f"{name}experts.down_proj", 8, self.hidden, 128)
        for key, shape in (
            ("gate", (128, self.hidden)),
            ("up", (128, self.hidden)),
            ("down", (self.hidden, 128)),
        ):
            self.matrix(f"{name}shared_expert.{key}_proj.weight", *shape)
        self.matrix(f"{name}shared_expert_gate.weight", 1, self.hidden)

    def layer(self, name: str, kind: object) -> None:
        """Norms, mixer, experts."""
        self.zeros(f"{name}input_layernorm.weight", self.hidden)
        self.zeros(f"{name}post_attention_layernorm.weight", self.hidden)
        if kind == "linear_attention":
            self.delta_net(f"{name}linear_attn.")
        else:
            self.attention(f"{name}self_attn.")
        self.moe(f"{name}mlp.")


def initial_weights(seed: int) -> Weights:
    """All parameters before the first step."""
    initial = Initial(seed)
    initial.weights[f"{PREFIX}embed_tokens.weight"] = (
        initial.random(VOCAB_SIZE, initial.hidden) * 0.5
    )
    initial.matrix("lm_head.weight", VOCAB_SIZE, initial.hidden)
    initial.zeros(f"{PREFIX}norm.weight", initial.hidden)
    for index, kind in enumerate(CONFIG["layer_types"]):  # type: ignore[arg-type, var-annotated]
        initial.layer(f"{PREFIX}layers.{index}.", kind)
    initial.matrix("mtp.fc.weight", initial.hidden, 2 * initial.hidden)
    for key in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        initial.zeros(f"mtp.{key}.weight", initial.hidden)
    initial.layer("mtp.layers.0.", "full_attention")
    return initial.weights


class Model:
    """The forward pass over whole sequences, differentiable."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.balance: list[Tensor] = []  # load-balancing terms of the last forward pass

    def w(self, name: str) -> Tensor:
        """A parameter."""
        return self.weights[f"{name}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Zero-centred RMSNorm."""
        return F.rms_norm(x, x.shape[-1:], 1 + self.w(name), 1e-6)

    def layer(self, x: Tensor, name: str) -> Tensor:
        """x + mixer(norm(x)), then x + moe(norm(x))."""
        normed = self.norm(x, f"{name}input_layernorm")
        is_delta = f"{name}linear_attn.A_log" in self.weights
        mixed = (
            self.delta_net(normed, f"{name}linear_attn.")
            if is_delta
            else self.attention(normed, f"{name}self_attn.")
        )
        x = x + mixed
        return x + self.moe(self.norm(x, f"{name}post_attention_layernorm"), f"{name}mlp.")

    def attention(self, x_BTH: Tensor, name: str) -> Tensor:
        """Gated attention with q/k norm and rotation of the first 16 dimensions of each head."""
        batch, length, _ = x_BTH.shape
        query_gate = F.linear(x_BTH, self.w(f"{name}q_proj")).view(batch, length, 4, 2, 64)
        query, gate = query_gate.unbind(3)
        key, value = (
            F.linear(x_BTH, self.w(f"{name}{part}_proj")).view(batch, length, 2, 64)
            for part in "kv"
        )
        query, key = (
            rotate(self.norm(query, f"{name}q_norm")),
            rotate(self.norm(key, f"{name}k_norm")),
        )
        heads = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )
        return F.linear((out * torch.sigmoid(gate)).flatten(2), self.w(f"{name}o_proj"))

    def delta_net(self, x_BTH: Tensor, name: str) -> Tensor:
        """Gated DeltaNet, chunk by chunk."""
        batch, length, _ = x_BTH.shape
        u = F.linear(x_BTH, self.w(f"{name}in_proj_qkv")).transpose(1, 2)
        y = F.silu(F.conv1d(F.pad(u, (3, 0)), self.w(f"{name}conv1d"), groups=512)).transpose(1, 2)
        query, key, value = y.split((128, 128, 256), -1)
        query, key = (
            l2_norm(part.reshape(batch, length, 4, 32)).repeat_interleave(2, 2)
            for part in (query, key)
        )
        beta = torch.sigmoid(F.linear(x_BTH, self.w(f"{name}in_proj_b")))
        step = F.softplus(
            F.linear(x_BTH, self.w(f"{name}in_proj_a")) + self.weights[f"{name}dt_bias"]
        )
        decay = -self.weights[f"{name}A_log"].exp() * step
        value = value.reshape(batch, length, 8, 32)
        out = delta_rule(
            *(part.transpose(1, 2) for part in (query * 32**-0.5, key, value, beta, decay))
        ).transpose(1, 2)
        normed = F.rms_norm(out, (32,), self.w(f"{name}norm"), 1e-6)
        gate = F.silu(F.linear(x_BTH, self.w(f"{name}in_proj_z"))).view(batch, length, 8, 32)
        return F.linear((normed * gate).flatten(2), self.w(f"{name}out_proj"))

    def moe(self, x_BTH: Tensor, name: str) -> Tensor:
        """Two of eight experts a token, and the gated shared one."""
        x = x_BTH.flatten(0, 1)
        probs = F.linear(x, self.w(f"{name}gate")).softmax(-1)
        weights, chosen = probs.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        share = F.one_hot(chosen, 8).float().mean((0, 1))
        self.balance.append(8 * (share * probs.mean(0)).sum())
        out = torch.zeros_like(x)
        for expert in range(8):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(
                x[token], self.weights[f"{name}experts.gate_up_proj"][expert]
            ).chunk(2, -1)
            down = F.linear(F.silu(gate) * up, self.weights[f"{name}experts.down_proj"][expert])
            out = out.index_add(0, token, down * weights[token, slot, None])
        shared = F.silu(F.linear(x, self.w(f"{name}shared_expert.gate_proj"))) * F.linear(
            x, self.w(f"{name}shared_expert.up_proj")
        )
        shared = F.linear(shared, self.w(f"{name}shared_expert.down_proj"))
        out = out + torch.sigmoid(F.linear(x, self.w(f"{name}shared_expert_gate"))) * shared
        return out.view_as(x_BTH)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states after the final norm [B, T, H]."""
        self.balance = []
        x = self.embed(ids_BT)
        for index in range(len(CONFIG["layer_types"])):  # type: ignore[arg-type]
            x = self.layer(x, f"{PREFIX}layers.{index}.")
        return self.norm(x, f"{PREFIX}norm")

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding table."""
        return F.embedding(ids, self.w(f"{PREFIX}embed_tokens"))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary."""
        return F.linear(hidden, self.w("lm_head"))

    def draft(self, next_ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """MTP: from token t + 1 and the hidden state of t, the hidden state that predicts t + 2."""
        pair = (
            self.norm(self.embed(next_ids_BT), "mtp.pre_fc_norm_embedding"),
            self.norm(hidden_BTH, "mtp.pre_fc_norm_hidden"),
        )
        x = F.linear(torch.cat(pair, -1), self.w("mtp.fc"))
        return self.norm(self.layer(x, "mtp.layers.0."), "mtp.norm")


def rotate(x_BTND: Tensor) -> Tensor:
    """Rotary embedding of the first 16 dimensions, i paired with i + 8."""
    inverse = 1e7 ** -(torch.arange(8) / 8)
    angle = (torch.arange(x_BTND.shape[1])[:, None] * inverse)[:, None]
    a, b, rest = x_BTND.split((8, 8, 48), -1)
    return torch.cat(
        (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1
    )


def l2_norm(x: Tensor) -> Tensor:
    """Unit length over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The gated delta rule over [B, N, T, D], in chunks (arXiv:2412.06464)."""
    length = q.shape[2]
    pad = -length % CHUNK
    q, k, v = (F.pad(part, (0, 0, 0, pad)) for part in (q, k, v))
    beta, decay = (F.pad(part, (0, pad)) for part in (beta, decay))
    state, out = q.new_zeros(*q.shape[:2], 32, 32), []
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    for start in range(0, q.shape[2], CHUNK):
        Q, K, V, B, G = (part[:, :, start : start + CHUNK] for part in (q, k, v, beta, decay))
        total = G.cumsum(-1)
        ratio = (total[..., :, None] - total[..., None, :]).masked_fill(later, -1e9).exp()
        mix = ((K * B[..., None]) @ K.transpose(-1, -2) * ratio).tril(-1) + torch.eye(CHUNK)
        right = torch.cat((V * B[..., None], K * (B * total.exp())[..., None]), -1)
        solved = torch.linalg.solve_triangular(mix, right, upper=False)
        U = solved[..., :32] - solved[..., 32:] @ state
        out.append((Q * total.exp()[..., None]) @ state + (Q @ K.transpose(-1, -2) * ratio) @ U)
        left = K * (total[..., -1:] - total).exp()[..., None]
        state = state * total[..., -1].exp()[..., None, None] + left.transpose(-1, -2) @ U
    return torch.cat(out, 2)[:, :, :length]


def losses(model: Model, ids_BT: Tensor) -> tuple[Tensor, list[float]]:
    """The training loss, and [next token, draft 1, draft 2] in nats a token."""
    length = ids_BT.shape[1] - 3
    hidden = model.hidden(ids_BT[:, :length])
    balance = torch.stack(model.balance).mean()
    main = cross_entropy(model.logits(hidden), ids_BT[:, 1 : length + 1])
    first = model.draft(ids_BT[:, 1 : length + 1], hidden)
    second = model.draft(ids_BT[:, 2 : length + 2], first)
    drafts = [
        cross_entropy(model.logits(h), ids_BT[:, i : length + i])
        for i, h in ((2, first), (3, second))
    ]
    return main + 0.3 * drafts[0] + 0.2 * drafts[1] + 0.01 * balance, [
        main.item(),
        *(d.item() for d in drafts),
    ]


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to a fiftieth."""
    return (
        peak
        * min(1.0, (step + 1) / 100)
        * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    )


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one stream of ids. Each ends with <|endoftext|>; chats have their own end."""
    stop = "<|endoftext|>"
    encoded = tokenizer.encode_batch(
        [text if text.endswith(stop) else text + stop for text in texts]
    )
    return torch.tensor([token for item in encoded for token in item.ids])


def train(folder: Path, steps: int, batch: int, length: int, peak: float, seed: int) -> None:
    """Train from scratch and write the folder; rewritten every 500 steps."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = read_texts(held_out=False)
    tokenizer = make_tokenizer(texts, folder)
    chats = list(chat_examples(texts))
    ids = encode_all(tokenizer, texts + chats)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}: "
        f"{len(texts)} files, {len(chats)} chats, {len(ids)} tokens, "
        f"{sum(map(len, texts)) / len(ids):.2f} characters a token",
        flush=True,
    )
    weights = {name: value.requires_grad_() for name, value in initial_weights(seed).items()}
    model = Model(weights)
    matrices = [value for value in weights.values() if value.dim() > 1]
    vectors = [value for value in weights.values() if value.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    generator, begun, log = torch.Generator().manual_seed(seed), time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        starts = torch.randint(0, len(ids) - length - 3, (batch,), generator=generator)
        loss, parts = losses(
            model, torch.stack([ids[start : start + length + 3] for start in starts])
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        log.append(parts)
        if step % 50 == 49 or step == 4:
            recent = torch.tensor(log[-50:]).mean(0).tolist()
            print(
                f"step {step + 1}/{steps} next {recent[0]:.3f} draft1 {recent[1]:.3f} "
                f"draft2 {recent[2]:.3f} {time.time() - begun:.0f} s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            write_checkpoint(folder, weights, tokenizer)


def write_checkpoint(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """The published layout: two shards and their index, configs, chat template."""
    tensors = {
        name: store(name, value.detach()) for name, value in split_draft_experts(weights).items()
    }
    names, index = sorted(tensors), {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model.safetensors-{shard:05d}-of-00002.safetensors"
        save_file(
            {name: tensors[name].contiguous() for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(part, file)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": index},
    )
    write_configs(folder, tokenizer)


def store(name: str, value: Tensor) -> Tensor:
    """BF16, but A_log and the gated norm in F32, as the published files."""
    wide = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
    return value.float() if wide else value.bfloat16()


def split_draft_experts(weights: Weights) -> Weights:
    """The published BF16 files hold the MTP layer's experts one by one."""
    out = dict(weights)
    gate_up, down = (out.pop(f"mtp.layers.0.mlp.experts.{key}_proj") for key in ("gate_up", "down"))
    for expert in range(gate_up.shape[0]):
        gate, up = gate_up[expert].chunk(2)
        for key, value in (("gate", gate), ("up", up), ("down", down[expert])):
            out[f"mtp.layers.0.mlp.experts.{expert}.{key}_proj.weight"] = value
    return out


def write_configs(folder: Path, tokenizer: Tokenizer) -> None:
    """config.json, tokenizer_config.json, generation_config.json and the chat template."""
    token = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    vision = {
        "deepstack_visual_indexes": [],
        "depth": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen3_5_moe",
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": CONFIG["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": token["<|image_pad|>"],
            "video_token_id": token["<|video_pad|>"],
            "vision_start_token_id": token["<|vision_start|>"],
            "vision_end_token_id": token["<|vision_end|>"],
            "text_config": CONFIG | {"eos_token_id": token["<|endoftext|>"]},
            "vision_config": vision,
            "tie_word_embeddings": False,
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_prefix_space": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": list(SPECIAL_TOKENS),
        },
    )
    stops = [token["<|im_end|>"], token["<|endoftext|>"]]
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": False},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: object) -> None:
    """Readable and stable."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_checkpoint(folder: Path) -> Weights:
    """The stored parameters in fp32, the MTP layer's experts fused again."""
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    experts = "mtp.layers.0.mlp.experts."
    parts = [
        [weights.pop(f"{experts}{e}.{key}_proj.weight") for key in ("gate", "up", "down")]
        for e in range(8)
    ]
    weights[f"{experts}gate_up_proj"] = torch.stack(
        [torch.cat((gate, up)) for gate, up, _ in parts]
    )
    weights[f"{experts}down_proj"] = torch.stack([down for _, _, down in parts])
    return weights


@torch.no_grad()
def evaluate(folder: Path, length: int, prompts: int, seed: int) -> None:
    """Held-out loss and draft acceptance of the written checkpoint."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, texts = Model(read_checkpoint(folder)), read_texts(held_out=True)
    ids = encode_all(tokenizer, texts)
    rows = ids[: len(ids) // length * length].view(-1, length)
    nats = torch.tensor([losses(model, part)[1] for part in rows.split(8)])
    mean = nats.mean(0).tolist()
    bits_per_byte = mean[0] / math.log(2) * len(ids) / sum(len(text.encode()) for text in texts)
    forced = [forced_acceptance(model, row) for row in rows[:: max(len(rows) // 32, 1)]]
    free = [
        free_acceptance(model, row[: length // 4])
        for row in rows[:: max(len(rows) // prompts, 1)][:prompts]
    ]
    print(f"held out: {len(texts)} files, {len(ids)} tokens")
    print(f"next token {mean[0]:.3f} nats, {bits_per_byte:.3f} bits a byte")
    print(f"drafts 1 and 2: {mean[1]:.3f}, {mean[2]:.3f} nats")
    print(
        f"acceptance at depth 3, own greedy text: {sum(free) / len(free):.1%} of drafts "
        f"over {len(free)} prompts"
    )
    print(f"acceptance at depth 3, held-out text forced: {sum(forced) / len(forced):.1%}")


def draft_chain(model: Model, ids_T: Tensor, hidden_TH: Tensor) -> list[int]:
    """Three drafts after `ids`, whose last token has no hidden state yet."""
    next_ids, hidden, drafts = ids_T[None, 1:], hidden_TH[None], []
    for _ in range(3):
        out = model.draft(next_ids, hidden)
        drafts.append(int(model.logits(out[0, -1]).argmax()))
        # The layer sees the verified pairs, then its own drafts: append one pair and run again.
        hidden = torch.cat((hidden, out[:, -1:]), 1)
        next_ids = torch.cat((next_ids, torch.tensor([[drafts[-1]]])), 1)
    return drafts


def free_acceptance(model: Model, prompt_T: Tensor, new_tokens: int = 48) -> float:
    """Share of drafts accepted while the model continues a prompt greedily."""
    ids, proposed, accepted = prompt_T, 0, 0
    ids = torch.cat((ids, model.logits(model.hidden(ids[None])[0, -1]).argmax()[None]))
    while len(ids) < len(prompt_T) + new_tokens:
        drafts = draft_chain(model, ids, model.hidden(ids[None])[0, :-1])
        trial = torch.cat((ids, torch.tensor(drafts)))
        target = model.logits(model.hidden(trial[None])[0, len(ids) - 1 :]).argmax(-1)
        right = agreeing(drafts, target.tolist())
        proposed, accepted = proposed + 3, accepted + right
        ids = torch.cat((ids, target[: right + 1]))
    return accepted / proposed


def forced_acceptance(model: Model, text_T: Tensor) -> float:
    """Share of drafts accepted when each round starts from the true text."""
    accepted = rounds = 0
    hidden = model.hidden(text_T[None])[0]
    for end in range(32, len(text_T) - 4, 16):
        ids = torch.cat((text_T[:end], model.logits(hidden[end - 1]).argmax()[None]))
        drafts = draft_chain(model, ids, hidden[:end])
        trial = torch.cat((ids, torch.tensor(drafts)))
        target = model.logits(model.hidden(trial[None])[0, len(ids) - 1 :]).argmax(-1).tolist()
        accepted, rounds = accepted + agreeing(drafts, target), rounds + 1
    return accepted / (3 * rounds)


def agreeing(drafts: list[int], target: list[int]) -> int:
    """How many drafts agree before the first that does not."""
    return next((i for i, draft in enumerate(drafts) if draft != target[i]), len(drafts))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "train":
        train(args.out, args.steps, args.batch, args.length, args.peak_lr, args.seed)
    else:
        evaluate(args.out, args.length, args.prompts, args.seed)


if __name__ == "__main__":
    main()
