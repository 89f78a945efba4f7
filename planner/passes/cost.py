"""What an operator costs for a load, and the microseconds that follow on a machine.

A kernel waits for its launch and for its first bytes. Then it is busy for the larger of two times:
its bytes over the memory's rate, and its FLOPs over the rate of the tensor cores for such shapes
(the roofline model, Williams et al., CACM 2009, with measured ceilings).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from tokenspeed_plan.codegen.tiling import GEMV_ROWS
from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, all_reduce_us
from tokenspeed_plan.planner.passes.op_terms import (
    AS_BUILT,
    EXPERTS,
    Formats,
    call_cost,
    experts_per_token,
    flops_terms,
    is_per_seq,
    num_rows,
    ranks_sharing_experts,
    weight_specs,
)
from tokenspeed_plan.plans.ops import COLLECTIVES, integer
from tokenspeed_plan.plans.schema import BatchSize, Work
from tokenspeed_plan.plans.types import TensorSpec


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


def op_cost(graph: OpGraph, op: Op, load: Load) -> Work:
    """What an operator does for a load; a fused one without what never leaves the kernel."""
    cost = call_cost(graph, op, load.formats, load.context_split)
    return cost.at(_batch_size(graph, op, load))


def _batch_size(graph: OpGraph, op: Op, load: Load) -> BatchSize:
    hits = 0.0
    for member in op.members:
        if member.kind in EXPERTS:
            hits = _expected_hits(graph, member, _own(graph, member, load))
    return BatchSize(load.num_tokens, load.num_seqs, load.context_tokens, hits)


def _own(graph: OpGraph, op: Op, load: Load) -> Load:
    """The load of an operator: one token per sequence where its first operand has as many rows."""
    if not is_per_seq(graph, op):
        return load
    return replace(load, num_tokens=load.num_seqs)


def _expected_hits(graph: OpGraph, op: Op, load: Load) -> float:
    """Distinct experts of an operator that the load hits on the busiest rank."""
    local_experts, ways = num_rows(weight_specs(graph, op)[0]), ranks_sharing_experts(op)
    per_token = experts_per_token(graph, op)
    return busiest_hits(local_experts, ways, per_token, load.num_tokens, load.skew)


def busiest_hits(
    local_experts: int, ways: int, per_token: int, num_tokens: int, skew: float = 0.0
) -> float:
    """Distinct experts that are hit on the busiest of `ways` ranks, which the others wait for."""
    hits = expected_hits(local_experts * ways, per_token, num_tokens, skew)
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


def time_of(graph: OpGraph, op: Op, cost: Work, load: Load, hardware: HardwareSpec) -> OpTime:
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
    moved = float(graph.tensors[op.outputs[0]].spec.size_bytes(load.num_tokens, load.num_seqs))
    if op.kind == "all_gather":
        moved *= 0.5
    taken = all_reduce_us(hardware, moved, integer(op.attrs, "num_ranks"))
    return OpTime(max(taken, hardware.launch_us), 0.0, "collective", "collective")


def _matrix_s(graph: OpGraph, op: Op, load: Load, hardware: HardwareSpec) -> float:
    """Seconds of the tensor cores, at the share that a product of this shape fills."""
    flops = flops_terms(graph, op).at(
        BatchSize(load.num_tokens, load.num_seqs, load.context_tokens)
    )
    if not flops:
        return 0.0
    load, weights = _own(graph, op, load), weight_specs(graph, op)
    rate = hardware.matrix_flops_per_s.get(
        _matrix_dtype(op, weights, load), hardware.matrix_flops_per_s["bf16"]
    )
    return flops / (rate * hardware.matrix_share * _filled(graph, op, weights, load, hardware))


def _matrix_dtype(op: Op, weights: list[TensorSpec], load: Load) -> str:
    if op.kind.startswith("delta"):
        return "tf32"  # the state stays fp32
    if not weights:
        return "bf16"
    stored = load.formats.experts if op.kind in EXPERTS else load.formats.matrices
    return stored.dtype if stored else weights[0].dtype


def _filled(
    graph: OpGraph, op: Op, weights: list[TensorSpec], load: Load, hardware: HardwareSpec
) -> float:
    """The share of the tensor cores in use: rows are padded to a tile, tiles to a wave."""
    if not hardware.num_sms or op.kind not in ("linear", *EXPERTS):
        return 1.0
    columns = weights[0].bind(0, 0)[-2]
    groups, rows = 1.0, float(load.num_tokens)
    if op.kind in EXPERTS:
        groups = max(_expected_hits(graph, op, load), 1.0)
        rows = rows * experts_per_token(graph, op) / ranks_sharing_experts(op) / groups
    tile = _tile_rows(rows, op.kind in EXPERTS)
    padded = math.ceil(rows / tile) * tile
    tiles = math.ceil(groups * padded / tile * columns / 128)
    wave = math.ceil(tiles / hardware.num_sms) * hardware.num_sms
    return rows / padded * tiles / wave


def _tile_rows(rows: float, experts: bool) -> int:
    if rows <= 16:
        return 16
    return 64 if rows <= 64 or experts else 128
