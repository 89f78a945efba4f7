"""The MTP layer in two ways: our graph on reference bodies, and transformers' own decoder layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from checkpoints import Kind
from conftest import make_spec
from safetensors.torch import load_file
from torch import Tensor

from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.passes.limits import CapacityOptions, plan_capacity
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES


def read(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


@torch.no_grad()
def draft_logits_of_graph(folder: Path, hidden_TH: Tensor, ids_T: Tensor) -> Tensor:
    """Logits after each token. The graph computes the last token's, so it runs on each prefix."""
    spec = make_spec(folder, speculation={"depth": 1})
    model = find_model(spec)
    limits = plan_capacity(
        spec.workload, model.config, find_hardware("cpu"), CapacityOptions(depth=1)
    )
    graph = build(
        BuildContext(model.config, "fp32", limits, model.num_valid_tokens, model.fused_experts),
        "prefill",
        1,
    )
    stored, fixed = read(folder), dict[str, Tensor]()
    order = list(graph.ordered())
    ops = order[1 + next(index for index, op in enumerate(order) if op.kind == "shift_tokens") :]
    for weight in (graph.weights[name] for op in ops for name in op.weights):
        parts = [
            assemble(stored, source.name, source.start, source.size) for source in weight.sources
        ]
        fixed[weight.name] = torch.cat(parts, weight.join_dim)
    rows = []
    for count in range(1, len(ids_T) + 1):
        values: dict[str, Tensor] = fixed | {
            "shift_tokens": ids_T[:count],
            "final_norm": hidden_TH[:count],
            "next_tokens": ids_T[-1:],
            "positions": torch.arange(count),
            "slot_mapping": torch.arange(count),
            "cu_seqlens": torch.tensor([0, count]),
            "context_lens": torch.tensor([count]),
            "page_table": torch.arange(limits.table_pages)[None],
        }
        states = {name for op in ops for name, _ in op.states}
        values |= {name: torch.zeros(graph.tensors[name].spec.bind(0, 0)) for name in states}
        for op in ops:
            results = REFERENCE_BODIES[op.kind](
                dict(op.attrs), *(values[name] for name in op.operands)
            )
            values |= dict(zip(op.outputs, results, strict=True))
        rows.append(values["draft_logits"])
    return torch.cat(rows)


def assemble(
    stored: dict[str, Tensor], name: str, start: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    if "{expert}" in name:
        return torch.stack(
            [stored[name.replace("{expert}", str(index))] for index in range(size[0])]
        )
    return stored[name][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


@torch.no_grad()
def draft_logits_of_transformers(
    folder: Path, config: Any, kind: Kind, hidden_TH: Tensor, ids_T: Tensor
) -> Tensor:
    if kind.moe:
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

        layer_class, rotary, norm = (
            hf.Qwen3_5MoeDecoderLayer,
            hf.Qwen3_5MoeTextRotaryEmbedding,
            hf.Qwen3_5MoeRMSNorm,
        )
    else:
        from transformers.models.qwen3_5 import modeling_qwen3_5 as hf  # type: ignore[no-redef]

        layer_class, rotary, norm = (
            hf.Qwen3_5DecoderLayer,
            hf.Qwen3_5TextRotaryEmbedding,
            hf.Qwen3_5RMSNorm,
        )
    config = copy.deepcopy(config)
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    weights, count = read(folder), len(ids_T)
    layer = layer_class(config, 0).float().eval()
    own = {
        name.removeprefix("mtp.layers.0."): v
        for name, v in weights.items()
        if name.startswith("mtp.layers.0.")
    }
    layer.load_state_dict(fused(own))

    def normed(x: Tensor, name: str) -> Tensor:
        module = norm(x.shape[-1], eps=config.rms_norm_eps)
        module.load_state_dict({"weight": weights[f"mtp.{name}.weight"]})
        return module(x)

    embedded = weights["model.language_model.embed_tokens.weight"][ids_T]
    pair = torch.cat(
        (normed(embedded, "pre_fc_norm_embedding"), normed(hidden_TH, "pre_fc_norm_hidden")), -1
    )
    x = (pair @ weights["mtp.fc.weight"].T)[None]
    positions = rotary(config)(x, torch.arange(count)[None, None].expand(3, 1, count))
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    x = layer(x, position_embeddings=positions, attention_mask=mask)
    return normed(x[0], "norm") @ weights["lm_head.weight"].T


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    split = [
        name for name in weights if ".experts." in name and name.split(".experts.")[1][0].isdigit()
    ]
    if not split:
        return weights
    parts = {name: weights.pop(name) for name in split}
    count = 1 + max(int(name.split(".")[2]) for name in parts)
    stem = "mlp.experts."
    gate_up = [
        torch.cat([parts[f"{stem}{e}.{k}_proj.weight"] for k in ("gate", "up")])
        for e in range(count)
    ]
    down = [parts[f"{stem}{e}.down_proj.weight"] for e in range(count)]
    return weights | {
        f"{stem}gate_up_proj": torch.stack(gate_up),
        f"{stem}down_proj": torch.stack(down),
    }
