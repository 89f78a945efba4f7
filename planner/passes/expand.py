"""Expand: operators that no single kernel does well at this size become several that do.

- The chunked delta rule is a part that all chunks can do at once, and a scan that carries the
  state.
- Experts of many rows are products of a group of rows each, so the rows are sorted by expert first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tokenspeed_plan.planner.graph import Op, OpGraph, Tensor
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.types import Attr, DType

FEW_ROWS = 16  # up to here a product for each pair of row and expert reads hardly any expert twice


def expand(graph: OpGraph, num_tokens: int, num_seqs: int) -> OpGraph:
    """The graph with the operators that suit a program of so many tokens and sequences."""
    tensors = dict(graph.tensors)
    ops: list[Op] = []
    sorted_ids: dict[str, tuple[str, str]] = {}
    for op in graph.ops:
        work = _Expansion(op, graph, tensors, (num_tokens, num_seqs), sorted_ids)
        ops += _RULES[op.kind](work) if op.kind in _RULES else [op]
    used = {
        name for op in ops for name in (*op.inputs, *op.outputs, *(state for state, _ in op.states))
    }
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name in used or tensor.arena != "activations"
    }
    return replace(graph, ops=tuple(ops), tensors=kept)


@dataclass
class _Expansion:
    """One operator on its way to several."""

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
        """An operator in place of ours; with `keep` it takes over weights, states and rank constants."""
        op, definition, name = self.op, OPS[kind], f"{self.op.name}{suffix}"
        weights, states, ranks = (op.weights, op.states, op.rank_attrs) if keep else ((), (), {})
        operands = (*inputs, *weights, *(state for state, _ in states))
        specs = {
            role: self.tensors[value].spec
            if value in self.tensors
            else self.graph.weights[value].spec
            for role, value in zip(definition.operands, operands, strict=True)
        }
        made = definition.infer(attrs, specs)
        names = outputs or tuple(f"{name}.{role}" for role in made)
        for value, spec in zip(names, made.values(), strict=True):
            self.tensors.setdefault(value, Tensor(value, spec))
        return Op(name, kind, inputs, names, weights, states, dict(attrs), rank_attrs=dict(ranks))

    def attrs(self, *names: str) -> dict[str, Attr]:
        """Some of the operator's constants."""
        return {name: self.op.attrs[name] for name in names}

    @property
    def num_rows(self) -> int:
        """Rows of the operator's first operand."""
        return self.tensors[self.op.inputs[0]].spec.bind(*self.sizes)[0]

    @property
    def dtype(self) -> DType:
        """Of the operator's result."""
        return self.tensors[self.op.outputs[0]].spec.dtype


def _delta_rule(work: _Expansion) -> list[Op]:
    op = work.op
    if op.attrs["mode"] != "chunked":
        return [op]
    q, k, v, beta, log_decay, cu_seqlens, *rows = op.inputs
    attrs = {name: value for name, value in op.attrs.items() if name != "mode"}
    chunk = work.emit(".chunk", "delta_chunk", (q, k, v, beta, log_decay, cu_seqlens), attrs)
    inputs = (q, k, *chunk.outputs, cu_seqlens, *rows)
    return [
        chunk,
        work.emit("", "delta_scan", inputs, attrs | {"dtype": work.dtype}, op.outputs, keep=True),
    ]


def _experts_up(work: _Expansion) -> list[Op]:
    op = work.op
    if work.num_rows <= FEW_ROWS:
        return [op]
    x, ids = op.inputs
    sort = replace(work.emit(".sort", "expert_sort", (ids,), op.attrs), rank_attrs=op.rank_attrs)
    work.sorted_ids[ids] = (sort.outputs[0], sort.outputs[1])
    return [sort, work.emit("", "grouped_up", (x, *sort.outputs), op.attrs, op.outputs, keep=True)]


def _experts_down(work: _Expansion) -> list[Op]:
    op = work.op
    h, ids, weights = op.inputs
    if ids not in work.sorted_ids:
        return [op]
    down = work.emit(".down", "grouped_down", (h, *work.sorted_ids[ids]), op.attrs, keep=True)
    return [down, work.emit("", "expert_sum", (*down.outputs, weights), {}, op.outputs)]


_RULES: dict[str, Callable[[_Expansion], list[Op]]] = {
    "delta_rule": _delta_rule,
    "experts_up": _experts_up,
    "experts_down": _experts_down,
}
