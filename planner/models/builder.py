"""Emission of operators, tensors and weights. Nothing here knows a model.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

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
from tokenspeed_plan.plans.encodings import ENCODED_FORMATS, Encoding
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.ops import (
    ADJUSTMENTS,
    IS_MASKED,
    MIN_P,
    OPS,
    PENALTIES,
    SAMPLING_INPUTS,
    STOP_IDS,
    TOKEN_MASK,
    adjustment_words,
    mask_words,
)
from tokenspeed_plan.plans.schema import ArenaName, Capacity
from tokenspeed_plan.plans.types import FORMATS, Attr, Dim, DType, Format, Phase, TensorSpec

Splits = Mapping[int, Split]


def _plain(name: str) -> Encoding | None:
    """Of a checkpoint that is not quantised."""
    return None


def _unscaled(source: str) -> tuple[float, float]:
    """Of a checkpoint without scales of keys and values."""
    return 1.0, 1.0


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What shapes a graph besides the model: dtype, limits, and how the checkpoint stores experts.

    Attributes:
        config: the model.
        dtype: element type of weights and activations.
        limits: sizes of caches and batches.
        num_valid_tokens: vocabulary entries that stand for a token.
        fused_experts: whether the experts under a name prefix are one tensor; otherwise each
            expert has tensors of its own.
        draft_vocab: drafts are chosen from this many of the first tokens; from all where None.
        encoding: how a matrix of the checkpoint is encoded; None where its elements are plain.
        fp8_head: whether the LM head is in blocks of FP8 however it is stored.
        kv_dtype: of keys and values in the cache; that of the activations where None.
        key_scales: those of keys and values in FP8, by what the names of an attention begin with.
        grammar: whether a grammar may mask the tokens of a sequence.
        penalties: whether penalties and biases may change its logits.
        stored_state: how the matrices of recurrent state are stored; None for `wide`.
    """

    config: ModelConfig
    dtype: DType
    limits: Capacity
    num_valid_tokens: int
    fused_experts: Callable[[str], bool]
    draft_vocab: int | None = None
    encoding: Callable[[str], Encoding | None] = _plain
    fp8_head: bool = False
    kv_dtype: DType | None = None
    key_scales: Callable[[str], tuple[float, float]] = _unscaled
    grammar: bool = False
    penalties: bool = False
    stored_state: DType | None = None

    @property
    def wide(self) -> DType:
        """The dtype in which recurrent state and gates are computed."""
        return "fp64" if self.dtype == "fp64" else "fp32"


def _sampling_inputs(vocab_size: int, limits: Capacity) -> dict[str, tuple[tuple[int, ...], DType]]:
    """What sampling, penalties and masks need of each sequence: by name its words, their dtype."""
    found: dict[str, tuple[tuple[int, ...], DType]] = {
        name: ((), dtype) for name, dtype in (SAMPLING_INPUTS | PENALTIES).items()
    }
    entries = adjustment_words(vocab_size, limits.max_seq_len)
    words = (limits.max_depth + 1) * mask_words(vocab_size)
    found[MIN_P] = (), "fp32"
    found[IS_MASKED] = (), "i32"
    found[ADJUSTMENTS] = (entries,), "i32"
    found[TOKEN_MASK] = (words,), "i32"
    return found


def stored_format(context: BuildContext, names: Iterable[str]) -> Format | None:
    """The format of matrices that one kernel reads together, None where their elements are plain.

    Raises:
        SpecError: they differ.
    """
    stored: dict[Format | None, str] = {}
    for name in names:
        encoding = context.encoding(name)
        found = None
        if encoding is not None:
            found = ENCODED_FORMATS[encoding]
        stored.setdefault(found, name)
    if len(stored) > 1:
        (one, first), (other, second), *_ = stored.items()
        words = [str(each or "plain elements") for each in (one, other)]
        raise SpecError(
            f"`{first}` is stored as {words[0]} and `{second}` as {words[1]}, one kernel reads "
            "both",
            "use a checkpoint that stores both alike, as the published ones do",
        )
    return next(iter(stored), None)


def _output_names(
    suffix: str, op: str, roles: Sequence[str], given: Sequence[str]
) -> tuple[str, ...]:
    if given:
        return tuple(f"{name}{suffix}" for name in given)
    if len(roles) == 1:
        return (op,)
    return tuple(f"{op}.{role}" for role in roles)


