"""What an operator costs: FLOPs, bytes and state, and the microseconds that follow on a machine.

A kernel waits for its launch and for its first bytes. Then it is busy for the larger of two times:
its bytes over the memory's rate, and its FLOPs over the rate of the tensor cores for such shapes
(the roofline model, Williams et al., CACM 2009, with measured ceilings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from tokenspeed_plan.codegen.tiling import GEMV_ROWS
from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, all_reduce_us
from tokenspeed_plan.plans.ops import COLLECTIVES, DELTA_CHUNK, RECOMPUTED, integer, query_len
from tokenspeed_plan.plans.types import Format, TensorSpec


@dataclass(frozen=True, slots=True)
class Formats:
    """How experts, projections, and keys and values are stored; None for as the graph was built."""

    experts: Format | None = None
    matrices: Format | None = None
    kv: Format | None = None


AS_BUILT = Formats()


@dataclass(frozen=True, slots=True)
class Load:
    """The batch of one step: tokens, sequences, and tokens of context that each sequence has.

    `skew` is the exponent of a Zipf law of experts; 0 means uniform routing. `context_split` ranks
    share the keys and values of a head: each reads its part, for the queries of all of them.
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
    """The cost of an operator; that of a fused one leaves out what never leaves the kernel."""
    total = OpCost()
    for member in op.members:
        total += _member_cost(graph, member, load)
    names = dict.fromkeys((*op.inputs, *op.outputs))
    moved = sum(_bytes(graph, name, load) for name in names)
    return replace(total, activation_bytes=moved)


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
    """The load of an operator: one token per sequence where its first operand has as many rows."""
    if load.num_tokens == load.num_seqs or not op.inputs:
        return load
    if graph.tensors[op.inputs[0]].spec.shape[0] != "num_seqs":
        return load
    return replace(load, num_tokens=load.num_seqs)


