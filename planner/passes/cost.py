"""What an operator costs for a load, and the microseconds that follow on a machine.

A kernel waits for its launch and for its first bytes. Then it is busy for the larger of two times:
its bytes over the memory's rate, and its FLOPs over the rate of the tensor cores for such shapes
(the roofline model, Williams et al., CACM 2009, with measured ceilings).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

from tokenspeed_plan.codegen.dense.dense_tiling import (
    NARROW_TILE,
    filling_tile,
    is_narrow,
    shares_depth,
)
from tokenspeed_plan.codegen.tiling import GEMV_ROWS
from tokenspeed_plan.planner.graph import LIBRARY_MARGIN, Op, OpGraph
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, gather_us, library_us, push_us
from tokenspeed_plan.planner.passes.op_terms import (
    AS_BUILT,
    EXPERTS,
    NO_AMOUNTS,
    Formats,
    experts_per_token,
    flops_terms,
    is_per_seq,
    num_rows,
    op_amounts,
    ranks_sharing_experts,
    weight_specs,
)
from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.ops import COLLECTIVES, integer, query_len
from tokenspeed_plan.plans.schema import Amounts, BatchSize, CallAmounts, KernelSpec, Part, Work
from tokenspeed_plan.plans.types import Format, TensorSpec

# Products of weights in FP8, converted first or multiplied as they are; and of weights in NVFP4.
Variant = Literal["", "_fp8", "_quantised", "_fp4"]


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
    return costed_op(graph, op, load.formats, load.context_split).work(load)


@dataclass(frozen=True, slots=True)
class _Experts:
    """The experts of an operator: on this rank, ranks that share them out, and of each token."""

    local_experts: int
    ways: int
    per_token: int

    def hits(self, num_tokens: int, skew: float) -> float:
        """Distinct experts that the tokens hit on the busiest rank."""
        return busiest_hits(self.local_experts, self.ways, self.per_token, num_tokens, skew)


@dataclass(frozen=True, slots=True)
class _Member:
    """What the time of a member takes from its graph.

    `columns` are those of a product's weight, and 0 of all else.
    """

    kind: str
    flops: Amounts
    is_per_seq: bool
    matrix_dtype: str
    columns: int
    experts: _Experts | None

    def rows(self, load: Load) -> int:
        """Of its first operand: each token, or one of each sequence."""
        if self.is_per_seq:
            return load.num_seqs
        return load.num_tokens


@dataclass(frozen=True, slots=True)
class _Collective:
    """A collective, by itself or inside a kernel."""

    kind: str
    result: TensorSpec
    num_ranks: int


@dataclass(frozen=True, slots=True)
class CostedOp:
    """What the price of an operator takes from its graph, whatever the load.

    `libraries` are the functions that compute it too, on some machine.
    `waiting_tokens` of a sequence wait for another one inside a kernel of the delta rule.
    """

    heaviest: str
    variant: Variant
    amounts: CallAmounts
    members: tuple[_Member, ...]
    collective: _Collective | None
    is_collective: bool
    waiting_tokens: int = 0
    libraries: tuple[str, ...] = ()

    @property
    def is_small(self) -> bool:
        """Whether it is no product, attention, state or collective: a norm, a split, a gate."""
        return self.heaviest == "rows" and self.collective is None

    @property
    def has_quantised_product(self) -> bool:
        """Whether it is a product of FP8 or NVFP4, experts apart."""
        return self.heaviest == "product" and self.variant != ""

    def work(self, load: Load) -> Work:
        """What the operator does for a load."""
        hits = 0.0
        for member in self.members:
            if member.experts:
                hits = member.experts.hits(member.rows(load), load.skew)
        batch = BatchSize(load.num_tokens, load.num_seqs, load.context_tokens, hits)
        return self.amounts.at(batch)


def costed_op(
    graph: OpGraph, op: Op, formats: Formats = AS_BUILT, context_split: int = 1
) -> CostedOp:
    """An operator with its costs; raises nothing, and depends on no load.

    Args:
        graph: where the operator is.
        op: the operator.
        formats: how keys and values are stored.
        context_split: ranks that share the keys and values of a head.
    """
    members = tuple(_member(graph, member, formats) for member in op.members)
    collective = None
    for member in op.members:
        if collective is None and member.kind in COLLECTIVES:
            collective = _collective(graph, member)
    return CostedOp(
        heaviest=_heaviest({member.kind for member in members}),
        variant=_variant(graph, op),
        amounts=op_amounts(graph, op, formats, context_split),
        members=members,
        collective=collective,
        is_collective=op.kind in COLLECTIVES,
        waiting_tokens=waiting_tokens(op.members),
        libraries=library_functions(graph, op, formats),
    )


def signature(graph: OpGraph, op: Op) -> tuple[object, ...]:
    """All that `costed_op` takes from a graph: operators with equal ones cost the same."""
    members = tuple(_member_signature(graph, member) for member in op.members)
    names = dict.fromkeys((*op.inputs, *op.outputs))
    return op.kind, members, _specs_of(graph, names)


def _member_signature(graph: OpGraph, op: Op) -> tuple[object, ...]:
    """Of rank constants it has the ranks that share something out, and not what they start with."""
    weights = tuple((spec.shape, spec.format) for spec in weight_specs(graph, op))
    states = _specs_of(graph, (name for name, _ in op.states))
    accesses = tuple(access for _, access in op.states)
    ways = tuple((name, shift.mod) for name, shift in op.rank_attrs.items())
    attrs = tuple(op.attrs.items())
    tensors = _specs_of(graph, op.inputs), _specs_of(graph, op.outputs)
    return op.kind, attrs, ways, tensors, weights, states, accesses


def _specs_of(graph: OpGraph, names: Iterable[str]) -> tuple[object, ...]:
    """Shapes and formats; as tuples, whose parts are mostly the same objects, they compare fast."""
    specs = [graph.tensors[name].spec for name in names]
    return tuple((spec.shape, spec.format) for spec in specs)


def waiting_tokens(parts: Iterable[Op | Part]) -> int:
    """Tokens of a sequence that wait for another one in a kernel of the delta rule.

    Those that are recomputed are at most as many as the queries.
    """
    turns = [part for part in parts if part.kind in ("recompute_state", "delta_rule")]
    return max(sum(query_len(part.attrs) for part in turns) - 1, 0)


def library_functions(graph: OpGraph, op: Op, formats: Formats = AS_BUILT) -> tuple[str, ...]:
    """The functions of libraries that compute an operator, by their keys.

    Args:
        graph: of the operator.
        op: fused.
        formats: how tensors are stored, where the graph is not built with their formats.
    """
    kinds = tuple(member.kind for member in op.members)
    found: list[str] = []
    if is_per_seq(graph, op):
        return ()
    for key, function in LIBRARY_FUNCTIONS.items():
        if kinds not in function.runs:
            continue
        tensors = (*op.inputs, *op.outputs, *(state for state, _ in op.states))
        specs = [*weight_specs(graph, op), *(graph.tensors[name].spec for name in tensors)]
        dtypes = {str(spec.format) for spec in specs}
        if formats.kv is not None and "attention" in kinds:
            dtypes.add(str(formats.kv))
        if function.computes(kinds, op.members[0].attrs, dtypes):
            found.append(key)
    return tuple(found)


def _variant(graph: OpGraph, op: Op) -> Variant:
    """Which of the prices of its class a kernel has."""
    products = [part for part in op.members if part.kind in ("linear", *EXPERTS)]
    if any(is_quantised(graph, part) for part in products):
        return "_quantised"
    return _stored({graph.weights[name].spec.format for part in products for name in part.weights})


def _stored(formats: Collection[Format]) -> Variant:
    """The variant of a product by the formats of its weights."""
    if FP8 in formats:
        return "_fp8"
    return "_fp4" if any(each.dtype == "fp4" for each in formats) else ""


def _member(graph: OpGraph, op: Op, formats: Formats) -> _Member:
    weights = weight_specs(graph, op)
    columns, experts = 0, None
    if op.kind in EXPERTS:
        experts = _Experts(
            num_rows(weights[0]), ranks_sharing_experts(op), experts_per_token(graph, op)
        )
    if op.kind in ("linear", *EXPERTS):
        columns = weights[0].bind(0, 0)[-2]
    return _Member(
        kind=op.kind,
        flops=flops_terms(graph, op),
        is_per_seq=is_per_seq(graph, op),
        matrix_dtype=_matrix_dtype(graph, op, weights, formats),
        columns=columns,
        experts=experts,
    )


def _collective(graph: OpGraph, op: Op) -> _Collective:
    result = graph.tensors[op.outputs[0]].spec
    return _Collective(op.kind, result, integer(op.attrs, "num_ranks"))


def _matrix_dtype(graph: OpGraph, op: Op, weights: list[TensorSpec], formats: Formats) -> str:
    if op.kind.startswith("delta"):
        return "tf32"  # the state stays fp32
    if not weights:
        return "bf16"
    if weights[0].format.block and not (formats.quantised_products or is_quantised(graph, op)):
        return "bf16"
    return weights[0].dtype


def is_quantised(graph: OpGraph, op: Op) -> bool:
    """Whether an operator multiplies quantised activations."""
    return graph.tensors[op.inputs[0]].spec.format == FP8_ROWS


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
    popularity, scale = _popularity(num_experts, per_token, skew)
    return sum(-math.expm1(-scale * weight * num_tokens) for weight in popularity)


@cache
def _popularity(num_experts: int, per_token: int, skew: float) -> tuple[tuple[float, ...], float]:
    """e^-s of each expert, and the c at which a token takes k of them, by bisection."""
    popularity = tuple((rank + 1.0) ** -skew for rank in range(num_experts))
    low, high = 0.0, 1.0
    while sum(-math.expm1(-high * weight) for weight in popularity) < per_token and high < 1e9:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        taken = sum(-math.expm1(-middle * weight) for weight in popularity)
        low, high = (middle, high) if taken < per_token else (low, middle)
    return popularity, high


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
ADDED = "attention_prefill"  # whose bytes and products take their times one after the other
# Keys beyond the mean of those that a query sees, which its tile of 128 queries multiplies too.
DIAGONAL_TOKENS = 64
# With up to so many rows a product waits for its weights on every machine that we know.
MEMORY_BOUND_ROWS = 64


def op_class(kinds: Collection[str], num_rows: int, num_seqs: int, variant: Variant = "") -> str:
    """The class of a kernel with such members; the machine's profile prices each class."""
    return _class_of(_heaviest(kinds), num_rows, num_seqs) + variant


