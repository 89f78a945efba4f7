"""What an operator costs: FLOPs, bytes and state, and the microseconds that follow on a machine.

A kernel waits for its launch and for its first bytes, then works for the larger of its bytes and
its FLOPs over what the machine reaches for such shapes (the roofline model, Williams et al., CACM
2009, with measured ceilings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from tokenspeed_plan.codegen.tiling import GEMV_ROWS
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec, all_reduce_us
from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.plans.ops import COLLECTIVES, DELTA_CHUNK, RECOMPUTED, integer, query_len
from tokenspeed_plan.plans.types import FORMATS, TensorSpec

WeightFormat = Literal["bf16", "fp32", "fp8", "nvfp4"]


@dataclass(frozen=True, slots=True)
class Formats:
    """How weights and the KV cache are stored, where that is not what the graph was built with.

    `experts` and `matrices` are None for the graph's own dtype; `kv_bytes` are those of an element.
    """

    experts: WeightFormat | None = None
    matrices: WeightFormat | None = None
    kv_bytes: float | None = None


AS_BUILT = Formats()


@dataclass(frozen=True, slots=True)
class Load:
    """What one replay carries: tokens, sequences, and tokens of context that each sequence has.

    `skew` is the exponent of a Zipf law of experts (0: routing is uniform). `context_split` ranks
    share the keys and values of a head: each reads its part, for the queries of all.
    """

    num_tokens: int
    num_seqs: int
    context_tokens: int
    skew: float = 0.0
    context_split: int = 1
    formats: Formats = AS_BUILT


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
    load = _own(graph, op, load)
    weights = [graph.weights[name].spec for name in op.weights]
    flops = _flops(graph, op, weights, load)
    return OpCost(
        flops, _weight_bytes(graph, op, weights, load), 0.0, _state_bytes(graph, op, load)
    )


def _own(graph: OpGraph, op: Op, load: Load) -> Load:
    """The load of an operator that works on a row a sequence, such as the head."""
    if (
        load.num_tokens == load.num_seqs
        or not op.inputs
        or graph.tensors[op.inputs[0]].spec.shape[0] != "num_seqs"
    ):
        return load
    return replace(load, num_tokens=load.num_seqs)


def _flops(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind not in _FLOPS:
        return 0.0
    shared = _experts_per_token(graph, op) / _ranks_sharing(op) if op.kind in _EXPERTS else 1.0
    return shared * _FLOPS[op.kind](op.attrs, weights, load)


def _weight_bytes(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind == "embed":
        return float(load.num_tokens * weights[0].size_bytes() // _rows(weights[0]))
    if op.kind in _EXPERTS:
        hits = _expected_hits(_rows(weights[0]), graph, op, load)
        return (
            hits
            * weights[0].size_bytes()
            * stored_scale(op, weights[0], load.formats)
            / _rows(weights[0])
        )
    return sum(spec.size_bytes() * stored_scale(op, spec, load.formats) for spec in weights)


def stored_scale(op: Op, spec: TensorSpec, formats: Formats) -> float:
    """Bytes of an operator's weight as stored over bytes as built.

    Experts and projections are quantised; tables, the head, routers, convolutions and vectors are
    not.
    """
    kept = (
        op.kind != "linear"
        or op.name.partition("@")[0] in ("head", "draft_head")
        or op.name.endswith(".router")
    )
    stored = formats.experts if op.kind in _EXPERTS else None if kept else formats.matrices
    return (
        1.0 if stored is None else FORMATS[stored].bytes_per_element / spec.format.bytes_per_element
    )


def _experts_per_token(graph: OpGraph, op: Op) -> int:
    ids = graph.tensors[op.inputs[1]].spec.shape[-1]
    assert isinstance(ids, int)
    return ids


def _ranks_sharing(op: Op) -> int:
    return op.rank_attrs["expert_start"].mod if "expert_start" in op.rank_attrs else 1


def _rows(spec: TensorSpec) -> int:
    return spec.bind(0, 0)[0]


def _expected_hits(local_experts: int, graph: OpGraph, op: Op, load: Load) -> float:
    """Distinct experts that are hit on the rank with the most of them: the others wait for it."""
    ways = _ranks_sharing(op)
    hits = expected_hits(
        local_experts * ways, _experts_per_token(graph, op), load.num_tokens, load.skew
    )
    return min(busiest_share(hits, ways), float(local_experts))


@cache
def busiest_share(hits: float, ways: int) -> float:
    """Expected hits of the busiest of `ways` ranks, each hit falling on any of them.

    E[max] = sum_x 1 - P(B <= x)^ways with B binomial; as if ranks were independent, which is close.
    """
    if ways == 1:
        return hits
    below, above = math.floor(hits), math.ceil(hits)
    share = hits - below
    return (1.0 - share) * _busiest(below, ways) + share * _busiest(above, ways)


def _busiest(hits: int, ways: int) -> float:
    chance, at_most, total = (1.0 - 1.0 / ways) ** hits, 0.0, 0.0
    for x in range(hits):
        at_most = min(at_most + chance, 1.0)
        total += 1.0 - at_most**ways
        chance *= (hits - x) / (x + 1) / (ways - 1)
    return max(total, hits / ways)


@cache
def expected_hits(num_experts: int, per_token: int, num_tokens: int, skew: float = 0.0) -> float:
    """Distinct experts that T tokens hit: sum_e 1 - (1 - p_e)^T.

    Under uniform routing p = k / E. With skew s the e-th most popular expert is drawn in proportion
    to e^-s, and p_e = 1 - exp(-c e^-s) with the c at which a token takes k of them (independent
    draws).
    """
    if not skew:
        share = min(per_token / num_experts, 1.0)
        return num_experts * (1.0 - (1.0 - share) ** num_tokens)
    popularity = [(rank + 1.0) ** -skew for rank in range(num_experts)]
    low, high = 0.0, 1.0
    while sum(-math.expm1(-high * weight) for weight in popularity) < per_token and high < 1e9:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        taken = sum(-math.expm1(-middle * weight) for weight in popularity)
        low, high = (middle, high) if taken < per_token else (low, middle)
    return sum(-math.expm1(-high * weight * num_tokens) for weight in popularity)


def _state_bytes(graph: OpGraph, op: Op, load: Load) -> float:
    total = 0.0
    for name, access in op.states:
        spec = graph.tensors[name].spec
        row = (
            math.prod(spec.bind(0, 0)[1:]) * spec.size_bytes() / max(math.prod(spec.bind(0, 0)), 1)
        )
        stored_bytes = spec.format.bytes_per_element
        narrow = (load.formats.kv_bytes or stored_bytes) / stored_bytes
        if op.kind == "kv_write":
            total += load.num_tokens * row * narrow / integer(op.attrs, "page_size")
        elif op.kind == "attention":
            read = (
                load.num_seqs * load.context_tokens * row * narrow / integer(op.attrs, "page_size")
            )
            total += read / load.context_split
        else:
            total += load.num_seqs * row * _times(op, access)
    return total


def _times(op: Op, access: str) -> int:
    """How often an operator reads or writes the rows of its state: a step leaves a state after each row that it has."""
    if op.kind == "recompute_state":
        return 2
    if op.attrs.get("mode") == RECOMPUTED:  # it is in registers since the replay
        return 0
    return 1 + (query_len(op.attrs) if access == "update" else 0)


Flops = Callable[[Mapping[str, object], list[TensorSpec], Load], float]


def _matrix(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    return 2.0 * load.num_tokens * math.prod(weights[0].bind(0, 0))


def _experts(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    shape = weights[0].bind(0, 0)[1:]
    return 2.0 * load.num_tokens * math.prod(shape)


def _attention(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Scores and values: 4 D a query head for each pair of query and key."""
    pairs = load.num_tokens * load.context_tokens
    return 4.0 * pairs * int(str(attrs["num_heads"])) * int(str(attrs["head_dim"]))


