"""Feed-forward blocks: dense SwiGLU, and routed experts with or without a gated shared expert.

Shapes: T tokens, H hidden, E experts, M channels of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.planner.graph import DimSplits, Source
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.builder import GraphBuilder, Splits
from tokenspeed_plan.planner.models.common_blocks import add, norm
from tokenspeed_plan.planner.models.config import MoeConfig


def feed_forward(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    """x + ffn(norm(x)); `source` is what the layer's tensors begin with."""
    normed = norm(graph, f"{name}.ffn_norm", f"{source}post_attention_layernorm.weight", x)
    source = f"{source}mlp."
    with graph.within("ffn"):
        if graph.config.moe:
            y = _Moe(graph, graph.config.moe, name, source).emit(normed)
        else:
            y = _mlp(graph, f"{name}.mlp", source, normed)
    return add(graph, f"{name}.ffn_add", y, x)


def _mlp(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    size = graph.config.intermediate_size
    inner = _swiglu_up(graph, name, source, x, size)
    return _swiglu_down(graph, name, source, inner, size, partial=True)


def _swiglu_up(graph: GraphBuilder, name: str, source: str, x: str, size: int) -> str:
    split = Split("mlp", size)
    blocks: dict[str, tuple[int, Splits]] = {
        f"{source}{key}_proj.weight": (size, {0: split}) for key in ("gate", "up")
    }
    weight = graph.matrix(f"{name}_gate_up.weight", blocks, graph.config.hidden_size)
    both = graph.linear(f"{name}_gate_up", x, weight, ((2 * size, split),))[0]
    return graph.op(f"{name}_act", "silu_mul", (both,), out_splits=(split,))[0]


def _swiglu_down(
    graph: GraphBuilder, name: str, source: str, inner: str, size: int, partial: bool
) -> str:
    hidden, split = graph.config.hidden_size, Split("mlp", size)
    weight = graph.row_parallel(
        f"{name}_down.weight", f"{source}down_proj.weight", (hidden, size), split
    )
    return graph.linear(f"{name}_down", inner, weight, ((hidden, None),), partial=partial)[0]


@dataclass(frozen=True, slots=True)
class _Routed:
    """The router's outputs: chosen experts [T, k], their shares, the shared expert's gate."""

    ids: str
    shares: str
    shared_gate: str | None


@dataclass(frozen=True, slots=True)
class _Moe:
    """The expert block of one layer; `source` is what its tensors' names begin with."""

    graph: GraphBuilder
    config: MoeConfig
    name: str
    source: str

    def emit(self, x: str) -> str:
        """Ranks hold partial sums; those of routed and shared experts are added up together."""
        routed = self.route(x)
        size = self.config.shared_intermediate_size
        if routed.shared_gate is None:
            inner = self.experts_up(x, routed)
            return self.experts_down(inner, routed, partial=True)
        # Both up projections, then both down projections: neighbours can be one kernel.
        shared_name, shared_source = f"{self.name}.shared", f"{self.source}shared_expert."
        inner = self.experts_up(x, routed)
        shared_inner = _swiglu_up(self.graph, shared_name, shared_source, x, size)
        y = self.experts_down(inner, routed, partial=False)
        shared = _swiglu_down(
            self.graph, shared_name, shared_source, shared_inner, size, partial=False
        )
        operands = (shared, y, routed.shared_gate)
        return self.graph.op(f"{self.name}.moe", "gated_add", operands, partial=True)[0]

    def route(self, x: str) -> _Routed:
        graph, name, num_experts = self.graph, self.name, self.config.num_experts
        blocks: dict[str, tuple[int, Splits]] = {f"{self.source}gate.weight": (num_experts, {})}
        outs: list[tuple[int, Split | None]] = [(num_experts, None)]
        names = [f"{name}.router_logits"]
        if self.config.shared_intermediate_size:
            blocks[f"{self.source}shared_expert_gate.weight"] = (1, {})
            outs.append((1, None))
            names.append(f"{name}.shared_gate")
        weight = graph.matrix(f"{name}.router.weight", blocks, graph.config.hidden_size)
        top_k = {"top_k": self.config.num_experts_per_token}
        with graph.within("router"):
            logits, *gates = graph.linear(f"{name}.router", x, weight, outs, names)
            shares, ids = graph.op(f"{name}.topk", "topk", (logits,), attrs=top_k)
        shared_gate = None
        if gates:
            shared_gate = gates[0]
        return _Routed(ids, shares, shared_gate)

    @property
    def splits(self) -> tuple[Split, Split]:
        """How ranks share experts, and each expert's channels."""
        inner = Split("expert_inner", self.config.intermediate_size)
        return Split("experts", self.config.num_experts), inner

    @property
    def expert_constants(self) -> dict[str, Any]:
        """Arguments of an operator that depend on which experts a rank has."""
        count, split = self.config.num_experts, self.splits[0]
        return {
            "attrs": {"num_experts": count},
            "attr_splits": {"num_experts": split},
            "shifts": {"expert_start": (count, split)},
        }

    def experts_up(self, x: str, routed: _Routed) -> str:
        graph, m, name = self.graph, self.config, f"{self.name}.experts_up"
        shape = (m.num_experts, 2 * m.intermediate_size, graph.config.hidden_size)
        weight = graph.weight(f"{name}.weight", shape, self.up_sources(), join_dim=1)
        return graph.op(
            name,
            "experts_up",
            (x, routed.ids),
            (weight,),
            out_splits=(self.splits[1],),
            **self.expert_constants,
        )[0]

    def up_sources(self) -> tuple[Source, ...]:
        """Gate rows, then up rows, of each expert; ranks cut each half by itself."""
        m, hidden = self.config, self.graph.config.hidden_size
        experts, inner = self.splits
        size = (m.num_experts, m.intermediate_size, hidden)
        splits: DimSplits = ((0, experts), (1, inner))
        prefix = f"{self.source}experts."
        if self.graph.context.fused_experts(prefix):
            shape = (m.num_experts, 2 * m.intermediate_size, hidden)
            return tuple(
                Source(f"{prefix}gate_up_proj", shape, (0, start, 0), size, splits)
                for start in (0, m.intermediate_size)
            )
        return tuple(
            Source(f"{prefix}{{expert}}.{key}_proj.weight", size, (0, 0, 0), size, splits)
            for key in ("gate", "up")
        )

    def experts_down(self, inner: str, routed: _Routed, partial: bool) -> str:
        graph, m, name = self.graph, self.config, f"{self.name}.experts_down"
        experts, channels = self.splits
        shape = (m.num_experts, graph.config.hidden_size, m.intermediate_size)
        prefix = f"{self.source}experts."
        source = f"{prefix}{{expert}}.down_proj.weight"
        if graph.context.fused_experts(prefix):
            source = f"{prefix}down_proj"
        splits: DimSplits = ((0, experts), (2, channels))
        part = Source(source, shape, (0, 0, 0), shape, splits)
        weight = graph.weight(f"{name}.weight", shape, (part,))
        return graph.op(
            name,
            "experts_down",
            (inner, routed.ids, routed.shares),
            (weight,),
            partial=partial,
            **self.expert_constants,
        )[0]
