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

# With up to so many tokens, one product for each pair of token and expert reads hardly any expert
# twice.
FEW_ROWS = 16


def expand(graph: OpGraph, num_tokens: int, num_seqs: int) -> OpGraph:
    """The graph with the operators that suit a program of this size."""
    tensors = dict(graph.tensors)
    ops: list[Op] = []
    sorted_ids: dict[str, tuple[str, str]] = {}
    for op in graph.ops:
        work = _Expansion(op, graph, tensors, (num_tokens, num_seqs), sorted_ids)
        if op.kind in _RULES:
            ops += _RULES[op.kind](work)
        else:
            ops.append(op)
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
        operands = zip(definition.operands, op.operands, strict=True)
        specs = {role: self._spec(name) for role, name in operands}
        inferred = definition.infer(op.attrs, specs)
        names = op.outputs or tuple(f"{op.name}.{role}" for role in inferred)
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
