"""Checkpoints whose matrices are whole blocks, so that they can be quantised; what they answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from checkpoints import VOCAB, Kind
from click.testing import CliRunner
from conftest import ROOT, make_spec
from planning import planned
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.passes.pipeline import DEFAULT_OPTIONS, PassOptions
from tokenspeed_plan.runtime import Engine, SamplingParams

NUM_TOKENS = 8
Tensors = dict[str, torch.Tensor]
BLOCKS: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
    "mrope_section": [6, 5, 5],
}
MOE = Kind(sizes={key: size for key, size in BLOCKS.items() if key != "intermediate_size"})
DENSE = Kind(moe=False, tied=True, sizes={k: v for k, v in BLOCKS.items() if "exp" not in k})
DENSE.sizes.pop("moe_intermediate_size")
ALL = {"moe": MOE, "dense": DENSE}


def quantize(source: Path, target: Path, *options: str) -> Any:
    args = ["quantize", str(source), str(target), *(options or ("--to", "fp8"))]
    return CliRunner().invoke(main, args)


def weights_of(folder: Path) -> Tensors:
    weights: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def values_of(elements: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """w[i, j] = e4m3(code) * scale[i // 128, j // 128], from the bits."""
    code = elements.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, fraction = 1 - 2 * (code >> 7), (code >> 3) & 15, code & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    factors = scales.float().numpy()
    rows, columns = np.indices(code.shape)
    return torch.from_numpy((values * factors[rows // 128, columns // 128]).astype(np.float32))


def fuse_experts(weights: Tensors, num_experts: int) -> Tensors:
    stems = {name.partition(".0.gate_proj")[0] for name in weights if ".0.gate_proj" in name}
    for stem in sorted(stems):
        if stem.startswith("mtp."):
            continue
        parts: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
        for expert in range(num_experts):
            for key, found in parts.items():
                found.append(weights.pop(f"{stem}.{expert}.{key}_proj.weight"))
        gates, ups = torch.stack(parts["gate"]), torch.stack(parts["up"])
        weights[f"{stem}.gate_up_proj"] = torch.cat((gates, ups), 1)
        weights[f"{stem}.down_proj"] = torch.stack(parts["down"])
    return weights


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB - 20, (n,), generator=random).tolist() for n in (40, 3)]


def ids_of(
    folder: Path,
    head: str = "auto",
    options: PassOptions = DEFAULT_OPTIONS,
    **changes: Any,
) -> list[list[int]]:
    spec = make_spec(folder, model={"weights": "auto", "head": head}, **changes)
    if "quantization_config" not in (folder / "config.json").read_text():
        spec = make_spec(folder, **changes)
    engine = Engine.from_plan(planned(spec, options=options), folder)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return [list(done.token_ids) for done in engine.generate(prompts(), params)]


DEMO = ROOT / "examples/demo/model"
HELD_OUT_TOKENS, ROW = 6144, 256


def held_out_ids() -> torch.Tensor:
    """Tokens of standard library files that the demo model was not trained on, [rows, ROW]."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        # The rule of tools/train_demo_model.py: one file in forty, by its name.
        if int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 40 == 7:
            ids += tokenizer.encode(path.read_text(encoding="utf-8")).ids
    count = min(len(ids), HELD_OUT_TOKENS) // ROW * ROW
    return torch.tensor(ids[:count]).view(-1, ROW)


@contextmanager
def quantised_activations(vocab_size: int) -> Iterator[None]:
    """PyTorch's products of whole blocks, but the head's, read activations in e4m3.

    A row has a factor for each 128 columns, the largest of them over 448.
    """
    product = torch.nn.functional.linear

    def rounded(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if w.shape[0] != vocab_size and not any(size % 128 for size in w.shape):
            wide = x.unflatten(-1, (-1, 128))
            factors = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
            x = ((wide / factors).to(torch.float8_e4m3fn).float() * factors).flatten(-2)
        return product(x, w, bias)

    with mock.patch.object(torch.nn.functional, "linear", rounded):
        yield


@torch.no_grad()
def loss_of(folder: Path, ids: torch.Tensor, attention: str = "eager") -> float:
    """transformers' loss in fp32, nats a token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
    ).eval()
    losses = [model(rows, labels=rows).loss.item() for rows in ids.split(4)]
    return sum(losses) / len(losses)
