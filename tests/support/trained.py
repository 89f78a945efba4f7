"""A tiny checkpoint, trained until some drafts are right, and a twin of the engine.

The language repeats a cycle of words. The target and the MTP layer are transformers' own layers,
trained together. A trained MTP layer would predict so simple a language without errors, so noise is
added to its projection.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import KINDS, Kind, load_oracle, oracle_config, write_checkpoint
from draft_oracle import fused, read
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS, BATCH, LENGTH = 60, 8, 24
NOISE = 1.2  # of the standard deviation of its weights
WORDS = 60  # tokens that the language has


class Mtp(nn.Module):
    """The MTP layer, made of transformers' parts: a token and the hidden state before it go in."""

    def __init__(self, kind: Kind, weights: dict[str, Tensor]) -> None:
        super().__init__()
        if kind.moe:
            from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

            layer, norm = hf.Qwen3_5MoeDecoderLayer, hf.Qwen3_5MoeRMSNorm
        else:
            from transformers.models.qwen3_5 import modeling_qwen3_5 as hf  # type: ignore[no-redef]

            layer, norm = hf.Qwen3_5DecoderLayer, hf.Qwen3_5RMSNorm
        config = copy.deepcopy(oracle_config(kind))
        config.layer_types, config.num_hidden_layers = ["full_attention"], 1
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            norm(size, eps=1e-6) for _ in names
        )
        self.layers = nn.ModuleList([layer(config, 0)])
        own = {
            name.removeprefix("mtp."): value
            for name, value in weights.items()
            if name.startswith("mtp.")
        }
        block = {
            name.removeprefix("layers.0."): value
            for name, value in own.items()
            if name.startswith("layers.0.")
        }
        self.load_state_dict(
            {name: value for name, value in own.items() if not name.startswith("layers.")}
            | {f"layers.0.{name}": value for name, value in fused(block).items()}
        )

    def forward(self, oracle: Any, ids_BT: Tensor, hidden_BTH: Tensor, start: int = 0) -> Tensor:
        embedded = self.pre_fc_norm_embedding(oracle.model.embed_tokens(ids_BT))
        x = self.fc(torch.cat((embedded, self.pre_fc_norm_hidden(hidden_BTH)), -1))
        count = ids_BT.shape[1]
        places = torch.arange(start, start + count)[None, None].expand(3, len(ids_BT), count)
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        x = self.layers[0](
            x, position_embeddings=oracle.model.rotary_emb(x, places), attention_mask=mask
        )
        return self.norm(x)


def write_trained(folder: Path, name: str, seed: int = 0) -> Path:
    """A checkpoint of a kind, trained."""
    kind = KINDS[name]
    write_checkpoint(folder, kind, seed)
    torch.manual_seed(seed)
    order = torch.randperm(400)[:WORDS]
    oracle, mtp = load_oracle(folder, kind).train(), Mtp(kind, read(folder))
    params = [*oracle.parameters(), *mtp.parameters()]
    optimizer = torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1.0 - step / STEPS)
        optimizer.zero_grad()
        _loss(oracle, mtp, _walks(order, LENGTH + 3)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    with torch.no_grad():
        mtp.fc.weight += NOISE * mtp.fc.weight.std() * torch.randn_like(mtp.fc.weight)
    _save(folder, oracle, mtp)
    return folder


def _walks(order: Tensor, length: int) -> Tensor:
    """Random cuts of the cycle of words, which sometimes jump to another place."""
    place = torch.randint(0, WORDS, (BATCH, 1)) + torch.arange(length)
    return order[(place + (torch.rand(BATCH, length) < 0.1).cumsum(1) * 7) % WORDS]


def _loss(oracle: Any, mtp: Mtp, ids_BT: Tensor) -> Tensor:
    hidden = oracle.model(input_ids=ids_BT[:, :LENGTH], use_cache=False).last_hidden_state
    first = mtp(oracle, ids_BT[:, 1 : LENGTH + 1], hidden)
    second = mtp(oracle, ids_BT[:, 2 : LENGTH + 1], first[:, :-1], 1)
    parts = ((hidden, 1, 1.0), (first, 2, 0.5), (second, 3, 0.25))
    losses = [
        share
        * F.cross_entropy(
            oracle.lm_head(h).flatten(0, 1), ids_BT[:, at : at + h.shape[1]].flatten()
        )
        for h, at, share in parts
    ]
    return torch.stack(losses).sum()


def _save(folder: Path, oracle: Any, mtp: Mtp) -> None:
    made = {f"mtp.{name}": value for name, value in mtp.state_dict().items()}
    made |= {
        name.replace("model.", "model.language_model.", 1): v
        for name, v in oracle.state_dict().items()
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(
        {name: value.detach().clone().contiguous() for name, value in made.items()},
        folder / "model.safetensors",
    )


@dataclass(frozen=True)
class Round:
    """One step of speculation: what was drafted, and how many of it were right."""

    drafts: tuple[int, ...]
    accepted: int


class Twin:
    """Greedy speculation without caches: transformers' layers compute everything in each round."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.oracle, self.mtp = load_oracle(folder, kind), Mtp(kind, read(folder)).eval()

    @torch.no_grad()
    def rounds(self, prompt: list[int], count: int, depth: int) -> tuple[list[int], list[Round]]:
        """The first `count` tokens after a prompt, and the rounds that made all but the first."""
        tokens, made = [self.target(prompt)[0][-1]], list[Round]()
        while len(tokens) < count:
            ids = prompt + tokens
            drafts = self.drafts(ids, depth)
            wanted = self.target(ids + drafts)[0][len(ids) - 1 :]
            right = [draft == token for draft, token in zip(drafts, wanted, strict=False)]
            accepted = right.index(False) if False in right else depth
            made.append(Round(tuple(drafts), accepted))
            tokens += wanted[: accepted + 1]
        return tokens[:count], made

    def target(self, ids: list[int]) -> tuple[list[int], Tensor]:
        """The most likely token after each one, and the hidden states."""
        hidden = self.oracle.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        return self.oracle.lm_head(hidden)[0].argmax(-1).tolist(), hidden

    def drafts(self, ids: list[int], depth: int) -> list[int]:
        """Drafts after `ids`, whose last token has no hidden state of the target yet."""
        hidden, tokens = self.target(ids[:-1])[1], ids[1:]
        for _ in range(depth):
            last = self.mtp(self.oracle, torch.tensor([tokens]), hidden)[:, -1:]
            tokens = [*tokens, int(self.oracle.lm_head(last).argmax())]
            hidden = torch.cat((hidden, last), 1)
        return tokens[len(ids) - 1 :]
