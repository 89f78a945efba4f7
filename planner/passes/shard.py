"""Shard: every dimension becomes what one rank holds, and collectives make the ranks agree again.

Column-parallel products need nothing; row-parallel ones, the embedding and the expert block give
partial sums, which an all-reduce adds up; the head gives a block of logits, which an all-gather
puts together (Megatron-LM, arXiv:1909.08053; KV heads are copied where there are more ranks than
heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Source, Stage, Tensor, Weight
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.plans.types import Dim


def shard(graph: OpGraph, layout: ParallelLayout) -> OpGraph:
    """The graph of one rank.

    Raises:
        SpecError: the layout does not divide the model.
    """
    tensors = {name: _localize(tensor, layout) for name, tensor in graph.tensors.items()}
    weights = {name: _cut_weight(weight, layout) for name, weight in graph.weights.items()}
    ops: list[Op] = []
    for op in graph.ops:
        local = _cut_op(op, tensors, layout)
        kind, count = _collective(op), _ranks_of(op, graph, layout)
        ops += (
            [local]
            if kind is None or count == 1
            else _with_collective(local, kind, graph, tensors, count)
        )
    return graph.to(Stage.SHARDED, ops=tuple(ops), tensors=tensors, weights=weights)


def _localize(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    shape: list[Dim] = list(tensor.spec.shape)
    for dim, split in tensor.splits:
        size = shape[dim]
        assert isinstance(size, int)
        shape[dim] = split.local(size, layout)
    return replace(tensor, spec=tensor.spec.reshaped(tuple(shape)), splits=())


def _cut_weight(weight: Weight, layout: ParallelLayout) -> Weight:
    sources = tuple(_cut_source(source, layout) for source in weight.sources)
    shape = list(sources[0].size)
    shape[weight.join_dim] = sum(source.size[weight.join_dim] for source in sources)
    return replace(weight, sources=sources, spec=weight.spec.reshaped(tuple(shape)))


def _cut_source(source: Source, layout: ParallelLayout) -> Source:
    size, ranks = list(source.size), []
    for dim, split in source.splits:
        shift = split.shift(size[dim], layout)
        size[dim] = split.local(size[dim], layout)
        if shift.mod > 1:
            ranks.append((dim, shift))
    return replace(source, size=tuple(size), splits=(), ranks=tuple(ranks))


def _cut_op(op: Op, tensors: Mapping[str, Tensor], layout: ParallelLayout) -> Op:
    attrs = dict(op.attrs) | {
        name: split.local_units(layout) for name, split in op.attr_splits.items()
    }
    if op.kind == "linear":
        attrs["splits"] = tuple(_width(tensors[name]) for name in op.outputs)
    shifts = {name: split.shift(size, layout) for name, (size, split) in op.shifts.items()}
    ranks = {name: shift for name, shift in shifts.items() if shift.mod > 1}
    return replace(
        op, attrs=attrs, attr_splits={}, shifts={}, rank_attrs=ranks, partial=False, gathered=False
    )


def _width(tensor: Tensor) -> int:
    width = tensor.spec.shape[-1]
    assert isinstance(width, int)
    return width


def _collective(op: Op) -> str | None:
    return "all_reduce" if op.partial else "all_gather" if op.gathered else None


def _ranks_of(op: Op, graph: OpGraph, layout: ParallelLayout) -> int:
    """How many ranks hold the terms: those that share the axis along which the operator's weight is cut."""
    splits = [
        split
        for name in op.weights
        for source in graph.weights[name].sources
        for _, split in source.splits
    ]
    return layout.ways(splits[0].axis) if splits else layout.num_ranks


def _with_collective(
    op: Op, kind: str, graph: OpGraph, tensors: dict[str, Tensor], num_ranks: int
) -> list[Op]:
    """The operator writes a local tensor; the collective writes the one that everybody reads."""
    (name,) = op.outputs
    local = tensors[name]
    tensors[f"{name}.local"] = replace(local, name=f"{name}.local", arena="activations")
    tensors[name] = replace(local, spec=graph.tensors[name].spec)
    collective = Op(
        f"{name}.{kind}", kind, (f"{name}.local",), (name,), attrs={"num_ranks": num_ranks}
    )
    return [replace(op, outputs=(f"{name}.local",)), collective]