def _flops(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind not in _FLOPS:
        return 0.0
    flops = _FLOPS[op.kind](op.attrs, weights, load)
    if op.kind not in _EXPERTS:
        return flops
    return _experts_per_token(graph, op) / _ranks_sharing(op) * flops


def _weight_bytes(graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load) -> float:
    if op.kind == "embed":
        return float(load.num_tokens * weights[0].size_bytes() // _rows(weights[0]))
    if op.kind in _EXPERTS:
        num_experts = _rows(weights[0])
        hits = _expected_hits(num_experts, graph, op, load)
        scale = stored_scale(op, weights[0], load.formats)
        return hits * weights[0].size_bytes() * scale / num_experts
    return sum(spec.size_bytes() * stored_scale(op, spec, load.formats) for spec in weights)


def stored_scale(op: Op, spec: TensorSpec, formats: Formats) -> float:
    """Bytes of an operator's weight as stored, divided by its bytes as built.

    Experts and projections are quantised. Tables, heads, routers, convolutions and vectors are not.
    """
    stored = _stored_format(op, formats)
    if stored is None:
        return 1.0
    return stored.bytes_per_element / spec.format.bytes_per_element


def _stored_format(op: Op, formats: Formats) -> Format | None:
    if op.kind in _EXPERTS:
        return formats.experts
    if op.kind == "linear" and op.role not in ("head", "router"):
        return formats.matrices
    return None


def _experts_per_token(graph: OpGraph, op: Op) -> int:
    ids = graph.tensors[op.inputs[1]].spec.shape[-1]
    assert isinstance(ids, int)
    return ids


def _ranks_sharing(op: Op) -> int:
    if "expert_start" not in op.rank_attrs:
        return 1
    return op.rank_attrs["expert_start"].mod


def _rows(spec: TensorSpec) -> int:
    return spec.bind(0, 0)[0]


def _expected_hits(local_experts: int, graph: OpGraph, op: Op, load: Load) -> float:
    """Distinct experts that are hit on the busiest rank, which the others wait for."""
    ways = _ranks_sharing(op)
    hits = expected_hits(
        local_experts * ways, _experts_per_token(graph, op), load.num_tokens, load.skew
    )
    return min(busiest_share(hits, ways), float(local_experts))


@cache
def busiest_share(hits: float, ways: int) -> float:
    """Expected hits of the busiest of `ways` ranks, each hit falling on any of them.

    E[max] = sum_x 1 - P(B <= x)^ways with B binomial. Ranks count as independent, which is close.
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
    return sum(_access_bytes(graph, op, name, access, load) for name, access in op.states)


def _access_bytes(graph: OpGraph, op: Op, name: str, access: str, load: Load) -> float:
    """Bytes that an operator moves of one buffer: of pages by token, of state slots by sequence."""
    spec = graph.tensors[name].spec
    shape = spec.bind(0, 0)
    slot_bytes = math.prod(shape[1:]) * spec.size_bytes() / max(math.prod(shape), 1)
    kv_format = load.formats.kv or spec.format
    stored = kv_format.bytes_per_element / spec.format.bytes_per_element
    if op.kind == "kv_write":
        return load.num_tokens * slot_bytes * stored / integer(op.attrs, "page_size")
    if op.kind == "attention":
        tokens = load.num_seqs * load.context_tokens
        read = tokens * slot_bytes * stored / integer(op.attrs, "page_size")
        return read / load.context_split
    return load.num_seqs * slot_bytes * _times(op, access)


def _times(op: Op, access: str) -> int:
    """How often an operator moves a state: a step reads one and may write one after each query."""
    if op.kind == "recompute_state":
        return 2
    if op.attrs.get("mode") == RECOMPUTED:  # `recompute_state` left it in registers
        return 0
    if access != "update":
        return 1
    return 1 + query_len(op.attrs)


Flops = Callable[[Mapping[str, object], list[TensorSpec], Load], float]


def _matrix(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    return 2.0 * load.num_tokens * math.prod(weights[0].bind(0, 0))


def _experts(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    shape = weights[0].bind(0, 0)[1:]
    return 2.0 * load.num_tokens * math.prod(shape)


def _attention(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """Scores and values: 4 D for each query head and each pair of query and key."""
    pairs = load.num_tokens * load.context_tokens
    return 4.0 * pairs * int(str(attrs["num_heads"])) * int(str(attrs["head_dim"]))


def _per_head(
    attrs: Mapping[str, object], load: Load, per_token: Callable[[int, int], int]
) -> float:
    key, value = int(str(attrs["key_dim"])), int(str(attrs["value_dim"]))
    return float(load.num_tokens * int(str(attrs["num_v_heads"])) * per_token(key, value))


def _delta_rule(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """One token after the other: 7 dk dv for each."""
    if attrs["mode"] == "chunked":
        return _delta_chunk(attrs, weights, load) + _delta_scan(attrs, weights, load)
    return _per_head(attrs, load, lambda key, value: 7 * key * value)


def _recompute_state(attrs: Mapping[str, object], weights: list[TensorSpec], load: Load) -> float:
    """The accepted tokens of the step before, at most as many as its queries: 5 dk dv for each."""
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
# With up to so many rows a product waits for its weights on every machine that we know.
MEMORY_BOUND_ROWS = 64


def op_class(kinds: Collection[str], num_rows: int, num_seqs: int) -> str:
    """The class of a kernel with such members; the machine's profile prices each class."""
    heaviest = next((name for kind, name in _CLASSES if kind in kinds), "rows")
    if heaviest == "attention":
        if num_rows > MEMORY_BOUND_ROWS * num_seqs:
            return "attention_prefill"
        return "attention_decode"
    if heaviest == "product" and num_rows <= GEMV_ROWS:
        return "stream"
    if heaviest == "product" and num_rows <= MEMORY_BOUND_ROWS:
        return "few_rows"
    return heaviest


@dataclass(frozen=True, slots=True)
class OpTime:
    """Microseconds of waiting, then microseconds in which the memory or the cores are busy.

    `bound` says which of them the busy part is, `waits_for` what the latency is.
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
    """`op_time` of an operator whose cost is known."""
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
    """By the fewest rows that a member works on: a head works on the last row of each sequence."""
    rows = min(_own(graph, member, load).num_tokens for member in op.members)
    return op_class({member.kind for member in op.members}, rows, load.num_seqs)


def _collective_time(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> OpTime:
    """An all-gather sends each part once, an all-reduce there and back, so twice the bytes."""
    moved = float(_bytes(graph, op.outputs[0], load))
    if op.kind == "all_gather":
        moved *= 0.5
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
    if not weights:
        return "bf16"
    stored = load.formats.experts if op.kind in _EXPERTS else load.formats.matrices
    return stored.dtype if stored else weights[0].dtype


def _filled(
    graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load, hardware: HardwareSpec
) -> float:
    """The share of the tensor cores in use: rows are padded to a tile, tiles to a wave."""
    if not hardware.num_sms or op.kind not in ("linear", *_EXPERTS):
        return 1.0
    columns = weights[0].bind(0, 0)[-2]
    groups, rows = 1.0, float(load.num_tokens)
    if op.kind in _EXPERTS:
        groups = max(_expected_hits(_rows(weights[0]), graph, op, load), 1.0)
        rows = rows * _experts_per_token(graph, op) / _ranks_sharing(op) / groups
    tile = _tile_rows(rows, op.kind in _EXPERTS)
    padded = math.ceil(rows / tile) * tile
    tiles = math.ceil(groups * padded / tile * columns / 128)
    wave = math.ceil(tiles / hardware.num_sms) * hardware.num_sms
    return rows / padded * tiles / wave


def _tile_rows(rows: float, experts: bool) -> int:
    if rows <= 16:
        return 16
    return 64 if rows <= 64 or experts else 128
