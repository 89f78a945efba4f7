"""Shard: every dimension becomes what one rank holds, and collectives make the ranks agree again.

Column-parallel products need no collective. Row-parallel ones, the embedding and the expert block
give partial sums, which an all-reduce adds up. The head gives a block of logits, which an
all-gather puts together (Megatron-LM, arXiv:1909.08053). KV heads are copied where there are more
ranks than heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Source, Stage, Tensor, Weight
from tokenspeed_plan.planner.layout import Axis, ParallelLayout
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
        kind, num_ranks = _collective(op), _ranks_of(op, graph, layout)
        if kind is None or num_ranks == 1:
            ops.append(local)
        else:
            ops += _with_collective(local, kind, graph, tensors, num_ranks)
    return graph.to(Stage.SHARDED, ops=tuple(ops), tensors=tensors, weights=weights)


def _localize(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    shape: list[Dim] = list(tensor.spec.shape)
    for dim, split in tensor.splits:
        size = shape[dim]
        assert isinstance(size, int)
        shape[dim] = split.local(size, layout)
    return replace(tensor, spec=tensor.spec.reshaped(tuple(shape)), splits=())


def _cut_weight(weight: Weight, layout: ParallelLayout) -> Weight:
    sources: list[Source] = []
    for source in weight.sources:
        sources += _unpack(source, layout) if source.every else [_cut_source(source, layout)]
    shape = list(sources[0].size)
    shape[weight.join_dim] = sum(source.size[weight.join_dim] for source in sources)
    return replace(weight, sources=tuple(sources), spec=weight.spec.reshaped(tuple(shape)))


def _cut_source(source: Source, layout: ParallelLayout) -> Source:
    size, ranks = list(source.size), []
    for dim, split in source.splits:
        shift = split.shift(size[dim], layout)
        size[dim] = split.local(size[dim], layout)
        if shift.mod > 1:
            ranks.append((dim, shift))
    return replace(source, size=tuple(size), splits=(), ranks=tuple(ranks))


def _unpack(source: Source, layout: ParallelLayout) -> list[Source]:
    """One ordinary source for each group of packed rows that a rank holds.

    The groups are cut as if they stood for all of their `every` rows, so that a rank's shift steps
    over whole groups of the checkpoint tensor; then each group keeps its own `run` rows.
    """
    num_groups = source.size[0] // source.run
    whole = replace(source, size=(num_groups * source.every, *source.size[1:]), run=0, every=0)
    local = _cut_source(whole, layout)
    first, rest = source.start[0], source.start[1:]
    return [
        replace(local, start=(first + offset, *rest), size=(source.run, *local.size[1:]))
        for offset in range(0, local.size[0], source.every)
    ]


def _cut_op(op: Op, tensors: Mapping[str, Tensor], layout: ParallelLayout) -> Op:
    attrs = dict(op.attrs)
    for name, split in op.attr_splits.items():
        attrs[name] = split.local_units(layout)
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
    if op.partial:
        return "all_reduce"
    return "all_gather" if op.gathered else None


def _ranks_of(op: Op, graph: OpGraph, layout: ParallelLayout) -> int:
    """How many ranks hold the terms: the product over the axes along which its weights are cut."""
    axes: set[Axis] = set()
    for name in op.weights:
        for source in graph.weights[name].sources:
            axes.update(split.axis for _, split in source.splits)
    if not axes:
        return layout.num_ranks
    return math.prod(layout.ways(axis) for axis in axes)


def _with_collective(
    op: Op, kind: str, graph: OpGraph, tensors: dict[str, Tensor], num_ranks: int
) -> list[Op]:
    """The operator writes a local tensor; the collective writes the one that others read."""
    (name,) = op.outputs
    local = tensors[name]
    tensors[f"{name}.local"] = replace(local, name=f"{name}.local", arena="activations")
    tensors[name] = replace(local, spec=graph.tensors[name].spec)
    collective = Op(
        f"{name}.{kind}",
        kind,
        (f"{name}.local",),
        (name,),
        attrs={"num_ranks": num_ranks},
        layer=op.layer,
        role=op.role,
    )
    return [replace(op, outputs=(f"{name}.local",)), collective]
