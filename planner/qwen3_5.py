"""Qwen3.5 as an operator graph: one operator for each line of the model's definition.

Shapes: T tokens, S sequences, H hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenspeed_plan.planner.graph import DimSplits, Op, OpGraph, Source, Stage, Tensor, Weight
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.model_config import ModelConfig
from tokenspeed_plan.plans.ops import BATCH_STATE, OPS, SAMPLING_INPUTS
from tokenspeed_plan.plans.schema import ArenaName, Limits
from tokenspeed_plan.plans.types import Attr, Dim, DType, Phase, TensorSpec

Splits = Mapping[int, Split]
MTP_PREFIX = "mtp."


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What shapes a graph besides the model: dtype, limits, and how the checkpoint stores its experts.

    `fused_experts` tells for a name prefix whether its experts are one tensor (else one tensor an expert).
    """

    config: ModelConfig
    dtype: DType
    limits: Limits
    num_valid_tokens: int
    fused_experts: Callable[[str], bool]

    @property
    def wide(self) -> DType:
        """The dtype of recurrent state and gates."""
        return "fp64" if self.dtype == "fp64" else "fp32"


def build(context: BuildContext, phase: Phase) -> OpGraph:
    """The target model in one phase: token ids in, next tokens out."""
    graph = _Builder(context, phase)
    x = graph.embed("embed", "token_ids")
    for index, kind in enumerate(context.config.layer_types):
        mixer = graph.delta_net if kind == "linear_attention" else graph.attention
        x = graph.layer(f"L{index}", f"{context.config.prefix}layers.{index}.", x, mixer)
    x = graph.norm("final_norm", f"{context.config.prefix}norm.weight", x)
    x = graph.op("last_token", "last_token", (x, "cu_seqlens"))[0]
    logits = graph.head("logits", x)
    graph.op(
        "sample",
        "sample",
        (logits, *SAMPLING_INPUTS),
        out_names=("next_tokens",),
        attrs={"num_valid_tokens": context.num_valid_tokens},
    )
    if phase == "decode":
        page_size = {"page_size": context.limits.page_size}
        graph.op("advance", "advance", ("next_tokens", "page_table"), states=BATCH_STATE, attrs=page_size)
    return graph.finish(("logits", "next_tokens"))


def build_draft(context: BuildContext) -> OpGraph:
    """The MTP layer (one draft step): the next token's id and the target's final hidden row in, a draft out."""
    graph = _Builder(context, "draft")
    hidden = graph.tensor("target_hidden", ("num_tokens", context.config.hidden_size), context.dtype, "io")
    embedded = graph.norm(
        "mtp.embed_norm", f"{MTP_PREFIX}pre_fc_norm_embedding.weight", graph.embed("embed", "token_ids")
    )
    normed = graph.norm("mtp.hidden_norm", f"{MTP_PREFIX}pre_fc_norm_hidden.weight", hidden)
    joined = graph.op("mtp.concat", "concat", (embedded, normed))[0]
    fc = graph.matrix("mtp.fc", {"mtp.fc.weight": (context.config.hidden_size, {})}, 2 * context.config.hidden_size)
    x = graph.linear("mtp.fc", joined, fc, ((context.config.hidden_size, None),))[0]
    x = graph.layer(f"L{context.config.num_layers}", f"{MTP_PREFIX}layers.0.", x, graph.attention)
    x = graph.norm("draft_hidden", f"{MTP_PREFIX}norm.weight", x)
    logits = graph.head("draft_logits", x)
    graph.op("draft", "argmax", (logits,), out_names=("draft_tokens",))
    return graph.finish((x, "draft_logits", "draft_tokens"))