def variant_of(kernel: KernelSpec) -> Variant:
    """Which of the prices of its class a kernel of a plan has."""
    formats = {param.tensor.format for param in kernel.params if param.role in ("input", "weight")}
    return "_quantised" if FP8_ROWS in formats else _stored(formats)


def _heaviest(kinds: Collection[str]) -> str:
    return next((name for kind, name in _CLASSES if kind in kinds), "rows")


def _class_of(heaviest: str, num_rows: int, num_seqs: int) -> str:
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
    """Predicted time of one kernel, library call or collective."""
    costed = costed_op(graph, op, load.formats, load.context_split)
    return time_of(costed, costed.work(load), load, hardware)


def time_of(op: CostedOp, work: Work, load: Load, hardware: HardwareSpec) -> OpTime:
    """`op_time` of an operator whose work is known: of its kernel, or of a library in its place.

    A plan chooses for each program (`planner/passes/library.py`), a prediction for each load.
    """
    own = kernel_time_of(op, work, load, hardware)
    names = [
        name
        for name in op.libraries
        if name in hardware.libraries and load.num_tokens >= LIBRARY_FUNCTIONS[name].least_tokens
    ]
    others = [library_time_of(op, work, load, hardware, name) for name in names]
    best = min(others, key=lambda each: each.total_us, default=own)
    is_asked = any(hardware.libraries[name].asked for name in names)
    if is_asked or best.total_us < (1.0 - LIBRARY_MARGIN) * own.total_us:
        return best
    return own


