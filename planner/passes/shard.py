"""Shard: every dimension becomes what one rank holds, and collectives put results together.

Column-parallel products need no collective. Row-parallel ones, the embedding and the expert block
give partial sums, which an all-reduce adds up. The head gives a block of logits, which an
all-gather puts together (Megatron-LM, arXiv:1909.08053). KV heads are copied where there are more
ranks than heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Source, Stage, Tensor, Weight
from tokenspeed_plan.planner.layout import Axis, ParallelLayout
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.types import Dim, Format


def shard(graph: OpGraph, layout: ParallelLayout) -> OpGraph:
    """The graph of one rank.

    Raises:
        SpecError: the layout does not divide the model.
    """
    tensors = {}
    for name, tensor in graph.tensors.items():
        tensors[name] = _localize(tensor, layout)
    weights = {}
    for name, weight in graph.weights.items():
        weights[name] = _cut_weight(weight, layout)
    ops: list[Op] = []
    for op in graph.ops:
        local = _cut_op(op, tensors, layout)
        kind = _collective(op)
        num_ranks = _ranks_of(op, graph, layout)
        if kind is None or num_ranks == 1:
            ops.append(local)
        else:
            ops += _with_collective(local, kind, graph, tensors, num_ranks)
    return graph.to(
        Stage.SHARDED,
        ops=tuple(ops),
        tensors=tensors,
        weights=weights,
    )


def _localize(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    if not tensor.splits:
        return tensor
    shape: list[Dim] = list(tensor.spec.shape)
    for dim, split in tensor.splits:
        size = shape[dim]
        assert isinstance(size, int)
        shape[dim] = split.local(size, layout)
    spec = tensor.spec.reshaped(tuple(shape))
    return replace(tensor, spec=spec, splits=())


def _cut_weight(weight: Weight, layout: ParallelLayout) -> Weight:
    is_cut = any(source.splits or source.every for source in weight.sources)
    if not is_cut and not weight.spec.format.block:
        return weight
    sources: list[Source] = []
    for source in weight.sources:
        if source.every:
            sources += _unpack(source, layout)
        else:
            sources.append(_cut_source(source, layout))
    joined = weight.join_dim
    shape = list(sources[0].size)
    shape[joined] = sum(source.size[joined] for source in sources)
    spec = weight.spec
    if spec.shape != tuple(shape):
        spec = spec.reshaped(tuple(shape))
    if spec.format.block:
        _check_blocks(sources, spec.format)
    return replace(weight, sources=tuple(sources), spec=spec)


def _check_blocks(sources: Sequence[Source], stored: Format) -> None:
    """What a rank takes of a block-scaled tensor, and what stands beside it, is whole blocks.

    Raises:
        SpecError: a cut goes through a block.
    """
    for source in sources:
        steps = dict(source.ranks)
        first = len(source.size) - len(stored.unit)
        for dim, block in enumerate(stored.unit, first):
            step = 0
            if dim in steps:
                step = steps[dim].step
            for number in (source.size[dim], source.start[dim], step):
                if number % block:
                    raise SpecError(
                        f"`{source.name}` is cut at {number}, which is not whole blocks of "
                        f"{block} of {stored}",
                        "use fewer ways of tensor parallelism, or expert parallelism",
                    )


def _cut_source(source: Source, layout: ParallelLayout) -> Source:
    if not source.splits:
        return source
    size = list(source.size)
    ranks = []
    for dim, split in source.splits:
        whole = size[dim]
        shift = split.shift(whole, layout)
        size[dim] = split.local(whole, layout)
        if shift.mod > 1:
            ranks.append((dim, shift))
    return replace(
        source,
        size=tuple(size),
        splits=(),
        ranks=tuple(ranks),
    )


def _unpack(source: Source, layout: ParallelLayout) -> list[Source]:
    """One ordinary source for each group of packed rows that a rank holds.

    The groups are cut as if they stood for all of their `every` rows, so that a rank's shift steps
    over whole groups of the checkpoint tensor; then each group keeps its own `run` rows.
    """
    packed, *others = source.size
    num_groups = packed // source.run
    size = (num_groups * source.every, *others)
    local = _cut_source(replace(source, size=size, run=0, every=0), layout)
    rows, *columns = local.size
    first, *rest = source.start
    groups = []
    for offset in range(0, rows, source.every):
        group = replace(
            local,
            start=(first + offset, *rest),
            size=(source.run, *columns),
        )
        groups.append(group)
    return groups


def _cut_op(op: Op, tensors: Mapping[str, Tensor], layout: ParallelLayout) -> Op:
    is_cut = op.attr_splits or op.shifts or op.partial or op.gathered
    if not is_cut and op.kind != "linear":
        return op
    attrs = dict(op.attrs)
    for name, split in op.attr_splits.items():
        attrs[name] = split.local_units(layout)
    if op.kind == "linear":
        outputs = [tensors[name] for name in op.outputs]
        attrs["splits"] = tuple(map(_width, outputs))
    rank_attrs = {}
    for name, (size, split) in op.shifts.items():
        shift = split.shift(size, layout)
        if shift.mod > 1:
            rank_attrs[name] = shift
    return replace(
        op,
        attrs=attrs,
        attr_splits={},
        shifts={},
        rank_attrs=rank_attrs,
        partial=False,
        gathered=False,
    )


def _width(tensor: Tensor) -> int:
    width = tensor.spec.shape[-1]
    assert isinstance(width, int)
    return width


def _collective(op: Op) -> str | None:
    if op.partial:
        return "all_reduce"
    if op.gathered:
        return "all_gather"
    return None


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
    local_name = f"{name}.local"
    local = tensors[name]
    tensors[local_name] = replace(local, name=local_name, arena="activations")
    tensors[name] = replace(local, spec=graph.tensors[name].spec)
    collective = Op(
        name=f"{name}.{kind}",
        kind=kind,
        inputs=(local_name,),
        outputs=(name,),
        attrs={"num_ranks": num_ranks},
        layer=op.layer,
        role=op.role,
    )
    return [replace(op, outputs=(local_name,)), collective]
