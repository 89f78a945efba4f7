"""How long one replay takes under a layout, and of what kinds of time: the plan's own graphs and prices, a few layers.

Layers of a kind cost the same, so a graph with the first layer and one of each kind is priced, and
each price counted as often as the model has such layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import add, attrgetter

from tokenspeed_plan.codegen.tiling import GEMV_ROWS
from tokenspeed_plan.planner.advisor.hardware import TIME_KINDS, HardwareSpec, all_reduce_us
from tokenspeed_plan.planner.graph import Op, OpGraph
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.models.config import LayerType, ModelConfig
from tokenspeed_plan.planner.models.qwen3_5 import BuildContext, build
from tokenspeed_plan.planner.passes.cost import Formats, Load, WeightFormat, op_cost, time_of
from tokenspeed_plan.planner.passes.expand import FEW_ROWS, expand
from tokenspeed_plan.planner.passes.fuse import fuse
from tokenspeed_plan.planner.passes.limits import plan_limits
from tokenspeed_plan.planner.passes.recompute_topk import recompute_topk
from tokenspeed_plan.planner.passes.shard import shard
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.types import DType, Phase

_FFN = re.compile(r"\.(router|topk|experts|shared|moe|mlp)")
_LAYER = re.compile(r"L(\d+)\.")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Microseconds of one replay by kind, and what they are made of.

    `floor_us`: the weights and state that it needs, once, at the memory's peak rate.
    """

    memory: float = 0.0
    matrix: float = 0.0
    launch: float = 0.0
    collective: float = 0.0
    host: float = 0.0
    launches: float = 0.0
    collectives: float = 0.0
    floor_us: float = 0.0

    @property
    def total_us(self) -> float:
        """All kinds."""
        return self.memory + self.matrix + self.launch + self.collective + self.host

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*map(add, _VALUES(self), _VALUES(other)))

    def __mul__(self, count: float) -> StepTime:
        return StepTime(*(count * value for value in _VALUES(self)))

    def error_us(self, errors: Mapping[str, float]) -> float:
        """The half-width of the interval: kinds of time err independently, times of a kind together."""
        return math.hypot(*(errors[kind] * getattr(self, kind) for kind in TIME_KINDS))

    @property
    def bound(self) -> str:
        """The kind that takes most."""
        return max(TIME_KINDS, key=lambda kind: getattr(self, kind))


