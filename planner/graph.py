"""The operator graph: operators, tensors and weights, with `networkx` for their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.schema import ArenaName, CallCost, CollectiveCall, RecordEvent, WaitEvent
from tokenspeed_plan.plans.types import Attr, Phase, RankShift, TensorSpec

if TYPE_CHECKING:
    import networkx

# `residual` are norms and sums of the residual stream; `batch` operators update the batch's inputs.
Role = Literal["embed", "mixer", "ffn", "router", "residual", "head", "draft", "batch"]
LIBRARY_MARGIN = 0.03  # by which a function of a library must be faster than the kernel
DimSplits = tuple[tuple[int, Split], ...]


class Stage(StrEnum):
    """How far a graph has come."""

    BUILT = "built"
    SHARDED = "sharded"
    EXPANDED = "expanded"
    FUSED = "fused"
    RECOMPUTED = "recomputed"
    SCHEDULED = "scheduled"
    PLACED = "placed"
    LOWERED = "lowered"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation, an input or a state buffer. Ranks share out the dimensions in `splits`."""

    name: str
    spec: TensorSpec
    arena: ArenaName = "activations"
    splits: DimSplits = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A box of a checkpoint tensor that goes into a weight. Ranks share out dimensions in `splits`.

    A name with `{expert}` stands for one tensor per expert, stacked.

    Packed rows: with `every`, the piece takes `run` rows out of each `every` rows of the checkpoint
    tensor, beginning at `start[0]`. Then `size[0]` is the number of groups times `run`, and a split
    of dimension 0 shares whole groups out. `shard` replaces such a source by one ordinary source
    for each group.

    `encoding` says how the checkpoint stores it, None where its elements are plain.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    splits: DimSplits = ()
    ranks: tuple[tuple[int, RankShift], ...] = ()
    run: int = 0
    every: int = 0
    encoding: Encoding | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: its sources side by side along `join_dim`.

    `rounds`: the checkpoint has plain elements, which are rounded to blocks of FP8 when loaded.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Source, ...]
    join_dim: int = 0
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One operator, or after fusion one kernel made of `parts`.

    Attributes:
        name: unique.
        kind: an operator of `plans.ops.OPS`, a collective, or a fused kind.
        inputs, outputs: names of tensors.
        weights, states: names of parameters, and of persistent buffers with the access.
        attrs: constants.
        attr_splits: how ranks share out what a constant counts, by its name.
        shifts: constants that differ by rank: name -> (size, split); `rank_attrs` once sharded.
        partial: each rank's output is a term of a sum (after `embed` and row-parallel products).
        gathered: each rank's output is a block of columns that every rank needs.
        layer: number of its decoder layer, None outside of them; the MTP layer follows the last.
        role: what it does for the model.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    states: tuple[tuple[str, Access], ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    attr_splits: Mapping[str, Split] = field(default_factory=dict)
    shifts: Mapping[str, tuple[int, Split]] = field(default_factory=dict)
    rank_attrs: Mapping[str, RankShift] = field(default_factory=dict)
    partial: bool = False
    gathered: bool = False
    parts: tuple[Op, ...] = ()
    layer: int | None = None
    role: Role = "batch"

    @property
    def members(self) -> tuple[Op, ...]:
        """The operators inside: itself where it is not fused."""
        return self.parts or (self,)

    @property
    def operands(self) -> tuple[str, ...]:
        """Everything it reads or updates, in the order of its definition."""
        states = [name for name, _ in self.states]
        return (*self.inputs, *self.weights, *states)


@dataclass(frozen=True, slots=True)
class ScheduledOp:
    """An operator's turn in the order of the program, on its stream."""

    op_name: str
    stream: int = 0


@dataclass(frozen=True, slots=True)
class LibraryChoice:
    """A function of a library that computes what a kernel does, and the price of both.

    Attributes:
        function: its key in `LIBRARY_FUNCTIONS`.
        operator: what it computes, for people.
        workspace_bytes: that it takes at the program's full size.
        call_us: of a call, for the batch that the plan is priced for.
        kernel_us, library_us: of a call, over the batches that the choice is made for.
        asked: whether the spec wants the function whatever it costs.
    """

    function: str
    operator: str
    workspace_bytes: int
    call_us: float
    kernel_us: float
    library_us: float
    asked: bool = False

    @property
    def pays(self) -> bool:
        """Whether the function is called: asked for, or faster by more than its prices err."""
        return self.asked or self.library_us < (1.0 - LIBRARY_MARGIN) * self.kernel_us


@dataclass(frozen=True, slots=True)
class LoweredCall:
    """The call of a kernel whose tiling is not chosen yet.

    Attributes:
        key: of the kernel in `OpGraph.candidates`.
        args: names of buffers and weights; the scratch of the chosen tiling comes after them.
        stream: where it runs.
        predicted_us, cost: of one call; the time is for the batch that the plan is priced for.
        library: a function that may be called in the kernel's place.
    """

    key: str
    args: tuple[str, ...]
    stream: int
    predicted_us: float
    cost: CallCost
    library: LibraryChoice | None = None


ScheduledStep = ScheduledOp | RecordEvent | WaitEvent
LoweredStep = LoweredCall | CollectiveCall | RecordEvent | WaitEvent


@dataclass(frozen=True)
class OpGraph:
    """A program on its way to the plan. Passes return a new graph and change nothing in place.

    Attributes:
        phase, stage: what the program does, and how far it has come.
        ops, tensors, weights: the operators in order, and what they name.
        inputs, outputs: names of tensors.
        depth: drafts that the program makes for each sequence.
        steps, num_streams: set by `schedule`.
        time_us, runner_up_us: predicted time, and the best one with another number of streams.
        offsets, activation_bytes: where activations lie, and how much they need, set by `place`.
        calls, candidates: set by `lower`; the tilings of each kernel by key, best first.
    """

    phase: Phase
    stage: Stage
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Weight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    depth: int = 0
    steps: tuple[ScheduledStep, ...] = ()
    num_streams: int = 1
    time_us: float = 0.0
    runner_up_us: float | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    calls: tuple[LoweredStep, ...] = ()
    candidates: Mapping[str, tuple[Built, ...]] = field(default_factory=dict)

    def to(self, stage: Stage, **changes: Any) -> OpGraph:
        """The graph at the next stage; its order is kept where the operators stay the same."""
        graph = replace(self, stage=stage, **changes)
        same_ops = graph.ops is self.ops
        if same_ops and "nx" in self.__dict__:
            graph.__dict__["nx"] = self.nx
        return graph

    @cached_property
    def by_name(self) -> Mapping[str, Op]:
        """Operators by name."""
        return {op.name: op for op in self.ops}

    @property
    def num_queries(self) -> int:
        """Tokens of each sequence in a decode step, 1 in prefill."""
        if self.phase == "prefill":
            return 1
        return self.depth + 1

    @cached_property
    def nx(self) -> networkx.DiGraph[str]:
        """Operators as nodes.

        Edges are data, state that is written and then read, and inputs that are read before the
        program updates them.
        """
        import networkx  # late: it takes half a second, and commands that replay need none of it

        graph: networkx.DiGraph[str] = networkx.DiGraph()
        writers: dict[str, str] = {}
        readers: dict[str, list[str]] = {}
        for op in self.ops:
            graph.add_node(op.name)
            read = list(op.inputs)
            written = list(op.outputs)
            for name, access in op.states:
                if name in self.inputs:
                    for reader in readers.get(name, ()):
                        graph.add_edge(reader, op.name)
                if access == "read":
                    read.append(name)
                else:
                    written.append(name)
            for name in op.inputs:
                readers.setdefault(name, []).append(op.name)
            for name in read:
                if name in writers:
                    graph.add_edge(writers[name], op.name, tensor=name)
            for name in written:
                writers[name] = op.name
        return graph

    def ordered(self) -> Iterator[Op]:
        """Operators in emission order, which is topological: each edge of `nx` leads forward."""
        return iter(self.ops)
