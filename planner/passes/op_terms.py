"""FLOPs and bytes of each operator, as linear functions of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.plans.ops import DELTA_CHUNK, RECOMPUTED, integer, query_len
from tokenspeed_plan.plans.schema import Amounts, CallAmounts, CallCost, Terms
from tokenspeed_plan.plans.types import Attr, Format, TensorSpec

EXPERTS = ("experts_up", "experts_down", "grouped_up", "grouped_down")


@dataclass(frozen=True, slots=True)
class Formats:
    """How keys and values are stored; None for as the graph was built.

    `quantised_products`: the tensor cores multiply block-scaled weights as they are; ours are
    converted first.
    """

    kv: Format | None = None
    quantised_products: bool = False


AS_BUILT = Formats()
NO_AMOUNTS = Amounts()


def call_cost(graph: OpGraph, op: Op) -> CallCost:
    """The cost of an operator, as a plan has it."""
    costs = op_amounts(graph, op)
    return CallCost(
        products=_frozen(costs.products),
        mixers=_frozen(costs.mixers),
        weights=_frozen(costs.weights),
        activations=_frozen(costs.activations),
        state=_frozen(costs.state),
    )


def _frozen(amounts: Amounts) -> Terms:
    return Terms(**asdict(amounts))


def op_amounts(
    graph: OpGraph, op: Op, formats: Formats = AS_BUILT, context_split: int = 1
) -> CallAmounts:
    """The cost of an operator; that of a fused one leaves out what never leaves the kernel.

    Args:
        graph: where the operator is.
        op: the operator.
        formats: how keys and values are stored.
        context_split: ranks that share the keys and values of a head.
    """
    members = op.members
    names = dict.fromkeys((*op.inputs, *op.outputs))
    picked = _picked(members)
    return CallAmounts(
        products=_sum(_product_terms(graph, member) for member in members),
        mixers=_sum(_mixer_terms(graph, member) for member in members),
        weights=_sum(_weight_terms(graph, member) for member in members),
        activations=_sum(_tensor_terms(graph.tensors[name].spec, name in picked) for name in names),
        state=_sum(_state_terms(graph, member, formats, context_split) for member in members),
    )


def flops_terms(graph: OpGraph, op: Op) -> Amounts:
    """FLOPs of an operator that is not fused."""
    return _sum((_product_terms(graph, op), _mixer_terms(graph, op)))


def is_per_seq(graph: OpGraph, op: Op) -> bool:
    """Whether an operator works on one token of each sequence: its first operand has such rows."""
    if not op.inputs:
        return False
    return graph.tensors[op.inputs[0]].spec.shape[:1] == ("num_seqs",)


def experts_per_token(graph: OpGraph, op: Op) -> int:
    """How many experts each token chooses."""
    ids = graph.tensors[op.inputs[1]].spec.shape[-1]
    assert isinstance(ids, int)
    return ids


def ranks_sharing_experts(op: Op) -> int:
    """Ranks among which the experts of an operator are shared out."""
    if "expert_start" not in op.rank_attrs:
        return 1
    return op.rank_attrs["expert_start"].mod


def num_rows(spec: TensorSpec) -> int:
    """Rows of a weight: of a stack of experts, its experts."""
    return spec.bind(0, 0)[0]


def weight_specs(graph: OpGraph, op: Op) -> list[TensorSpec]:
    """The weights of an operator."""
    return [graph.weights[name].spec for name in op.weights]


def _sum(parts: Iterable[Amounts]) -> Amounts:
    total = NO_AMOUNTS
    for part in parts:
        if total is NO_AMOUNTS:
            total = part
        elif part is not NO_AMOUNTS:
            total += part
    return total


def _per_row(graph: OpGraph, op: Op, amount: float) -> Amounts:
    if is_per_seq(graph, op):
        return Amounts(per_seq=amount)
    return Amounts(per_token=amount)


def _picked(members: Iterable[Op]) -> set[str]:
    """Tensors of which only the last row of each sequence is read."""
    picked = {member.inputs[0] for member in members if member.kind == "last_token"}
    others = (member.inputs for member in members if member.kind != "last_token")
    return picked.difference(*others)


def _tensor_terms(spec: TensorSpec, is_picked: bool) -> Amounts:
    """Bytes of a tensor, of which at most the leading dimension is symbolic."""
    fixed = [dim for dim in spec.shape if isinstance(dim, int)]
    size = math.prod(fixed) * spec.format.bytes_per_element
    if "num_tokens" in spec.shape and not is_picked:
        return Amounts(per_token=size)
    if "num_seqs" in spec.shape or is_picked:
        return Amounts(per_seq=size)
    if "num_seqs+1" in spec.shape:
        return Amounts(once=size, per_seq=size)
    return Amounts(once=size)


def _weight_terms(graph: OpGraph, op: Op) -> Amounts:
    if not op.weights:
        return NO_AMOUNTS
    specs = weight_specs(graph, op)
    if op.kind == "embed":
        return _per_row(graph, op, specs[0].size_bytes() / num_rows(specs[0]))
    if op.kind in EXPERTS:
        return Amounts(per_expert=specs[0].size_bytes() / num_rows(specs[0]))
    return Amounts(once=sum(spec.size_bytes() for spec in specs))


def _state_terms(graph: OpGraph, op: Op, formats: Formats, context_split: int) -> Amounts:
    total = NO_AMOUNTS
    for name, access in op.states:
        spec = graph.tensors[name].spec
        if op.kind == "kv_write":
            total += _per_row(graph, op, _kv_bytes(op, spec, formats))
        elif op.kind == "attention":
            total += Amounts(per_seq_context=_kv_bytes(op, spec, formats) / context_split)
        else:
            total += Amounts(per_seq=_slot_bytes(spec) * _times(op, access))
    return total


def _kv_bytes(op: Op, spec: TensorSpec, formats: Formats) -> float:
    """Keys and values of one token."""
    stored = formats.kv or spec.format
    scale = stored.bytes_per_element / spec.format.bytes_per_element
    return _slot_bytes(spec) * scale / integer(op.attrs, "page_size")


def _slot_bytes(spec: TensorSpec) -> float:
    """One page or one state slot; 0 of a few numbers a sequence."""
    shape = spec.bind(0, 0)
    return math.prod(shape[1:]) * spec.size_bytes() / max(math.prod(shape), 1)


def _times(op: Op, access: str) -> int:
    """How often an operator moves a state: a step reads one and may write one after each query."""
    if op.kind == "recompute_state":
        return 2
    if op.attrs.get("mode") == RECOMPUTED:  # `recompute_state` left it in registers
        return 0
    if access != "update":
        return 1
    if op.kind == "ring_conv" and op.attrs["mode"] == "update":
        return 1  # all entries but one are read, and that one is written
    return 1 + query_len(op.attrs)


def _product_terms(graph: OpGraph, op: Op) -> Amounts:
    """2 FLOPs for each element of a weight and each row."""
    if op.kind == "linear":
        return _per_row(graph, op, 2.0 * math.prod(weight_specs(graph, op)[0].bind(0, 0)))
    if op.kind in EXPERTS:
        of_one = 2.0 * math.prod(weight_specs(graph, op)[0].bind(0, 0)[1:])
        return _per_row(
            graph, op, experts_per_token(graph, op) / ranks_sharing_experts(op) * of_one
        )
    return NO_AMOUNTS


def _mixer_terms(graph: OpGraph, op: Op) -> Amounts:
    if op.kind == "attention":
        pair = _attention(op.attrs)
        if is_per_seq(graph, op):
            return Amounts(per_seq_context=pair)
        return Amounts(per_token_context=pair)
    if op.kind in _DELTA_FLOPS:
        key, value = integer(op.attrs, "key_dim"), integer(op.attrs, "value_dim")
        of_head = _DELTA_FLOPS[op.kind](op.attrs, key, value)
        return _per_row(graph, op, float(integer(op.attrs, "num_v_heads") * of_head))
    return NO_AMOUNTS


def _attention(attrs: Mapping[str, Attr]) -> float:
    """Scores and values: 4 D for each query head and each pair of query and key."""
    return 4.0 * integer(attrs, "num_heads") * integer(attrs, "head_dim")


def _delta_rule(attrs: Mapping[str, Attr], key: int, value: int) -> int:
    """One token after the other: 7 dk dv for each."""
    if attrs["mode"] == "chunked":
        return _delta_chunk(attrs, key, value) + _delta_scan(attrs, key, value)
    return 7 * key * value


def _recompute_state(attrs: Mapping[str, Attr], key: int, value: int) -> int:
    """The accepted tokens of the step before, at most as many as its queries: 5 dk dv for each."""
    return 5 * key * value


def _delta_chunk(attrs: Mapping[str, Attr], key: int, value: int) -> int:
    """Chunks of c = 64: K K^T and Q K^T, and A^-1 [V | K]."""
    return 2 * DELTA_CHUNK * (3 * key + value)


def _delta_scan(attrs: Mapping[str, Attr], key: int, value: int) -> int:
    """Chunks of c = 64: the product of Q K^T and U, and three products with the state."""
    return 2 * DELTA_CHUNK * value + 6 * key * value


# FLOPs of each value head and token, by the dimensions of a key and a value.
_DELTA_FLOPS: dict[str, Callable[[Mapping[str, Attr], int, int], int]] = {
    "delta_rule": _delta_rule,
    "recompute_state": _recompute_state,
    "delta_chunk": _delta_chunk,
    "delta_scan": _delta_scan,
}