_VALUES = attrgetter(*(each.name for each in fields(StepTime)))


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine replays a step, where it is not ours: launches and collectives of a layer, host work of a step."""

    name: str
    kernels_per_layer: float
    collectives_per_layer: float
    host_us: float


def _alike(rows: int) -> int:
    """The most rows whose graph is the same."""
    return next((most for most in (GEMV_ROWS, FEW_ROWS) if rows <= most), FEW_ROWS + 1)


def formats_of(weights: WeightFormat, kv_dtype: str = "bf16") -> Formats:
    """How a published checkpoint of this kind stores its tensors: NVFP4 ones quantise only the routed experts."""
    kv_bytes = 1.0 if kv_dtype == "fp8" else None
    if weights == "fp8":
        return Formats("fp8", "fp8", kv_bytes)
    return Formats("nvfp4", None, kv_bytes) if weights == "nvfp4" else Formats(kv_bytes=kv_bytes)


@dataclass
class StepModel:
    """Prices of replays of one model on one kind of machine; graphs and prices are kept."""

    config: ModelConfig
    hardware: HardwareSpec
    weights: WeightFormat = "bf16"
    skew: float = 0.0
    engine: Engine | None = None
    # where it drafts, inputs are kept and computed again, not a row of state for each
    recomputes: bool = False
    draft_vocab: int | None = None
    whole: dict[tuple[Phase, int], OpGraph] = field(default_factory=dict)
    sharded: dict[tuple[ParallelLayout, Phase, int], OpGraph] = field(default_factory=dict)
    graphs: dict[tuple[ParallelLayout, Phase, int, int, int], OpGraph] = field(default_factory=dict)
    prices: dict[tuple[ParallelLayout, Phase, int, Load], StepTime] = field(default_factory=dict)
    arenas: dict[tuple[ParallelLayout, Phase, int, int, int], int] = field(default_factory=dict)

    @property
    def dtype(self) -> DType:
        """What graphs are built with."""
        return "fp32" if self.weights == "fp32" else "bf16"

    def decode(
        self, layout: ParallelLayout, seqs: int, context: int, depth: int = 0, kv: str = "bf16"
    ) -> StepTime:
        """One step of `seqs` sequences in the pool: it verifies `depth` drafts of each and makes as many."""
        own = -(-seqs // layout.attention_dp)
        load = self._load(own * (depth + 1), own, context, layout, kv)
        step = self._priced(layout, "decode", load, depth)
        return self._as_engine(step + self._split_collectives(layout, load), load, depth)

    def prefill(
        self, layout: ParallelLayout, tokens: int, context: int, kv: str = "bf16", depth: int = 0
    ) -> StepTime:
        """One chunk of a prompt of which `context` tokens are there already, and `depth` drafts of what follows.

        Groups of data-parallel attention have prompts of their own; one prompt keeps one group
        busy.
        """
        load = self._load(tokens, 1, context + (tokens + 1) // 2, layout, kv)
        step = self._priced(layout, "prefill", load, depth) + self._split_collectives(layout, load)
        return self._as_engine(step + StepTime(host=self.hardware.host_us), load, 0)

    def _load(self, tokens: int, seqs: int, context: int, layout: ParallelLayout, kv: str) -> Load:
        formats = formats_of(self.weights, kv)
        return Load(tokens, seqs, context, self.skew, layout.context_split, formats)

    def _priced(self, layout: ParallelLayout, phase: Phase, load: Load, depth: int = 0) -> StepTime:
        key = (layout, phase, depth, load)
        if key not in self.prices:
            ways = layout.attention_dp
            graph = self.graph(layout, phase, load.num_tokens * ways, load.num_seqs * ways, depth)
            total = StepTime()
            for op, count in self._counted(graph):
                total += self._op(graph, op, self._load_of(op, load, layout, phase)) * count
            self.prices[key] = total
        return self.prices[key]

    def _load_of(self, op: Op, load: Load, layout: ParallelLayout, phase: Phase) -> Load:
        """The expert block, the table and the head see the tokens of all groups; a lone prompt is that of one group."""
        if layout.attention_dp == 1 or phase == "prefill":
            return load
        shared = not _LAYER.match(op.name) or any(_FFN.search(member.name) for member in op.members)
        ways = layout.attention_dp if shared else 1
        return replace(load, num_tokens=load.num_tokens * ways, num_seqs=load.num_seqs * ways)

    def _op(self, graph: OpGraph, op: Op, load: Load) -> StepTime:
        cost = op_cost(graph, op, load)
        time = time_of(graph, op, cost, load, self.hardware)
        floor_us = (cost.weight_bytes + cost.state_bytes) / self.hardware.peak_bytes_per_s * 1e6
        parts = {
            kind: time.busy_us * (kind == time.bound) + time.latency_us * (kind == time.waits_for)
            for kind in ("memory", "matrix", "launch", "collective")
        }
        meets = float(time.waits_for == "collective")
        return StepTime(**parts, launches=1.0, collectives=meets, floor_us=floor_us)

    def _split_collectives(self, layout: ParallelLayout, load: Load) -> StepTime:
        """Queries and partial results between the ranks that split a context; tokens between data-parallel groups."""
        full = self.config.layer_types.count("full_attention")
        row_bytes = 2.0 * load.num_tokens * self.config.hidden_size
        merges, gathers = (
            2 * full * (layout.context_split > 1),
            self.config.num_layers * (layout.attention_dp > 1),
        )
        heads = self.config.attention.num_qo_heads * self.config.attention.head_dim
        rows = 2.0 * load.num_tokens * heads / layout.attention_tp * layout.context_split
        us = merges * all_reduce_us(self.hardware, rows, layout.context_split)
        us += gathers * all_reduce_us(
            self.hardware, row_bytes * layout.attention_dp / 2, layout.num_ranks
        )
        return StepTime(collective=us, launches=merges + gathers, collectives=merges + gathers)

    def _as_engine(self, step: StepTime, load: Load, depth: int) -> StepTime:
        """The same work, launched and summed up as another engine does it."""
        if self.engine is None:
            return step
        layers = self.config.num_layers + depth
        launches, sums = (
            layers * self.engine.kernels_per_layer,
            layers * self.engine.collectives_per_layer,
        )
        sum_us = step.collective / step.collectives if step.collectives else 0.0
        sums = sums if step.collectives else 0.0
        waits = (launches - sums) * (self.hardware.launch_us + self.hardware.waits_us["stream"])
        return replace(
            step,
            launch=waits,
            collective=sums * sum_us,
            host=self.engine.host_us,
            launches=launches,
            collectives=sums,
        )

    def _counted(self, graph: OpGraph) -> Iterator[tuple[Op, int]]:
        """Operators, and how often the model has each."""
        return ((op, self.count_of(op.name)) for op in graph.ops)

    def count_of(self, name: str) -> int:
        """How many layers of the model an operator, a weight or a state of the short one stands for."""
        layer, counts = _LAYER.match(name), self._layer_counts
        index = int(layer[1]) if layer else len(counts)
        return counts[index] if index < len(counts) else 1

    def _kinds(self) -> tuple[LayerType, ...]:
        """The first layer, then one of each kind."""
        types = self.config.layer_types
        rest = sorted(set(types[1:]), key=lambda kind: (kind != types[0], kind))
        return (types[0], *rest)

    @cached_property
    def _layer_counts(self) -> list[int]:
        return [1, *(self.config.layer_types[1:].count(kind) for kind in self._kinds()[1:])]

    def graph(
        self, layout: ParallelLayout, phase: Phase, tokens: int, seqs: int = 1, depth: int = 0
    ) -> OpGraph:
        """The fused graph of a short model, for one or two rows, for few or for many; so with the sequences."""
        sizes = (_alike(tokens), _alike(seqs))
        if (key := (layout, phase, depth, *sizes)) not in self.graphs:
            fused = fuse(expand(self._of_rank(layout, phase, depth), *sizes), *sizes)
            self.graphs[key] = recompute_topk(fused, *sizes)
        return self.graphs[key]

    def _of_rank(self, layout: ParallelLayout, phase: Phase, depth: int) -> OpGraph:
        if (phase, depth) not in self.whole:
            self.whole[phase, depth] = build(self._context(depth), phase, depth)
        if (key := (layout, phase, depth)) not in self.sharded:
            self.sharded[key] = shard(self.whole[phase, depth], layout)
        return self.sharded[key]

    def _context(self, depth: int) -> BuildContext:
        short = replace(self.config, layer_types=self._kinds())
        workload = WorkloadSpec(first_turn_tokens=1, output_tokens=1)
        limits = plan_limits(
            workload, self.config, self.hardware, depth=depth, recomputes=self.recomputes
        )
        return BuildContext(
            short, self.dtype, limits, self.config.vocab_size, lambda prefix: True, self.draft_vocab
        )
