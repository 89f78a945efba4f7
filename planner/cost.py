"""What an operator costs: FLOPs, bytes and state, and the microseconds that follow on a machine.

The time of a kernel is the larger of its bytes and its FLOPs over the machine's rates, plus one launch (the roofline
model, Williams et al., CACM 2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.hardware import HardwareSpec
from tokenspeed_plan.plans.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Load:
    """What one replay carries: tokens, sequences, and tokens of context that each sequence has."""

    num_tokens: int
    num_seqs: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class OpCost:
    """Work of one operator on one rank."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    state_bytes: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """All bytes read or written."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.state_bytes + other.state_bytes,
        )


def op_cost(graph: OpGraph, op: Op, load: Load) -> OpCost:
    """The cost of an operator; of a fused one, of its members less what never leaves the kernel."""
    members = [_member_cost(graph, member, load) for member in op.members]
    total = OpCost()
    for cost in members:
        total += cost
    names = dict.fromkeys((*op.inputs, *op.outputs))
    moved = sum(_bytes(graph, name, load) for name in names)
    return OpCost(total.flops, total.weight_bytes, moved, total.state_bytes)


def _bytes(graph: OpGraph, name: str, load: Load) -> int:
    return graph.tensors[name].spec.size_bytes(load.num_tokens, load.num_seqs)


def _member_cost(graph: OpGraph, op: Op, load: Load) -> OpCost:
    weights = [graph.weights[name].spec for name in op.weights]
    if graph.depth and op.inputs and graph.tensors[op.inputs[0]].spec.shape[0] == "num_seqs":
        load = replace(load, num_tokens=load.num_seqs)  # a pass over drafts has one row a sequence
    flops = _FLOPS.get(op.kind, _elementwise)(op.attrs, weights, load)
    if op.kind in _EXPERTS:
        flops *= _experts_per_token(graph, op) / _ranks_sharing(op)
    return OpCost(flops, _weight_bytes(graph, op, weights, load), 0.0, _state_bytes(graph, op, load))


def _weight_bytes(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind == "embed":
        return float(load.num_tokens * weights[0].size_bytes() // _rows(weights[0]))
    if op.kind in _EXPERTS:
        hits = _expected_hits(_rows(weights[0]), graph, op, load)
        return hits * weights[0].size_bytes() / _rows(weights[0])
    return float(sum(spec.size_bytes() for spec in weights))


def _experts_per_token(graph: OpGraph, op: Op) -> int:
    ids = graph.tensors[op.inputs[1]].spec.shape[-1]
    assert isinstance(ids, int)
    return ids


def _ranks_sharing(op: Op) -> int:
    return op.rank_attrs["expert_start"].mod if "expert_start" in op.rank_attrs else 1


def _rows(spec: TensorSpec) -> int:
    return spec.bind(0, 0)[0]


def _expected_hits(local_experts: int, graph: OpGraph, op: Op, load: Load) -> float:
    """Distinct experts of this rank that are hit under uniform routing: E (1 - (1 - k / E_all)^T)."""
    share = _experts_per_token(graph, op) / (local_experts * _ranks_sharing(op))
    return local_experts * (1.0 - (1.0 - min(share, 1.0)) ** load.num_tokens)


def _state_bytes(graph: OpGraph, op: Op, load: Load) -> float:
    total = 0.0
    for name, access in op.states:
        spec = graph.tensors[name].spec
        row = math.prod(spec.bind(0, 0)[1:]) * spec.size_bytes() / max(math.prod(spec.bind(0, 0)), 1)
        if op.kind == "kv_write":
            total += load.num_tokens * row / int(op.attrs["page_size"])
        elif op.kind == "attention":
            total += load.num_seqs * load.context_tokens * row / int(op.attrs["page_size"])
        else:
            written = int(op.attrs.get("rows_per_seq", 1)) if access == "update" else 0
            total += load.num_seqs * row * (1 + written)
    return total


Flops = Callable[[Mapping[str, object], list[TensorSpec], Load], float]


def _elementwise(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    return 0.0


def _matrix(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    return 2.0 * load.num_tokens * math.prod(weights[0].bind(0, 0))


def _experts(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    shape = weights[0].bind(0, 0)[1:]
    return 2.0 * load.num_tokens * math.prod(shape)


def _attention(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Scores and values: 4 D a query head for each pair of query and key."""
    return 4.0 * load.num_tokens * load.context_tokens * int(str(attrs["num_heads"])) * int(str(attrs["head_dim"]))


def _per_head(attrs: Mapping[str, object], load: Load, per_token: Callable[[int, int], int]) -> float:
    key, value = int(str(attrs["key_dim"])), int(str(attrs["value_dim"]))
    return float(load.num_tokens * int(str(attrs["num_v_heads"])) * per_token(key, value))


def _delta_rule(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """One token after the other: 7 dk dv each."""
    if attrs["mode"] == "chunked":
        return _delta_chunk(attrs, weights, load) + _delta_scan(attrs, weights, load)
    return _per_head(attrs, load, lambda key, value: 7 * key * value)


def _delta_chunk(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Chunks of c = 64: K K^T, and A^-1 [V | K]."""
    return _per_head(attrs, load, lambda key, value: 2 * 64 * key + 2 * 64 * (key + value))


def _delta_scan(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Chunks of c = 64: Q K^T, its product with U, and three products with the state."""
    return _per_head(attrs, load, lambda key, value: 2 * 64 * (key + value) + 6 * key * value)


_EXPERTS = ("experts_up", "experts_down", "grouped_up", "grouped_down")
_FLOPS: dict[str, Flops] = {
    "linear": _matrix,
    **dict.fromkeys(_EXPERTS, _experts),
    "attention": _attention,
    "delta_rule": _delta_rule,
    "delta_chunk": _delta_chunk,
    "delta_scan": _delta_scan,
}


@dataclass(frozen=True, slots=True)
class OpTime:
    """Microseconds in which the machine is waited for, then those in which its memory or its cores are kept busy."""

    latency_us: float
    busy_us: float

    @property
    def total_us(self) -> float:
        """Both, to a hundredth."""
        return round(self.latency_us + self.busy_us, 2)


def op_time(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> OpTime:
    """Predicted time of one kernel or collective."""
    if op.kind in ("all_reduce", "all_gather"):
        moved = _bytes(graph, op.outputs[0], load)
        return OpTime(hardware.all_reduce_us, moved / hardware.link_bytes_per_s * 1e6)
    cost = op_cost(graph, op, load)
    busy_s = max(cost.moved_bytes / hardware.read_bytes_per_s, cost.flops / hardware.matrix_flops_per_s)
    reduces = any(member.kind == "all_reduce" for member in op.members)
    return OpTime(hardware.all_reduce_us if reduces else hardware.launch_us, busy_s * 1e6)