def _per_head(
    attrs: Mapping[str, object], load: Load, per_token: Callable[[int, int], int]
) -> float:
    key, value = int(str(attrs["key_dim"])), int(str(attrs["value_dim"]))
    return float(load.num_tokens * int(str(attrs["num_v_heads"])) * per_token(key, value))


def _delta_rule(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """One token after the other: 7 dk dv each."""
    if attrs["mode"] == "chunked":
        return _delta_chunk(attrs, weights, load) + _delta_scan(attrs, weights, load)
    return _per_head(attrs, load, lambda key, value: 7 * key * value)


def _recompute_state(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """What came true of a step before that had as many rows: 5 dk dv each, all of them at most."""
    return _per_head(attrs, load, lambda key, value: 5 * key * value)


def _delta_chunk(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Chunks of c = 64: K K^T and Q K^T, and A^-1 [V | K]."""
    return _per_head(attrs, load, lambda key, value: 2 * DELTA_CHUNK * (3 * key + value))


def _delta_scan(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Chunks of c = 64: the product of Q K^T and U, and three products with the state."""
    return _per_head(attrs, load, lambda key, value: 2 * DELTA_CHUNK * value + 6 * key * value)


_EXPERTS = ("experts_up", "experts_down", "grouped_up", "grouped_down")
_FLOPS: dict[str, Flops] = {
    "linear": _matrix,
    **dict.fromkeys(_EXPERTS, _experts),
    "attention": _attention,
    "delta_rule": _delta_rule,
    "recompute_state": _recompute_state,
    "delta_chunk": _delta_chunk,
    "delta_scan": _delta_scan,
}


# A kernel's class is that of its heaviest member, in this order.
_CLASSES: tuple[tuple[str, str], ...] = (
    ("attention", "attention"),
    ("delta_chunk", "delta_chunk"),
    ("delta_scan", "delta_chunk"),
    ("delta_rule", "delta_step"),
    ("grouped_up", "grouped"),
    ("grouped_down", "grouped"),
    ("experts_up", "experts"),
    ("experts_down", "experts"),
    ("linear", "product"),
    ("embed", "rows"),
)
FEW_ROWS = 64  # up to here it waits for its weights on every machine that we know


def op_class(kinds: Collection[str], num_rows: int, num_seqs: int) -> str:
    """The class whose wait and residual a kernel of such members takes from the machine's profile."""
    found = next((name for kind, name in _CLASSES if kind in kinds), "rows")
    if found == "attention":
        return "attention_prefill" if num_rows > FEW_ROWS * num_seqs else "attention_decode"
    if found == "product" and num_rows <= FEW_ROWS:
        return "stream" if num_rows <= GEMV_ROWS else "few_rows"
    return found


@dataclass(frozen=True, slots=True)
class OpTime:
    """Microseconds in which the machine is waited for, then those in which its memory or its cores are kept busy.

    `bound` is the kind of time that the busy part is, `waits_for` that of the latency.
    """

    latency_us: float
    busy_us: float
    bound: Literal["memory", "matrix", "collective"] = "memory"
    waits_for: Literal["launch", "collective"] = "launch"

    @property
    def total_us(self) -> float:
        """Both, to a hundredth."""
        return round(self.latency_us + self.busy_us, 2)


def op_time(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> OpTime:
    """Predicted time of one kernel or collective."""
    return time_of(graph, op, op_cost(graph, op, load), load, hardware)


def time_of(graph: OpGraph, op: Op, cost: OpCost, load: Load, hardware: HardwareSpec) -> OpTime:
    """`op_time`, of an operator whose cost is known."""
    if op.kind in COLLECTIVES:
        return _collective_time(graph, op, load, hardware)
    memory_s = cost.moved_bytes / hardware.read_bytes_per_s
    matrix_s = sum(_matrix_s(graph, member, load, hardware) for member in op.members)
    name = _class(graph, op, load)
    busy_us = max(memory_s, matrix_s) * 1e6 * hardware.residuals[name]
    bound: Literal["memory", "matrix"] = "memory" if memory_s >= matrix_s else "matrix"
    sums = [member for member in op.members if member.kind == "all_reduce"]
    if not sums:
        return OpTime(hardware.launch_us + hardware.waits_us[name], busy_us, bound)
    return OpTime(
        _collective_time(graph, sums[0], load, hardware).latency_us, busy_us, bound, "collective"
    )


def _class(graph: OpGraph, op: Op, load: Load) -> str:
    """By the rows of the member that works on the fewest: a head works on the last ones alone."""
    rows = min(_own(graph, member, load).num_tokens for member in op.members)
    return op_class({member.kind for member in op.members}, rows, load.num_seqs)


def _collective_time(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> OpTime:
    """A gather sends each part once, where a sum goes there and back: half of the bytes of an all-reduce."""
    moved = _bytes(graph, op.outputs[0], load) * (0.5 if op.kind == "all_gather" else 1.0)
    taken = all_reduce_us(hardware, moved, integer(op.attrs, "num_ranks"))
    return OpTime(max(taken, hardware.launch_us), 0.0, "collective", "collective")


def _matrix_s(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> float:
    """Seconds of the tensor cores, at the share that a product of this shape fills."""
    load = _own(graph, op, load)
    weights = [graph.weights[name].spec for name in op.weights]
    flops = _flops(graph, op, weights, load)
    if not flops:
        return 0.0
    rate = hardware.matrix_flops_per_s.get(
        _matrix_dtype(op, weights, load), hardware.matrix_flops_per_s["bf16"]
    )
    return flops / (rate * hardware.matrix_share * _filled(graph, op, weights, load, hardware))


def _matrix_dtype(op: Op, weights: list[TensorSpec], load: Load) -> str:
    if op.kind.startswith("delta"):
        return "tf32"  # the state stays fp32
    stored = load.formats.experts if op.kind in _EXPERTS else load.formats.matrices
    return stored if stored and weights else weights[0].dtype if weights else "bf16"


def _filled(
    graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load, hardware: HardwareSpec
) -> float:
    """The share of the tensor cores that holds numbers: rows padded to a tile, tiles padded to a wave."""
    if not hardware.num_sms or op.kind not in ("linear", *_EXPERTS):
        return 1.0
    experts = op.kind in _EXPERTS
    columns = weights[0].bind(0, 0)[-2]
    pairs = load.num_tokens * (_experts_per_token(graph, op) if experts else 1)
    groups = max(_expected_hits(_rows(weights[0]), graph, op, load), 1.0) if experts else 1.0
    rows = pairs / (_ranks_sharing(op) if experts else 1) / groups
    tile = 16 if rows <= 16 else 64 if rows <= 64 or experts else 128
    padded = math.ceil(rows / tile) * tile
    tiles = math.ceil(groups * padded / tile * columns / 128)
    return rows / padded * tiles / (math.ceil(tiles / hardware.num_sms) * hardware.num_sms)
