"""The operator graph: a typed shell over `networkx.DiGraph` with a stable order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import networkx as nx

from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.schema import ArenaName, Step
from tokenspeed_plan.plans.types import Attr, Phase, RankShift, TensorSpec

# `residual` are norms and sums of the residual stream, `batch` what keeps the batch's own numbers.
Role = Literal["embed", "mixer", "ffn", "router", "residual", "head", "draft", "batch"]
DimSplits = tuple[tuple[int, Split], ...]


class Stage(StrEnum):
    """How far a graph has come."""

    BUILT = "built"
    SHARDED = "sharded"
    FUSED = "fused"
    SCHEDULED = "scheduled"
    PLACED = "placed"
    LOWERED = "lowered"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation, an input or a state buffer. `splits` says which dimensions ranks will share out."""

    name: str
    spec: TensorSpec
    arena: ArenaName = "activations"
    splits: DimSplits = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor that goes into a weight, with the dimensions that ranks share out.

    A name with `{expert}` stands for one tensor an expert, stacked.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    splits: DimSplits = ()
    ranks: tuple[tuple[int, RankShift], ...] = ()


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: its sources side by side along `join_dim`."""

    name: str
    spec: TensorSpec
    sources: tuple[Source, ...]
    join_dim: int = 0


@dataclass(frozen=True, slots=True)
class Op:
    """One operator, or after fusion one kernel made of `parts`.

    Attributes:
        name: unique.
        kind: an operator of `plans.ops.OPS`, a collective, or a fused kind.
        inputs, outputs: names of tensors. weights, states: names of parameters and persistent
            buffers.
        attrs: constants. attr_splits: those that count what ranks share out.
        shifts: constants that differ by rank: name -> (size, split); `rank_attrs` once sharded.
        partial: each rank's output is a term of a sum (after `embed` and row-parallel products).
        gathered: each rank's output is a block of columns that every rank needs.
        layer: number of its decoder layer (the MTP layer comes after the last), None outside of them.
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
        return self.inputs + self.weights + tuple(name for name, _ in self.states)


@dataclass(frozen=True)
class OpGraph:
    """A program on its way to the plan. Passes return a new graph; nothing is changed in place."""

    phase: Phase
    stage: Stage
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Weight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    depth: int = 0  # drafts that it makes
    steps: tuple[Step, ...] = ()
    num_streams: int = 1
    time_us: float = 0.0
    runner_up_us: float | None = None  # with another number of streams
    offsets: Mapping[str, int] = field(default_factory=dict)
    arena_bytes: int = 0

    def to(self, stage: Stage, **changes: Any) -> OpGraph:
        """The graph at the next stage."""
        return replace(self, stage=stage, **changes)

    @cached_property
    def nx(self) -> nx.DiGraph[str]:
        """Operators as nodes; edges are data, state written and then read, and inputs read before they move on."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        made_by: dict[str, str] = {}
        readers: dict[str, list[str]] = {}
        for op in self.ops:
            graph.add_node(op.name)
            for name in (state for state, _ in op.states if state in self.inputs):
                graph.add_edges_from((reader, op.name) for reader in readers.get(name, ()))
            for name in op.inputs:
                readers.setdefault(name, []).append(op.name)
            for name in (*op.inputs, *(name for name, access in op.states if access == "read")):
                if name in made_by:
                    graph.add_edge(made_by[name], op.name, tensor=name)
            made_by |= dict.fromkeys(op.outputs, op.name)
            made_by |= {name: op.name for name, access in op.states if access != "read"}
        return graph

    def ordered(self) -> Iterator[Op]:
        """Operators in the one topological order that keeps to emission order."""
        rank = {op.name: index for index, op in enumerate(self.ops)}
        for name in nx.lexicographical_topological_sort(self.nx, key=rank.__getitem__):
            yield self.ops[rank[name]]
