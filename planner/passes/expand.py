"""Expand: an operator that no single kernel does well at this size becomes several.

- The chunked delta rule becomes a part that works on all chunks at once, and a scan that carries
  the state from chunk to chunk.
- Experts of many tokens become grouped products: tokens are sorted by expert first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Stage, Tensor
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.types import Attr, DType, TensorSpec

# Up to this many tokens, one product for each pair of token and expert reads hardly any expert's
# weights twice.
FEW_ROWS = 16
SORTED_AT_ONCE = 1024  # tokens whose choices are sorted in one launch
PART_TOKENS, MOST_PARTS = 64, 128  # of those that are counted in parts


def expand(graph: OpGraph, num_tokens: int, num_seqs: int) -> OpGraph:
    """The graph with the operators that suit a program of this size."""
    tensors = dict(graph.tensors)
    ops: list[Op] = []
    sorted_ids: dict[str, tuple[str, str]] = {}
    for op in graph.ops:
        rule = _RULES.get(op.kind)
        if rule is None:
            ops.append(op)
            continue
        work = _Expansion(op, graph, tensors, (num_tokens, num_seqs), sorted_ids)
        ops += rule(work)
    used = {*graph.inputs, *graph.outputs}
    for op in ops:
        used.update(op.inputs, op.outputs, dict(op.states))
    kept = {}
    for name, tensor in tensors.items():
        if name in used or tensor.arena != "activations":
            kept[name] = tensor
    return graph.to(Stage.EXPANDED, ops=tuple(ops), tensors=kept)


@dataclass
class _Expansion:
    """One operator that becomes several; `sorted_ids` are the results of `expert_sort` by ids."""

    op: Op
    graph: OpGraph
    tensors: dict[str, Tensor]
    sizes: tuple[int, int]
    sorted_ids: dict[str, tuple[str, str]] = field(default_factory=dict)

    def emit(
        self,
        suffix: str,
        kind: str,
        inputs: tuple[str, ...],
        attrs: Mapping[str, Attr],
        outputs: tuple[str, ...] = (),
        keep: bool = False,
    ) -> Op:
        """An operator in place of ours; `keep` keeps the weights, states and rank constants."""
        op = Op(
            name=f"{self.op.name}{suffix}",
            kind=kind,
            inputs=inputs,
            outputs=outputs,
            attrs=dict(attrs),
            layer=self.op.layer,
            role=self.op.role,
        )
        if keep:
            op = replace(
                op,
                weights=self.op.weights,
                states=self.op.states,
                rank_attrs=dict(self.op.rank_attrs),
            )
        return self._with_outputs(op)

    def _with_outputs(self, op: Op) -> Op:
        """The operator with its outputs declared, and named where they have no names yet."""
        definition = OPS[op.kind]
        specs = {}
        for role, name in zip(definition.operands, op.operands, strict=True):
            specs[role] = self._spec(name)
        inferred = definition.infer(op.attrs, specs)
        names = op.outputs
        if not names:
            names = tuple(f"{op.name}.{role}" for role in inferred)
        for name, spec in zip(names, inferred.values(), strict=True):
            self.tensors.setdefault(name, Tensor(name, spec))
        return replace(op, outputs=names)

    def _spec(self, name: str) -> TensorSpec:
        if name in self.tensors:
            return self.tensors[name].spec
        return self.graph.weights[name].spec

    def attrs(self, *names: str) -> dict[str, Attr]:
        """Some of the operator's constants."""
        return {name: self.op.attrs[name] for name in names}

    @property
    def num_rows(self) -> int:
        """Rows of the operator's first operand."""
        first = self.tensors[self.op.inputs[0]]
        shape = first.spec.bind(*self.sizes)
        return shape[0]

    @property
    def dtype(self) -> DType:
        """Of the operator's result."""
        result = self.tensors[self.op.outputs[0]]
        return result.spec.dtype


def _delta_rule(work: _Expansion) -> list[Op]:
    op = work.op
    if op.attrs["mode"] != "chunked":
        return [op]
    q, k, v, beta, log_decay, cu_seqlens, *slots = op.inputs
    attrs = dict(op.attrs)
    del attrs["mode"]
    of_tokens = (q, k, v, beta, log_decay, cu_seqlens)
    chunk = work.emit(".chunk", "delta_chunk", of_tokens, attrs)
    of_chunks = (q, k, *chunk.outputs, cu_seqlens, *slots)
    attrs["dtype"] = work.dtype
    scan = work.emit("", "delta_scan", of_chunks, attrs, op.outputs, keep=True)
    return [chunk, scan]


def _experts_up(work: _Expansion) -> list[Op]:
    op = work.op
    if work.num_rows <= FEW_ROWS:
        return [op]
    x, ids = op.inputs
    sorting = _sort(work, ids)
    order, bounds = sorting[-1].outputs
    work.sorted_ids[ids] = (order, bounds)
    inputs = (x, order, bounds)
    up = work.emit("", "grouped_up", inputs, op.attrs, op.outputs, keep=True)
    return [*sorting, up]


def _sort(work: _Expansion, ids: str) -> list[Op]:
    """Choices by expert: in one launch, of many tokens in two, of which the first one counts.

    On an H200 with 256 experts and 8,192 tokens one launch takes 53 us, since each expert's program
    reads all choices twice.
    """
    op, ranks = work.op, work.op.rank_attrs
    if work.num_rows <= SORTED_AT_ONCE:
        return [replace(work.emit(".sort", "expert_sort", (ids,), op.attrs), rank_attrs=ranks)]
    attrs = {**op.attrs, "num_parts": min(-(-work.num_rows // PART_TOKENS), MOST_PARTS)}
    count = work.emit(".count", "expert_count", (ids,), attrs)
    place = work.emit(".sort", "expert_place", (ids, *count.outputs), attrs)
    return [replace(count, rank_attrs=ranks), replace(place, rank_attrs=ranks)]


def _experts_down(work: _Expansion) -> list[Op]:
    op = work.op
    h, ids, weights = op.inputs
    if ids not in work.sorted_ids:
        return [op]
    order, bounds = work.sorted_ids[ids]
    sorted_h = (h, order, bounds)
    down = work.emit(".down", "grouped_down", sorted_h, op.attrs, keep=True)
    terms = (*down.outputs, weights)
    total = work.emit("", "expert_sum", terms, {}, op.outputs)
    return [down, total]


_RULES: dict[str, Callable[[_Expansion], list[Op]]] = {
    "delta_rule": _delta_rule,
    "experts_up": _experts_up,
    "experts_down": _experts_down,
}
