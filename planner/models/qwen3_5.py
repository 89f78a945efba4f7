"""Qwen3.5 as an operator graph: one operator for each line of the model's definition.

Shapes: T tokens, S sequences, H hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenspeed_plan.planner.graph import (
    DimSplits,
    Op,
    OpGraph,
    Role,
    Source,
    Stage,
    Tensor,
    Weight,
)
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.plans.ops import BATCH_STATE, OPS, RECOMPUTED, SAMPLING_INPUTS, STOP_IDS
from tokenspeed_plan.plans.schema import ArenaName, Capacity
from tokenspeed_plan.plans.types import Attr, Dim, DType, Phase, TensorSpec

Splits = Mapping[int, Split]
MTP_PREFIX = "mtp."


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What shapes a graph besides the model: dtype, limits, and how the checkpoint stores its experts.

    `fused_experts` tells for a name prefix whether its experts are one tensor (else one tensor an
    expert). Drafts are chosen from the first `draft_vocab` tokens.
    """

    config: ModelConfig
    dtype: DType
    limits: Capacity
    num_valid_tokens: int
    fused_experts: Callable[[str], bool]
    draft_vocab: int | None = None

    @property
    def wide(self) -> DType:
        """The dtype of recurrent state and gates."""
        return "fp64" if self.dtype == "fp64" else "fp32"


def build(context: BuildContext, phase: Phase, depth: int = 0) -> OpGraph:
    """The target model in one phase: token ids in, next tokens out. With a depth, so many drafts after each too.

    A decode step of a depth verifies as many drafts as it makes: its sequences have `depth + 1`
    rows each.
    """
    graph = _Builder(context, phase, depth)
    x = graph.embed("embed", "token_ids")
    for index, kind in enumerate(context.config.layer_types):
        mixer = graph.delta_net if kind == "linear_attention" else graph.attention
        with graph.within("mixer", index):
            x = graph.layer(f"L{index}", f"{context.config.prefix}layers.{index}.", x, mixer)
    x = graph.norm("final_norm", f"{context.config.prefix}norm.weight", x)
    if depth and phase == "decode":
        return graph.finish(_verify(graph, x))
    last = graph.op("last_token", "last_token", (x, "cu_seqlens"))[0]
    outputs: tuple[str, ...] = (graph.head("logits", last), graph.sample("logits", "next_tokens"))
    if context.limits.max_depth:
        shifted = graph.op(
            "shift_tokens", "shift_tokens", ("token_ids", "following", "next_tokens", "cu_seqlens")
        )[0]
        if depth:
            last_row = _LastRow("last_token", "cu_seqlens")
            outputs += (_drafts(graph, shifted, x, last_row, "context_lens", "next_tokens"),)
        else:
            graph.draft_keys(shifted, x)
    if phase == "decode":
        page_size = {"page_size": context.limits.page_size}
        graph.commit_state_len()
        graph.op(
            "advance", "advance", ("next_tokens", "page_table"), states=BATCH_STATE, attrs=page_size
        )
    return graph.finish(outputs)