def library_time_of(
    op: CostedOp, work: Work, load: Load, hardware: HardwareSpec, name: str
) -> OpTime:
    """Predicted time of a library's function in the place of a kernel."""
    price = hardware.libraries[name]
    roof = roof_of(op, work, load, hardware)
    if price.memory_residual is not None:
        busy_us, bound = roof.added(price.memory_residual, price.residual)
    else:
        busy_us, bound = roof.busy(price.residual, price.residual)
    return OpTime(hardware.launch_us + price.wait_us, busy_us, bound)


@dataclass(frozen=True, slots=True)
class Roof:
    """Microseconds of the memory, and of the tensor cores, at their measured rates."""

    memory_us: float
    matrix_us: float

    def busy(self, memory: float, matrix: float) -> tuple[float, Literal["memory", "matrix"]]:
        """The longer of the two, each times its factor, and which one it is."""
        memory_us, matrix_us = self.memory_us * memory, self.matrix_us * matrix
        if memory_us >= matrix_us:
            return memory_us, "memory"
        return matrix_us, "matrix"

    def added(self, memory: float, matrix: float) -> tuple[float, Literal["memory", "matrix"]]:
        """Both, each times its factor, and which is the longer one.

        Attention of a prompt: a tile loads its queries and stores its results, with their gate,
        while no product of it runs.
        """
        longer = self.busy(memory, matrix)[1]
        return memory * self.memory_us + matrix * self.matrix_us, longer


