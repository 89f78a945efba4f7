"""What an operator costs: FLOPs, bytes and state, and the microseconds that follow on a machine.

The time of a kernel is the larger of its bytes and its FLOPs over the machine's rates, plus one launch (the roofline
model, Williams et al., CACM 2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    flops = _FLOPS.get(op.kind, _elementwise)(op.attrs, weights, load)
    if op.kind in ("experts_up", "experts_down"):
        flops *= _experts_per_token(graph, op) / _ranks_sharing(op)
    return OpCost(flops, _weight_bytes(graph, op, weights, load), 0.0, _state_bytes(graph, op, load))


def _weight_bytes(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind == "embed":
        return float(load.num_tokens * weights[0].size_bytes() // _rows(weights[0]))
    if op.kind in ("experts_up", "experts_down"):
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
            total += load.num_seqs * row * (2 if access == "update" else 1)
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


def _delta_rule(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Recurrent: 7 dk dv a token and head. Chunks of c = 64: 8 c d + 6 d^2."""
    key, value = int(str(attrs["key_dim"])), int(str(attrs["value_dim"]))
    chunked = attrs["mode"] == "chunked"
    per_token = 4 * 64 * (key + value) + 6 * key * value if chunked else 7 * key * value
    return float(load.num_tokens * int(str(attrs["num_v_heads"])) * per_token)


_FLOPS: dict[str, Flops] = {
    "linear": _matrix,
    "experts_up": _experts,
    "experts_down": _experts,
    "attention": _attention,
    "delta_rule": _delta_rule,
}


def predict_us(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> float:
    """Predicted microseconds of one kernel or collective, to a hundredth."""
    if op.kind in ("all_reduce", "all_gather"):
        moved = _bytes(graph, op.outputs[0], load)
        return round(hardware.all_reduce_us + moved / hardware.link_bytes_per_s * 1e6, 2)
    cost = op_cost(graph, op, load)
    busy_s = max(cost.moved_bytes / hardware.read_bytes_per_s, cost.flops / hardware.matrix_flops_per_s)
    return round(busy_s * 1e6 + hardware.launch_us, 2)
