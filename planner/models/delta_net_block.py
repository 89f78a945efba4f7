"""Gated DeltaNet: projections, causal convolution, delta rule, gated norm.

Shapes: A key heads of K channels, B value heads of N channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.graph import Source
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.builder import GraphBuilder, stored_format
from tokenspeed_plan.planner.models.config import DeltaNetConfig
from tokenspeed_plan.plans.ops import RECOMPUTED
from tokenspeed_plan.plans.types import Attr

_BATCH = ("cu_seqlens", "src_state_slots", "dst_state_slots")
_RECOMPUTE_BATCH = ("context_lens", "state_lens", "src_state_slots", "dst_state_slots")


def delta_net(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    """The whole block, from the normed hidden state to the term of the residual stream."""
    config = graph.config.delta_net
    assert config is not None
    return _Block(graph, config, name, f"{source}linear_attn.").emit(x)


@dataclass(frozen=True, slots=True)
class _Projected:
    """Names of what the input projection gives: [q | k | v], z, b and a."""

    qkv: str
    z: str
    b: str
    a: str


def _k_heads(config: DeltaNetConfig) -> Split:
    """How ranks share key heads."""
    return Split("attention", config.num_k_heads)


def _v_heads(config: DeltaNetConfig) -> Split:
    """How ranks share value heads."""
    return Split("attention", config.num_v_heads)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where the weights of a block are in the checkpoint; `prefix` begins the tensors' names."""

    config: DeltaNetConfig
    hidden_size: int
    prefix: str

    def flat_projections(self) -> tuple[Source, ...]:
        """[q | k | v | z | b | a] by rows; q, k and v are three slices of one checkpoint tensor."""
        d = self.config
        hidden = self.hidden_size
        splits = ((0, _v_heads(d)),)
        qkv = self.qkv_slices("in_proj_qkv.weight", (hidden,))
        rest = []
        rows = {"z": d.value_channels, "b": d.num_v_heads, "a": d.num_v_heads}
        for key, size in rows.items():
            shape = (size, hidden)
            name = f"{self.prefix}in_proj_{key}.weight"
            rest.append(Source(name, shape, (0, 0), shape, splits))
        return (*qkv, *rest)

    def packed_projections(self) -> tuple[Source, ...]:
        """The same rows where the checkpoint packs them by key head.

        For each key head `in_proj_qkvz` has its q, its k, then v and then z of its value heads;
        `in_proj_ba` has b and then a of its value heads (transformers, modeling_qwen3_next.py,
        `fix_query_key_value_ordering`).
        """
        d = self.config
        ratio = d.num_v_heads // d.num_k_heads
        values = ratio * d.value_dim
        qkvz = self.packed("in_proj_qkvz.weight", (d.key_dim, d.key_dim, values, values))
        return qkvz + self.packed("in_proj_ba.weight", (ratio, ratio))

    def packed(self, source: str, runs: tuple[int, ...]) -> tuple[Source, ...]:
        """The parts of a tensor that has `runs` rows of each part for each key head."""
        hidden = self.hidden_size
        groups = self.config.num_k_heads
        period = sum(runs)
        parts = []
        start = 0
        for run in runs:
            part = Source(
                f"{self.prefix}{source}",
                (groups * period, hidden),
                (start, 0),
                (groups * run, hidden),
                ((0, _k_heads(self.config)),),
                run=run,
                every=period,
            )
            parts.append(part)
            start += run
        return tuple(parts)

    def qkv_slices(self, source: str, rest: tuple[int, ...]) -> tuple[Source, ...]:
        """Queries, keys and values of one checkpoint tensor; `rest` are its other dimensions."""
        d = self.config
        keys = d.num_k_heads * d.key_dim
        k_heads = _k_heads(d)
        parts = (
            (0, keys, k_heads),
            (keys, keys, k_heads),
            (2 * keys, d.value_channels, _v_heads(d)),
        )
        name = f"{self.prefix}{source}"
        shape = (d.conv_channels, *rest)
        zeros = (0,) * len(rest)
        slices = []
        for start, rows, heads in parts:
            size = (rows, *rest)
            slices.append(Source(name, shape, (start, *zeros), size, ((0, heads),)))
        return tuple(slices)


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of one layer; `source` is what its tensors' names begin with."""

    graph: GraphBuilder
    config: DeltaNetConfig
    name: str
    source: str

    @property
    def k_heads(self) -> Split:
        return _k_heads(self.config)

    @property
    def v_heads(self) -> Split:
        return _v_heads(self.config)

    @property
    def sources(self) -> _Sources:
        return _Sources(self.config, self.graph.config.hidden_size, self.source)

    @property
    def head_attrs(self) -> dict[str, Attr]:
        return {
            "num_k_heads": self.config.num_k_heads,
            "num_v_heads": self.config.num_v_heads,
            "key_dim": self.config.key_dim,
            "value_dim": self.config.value_dim,
        }

    @property
    def head_splits(self) -> dict[str, Split]:
        return {"num_k_heads": self.k_heads, "num_v_heads": self.v_heads}

    def mode(self, step: str, many: str) -> dict[str, Attr]:
        """How an operator with recurrent state works in this phase."""
        if self.graph.phase == "prefill":
            return {"mode": many}
        if self.graph.recomputes:
            return {"mode": RECOMPUTED}
        return {"mode": step}

    def emit(self, x: str) -> str:
        projected = self.project(x)
        conv_weight = self.conv_weight()
        gate_weights = self.gate_weights()
        conv_state = self.conv_state()
        ssm_state = self.ssm_state()
        if self.graph.recomputes:
            states = (conv_state, ssm_state, *self.kept_inputs())
            self.recompute(projected, (conv_weight, *gate_weights), states)
        y = self.convolve(projected.qkv, conv_weight, conv_state)
        o = self.delta_rule(y, projected, gate_weights, ssm_state)
        normed = self.gated_norm(o, projected.z)
        hidden = self.graph.config.hidden_size
        weight = self.graph.row_parallel(
            f"{self.name}.o.weight",
            f"{self.source}out_proj.weight",
            (hidden, self.config.value_channels),
            self.v_heads,
        )
        outs = ((hidden, None),)
        (out,) = self.graph.linear(f"{self.name}.o", normed, weight, outs, partial=True)
        return out

    def project(self, x: str) -> _Projected:
        d = self.config
        v_heads = self.v_heads
        outs = (
            (d.conv_channels, self.k_heads),
            (d.value_channels, v_heads),
            (d.num_v_heads, v_heads),
            (d.num_v_heads, v_heads),
        )
        sources = self.sources.flat_projections()
        if d.packed:
            sources = self.sources.packed_projections()
        names = [f"{self.name}.{key}" for key in "uzba"]
        name = f"{self.name}.in_proj"
        # Quantised checkpoints keep the few rows of b and a as they are: a product of their own.
        projections, gates = (
            stored_format(self.graph.context, (source.name for source in part))
            for part in (sources[:-2], sources[-2:])
        )
        if projections != gates:
            qkv, z = self.product(name, x, sources[:-2], outs[:2], names[:2])
            b, a = self.product(f"{name}_ba", x, sources[-2:], outs[2:], names[2:])
        else:
            qkv, z, b, a = self.product(name, x, sources, outs, names)
        return _Projected(qkv, z, b, a)

    def product(
        self,
        name: str,
        x: str,
        sources: tuple[Source, ...],
        outs: Sequence[tuple[int, Split | None]],
        names: Sequence[str],
    ) -> tuple[str, ...]:
        """One product of the input projection."""
        columns = sum(size for size, _ in outs)
        shape = (columns, self.graph.config.hidden_size)
        weight = self.graph.weight(f"{name}.weight", shape, sources)
        return self.graph.linear(name, x, weight, outs, names)

    def recompute(
        self, projected: _Projected, weights: tuple[str, ...], states: tuple[str, ...]
    ) -> None:
        """Bring the states to the last accepted token, and keep the inputs of this step's."""
        taps: dict[str, Attr] = {"kernel_size": self.config.conv_kernel_size}
        self.graph.op(
            f"{self.name}.recompute",
            "recompute_state",
            (projected.qkv, projected.b, projected.a, *_RECOMPUTE_BATCH),
            weights,
            states,
            self.head_attrs | taps | self.graph.query_attrs,
            attr_splits=self.head_splits,
        )

    def convolve(self, qkv: str, weight: str, state: str) -> str:
        taps: dict[str, Attr] = {"kernel_size": self.config.conv_kernel_size}
        kind = "causal_conv"
        batch: tuple[str, ...] = _BATCH
        if self.graph.context.limits.in_place:
            kind, batch = "ring_conv", (*_BATCH, "context_lens")
        return self.graph.op(
            f"{self.name}.conv",
            kind,
            (qkv, *batch),
            (weight,),
            (state,),
            attrs=self.mode("update", "varlen") | taps | self.graph.query_attrs,
            out_splits=(self.k_heads,),
        )[0]

    def delta_rule(
        self, y: str, projected: _Projected, gate_weights: tuple[str, ...], state: str
    ) -> str:
        graph, v_heads = self.graph, self.v_heads
        qkv = graph.op(
            f"{self.name}.qkv",
            "qk_l2_norm",
            (y,),
            attrs=self.head_attrs,
            attr_splits=self.head_splits,
            out_splits=(self.k_heads, self.k_heads, v_heads),
        )
        gates = graph.op(
            f"{self.name}.gates",
            "delta_gates",
            (projected.b, projected.a),
            gate_weights,
            out_splits=(v_heads, v_heads),
        )
        return graph.op(
            f"{self.name}.delta_rule",
            "delta_rule",
            (*qkv, *gates, *_BATCH),
            states=(state,),
            attrs=self.head_attrs | self.mode("recurrent", "chunked") | graph.query_attrs,
            attr_splits=self.head_splits,
            out_splits=(v_heads,),
        )[0]

    def gated_norm(self, o: str, z: str) -> str:
        graph, d = self.graph, self.config
        name = f"{self.name}.gated_norm"
        weight = graph.vector(
            f"{name}.weight", f"{self.source}norm.weight", d.value_dim, graph.context.wide
        )
        attrs: dict[str, Attr] = {
            "eps": graph.config.rms_norm_eps,
            "num_heads": d.num_v_heads,
            "head_dim": d.value_dim,
        }
        return graph.op(
            name,
            "gated_norm",
            (o, z),
            (weight,),
            out_splits=(self.v_heads,),
            attrs=attrs,
            attr_splits={"num_heads": self.v_heads},
        )[0]

    def conv_weight(self) -> str:
        d = self.config
        rest = (1, d.conv_kernel_size)
        slices = self.sources.qkv_slices("conv1d.weight", rest)
        return self.graph.weight(f"{self.name}.conv.weight", (d.conv_channels, *rest), slices)

    def gate_weights(self) -> tuple[str, ...]:
        wide, heads = self.graph.context.wide, self.v_heads
        return tuple(
            self.graph.vector(
                f"{self.name}.{key.lower()}", f"{self.source}{key}", heads.units, wide, heads
            )
            for key in ("A_log", "dt_bias")
        )

    def conv_state(self) -> str:
        d = self.config
        context = self.graph.context
        slots = context.limits.num_state_slots
        kept = d.conv_kernel_size - 1
        if context.limits.in_place:
            kept = d.conv_kernel_size
        shape = (slots, kept, d.conv_channels)
        splits = ((2, self.k_heads),)
        return self.graph.tensor(f"{self.name}.conv_state", shape, context.dtype, "state", splits)

    def ssm_state(self) -> str:
        d = self.config
        context = self.graph.context
        slots = context.limits.num_state_slots
        shape = (slots, d.num_v_heads, d.key_dim, d.value_dim)
        splits = ((1, self.v_heads),)
        dtype = context.stored_state or context.wide
        return self.graph.tensor(f"{self.name}.ssm_state", shape, dtype, "state", splits)

    def kept_inputs(self) -> tuple[str, str]:
        """What is kept of a step's tokens: inputs of the convolution, and of the gates."""
        d, context = self.config, self.graph.context
        slots, kept = context.limits.num_state_slots, context.limits.kept_inputs
        inputs = self.graph.tensor(
            f"{self.name}.kept_inputs",
            (slots, kept, d.conv_channels),
            context.dtype,
            "state",
            ((2, self.k_heads),),
        )
        gates = self.graph.tensor(
            f"{self.name}.kept_gates",
            (slots, 2, kept, d.num_v_heads),
            context.dtype,
            "state",
            ((3, self.v_heads),),
        )
        return inputs, gates
