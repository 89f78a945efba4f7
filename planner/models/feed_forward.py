"""Feed-forward blocks: dense SwiGLU, and routed experts with or without a gated shared expert.

Shapes: T tokens, H hidden, E experts, M channels of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenspeed_plan.planner.graph import DimSplits, Source
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.builder import GraphBuilder, Splits, stored_format
from tokenspeed_plan.planner.models.common_blocks import add, norm
from tokenspeed_plan.planner.models.config import MoeConfig
from tokenspeed_plan.plans.encodings import NVFP4


def feed_forward(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    """x + ffn(norm(x)); `source` is what the layer's tensors begin with."""
    moe = graph.config.moe
    weight = f"{source}post_attention_layernorm.weight"
    normed = norm(graph, f"{name}.ffn_norm", weight, x)
    source = f"{source}mlp."
    with graph.within("ffn"):
        if moe:
            y = _Moe(graph, moe, name, source).emit(normed)
        else:
            y = _mlp(graph, f"{name}.mlp", source, normed)
    return add(graph, f"{name}.ffn_add", y, x)


def _mlp(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    size = graph.config.intermediate_size
    inner = _swiglu_up(graph, name, source, x, size)
    return _swiglu_down(graph, name, source, inner, size, partial=True)


def _swiglu_up(graph: GraphBuilder, name: str, source: str, x: str, size: int) -> str:
    split = Split("mlp", size)
    block: tuple[int, Splits] = (size, {0: split})
    sources = [f"{source}{key}_proj.weight" for key in ("gate", "up")]
    blocks = dict.fromkeys(sources, block)
    product = f"{name}_gate_up"
    weight = graph.matrix(f"{product}.weight", blocks, graph.config.hidden_size)
    outs = ((2 * size, split),)
    (both,) = graph.linear(product, x, weight, outs)
    (inner,) = graph.op(f"{name}_act", "silu_mul", (both,), out_splits=(split,))
    return inner


def _swiglu_down(
    graph: GraphBuilder, name: str, source: str, inner: str, size: int, partial: bool
) -> str:
    hidden = graph.config.hidden_size
    weight = graph.row_parallel(
        f"{name}_down.weight",
        f"{source}down_proj.weight",
        (hidden, size),
        Split("mlp", size),
    )
    outs = ((hidden, None),)
    (y,) = graph.linear(f"{name}_down", inner, weight, outs, partial=partial)
    return y


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
        self.check_formats()
        if routed.shared_gate is None:
            inner = self.experts_up(x, routed)
            return self.experts_down(inner, routed, partial=True)
        # Both up projections, then both down projections: neighbours can be one kernel.
        shared_name = f"{self.name}.shared"
        shared_source = f"{self.source}shared_expert."
        inner = self.experts_up(x, routed)
        shared_inner = _swiglu_up(self.graph, shared_name, shared_source, x, size)
        y = self.experts_down(inner, routed, partial=False)
        shared = _swiglu_down(
            self.graph, shared_name, shared_source, shared_inner, size, partial=False
        )
        operands = (shared, y, routed.shared_gate)
        (total,) = self.graph.op(f"{self.name}.moe", "gated_add", operands, partial=True)
        return total

    def check_formats(self) -> None:
        """Routed experts have one format, and the shared one too.

        Both share kernels. Those of NVFP4 read a shared expert in any format, the others in that of
        the routed ones.

        Raises:
            SpecError: they differ.
        """
        context = self.graph.context
        routed = [source.name for source in (*self.up_sources(), *self.down_sources())]
        shared = []
        if self.config.shared_intermediate_size:
            for key in ("gate", "up", "down"):
                shared.append(f"{self.source}shared_expert.{key}_proj.weight")
        if stored_format(context, routed) != NVFP4:
            routed += shared
        stored_format(context, routed)
        stored_format(context, shared)

    def route(self, x: str) -> _Routed:
        """The router's product, whose last column is the shared expert's gate, and its top-k."""
        graph = self.graph
        router = f"{self.name}.router"
        columns = {"gate": self.config.num_experts}
        names = [f"{self.name}.router_logits"]
        if self.config.shared_intermediate_size:
            columns["shared_expert_gate"] = 1
            names.append(f"{self.name}.shared_gate")
        blocks: dict[str, tuple[int, Splits]] = {}
        for key, size in columns.items():
            blocks[f"{self.source}{key}.weight"] = (size, {})
        outs = [(size, None) for size in columns.values()]
        weight = graph.matrix(f"{router}.weight", blocks, graph.config.hidden_size)
        attrs = {"top_k": self.config.num_experts_per_token}
        with graph.within("router"):
            logits, *gates = graph.linear(router, x, weight, outs, names)
            shares, ids = graph.op(f"{self.name}.topk", "topk", (logits,), attrs=attrs)
        shared_gate = next(iter(gates), None)
        return _Routed(ids, shares, shared_gate)

    @property
    def splits(self) -> tuple[Split, Split]:
        """How ranks share experts, and each expert's channels."""
        experts = Split("experts", self.config.num_experts)
        channels = Split("expert_inner", self.config.intermediate_size)
        return experts, channels

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
        graph = self.graph
        name = f"{self.name}.experts_up"
        _, channels = self.splits
        rows = 2 * self.config.intermediate_size
        shape = (self.config.num_experts, rows, graph.config.hidden_size)
        weight = graph.weight(f"{name}.weight", shape, self.up_sources(), join_dim=1)
        (inner,) = graph.op(
            name,
            "experts_up",
            (x, routed.ids),
            (weight,),
            out_splits=(channels,),
            **self.expert_constants,
        )
        return inner

    def up_sources(self) -> tuple[Source, ...]:
        """Gate rows, then up rows, of each expert; ranks cut each half by itself."""
        hidden = self.graph.config.hidden_size
        num_experts = self.config.num_experts
        inner = self.config.intermediate_size
        experts, channels = self.splits
        size = (num_experts, inner, hidden)
        splits: DimSplits = ((0, experts), (1, channels))
        prefix = f"{self.source}experts."
        if self.graph.context.fused_experts(prefix):
            name = f"{prefix}gate_up_proj"
            shape = (num_experts, 2 * inner, hidden)
            gate = Source(name, shape, (0, 0, 0), size, splits)
            up = Source(name, shape, (0, inner, 0), size, splits)
            return gate, up
        names = [f"{prefix}{{expert}}.{key}_proj.weight" for key in ("gate", "up")]
        return tuple(Source(name, size, (0, 0, 0), size, splits) for name in names)

    def down_sources(self) -> tuple[Source, ...]:
        """The down projection of each expert; ranks cut its columns."""
        experts, channels = self.splits
        inner = self.config.intermediate_size
        shape = (self.config.num_experts, self.graph.config.hidden_size, inner)
        prefix = f"{self.source}experts."
        name = f"{prefix}{{expert}}.down_proj.weight"
        if self.graph.context.fused_experts(prefix):
            name = f"{prefix}down_proj"
        return (Source(name, shape, (0, 0, 0), shape, ((0, experts), (2, channels))),)

    def experts_down(self, inner: str, routed: _Routed, partial: bool) -> str:
        graph = self.graph
        name = f"{self.name}.experts_down"
        sources = self.down_sources()
        weight = graph.weight(f"{name}.weight", sources[0].shape, sources)
        (y,) = graph.op(
            name,
            "experts_down",
            (inner, routed.ids, routed.shares),
            (weight,),
            partial=partial,
            **self.expert_constants,
        )
        return y