@dataclass(frozen=True, slots=True)
class _LastRow:
    """How to take the last row of each sequence: an operator, its second operand, its constants."""

    kind: str
    which: str
    attrs: Mapping[str, Attr] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where rows are: the inputs of the batch, or what `draft_place` made."""

    positions: str = "positions"
    slot_mapping: str = "slot_mapping"
    context_lens: str = "context_lens"


def _verify(graph: _Builder, hidden: str) -> tuple[str, ...]:
    """Sample after every row, accept the drafts that agree, draft anew, and move all inputs on."""
    rows: dict[str, Attr] = {"query_len": graph.depth + 1}
    logits = graph.head("verify_logits", hidden)
    said = graph.sample(logits, "verify_tokens")
    accepted, lens, last = graph.op(
        "accept",
        "accept",
        (
            "token_ids",
            said,
            "context_lens",
            "src_state_slots",
            "max_lens",
            "stop_ids",
            "seed",
            "rng_offset",
            "forced_accept",
        ),
        states=("accept_counts",),
        attrs=rows,
        out_names=("accepted", "committed_lens", "last_tokens"),
    )
    drafts = _drafts(graph, said, hidden, _LastRow("select_row", accepted, rows), lens, last)
    attrs = rows | {"page_size": graph.context.limits.page_size}
    graph.commit_state_len()
    graph.op(
        "advance", "advance_rows", (accepted, drafts, "page_table"), states=BATCH_STATE, attrs=attrs
    )
    return logits, said, accepted, drafts


def _drafts(
    graph: _Builder, tokens: str, hidden: str, last_row: _LastRow, lens: str, last: str
) -> str:
    """The MTP layer, over all new rows and then over its own drafts; gives [last token | drafts] of each sequence.

    The first pass is over what is certain: its keys and values stay. Row i takes the token after
    row i and the target's hidden state of row i, and only the last row is of further use. Keys of
    drafts are overwritten by what comes true.
    """
    drafts = last
    for number in range(1, graph.depth + 1):
        if number == 1:
            hidden = graph.draft_layer(tokens, hidden, _Place(context_lens=lens), last_row)
        else:
            graph.suffix = f"@{number}"
            hidden = graph.draft_layer(drafts, hidden, graph.place(lens, number - 1))
        logits = graph.head("draft_logits", hidden)
        graph.suffix = ""
        name = f"drafts_{graph.depth}" if number == graph.depth else f"drafts_so_far.{number}"
        drafts = graph.op(f"draft.{number}", "draft", (logits, drafts), out_names=(name,))[0]
    return drafts


@dataclass
class _Builder:
    """Emits operators in order; method names are those of the model's parts."""

    context: BuildContext
    phase: Phase
    depth: int
    # of the names of operators and activations, where a layer comes more than once
    suffix: str = ""
    layer_index: int | None = None
    role: Role = "batch"
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.context.config
        limits = self.context.limits
        rows, columns = limits.max_depth + 1, limits.state_slots_per_seq - 1
        self.recomputes = bool(limits.kept_inputs) and self.phase == "decode"
        for name in ("token_ids", "positions", "slot_mapping"):
            self.tensor(name, ("num_tokens",), "i32", "io")
        for name in ("context_lens", "state_lens", "src_state_slots", "following", "max_lens"):
            self.tensor(name, ("num_seqs",), "i32", "io")
        self.tensor(
            "dst_state_slots", ("num_seqs", columns) if columns > 1 else ("num_seqs",), "i32", "io"
        )
        self.tensor("stop_ids", ("num_seqs", STOP_IDS), "i32", "io")
        self.tensor("forced_accept", (rows,), "fp32", "io")
        self.tensor("accept_counts", (rows,), "i64", "io")
        self.tensor("cu_seqlens", ("num_seqs+1",), "i32", "io")
        self.tensor("page_table", ("num_seqs", limits.table_pages), "i32", "io")
        for name, dtype in SAMPLING_INPUTS.items():
            self.tensor(name, ("num_seqs",), dtype, "io")

    # Emission.

    @contextmanager
    def within(self, role: Role, layer: int | None = None) -> Iterator[None]:
        """Operators emitted inside have this role, and this layer or that around it."""
        before = self.role, self.layer_index
        self.role, self.layer_index = role, self.layer_index if layer is None else layer
        yield
        self.role, self.layer_index = before

    def tensor(
        self,
        name: str,
        shape: tuple[Dim, ...],
        dtype: DType,
        arena: ArenaName = "activations",
        splits: DimSplits = (),
    ) -> str:
        """Declare a tensor; returns its name."""
        self.tensors[name] = Tensor(name, TensorSpec.of(shape=shape, dtype=dtype), arena, splits)
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
        specs = {
            role: self._spec(value)
            for role, value in zip(definition.operands, operands, strict=True)
        }
        made = definition.infer(attrs or {}, specs)
        name = f"{name}{self.suffix}"
        given = tuple(f"{value}{self.suffix}" for value in out_names)
        names = given or tuple(name if len(made) == 1 else f"{name}.{role}" for role in made)
        for value, spec, split in zip(
            names, made.values(), _padded(out_splits, len(made)), strict=True
        ):
            splits = ((len(spec.shape) - 1, split),) if split else ()
            self.tensors[value] = Tensor(value, spec, "activations", splits)
        access = tuple(
            (state, how) for state, (_, how) in zip(states, definition.states, strict=True)
        )
        self.ops.append(
            Op(
                name,
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
                layer=self.layer_index,
                role=self.role,
            )
        )
        return names

    def _spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec if name in self.tensors else self.weights[name].spec

    def matrix(
        self,
        name: str,
        rows: Mapping[str, tuple[int, Splits]],
        columns: int,
        dtype: DType | None = None,
    ) -> str:
        """A weight of several checkpoint matrices stacked by rows: name -> (rows, splits)."""
        sources = tuple(
            Source(source, (count, columns), (0, 0), (count, columns), tuple(splits.items()))
            for source, (count, splits) in rows.items()
        )
        return self.weight(
            name, (sum(count for count, _ in rows.values()), columns), sources, dtype=dtype
        )

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: tuple[Source, ...],
        join_dim: int = 0,
        dtype: DType | None = None,
    ) -> str:
        """Declare a parameter; returns its name."""
        spec = TensorSpec.of(shape=shape, dtype=dtype or self.context.dtype)
        self.weights[name] = Weight(name, spec, sources, join_dim)
        return name

    def vector(
        self,
        name: str,
        source: str,
        size: int,
        dtype: DType | None = None,
        split: Split | None = None,
    ) -> str:
        """A one-dimensional parameter."""
        splits = ((0, split),) if split else ()
        return self.weight(
            name, (size,), (Source(source, (size,), (0,), (size,), splits),), dtype=dtype
        )

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
            attrs={"splits": tuple(size for size, _ in outs)},
            out_splits=[split for _, split in outs],
            out_names=names,
            partial=partial,
            gathered=gathered,
        )

    # The model.

    def embed(self, name: str, ids: str) -> str:
        """x = E[ids]."""
        shifts = {"row_start": (self.config.vocab_size, self._vocab())}
        with self.within("embed"):
            return self.op(name, "embed", (ids,), (self._table(),), partial=True, shifts=shifts)[0]

    def _vocab(self, rows: int | None = None) -> Split:
        return Split("vocab", rows or self.config.vocab_size)

    def _table(self) -> str:
        source = f"{self.config.prefix}embed_tokens.weight"
        return self.matrix(
            "embed.table",
            {source: (self.config.vocab_size, {0: self._vocab()})},
            self.config.hidden_size,
        )

    def norm(self, name: str, source: str, x: str) -> str:
        """Zero-centred RMSNorm."""
        weight = self.vector(f"{name}.weight", source, self.config.hidden_size)
        eps = {"eps": self.config.rms_norm_eps}
        with self.within("residual"):
            return self.op(name, "rms_norm", (x,), (weight,), attrs=eps)[0]

    def head(self, name: str, x: str) -> str:
        """Logits over the vocabulary, or over the part that drafts are chosen from."""
        drafts = name == "draft_logits"
        rows = (drafts and self.context.draft_vocab) or self.config.vocab_size
        op, split, table = (
            "draft_head" if drafts else "head",
            self._vocab(rows),
            self._head_weight(rows),
        )
        with self.within("head"):
            return self.linear(op, x, table, ((rows, split),), (name,), gathered=True)[0]

    def _head_weight(self, rows: int) -> str:
        tied, whole = self.config.tie_word_embeddings, self.config.vocab_size
        if tied and rows == whole:
            return self._table()
        source = f"{self.config.prefix}embed_tokens.weight" if tied else "lm_head.weight"
        hidden = self.config.hidden_size
        part = Source(source, (whole, hidden), (0, 0), (rows, hidden), ((0, self._vocab(rows)),))
        return self.weight(
            "head.weight" if rows == whole else "draft_head.weight", (rows, hidden), (part,)
        )

    def sample(self, logits: str, name: str) -> str:
        """The next token of each row."""
        attrs: dict[str, Attr] = {"num_valid_tokens": self.context.num_valid_tokens}
        return self.op(
            "sample",
            "sample",
            (logits, *SAMPLING_INPUTS),
            attrs=attrs | self._rows(),
            out_names=(name,),
        )[0]

    def _rows(self) -> dict[str, Attr]:
        """How many rows each sequence has in a decode step, where it is not one."""
        return {"query_len": self.depth + 1} if self.depth and self.phase == "decode" else {}

    def commit_state_len(self) -> None:
        """Note how far the states have been brought, where inputs are kept."""
        if self.recomputes:
            self.op(
                "commit_state_len",
                "commit_state_len",
                ("context_lens",),
                states=("state_lens",),
                attrs=self._rows(),
            )

    def last_row(self, how: _LastRow, name: str, x: str, split: Split | None = None) -> str:
        """The last row of each sequence."""
        return self.op(
            f"{name}.last", how.kind, (x, how.which), attrs=how.attrs, out_splits=(split,)
        )[0]

    def place(self, lens: str, step: int) -> _Place:
        """Where the row after `lens + step - 1` tokens is."""
        attrs: dict[str, Attr] = {"page_size": self.context.limits.page_size, "step": step}
        return _Place(*self.op("draft_place", "draft_place", (lens, "page_table"), attrs=attrs))

    def draft_layer(
        self, tokens: str, hidden: str, place: _Place, last_row: _LastRow | None = None
    ) -> str:
        """The MTP layer: each row's next token and the hidden state that said it in, a hidden state out.

        With `last_row`, keys and values are those of all rows, which lie where the batch says, and
        only the last row of each sequence goes on, from `place`.
        """
        x = self._draft_input(tokens, hidden)
        with self.within("mixer", self.config.num_layers):
            x = self._draft_block(
                f"L{self.config.num_layers}", f"{MTP_PREFIX}layers.0.", x, place, last_row
            )
        return self.norm("draft_hidden", f"{MTP_PREFIX}norm.weight", x)

    def draft_keys(self, tokens: str, hidden: str) -> None:
        """Keys and values of rows that draft nothing, for those that draft after them."""
        name, source = f"L{self.config.num_layers}", f"{MTP_PREFIX}layers.0."
        x = self._draft_input(tokens, hidden)
        with self.within("mixer", self.config.num_layers):
            self._draft_keys(name, source, x)

    def _draft_keys(self, name: str, source: str, x: str) -> None:
        x = self.norm(f"{name}.mixer_norm", f"{source}input_layernorm.weight", x)
        rows = self._key_rows(f"{source}self_attn.")
        weight = self.matrix(f"{name}.kv.weight", rows, self.config.hidden_size)
        outs = [(count, splits[0]) for count, splits in rows.values()]
        k, v = self.linear(f"{name}.kv", x, weight, outs, (f"{name}.k", f"{name}.v"))
        self._write_keys(name, f"{source}self_attn.", k, v, _Place())

    def _draft_input(self, tokens: str, hidden: str) -> str:
        size = self.config.hidden_size
        x = self.embed("mtp.embed", tokens)
        embedded = self.norm("mtp.embed_norm", f"{MTP_PREFIX}pre_fc_norm_embedding.weight", x)
        normed = self.norm("mtp.hidden_norm", f"{MTP_PREFIX}pre_fc_norm_hidden.weight", hidden)
        fc = self.matrix("mtp.fc.weight", {"mtp.fc.weight": (size, {})}, 2 * size)
        with self.within("draft"):
            joined = self.op("mtp.concat", "concat", (embedded, normed))[0]
            return self.linear("mtp.fc", joined, fc, ((size, None),))[0]

    def _draft_block(
        self, name: str, source: str, x: str, place: _Place, last_row: _LastRow | None
    ) -> str:
        normed = self.norm(f"{name}.mixer_norm", f"{source}input_layernorm.weight", x)
        q, gate = self.queries(name, source, normed, _Place() if last_row else place)
        if last_row:
            heads = Split("attention", self.config.attention.num_qo_heads)
            q, gate = (
                self.last_row(last_row, f"{name}.{key}", y, heads)
                for key, y in (("q", q), ("gate", gate))
            )
            x = self.last_row(last_row, f"{name}.x", x)
        x = self.add(f"{name}.mixer_add", self.attend(name, source, q, gate, place), x)
        return self.feed_forward(name, source, x)

    def layer(self, name: str, source: str, x: str, mixer: Callable[[str, str, str], str]) -> str:
        """x + mixer(norm(x)), then x + ffn(norm(x))."""
        normed = self.norm(f"{name}.mixer_norm", f"{source}input_layernorm.weight", x)
        x = self.add(f"{name}.mixer_add", mixer(name, source, normed), x)
        return self.feed_forward(name, source, x)

    def feed_forward(self, name: str, source: str, x: str) -> str:
        """x + ffn(norm(x))."""
        normed = self.norm(f"{name}.ffn_norm", f"{source}post_attention_layernorm.weight", x)
        ffn = self.moe if self.config.moe else self.mlp
        with self.within("ffn"):
            y = ffn(name, f"{source}mlp.", normed)
        return self.add(f"{name}.ffn_add", y, x)

    def add(self, name: str, x: str, residual: str) -> str:
        """x + residual."""
        with self.within("residual"):
            return self.op(name, "add", (x, residual))[0]

    def attention(self, name: str, source: str, x: str) -> str:
        """Gated attention with q/k norm and partial rotary embedding."""
        q, gate = self.queries(name, source, x, _Place())
        return self.attend(name, source, q, gate, _Place())

    def queries(self, name: str, source: str, x: str, place: _Place) -> tuple[str, str]:
        """Queries and gates of the rows, whose keys and values are written."""
        a, source = self.config.attention, f"{source}self_attn."
        heads, kv = self._heads()
        q_size, kv_size = a.num_qo_heads * a.head_dim, a.num_kv_heads * a.head_dim
        rows = {f"{source}q_proj.weight": (2 * q_size, {0: heads}), **self._key_rows(source)}
        weight = self.matrix(f"{name}.qkv.weight", rows, self.config.hidden_size)
        outs = ((2 * q_size, heads), (kv_size, kv), (kv_size, kv))
        qg, k, v = self.linear(
            f"{name}.qkv", x, weight, outs, (f"{name}.qg", f"{name}.k", f"{name}.v")
        )
        q, gate = self._split_gate(name, qg, heads)
        q = self._norm_rope(f"{name}.q", f"{source}q_norm.weight", q, heads, place)
        self._write_keys(name, source, k, v, place)
        return q, gate

    def _key_rows(self, source: str) -> dict[str, tuple[int, Splits]]:
        a, kv = self.config.attention, self._heads()[1]
        return {
            f"{source}{name}_proj.weight": (a.num_kv_heads * a.head_dim, {0: kv}) for name in "kv"
        }

    def _write_keys(self, name: str, source: str, k: str, v: str, place: _Place) -> None:
        kv = self._heads()[1]
        k = self._norm_rope(f"{name}.k", f"{source}k_norm.weight", k, kv, place)
        self.op(
            f"{name}.kv_write",
            "kv_write",
            (k, v, place.slot_mapping),
            states=(self._kv_cache(name),),
            attrs=self._kv_attrs(),
            attr_splits={"num_kv_heads": kv},
        )

    def attend(self, name: str, source: str, q: str, gate: str, place: _Place) -> str:
        """Gated attention of queries to all that is in the cache."""
        heads, kv = self._heads()
        many = self.tensors[q].spec.shape[0] == "num_tokens"
        mode: dict[str, Attr] = {
            "mode": "prefill" if self.phase == "prefill" and many else "decode"
        }
        o = self.op(
            f"{name}.attention",
            "attention",
            (q, "page_table", place.context_lens, "cu_seqlens"),
            states=(self._kv_cache(name),),
            attrs=self._kv_attrs()
            | mode
            | {"num_heads": heads.units}
            | (self._rows() if many else {}),
            attr_splits={"num_heads": heads, "num_kv_heads": kv},
            out_splits=(heads,),
        )[0]
        gated = self.op(f"{name}.gated", "sigmoid_gate", (o, gate), out_splits=(heads,))[0]
        q_size = heads.units * self.config.attention.head_dim
        out = self._row_parallel(
            f"{name}.o.weight", f"{source}self_attn.o_proj.weight", q_size, heads
        )
        return self.linear(
            f"{name}.o", gated, out, ((self.config.hidden_size, None),), partial=True
        )[0]

    def _heads(self) -> tuple[Split, Split]:
        a = self.config.attention
        return Split("attention", a.num_qo_heads), Split("kv", a.num_kv_heads)

    def _kv_attrs(self) -> dict[str, Attr]:
        a = self.config.attention
        return {
            "num_kv_heads": a.num_kv_heads,
            "head_dim": a.head_dim,
            "page_size": self.context.limits.page_size,
        }

    def _kv_cache(self, name: str) -> str:
        a, limits = self.config.attention, self.context.limits
        shape = (limits.num_pages + 1, 2, limits.page_size, a.num_kv_heads, a.head_dim)
        return self.tensor(
            f"{name}.kv_cache", shape, self.context.dtype, "kv_cache", ((3, self._heads()[1]),)
        )

    def _split_gate(self, name: str, qg: str, heads: Split) -> tuple[str, ...]:
        return self.op(
            f"{name}.split_gate",
            "split_gate",
            (qg,),
            out_splits=(heads, heads),
            attrs={"num_heads": heads.units, "head_dim": self.config.attention.head_dim},
            attr_splits={"num_heads": heads},
        )

    def _norm_rope(self, name: str, source: str, x: str, heads: Split, place: _Place) -> str:
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
            (x, place.positions),
            out_splits=(heads,),
            attrs=attrs | rope,
            attr_splits={"num_heads": heads},
        )[0]

    def _row_parallel(self, name: str, source: str, size: int, split: Split) -> str:
        hidden = self.config.hidden_size
        return self.weight(
            name,
            (hidden, size),
            (Source(source, (hidden, size), (0, 0), (hidden, size), ((1, split),)),),
        )

    def delta_net(self, name: str, source: str, x: str) -> str:
        """Gated DeltaNet: projections, causal convolution, delta rule, gated norm."""
        d, source = self.config.delta_net, f"{source}linear_attn."
        k_heads, v_heads = Split("attention", d.num_k_heads), Split("attention", d.num_v_heads)
        z_size = d.num_v_heads * d.value_dim
        weight = self._delta_in_proj(name, source)
        outs = (
            (d.conv_channels, k_heads),
            (z_size, v_heads),
            (d.num_v_heads, v_heads),
            (d.num_v_heads, v_heads),
        )
        u, z, b, a = self.linear(
            f"{name}.in_proj", x, weight, outs, tuple(f"{name}.{n}" for n in "uzba")
        )
        heads, head_splits = self._delta_heads(), {"num_k_heads": k_heads, "num_v_heads": v_heads}
        conv, gate = (self._conv_weight(name, source),), self._gate_weights(name, source, v_heads)
        conv_state, state = self._conv_state(name, k_heads), self._delta_state(name, v_heads)
        taps: dict[str, Attr] = {"kernel_size": d.conv_kernel_size}
        if self.recomputes:
            states = (conv_state, state, *self._kept(name, k_heads, v_heads))
            batch = ("context_lens", "state_lens", "src_state_slots", "dst_state_slots")
            attrs = heads | taps | self._rows()
            self.op(
                f"{name}.replay",
                "recompute_state",
                (u, b, a, *batch),
                (*conv, *gate),
                states,
                attrs,
                attr_splits=head_splits,
            )
        mode: dict[str, Attr] = {"mode": self._mode("update", "varlen")}
        y = self.op(
            f"{name}.conv",
            "causal_conv",
            (u, *_ROWS),
            conv,
            (conv_state,),
            attrs=mode | taps | self._rows(),
            out_splits=(k_heads,),
        )[0]
        qkv = self.op(
            f"{name}.qkv",
            "qk_l2_norm",
            (y,),
            attrs=heads,
            attr_splits=head_splits,
            out_splits=(k_heads, k_heads, v_heads),
        )
        gates = self.op(f"{name}.gates", "delta_gates", (b, a), gate, out_splits=(v_heads, v_heads))
        o = self.op(
            f"{name}.delta_rule",
            "delta_rule",
            (*qkv, *gates, *_ROWS),
            states=(state,),
            attrs=heads | {"mode": self._mode("recurrent", "chunked")} | self._rows(),
            attr_splits=head_splits,
            out_splits=(v_heads,),
        )[0]
        norm = self.vector(
            f"{name}.gated_norm.weight", f"{source}norm.weight", d.value_dim, self.context.wide
        )
        normed = self.op(
            f"{name}.gated_norm",
            "gated_norm",
            (o, z),
            (norm,),
            out_splits=(v_heads,),
            attrs={
                "eps": self.config.rms_norm_eps,
                "num_heads": d.num_v_heads,
                "head_dim": d.value_dim,
            },
            attr_splits={"num_heads": v_heads},
        )[0]
        out = self._row_parallel(f"{name}.o.weight", f"{source}out_proj.weight", z_size, v_heads)
        return self.linear(
            f"{name}.o", normed, out, ((self.config.hidden_size, None),), partial=True
        )[0]

    def _delta_in_proj(self, name: str, source: str) -> str:
        """[q | k | v | z | b | a] by rows; q, k and v are three slices of one checkpoint tensor."""
        d, hidden = self.config.delta_net, self.config.hidden_size
        v_heads = Split("attention", d.num_v_heads)
        others = {"z": d.num_v_heads * d.value_dim, "b": d.num_v_heads, "a": d.num_v_heads}
        sources = self._qkv_slices(f"{source}in_proj_qkv.weight", (hidden,)) + tuple(
            Source(
                f"{source}in_proj_{key}.weight",
                (size, hidden),
                (0, 0),
                (size, hidden),
                ((0, v_heads),),
            )
            for key, size in others.items()
        )
        return self.weight(
            f"{name}.in_proj.weight", (d.conv_channels + sum(others.values()), hidden), sources
        )

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
            Source(
                source,
                (d.conv_channels, *rest),
                (start, *zeros),
                (size, *rest),
                ((0, Split("attention", units)),),
            )
            for start, size, units in parts
        )

    def _delta_heads(self) -> dict[str, Attr]:
        d = self.config.delta_net
        return {
            "num_k_heads": d.num_k_heads,
            "num_v_heads": d.num_v_heads,
            "key_dim": d.key_dim,
            "value_dim": d.value_dim,
        }

    def _mode(self, step: str, many: str) -> str:
        """How an operator with recurrent state works in this phase."""
        return many if self.phase == "prefill" else RECOMPUTED if self.recomputes else step

    def _conv_weight(self, name: str, source: str) -> str:
        d = self.config.delta_net
        slices = self._qkv_slices(f"{source}conv1d.weight", (1, d.conv_kernel_size))
        return self.weight(f"{name}.conv.weight", (d.conv_channels, 1, d.conv_kernel_size), slices)

    def _conv_state(self, name: str, heads: Split) -> str:
        d = self.config.delta_net
        shape = (self.context.limits.num_state_slots, d.conv_kernel_size - 1, d.conv_channels)
        return self.tensor(f"{name}.conv_state", shape, self.context.dtype, "state", ((2, heads),))

    def _delta_state(self, name: str, heads: Split) -> str:
        d = self.config.delta_net
        shape = (self.context.limits.num_state_slots, d.num_v_heads, d.key_dim, d.value_dim)
        return self.tensor(f"{name}.ssm_state", shape, self.context.wide, "state", ((1, heads),))

    def _kept(self, name: str, k_heads: Split, v_heads: Split) -> tuple[str, str]:
        """What is kept of a step's rows: inputs of the convolution, and of the gates."""
        d, limits = self.config.delta_net, self.context.limits
        inputs = (limits.num_state_slots, limits.kept_inputs, d.conv_channels)
        gates = (limits.num_state_slots, 2, limits.kept_inputs, d.num_v_heads)
        return (
            self.tensor(
                f"{name}.kept_inputs", inputs, self.context.dtype, "state", ((2, k_heads),)
            ),
            self.tensor(f"{name}.kept_gates", gates, self.context.dtype, "state", ((3, v_heads),)),
        )

    def _gate_weights(self, name: str, source: str, heads: Split) -> tuple[str, ...]:
        return tuple(
            self.vector(
                f"{name}.{key.lower()}", f"{source}{key}", heads.units, self.context.wide, heads
            )
            for key in ("A_log", "dt_bias")
        )

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
        down = self._row_parallel(
            f"{name}_down.weight", f"{source}down_proj.weight", size, Split("mlp", size)
        )
        return self.linear(
            f"{name}_down", inner, down, ((self.config.hidden_size, None),), partial=partial
        )[0]

    def moe(self, name: str, source: str, x: str) -> str:
        """Routed experts and the gated shared expert; their sums over ranks are taken together."""
        m = self.config.moe
        assert m is not None
        rows: dict[str, tuple[int, Splits]] = {
            f"{source}gate.weight": (m.num_experts, {}),
            f"{source}shared_expert_gate.weight": (1, {}),
        }
        router = self.matrix(f"{name}.router.weight", rows, self.config.hidden_size)
        outs = (f"{name}.router_logits", f"{name}.shared_gate")
        columns = ((m.num_experts, None), (1, None))
        with self.within("router"):
            logits, shared_gate = self.linear(f"{name}.router", x, router, columns, outs)
            top_k = {"top_k": m.num_experts_per_token}
            weights, ids = self.op(f"{name}.topk", "topk", (logits,), attrs=top_k)
        # Both ways up, then both ways down: neighbours can be one kernel.
        routed_up = self._experts_up(name, f"{source}experts.", x, ids)
        shared_up = self._swiglu_up(
            f"{name}.shared", f"{source}shared_expert.", x, m.shared_intermediate_size
        )
        routed = self._experts_down(name, f"{source}experts.", routed_up, ids, weights)
        shared = self._swiglu_down(
            f"{name}.shared",
            f"{source}shared_expert.",
            shared_up,
            m.shared_intermediate_size,
            partial=False,
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
            f"{name}.experts_up",
            "experts_up",
            (x, ids),
            (up,),
            out_splits=(inner,),
            **self._expert_place(),
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
        return self.op(
            f"{name}.experts_down",
            "experts_down",
            (h, ids, weights),
            (down,),
            **self._expert_place(),
        )[0]

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
            Source(f"{source}{{expert}}.{key}_proj.weight", size, (0, 0, 0), size, splits)
            for key in ("gate", "up")
        )

    def finish(self, outputs: tuple[str, ...]) -> OpGraph:
        """The graph, with the inputs that it really reads; what it gives back lies in the io arena."""
        read = {
            name for op in self.ops for name in (*op.inputs, *(state for state, _ in op.states))
        }
        inputs = tuple(
            name for name, tensor in self.tensors.items() if tensor.arena == "io" and name in read
        )
        unused = {
            name
            for name, tensor in self.tensors.items()
            if tensor.arena == "io" and name not in read
        }
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in unused}
        for name in outputs:
            tensors[name] = Tensor(name, tensors[name].spec, "io", tensors[name].splits)
        ops = tuple(self.ops)
        return OpGraph(
            self.phase, Stage.BUILT, ops, tensors, self.weights, inputs, outputs, self.depth
        )


_ROWS = ("cu_seqlens", "src_state_slots", "dst_state_slots")


def _padded(splits: Sequence[Split | None], count: int) -> tuple[Split | None, ...]:
    return tuple(splits) or (None,) * count