@dataclass
class _Builder:
    """Emits operators in order; method names are those of the model's parts."""

    context: BuildContext
    phase: Phase
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.context.config
        pages = -(-self.context.limits.max_seq_len // self.context.limits.page_size)
        for name in ("token_ids", "positions", "slot_mapping"):
            self.tensor(name, ("num_tokens",), "i32", "io")
        for name in ("context_lens", "read_rows", "write_rows"):
            self.tensor(name, ("num_seqs",), "i32", "io")
        self.tensor("cu_seqlens", ("num_seqs+1",), "i32", "io")
        self.tensor("page_table", ("num_seqs", pages), "i32", "io")
        for name, dtype in SAMPLING_INPUTS.items():
            self.tensor(name, ("num_seqs",), dtype, "io")

    # Emission.

    def tensor(
        self,
        name: str,
        shape: tuple[Dim, ...],
        dtype: DType,
        arena: ArenaName = "activations",
        splits: DimSplits = (),
    ) -> str:
        """Declare a tensor; returns its name."""
        self.tensors[name] = Tensor(name, TensorSpec(shape=shape, dtype=dtype), arena, splits)
        return name

    def op(
        self,
        name: str,
        kind: str,
        inputs: Sequence[str],
        weights: Sequence[str] = (),
        states: Sequence[str] = (),
        attrs: Mapping[str, Attr] | None = None,
        attr_splits: Mapping[str, Split] | None = None,
        shifts: Mapping[str, tuple[int, Split]] | None = None,
        out_splits: Sequence[Split | None] = (),
        out_names: Sequence[str] = (),
        partial: bool = False,
        gathered: bool = False,
    ) -> tuple[str, ...]:
        """Emit one operator; shapes of its outputs follow from the table. Returns their names."""
        definition = OPS[kind]
        operands = (*inputs, *weights, *states)
        specs = {role: self._spec(value) for role, value in zip(definition.operands, operands, strict=True)}
        made = definition.infer(attrs or {}, specs)
        names = tuple(out_names) or tuple(name if len(made) == 1 else f"{name}.{role}" for role in made)
        for value, spec, split in zip(names, made.values(), _padded(out_splits, len(made)), strict=True):
            splits = ((len(spec.shape) - 1, split),) if split else ()
            self.tensors[value] = Tensor(value, spec, "activations", splits)
        access = tuple((state, how) for state, (_, how) in zip(states, definition.states, strict=True))
        self.ops.append(
            Op(
                f"{name}",
                kind,
                tuple(inputs),
                names,
                tuple(weights),
                access,
                attrs or {},
                attr_splits or {},
                shifts or {},
                partial=partial,
                gathered=gathered,
            )
        )
        return names

    def _spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec if name in self.tensors else self.weights[name].spec

    def matrix(
        self, name: str, rows: Mapping[str, tuple[int, Splits]], columns: int, dtype: DType | None = None
    ) -> str:
        """A weight of several checkpoint matrices stacked by rows: name -> (rows, splits)."""
        sources = tuple(
            Source(source, (count, columns), (0, 0), (count, columns), tuple(splits.items()))
            for source, (count, splits) in rows.items()
        )
        return self.weight(name, (sum(count for count, _ in rows.values()), columns), sources, dtype=dtype)

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: tuple[Source, ...],
        join_dim: int = 0,
        dtype: DType | None = None,
    ) -> str:
        """Declare a parameter; returns its name."""
        spec = TensorSpec(shape=shape, dtype=dtype or self.context.dtype)
        self.weights[name] = Weight(name, spec, sources, join_dim)
        return name

    def vector(self, name: str, source: str, size: int, dtype: DType | None = None, split: Split | None = None) -> str:
        """A one-dimensional parameter."""
        splits = ((0, split),) if split else ()
        return self.weight(name, (size,), (Source(source, (size,), (0,), (size,), splits),), dtype=dtype)

    def linear(
        self,
        name: str,
        x: str,
        weight: str,
        outs: Sequence[tuple[int, Split | None]],
        names: Sequence[str] = (),
        partial: bool = False,
        gathered: bool = False,
    ) -> tuple[str, ...]:
        """A product with one or more outputs: (columns, how ranks share them)."""
        return self.op(
            name,
            "linear",
            (x,),
            (weight,),
            attrs={"splits": ",".join(str(size) for size, _ in outs)},
            out_splits=[split for _, split in outs],
            out_names=names,
            partial=partial,
            gathered=gathered,
        )

    # The model.

    def embed(self, name: str, ids: str) -> str:
        """x = E[ids]."""
        return self.op(
            name,
            "embed",
            (ids,),
            (self._table(),),
            partial=True,
            shifts={"row_start": (self.config.vocab_size, self._vocab())},
        )[0]

    def _vocab(self) -> Split:
        return Split("vocab", self.config.vocab_size)

    def _table(self) -> str:
        source = f"{self.config.prefix}embed_tokens.weight"
        return self.matrix(
            "embed.table", {source: (self.config.vocab_size, {0: self._vocab()})}, self.config.hidden_size
        )

    def norm(self, name: str, source: str, x: str) -> str:
        """Zero-centred RMSNorm."""
        weight = self.vector(f"{name}.weight", source, self.config.hidden_size)
        return self.op(name, "rms_norm", (x,), (weight,), attrs={"eps": self.config.rms_norm_eps})[0]

    def head(self, name: str, x: str) -> str:
        """Logits over the vocabulary."""
        split, rows = self._vocab(), self.config.vocab_size
        if self.config.tie_word_embeddings:
            table = self._table()
        else:
            table = self.matrix("head.weight", {"lm_head.weight": (rows, {0: split})}, self.config.hidden_size)
        return self.linear("head", x, table, ((rows, split),), (name,), gathered=True)[0]

    def layer(self, name: str, source: str, x: str, mixer: Callable[[str, str, str], str]) -> str:
        """x + mixer(norm(x)), then x + ffn(norm(x))."""
        normed = self.norm(f"{name}.mixer_norm", f"{source}input_layernorm.weight", x)
        x = self.op(f"{name}.mixer_add", "add", (mixer(name, source, normed), x))[0]
        normed = self.norm(f"{name}.ffn_norm", f"{source}post_attention_layernorm.weight", x)
        ffn = self.moe if self.config.moe else self.mlp
        return self.op(f"{name}.ffn_add", "add", (ffn(name, f"{source}mlp.", normed), x))[0]

    def attention(self, name: str, source: str, x: str) -> str:
        """Gated attention with q/k norm and partial rotary embedding."""
        a, source = self.config.attention, f"{source}self_attn."
        heads, kv = Split("attention", a.num_qo_heads), Split("kv", a.num_kv_heads)
        q_size, kv_size = a.num_qo_heads * a.head_dim, a.num_kv_heads * a.head_dim
        rows = {
            f"{source}q_proj.weight": (2 * q_size, {0: heads}),
            f"{source}k_proj.weight": (kv_size, {0: kv}),
            f"{source}v_proj.weight": (kv_size, {0: kv}),
        }
        weight = self.matrix(f"{name}.qkv.weight", rows, self.config.hidden_size)
        outs = ((2 * q_size, heads), (kv_size, kv), (kv_size, kv))
        qg, k, v = self.linear(f"{name}.qkv", x, weight, outs, (f"{name}.qg", f"{name}.k", f"{name}.v"))
        q, gate = self._split_gate(name, qg, heads)
        q = self._norm_rope(f"{name}.q", f"{source}q_norm.weight", q, heads)
        k = self._norm_rope(f"{name}.k", f"{source}k_norm.weight", k, kv)
        o = self._attend(name, q, k, v, heads, kv)
        gated = self.op(f"{name}.gated", "sigmoid_gate", (o, gate), out_splits=(heads,))[0]
        out = self._row_parallel(f"{name}.o.weight", f"{source}o_proj.weight", q_size, heads)
        return self.linear(f"{name}.o", gated, out, ((self.config.hidden_size, None),), partial=True)[0]

    def _split_gate(self, name: str, qg: str, heads: Split) -> tuple[str, ...]:
        return self.op(
            f"{name}.split_gate",
            "split_gate",
            (qg,),
            out_splits=(heads, heads),
            attrs={"num_heads": heads.units, "head_dim": self.config.attention.head_dim},
            attr_splits={"num_heads": heads},
        )

    def _norm_rope(self, name: str, source: str, x: str, heads: Split) -> str:
        a = self.config.attention
        attrs: dict[str, Attr] = {"num_heads": heads.units, "head_dim": a.head_dim}
        weight = self.vector(f"{name}_norm.weight", source, a.head_dim)
        x = self.op(
            f"{name}_normed",
            "head_norm",
            (x,),
            (weight,),
            out_splits=(heads,),
            attrs=attrs | {"eps": self.config.rms_norm_eps},
            attr_splits={"num_heads": heads},
        )[0]
        rope: dict[str, Attr] = {
            "rotary_dim": a.rotary_dim,
            "theta": a.rope_theta,
            "factor": a.rope_factor,
            "original_max_positions": a.rope_original_max_positions,
        }
        return self.op(
            f"{name}_roped",
            "rope",
            (x, "positions"),
            out_splits=(heads,),
            attrs=attrs | rope,
            attr_splits={"num_heads": heads},
        )[0]

    def _attend(self, name: str, q: str, k: str, v: str, heads: Split, kv: Split) -> str:
        a, limits = self.config.attention, self.context.limits
        cache = self.tensor(
            f"{name}.kv_cache",
            (limits.num_pages + 1, 2, limits.page_size, a.num_kv_heads, a.head_dim),
            self.context.dtype,
            "kv_cache",
            ((3, kv),),
        )
        attrs: dict[str, Attr] = {"num_kv_heads": kv.units, "head_dim": a.head_dim, "page_size": limits.page_size}
        self.op(
            f"{name}.kv_write",
            "kv_write",
            (k, v, "slot_mapping"),
            states=(cache,),
            attrs=attrs,
            attr_splits={"num_kv_heads": kv},
        )
        more: dict[str, Attr] = {"mode": "prefill" if self.phase == "prefill" else "decode", "num_heads": heads.units}
        return self.op(
            f"{name}.attention",
            "attention",
            (q, "page_table", "context_lens", "cu_seqlens"),
            states=(cache,),
            attrs=attrs | more,
            attr_splits={"num_heads": heads, "num_kv_heads": kv},
            out_splits=(heads,),
        )[0]

    def _row_parallel(self, name: str, source: str, size: int, split: Split) -> str:
        hidden = self.config.hidden_size
        return self.weight(
            name, (hidden, size), (Source(source, (hidden, size), (0, 0), (hidden, size), ((1, split),)),)
        )

    def delta_net(self, name: str, source: str, x: str) -> str:
        """Gated DeltaNet: projections, causal convolution, delta rule, gated norm."""
        d, source = self.config.delta_net, f"{source}linear_attn."
        k_heads, v_heads = Split("attention", d.num_k_heads), Split("attention", d.num_v_heads)
        z_size = d.num_v_heads * d.value_dim
        weight = self._delta_in_proj(name, source)
        outs = ((d.conv_channels, k_heads), (z_size, v_heads), (d.num_v_heads, v_heads), (d.num_v_heads, v_heads))
        u, z, b, a = self.linear(f"{name}.in_proj", x, weight, outs, tuple(f"{name}.{n}" for n in "uzba"))
        y = self._conv(name, source, u)
        heads: dict[str, Attr] = {
            "num_k_heads": d.num_k_heads,
            "num_v_heads": d.num_v_heads,
            "key_dim": d.key_dim,
            "value_dim": d.value_dim,
        }
        head_splits = {"num_k_heads": k_heads, "num_v_heads": v_heads}
        qkv = self.op(
            f"{name}.qkv",
            "qk_l2_norm",
            (y,),
            attrs=heads,
            attr_splits=head_splits,
            out_splits=(k_heads, k_heads, v_heads),
        )
        gates = self._delta_gates(name, source, b, a, v_heads)
        state = self.tensor(
            f"{name}.ssm_state",
            (self.context.limits.num_rows, d.num_v_heads, d.key_dim, d.value_dim),
            self.context.wide,
            "state",
            ((1, v_heads),),
        )
        mode = "chunked" if self.phase == "prefill" else "recurrent"
        o = self.op(
            f"{name}.delta_rule",
            "delta_rule",
            (*qkv, *gates, *_ROWS),
            states=(state,),
            attrs=heads | {"mode": mode},
            attr_splits=head_splits,
            out_splits=(v_heads,),
        )[0]
        norm = self.vector(f"{name}.gated_norm.weight", f"{source}norm.weight", d.value_dim, self.context.wide)
        normed = self.op(
            f"{name}.gated_norm",
            "gated_norm",
            (o, z),
            (norm,),
            out_splits=(v_heads,),
            attrs={"eps": self.config.rms_norm_eps, "num_heads": d.num_v_heads, "head_dim": d.value_dim},
            attr_splits={"num_heads": v_heads},
        )[0]
        out = self._row_parallel(f"{name}.o.weight", f"{source}out_proj.weight", z_size, v_heads)
        return self.linear(f"{name}.o", normed, out, ((self.config.hidden_size, None),), partial=True)[0]

    def _delta_in_proj(self, name: str, source: str) -> str:
        """[q | k | v | z | b | a] by rows; q, k and v are three slices of one checkpoint tensor."""
        d, hidden = self.config.delta_net, self.config.hidden_size
        v_heads = Split("attention", d.num_v_heads)
        others = {"z": d.num_v_heads * d.value_dim, "b": d.num_v_heads, "a": d.num_v_heads}
        sources = self._qkv_slices(f"{source}in_proj_qkv.weight", (hidden,)) + tuple(
            Source(f"{source}in_proj_{key}.weight", (size, hidden), (0, 0), (size, hidden), ((0, v_heads),))
            for key, size in others.items()
        )
        return self.weight(f"{name}.in_proj.weight", (d.conv_channels + sum(others.values()), hidden), sources)

    def _qkv_slices(self, source: str, rest: tuple[int, ...]) -> tuple[Source, ...]:
        d = self.config.delta_net
        key = d.num_k_heads * d.key_dim
        parts = (
            (0, key, d.num_k_heads),
            (key, key, d.num_k_heads),
            (2 * key, d.num_v_heads * d.value_dim, d.num_v_heads),
        )
        zeros = tuple(0 for _ in rest)
        return tuple(
            Source(source, (d.conv_channels, *rest), (start, *zeros), (size, *rest), ((0, Split("attention", units)),))
            for start, size, units in parts
        )

    def _conv(self, name: str, source: str, u: str) -> str:
        d = self.config.delta_net
        split = Split("attention", d.num_k_heads)
        weight = self.weight(
            f"{name}.conv.weight",
            (d.conv_channels, 1, d.conv_kernel_size),
            self._qkv_slices(f"{source}conv1d.weight", (1, d.conv_kernel_size)),
        )
        state = self.tensor(
            f"{name}.conv_state",
            (self.context.limits.num_rows, d.conv_kernel_size - 1, d.conv_channels),
            self.context.dtype,
            "state",
            ((2, split),),
        )
        mode = "varlen" if self.phase == "prefill" else "update"
        return self.op(
            f"{name}.conv",
            "causal_conv",
            (u, *_ROWS),
            (weight,),
            (state,),
            attrs={"mode": mode, "kernel_size": d.conv_kernel_size},
            out_splits=(split,),
        )[0]

    def _delta_gates(self, name: str, source: str, b: str, a: str, heads: Split) -> tuple[str, ...]:
        weights = tuple(
            self.vector(f"{name}.{key.lower()}", f"{source}{key}", heads.units, self.context.wide, heads)
            for key in ("A_log", "dt_bias")
        )
        return self.op(f"{name}.gates", "delta_gates", (b, a), weights, out_splits=(heads, heads))

    def mlp(self, name: str, source: str, x: str) -> str:
        """Dense SwiGLU."""
        size = self.config.intermediate_size
        up = self._swiglu_up(f"{name}.mlp", source, x, size)
        return self._swiglu_down(f"{name}.mlp", source, up, size, partial=True)

    def _swiglu_up(self, name: str, source: str, x: str, size: int) -> str:
        split = Split("mlp", size)
        rows = {f"{source}{key}_proj.weight": (size, {0: split}) for key in ("gate", "up")}
        weight = self.matrix(f"{name}_gate_up.weight", rows, self.config.hidden_size)
        both = self.linear(f"{name}_gate_up", x, weight, ((2 * size, split),))[0]
        return self.op(f"{name}_act", "silu_mul", (both,), out_splits=(split,))[0]

    def _swiglu_down(self, name: str, source: str, inner: str, size: int, partial: bool) -> str:
        down = self._row_parallel(f"{name}_down.weight", f"{source}down_proj.weight", size, Split("mlp", size))
        return self.linear(f"{name}_down", inner, down, ((self.config.hidden_size, None),), partial=partial)[0]

    def moe(self, name: str, source: str, x: str) -> str:
        """Routed experts and the gated shared expert; their sums over ranks are taken together."""
        m = self.config.moe
        assert m is not None
        rows: dict[str, tuple[int, Splits]] = {
            f"{source}gate.weight": (m.num_experts, {}),
            f"{source}shared_expert_gate.weight": (1, {}),
        }
        router = self.matrix(f"{name}.router.weight", rows, self.config.hidden_size)
        logits, shared_gate = self.linear(
            f"{name}.router",
            x,
            router,
            ((m.num_experts, None), (1, None)),
            (f"{name}.router_logits", f"{name}.shared_gate"),
        )
        weights, ids = self.op(f"{name}.topk", "topk", (logits,), attrs={"top_k": m.num_experts_per_token})
        # Both ways up, then both ways down: neighbours can be one kernel.
        routed_up = self._experts_up(name, f"{source}experts.", x, ids)
        shared_up = self._swiglu_up(f"{name}.shared", f"{source}shared_expert.", x, m.shared_intermediate_size)
        routed = self._experts_down(name, f"{source}experts.", routed_up, ids, weights)
        shared = self._swiglu_down(
            f"{name}.shared", f"{source}shared_expert.", shared_up, m.shared_intermediate_size, partial=False
        )
        return self.op(f"{name}.moe", "gated_add", (shared, routed, shared_gate), partial=True)[0]

    def _expert_place(self) -> dict[str, Any]:
        """How ranks share the experts out."""
        assert self.config.moe is not None
        count = self.config.moe.num_experts
        split = Split("experts", count)
        return {
            "attrs": {"num_experts": count},
            "attr_splits": {"num_experts": split},
            "shifts": {"expert_start": (count, split)},
        }

    def _experts_up(self, name: str, source: str, x: str, ids: str) -> str:
        m = self.config.moe
        assert m is not None
        split, inner = Split("experts", m.num_experts), Split("expert_inner", m.intermediate_size)
        up = self.weight(
            f"{name}.experts_up.weight",
            (m.num_experts, 2 * m.intermediate_size, self.config.hidden_size),
            self._expert_up_sources(source, split, inner),
            join_dim=1,
        )
        return self.op(
            f"{name}.experts_up", "experts_up", (x, ids), (up,), out_splits=(inner,), **self._expert_place()
        )[0]

    def _experts_down(self, name: str, source: str, h: str, ids: str, weights: str) -> str:
        m = self.config.moe
        assert m is not None
        split, inner = Split("experts", m.num_experts), Split("expert_inner", m.intermediate_size)
        shape = (m.num_experts, self.config.hidden_size, m.intermediate_size)
        fused = self.context.fused_experts(source)
        down_name = f"{source}down_proj" if fused else f"{source}{{expert}}.down_proj.weight"
        down = self.weight(
            f"{name}.experts_down.weight",
            shape,
            (Source(down_name, shape, (0, 0, 0), shape, ((0, split), (2, inner))),),
        )
        return self.op(f"{name}.experts_down", "experts_down", (h, ids, weights), (down,), **self._expert_place())[0]

    def _expert_up_sources(self, source: str, split: Split, inner: Split) -> tuple[Source, ...]:
        """Gate rows, then up rows, of each expert; both halves are cut by themselves."""
        m = self.config.moe
        assert m is not None
        size = (m.num_experts, m.intermediate_size, self.config.hidden_size)
        splits: DimSplits = ((0, split), (1, inner))
        if self.context.fused_experts(source):
            shape = (m.num_experts, 2 * m.intermediate_size, self.config.hidden_size)
            return tuple(
                Source(f"{source}gate_up_proj", shape, (0, start, 0), size, splits)
                for start in (0, m.intermediate_size)
            )
        return tuple(
            Source(f"{source}{{expert}}.{key}_proj.weight", size, (0, 0, 0), size, splits) for key in ("gate", "up")
        )

    def finish(self, outputs: tuple[str, ...]) -> OpGraph:
        """The graph, with the inputs that it really reads; what it gives back lies in the io arena."""
        read = {name for op in self.ops for name in (*op.inputs, *(state for state, _ in op.states))}
        inputs = tuple(name for name, tensor in self.tensors.items() if tensor.arena == "io" and name in read)
        unused = {name for name, tensor in self.tensors.items() if tensor.arena == "io" and name not in read}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in unused}
        for name in outputs:
            tensors[name] = Tensor(name, tensors[name].spec, "io", tensors[name].splits)
        return OpGraph(self.phase, Stage.BUILT, tuple(self.ops), tensors, self.weights, inputs, outputs)


_ROWS = ("cu_seqlens", "read_rows", "write_rows")


def _padded(splits: Sequence[Split | None], count: int) -> tuple[Split | None, ...]:
    return tuple(splits) or (None,) * count