def roof_of(op: CostedOp, work: Work, load: Load, hardware: HardwareSpec) -> Roof:
    """The roofline of an operator whose work is known."""
    memory_s = work.moved_bytes / hardware.read_bytes_per_s
    matrix_s = sum(_matrix_s(member, load, hardware) for member in op.members)
    return Roof(memory_s * 1e6, matrix_s * 1e6)


def kernel_time_of(op: CostedOp, work: Work, load: Load, hardware: HardwareSpec) -> OpTime:
    """Predicted time of the kernel or collective itself."""
    collective = op.collective
    if collective and op.is_collective:
        wait_us = _collective_us(collective, load, hardware)
        return OpTime(wait_us, 0.0, "collective", "collective")
    # A head works on the last row of each sequence: the fewest rows that a member works on count.
    rows = min(member.rows(load) for member in op.members)
    name = hardware.priced(_class_of(op.heaviest, rows, load.num_seqs), op.variant)
    roof = roof_of(op, work, load, hardware)
    factors = hardware.residuals[name], hardware.matrix_residual(name)
    if name == ADDED and name in hardware.matrix_residuals:
        busy_us, bound = roof.added(*factors)
    else:
        busy_us, bound = roof.busy(*factors)
    if collective is None:
        wait_us = hardware.launch_us + hardware.waits_us[name]
        wait_us += op.waiting_tokens * hardware.delta_token_us
        return OpTime(wait_us, busy_us, bound)
    size_bytes = collective.result.size_bytes(load.num_tokens, load.num_seqs)
    pushed_us = push_us(hardware, size_bytes, collective.num_ranks)
    # It works on some rows while others are on their way.
    return OpTime(max(pushed_us, hardware.launch_us, busy_us), 0.0, "collective", "collective")


def _collective_us(op: _Collective, load: Load, hardware: HardwareSpec) -> float:
    moved = op.result.size_bytes(load.num_tokens, load.num_seqs)
    if op.kind == "all_gather":
        return max(gather_us(hardware, moved, op.num_ranks), hardware.launch_us)
    return max(library_us(hardware, moved, op.num_ranks), hardware.launch_us)


