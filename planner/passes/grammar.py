"""The grammar between passes: which operators a stage allows, and what it must have decided."""

from __future__ import annotations

from tokenspeed_plan.planner.graph import LoweredCall, Op, OpGraph, Stage
from tokenspeed_plan.planner.passes.fuse import FUSED_KINDS
from tokenspeed_plan.plans.ops import COLLECTIVES, OPS

_LOGICAL = frozenset(OPS) - frozenset(COLLECTIVES)
_SHARDED = _LOGICAL | frozenset(COLLECTIVES)
_FUSED = _SHARDED | FUSED_KINDS
ALLOWED = {
    Stage.BUILT: _LOGICAL,
    Stage.SHARDED: _SHARDED,
    Stage.EXPANDED: _SHARDED,
    Stage.FUSED: _FUSED,
    Stage.RECOMPUTED: _FUSED,
    Stage.SCHEDULED: _FUSED,
    Stage.PLACED: _FUSED,
    Stage.LOWERED: _FUSED,
}
_PLACED = (Stage.PLACED, Stage.LOWERED)
_SCHEDULED = (Stage.SCHEDULED, *_PLACED)


class GraphError(AssertionError):
    """A pass left the graph in a state that its stage does not allow: a defect of the planner."""


def check(graph: OpGraph) -> OpGraph:
    """The graph itself, if it obeys the grammar of its stage.

    Raises:
        GraphError: naming the first operator that does not.
    """
    allowed = ALLOWED[graph.stage]
    for op in graph.ops:
        if op.kind not in allowed:
            raise GraphError(f"`{op.name}` ({op.kind}) is not allowed when {graph.stage}")
        _check_operands(graph, op)
        if graph.stage is not Stage.BUILT and _is_whole(op):
            raise GraphError(f"`{op.name}` is not cut yet when {graph.stage}")
    import networkx

    if not networkx.is_directed_acyclic_graph(graph.nx):
        raise GraphError("the graph has a cycle")
    if graph.stage in _SCHEDULED and not graph.steps:
        raise GraphError(f"no steps when {graph.stage}")
    if graph.stage in _PLACED:
        _check_placed(graph)
    if graph.stage is Stage.LOWERED:
        _check_lowered(graph)
    return graph


def _is_whole(op: Op) -> bool:
    """Whether `shard` has not cut the operator yet."""
    if op.partial or op.gathered:
        return True
    return bool(op.attr_splits or op.shifts)


def _check_operands(graph: OpGraph, op: Op) -> None:
    states = [name for name, _ in op.states]
    tensors = (*op.inputs, *op.outputs, *states)
    for name in tensors:
        if name not in graph.tensors:
            raise GraphError(f"`{op.name}` uses `{name}`, which is not declared")
    for name in op.weights:
        if name not in graph.weights:
            raise GraphError(f"`{op.name}` uses weight `{name}`, which is not declared")


def _check_placed(graph: OpGraph) -> None:
    written = [name for op in graph.ops for name in op.outputs]
    for name in written:
        arena = graph.tensors[name].arena
        if arena == "activations" and name not in graph.offsets:
            raise GraphError(f"`{name}` has no offset when {graph.stage}")


def _check_lowered(graph: OpGraph) -> None:
    num_calls = len(graph.calls)
    num_steps = len(graph.steps)
    if num_calls != num_steps:
        raise GraphError(f"{num_calls} calls of {num_steps} steps when {graph.stage}")
    for step in graph.calls:
        if not isinstance(step, LoweredCall):
            continue
        tilings = graph.candidates.get(step.key)
        if not tilings:
            raise GraphError(f"a call of `{step.key}`, which has no tiling when {graph.stage}")