@dataclass
class GraphBuilder:
    """Emits operators in order, and keeps the tensors and weights that they use.

    Attributes:
        context: what shapes the graph.
        phase: prefill or decode.
        depth: drafts that the graph makes for each sequence.
        suffix: appended to names of operators and activations where a layer is emitted twice.
        layer_index: the layer of the operators that are emitted now.
        role: their role.
    """

    context: BuildContext
    phase: Phase
    depth: int
    suffix: str = ""
    layer_index: int | None = None
    role: Role = "batch"
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.context.config
        limits = self.context.limits
        self.recomputes = self.phase == "decode" and limits.rollback == "recompute"
        self._declare_batch()

    def _declare_batch(self) -> None:
        """The inputs of a batch; `finish` drops those that no operator reads."""
        limits = self.context.limits
        queries, dst_slots = limits.max_depth + 1, limits.written_slots_per_seq
        for name in ("token_ids", "positions", "slot_mapping"):
            self.tensor(name, ("num_tokens",), "i32", "io")
        for name in ("context_lens", "state_lens", "src_state_slots", "following", "max_lens"):
            self.tensor(name, ("num_seqs",), "i32", "io")
        dst_shape: tuple[Dim, ...] = ("num_seqs",)
        if dst_slots > 1:
            dst_shape = ("num_seqs", dst_slots)
        self.tensor("dst_state_slots", dst_shape, "i32", "io")
        self.tensor("stop_ids", ("num_seqs", STOP_IDS), "i32", "io")
        self.tensor("forced_accept", (queries,), "fp32", "io")
        self.tensor("accept_counts", (queries,), "i64", "io")
        self.tensor("cu_seqlens", ("num_seqs+1",), "i32", "io")
        self.tensor("page_table", ("num_seqs", limits.table_pages), "i32", "io")
        for name, (words, dtype) in _sampling_inputs(self.config.vocab_size, limits).items():
            self.tensor(name, ("num_seqs", *words), dtype, "io")

    @property
    def query_attrs(self) -> dict[str, Attr]:
        """`query_len`, the tokens of each sequence in a decode step; empty where that is 1."""
        if self.depth and self.phase == "decode":
            return {"query_len": self.depth + 1}
        return {}

    @contextmanager
    def within(self, role: Role, layer: int | None = None) -> Iterator[None]:
        """Operators emitted inside have this role and layer (the enclosing layer where None)."""
        before = self.role, self.layer_index
        self.role = role
        if layer is not None:
            self.layer_index = layer
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
        """Emit one operator; the table gives the shapes of its outputs. Returns their names."""
        operands = (*inputs, *weights, *states)
        specs = self._output_specs(kind, operands, attrs or {})
        name = f"{name}{self.suffix}"
        outputs = _output_names(self.suffix, name, tuple(specs), out_names)
        self._declare_outputs(outputs, tuple(specs.values()), out_splits)
        accesses = [access for _, access in OPS[kind].states]
        self.ops.append(
            Op(
                name,
                kind,
                tuple(inputs),
                outputs,
                tuple(weights),
                tuple(zip(states, accesses, strict=True)),
                attrs or {},
                attr_splits or {},
                shifts or {},
                partial=partial,
                gathered=gathered,
                layer=self.layer_index,
                role=self.role,
            )
        )
        return outputs

    def _output_specs(
        self, kind: str, operands: Sequence[str], attrs: Mapping[str, Attr]
    ) -> dict[str, TensorSpec]:
        definition = OPS[kind]
        named = zip(definition.operands, operands, strict=True)
        return definition.infer(attrs, {role: self._spec(value) for role, value in named})

    def _declare_outputs(
        self, names: Sequence[str], specs: Sequence[TensorSpec], splits: Sequence[Split | None]
    ) -> None:
        """Outputs are activations; a split of theirs is of the last dimension."""
        all_splits = tuple(splits) or (None,) * len(names)
        for name, spec, split in zip(names, specs, all_splits, strict=True):
            cut: DimSplits = ()
            if split:
                cut = ((len(spec.shape) - 1, split),)
            self.tensors[name] = Tensor(name, spec, "activations", cut)

    def _spec(self, name: str) -> TensorSpec:
        if name in self.tensors:
            return self.tensors[name].spec
        return self.weights[name].spec

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

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: tuple[Source, ...],
        join_dim: int = 0,
        dtype: DType | None = None,
        in_fp8: bool = False,
    ) -> str:
        """Declare a parameter, with `in_fp8` in FP8 however it is stored; returns its name.

        Raises:
            SpecError: its sources are stored in several formats.
        """
        spec = TensorSpec.of(shape=shape, dtype=dtype or self.context.dtype)
        stored = stored_format(self.context, (source.name for source in sources))
        rounds = in_fp8 and stored is None
        if stored is not None:
            spec = TensorSpec(shape=shape, format=stored)
            sources = tuple(
                replace(source, encoding=self.context.encoding(source.name)) for source in sources
            )
        elif rounds:
            spec = TensorSpec(shape=shape, format=FORMATS["fp8"])
        self.weights[name] = Weight(name, spec, sources, join_dim, rounds)
        return name

    def matrix(
        self,
        name: str,
        blocks: Mapping[str, tuple[int, Splits]],
        columns: int,
    ) -> str:
        """Checkpoint matrices stacked by rows: name -> (rows, splits)."""
        sources = []
        for source, (rows, splits) in blocks.items():
            shape = (rows, columns)
            sources.append(Source(source, shape, (0, 0), shape, tuple(splits.items())))
        total_rows = sum(rows for rows, _ in blocks.values())
        return self.weight(name, (total_rows, columns), tuple(sources))

    def vector(
        self,
        name: str,
        source: str,
        size: int,
        dtype: DType | None = None,
        split: Split | None = None,
    ) -> str:
        """A one-dimensional parameter."""
        splits: DimSplits = ()
        if split:
            splits = ((0, split),)
        part = Source(source, (size,), (0,), (size,), splits)
        return self.weight(name, (size,), (part,), dtype=dtype)

    def row_parallel(self, name: str, source: str, shape: tuple[int, int], split: Split) -> str:
        """A matrix [outputs, inputs] whose inputs ranks share out: products are partial sums."""
        part = Source(source, shape, (0, 0), shape, ((1, split),))
        return self.weight(name, shape, (part,))

    def finish(self, outputs: tuple[str, ...]) -> OpGraph:
        """The graph, with the inputs that it really reads; its outputs lie in the io arena."""
        read: set[str] = set()
        for op in self.ops:
            read.update(op.inputs)
            read.update(state for state, _ in op.states)
        batch = [name for name, tensor in self.tensors.items() if tensor.arena == "io"]
        inputs = tuple(name for name in batch if name in read)
        unused = set(batch) - read
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in unused}
        for name in outputs:
            tensors[name] = Tensor(name, tensors[name].spec, "io", tensors[name].splits)
        return OpGraph(
            self.phase,
            Stage.BUILT,
            tuple(self.ops),
            tensors,
            self.weights,
            inputs,
            outputs,
            self.depth,
        )