def _matrix_s(member: _Member, load: Load, hardware: HardwareSpec) -> float:
    """Seconds of the tensor cores, at the share that a product of this shape fills."""
    if member.flops is NO_AMOUNTS:
        return 0.0
    context = load.context_tokens
    if member.kind == "attention" and _class_of_member(member, load) == ADDED:
        context += DIAGONAL_TOKENS * (not hardware.whole_tiles)
    flops = member.flops.at(BatchSize(load.num_tokens, load.num_seqs, context))
    if not flops:
        return 0.0
    rates = hardware.matrix_flops_per_s
    rate = rates.get(member.matrix_dtype, rates["bf16"])
    return flops / (rate * hardware.matrix_share * _filled(member, load, hardware))


def _class_of_member(member: _Member, load: Load) -> str:
    return _class_of(member.kind, member.rows(load), load.num_seqs)


def _filled(member: _Member, load: Load, hardware: HardwareSpec) -> float:
    """The share of the tensor cores in use: results are padded to tiles, tiles to a wave."""
    num_sms = hardware.num_sms
    if not num_sms or not member.columns:
        return 1.0
    rows = member.rows(load)
    if member.experts:
        large = 64 if member.matrix_dtype == "fp8" or hardware.whole_tiles else 128
        return _filled_by_experts(member, member.experts, rows, load.skew, num_sms, large)
    if hardware.whole_tiles:
        return _filled_by_whole(rows, member.columns, num_sms)
    m, n, splits = _tile(member, rows, num_sms)
    tiles = math.ceil(rows / m) * math.ceil(member.columns / n)
    return rows * member.columns / (m * n * tiles) * _of_waves(tiles * splits, num_sms)


def _of_waves(tiles: int, num_sms: int) -> float:
    """The share of multiprocessors that are busy until the last of so many tiles."""
    return tiles / (math.ceil(tiles / num_sms) * num_sms)


def _tile(member: _Member, rows: int, num_sms: int) -> tuple[int, int, int]:
    """Rows and columns of the tile of a product, and the programs that share its depth.

    It is narrower where few would leave multiprocessors without work, as the rules have it.
    """
    if member.matrix_dtype == "fp8":
        if shares_depth(rows, member.columns, num_sms):
            return 64, 64, 4
        return 64, 128, 1
    if is_narrow(rows, member.columns):
        return NARROW_TILE
    return *filling_tile(rows, member.columns, num_sms), 1


def _tile_rows(rows: float, large: int) -> int:
    return 16 if rows <= 16 else 64 if rows <= 64 else large


def _filled_by_whole(rows: int, columns: int, num_sms: int) -> float:
    """With tiles of 128 columns, however few there are."""
    m = _tile_rows(rows, 128)
    padded = math.ceil(rows / m) * m
    return rows / padded * _of_waves(math.ceil(padded / m * columns / 128), num_sms)


def _filled_by_experts(
    member: _Member, experts: _Experts, num_tokens: int, skew: float, num_sms: int, large: int
) -> float:
    """The share of the tensor cores in use by the rows of experts, each of which ends in a tile.

    Tiles have `large` rows where experts have more than 64.
    """
    groups = max(experts.hits(num_tokens, skew), 1.0)
    rows = num_tokens * experts.per_token / experts.ways / groups
    tile = _tile_rows(rows, large)
    padded = tile * mean_tiles(float(f"{rows:.3g}"), tile)
    tiles = math.ceil(groups * padded / tile * member.columns / 128)
    return rows / padded * _of_waves(tiles, num_sms)


@cache
def mean_tiles(rows: float, tile: int) -> float:
    """Tiles of an expert that is hit, where experts get so many rows on average.

    1 + sum_k P(X > k tile), k from 1 on, with X normal as the Poisson law of rows nearly is: half a
    tile more than the rows fill, where there are many.
    """
    law = NormalDist(rows, math.sqrt(rows))
    most = math.ceil((rows + 4.0 * math.sqrt(rows)) / tile)
    return 1.0 + math.fsum(1.0 - law.cdf(count * tile + 0.5) for count in range(1, most + 1))
