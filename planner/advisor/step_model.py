"""What a step costs under a layout: the plan's own graphs and cost model, on a few layers.

All layers of a kind cost the same. The priced graph therefore has the first layer and one of each
kind, and each operator's time is counted once for each layer of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenspeed_plan.codegen.tiling import GEMV_ROWS, NORMED_ROWS
from tokenspeed_plan.planner.advisor.engine_profile import Engine
from tokenspeed_plan.planner.advisor.numbers import ceil_div
from tokenspeed_plan.planner.advisor.op_prices import NumberedOp, OpPrice, OpPrices
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.graph import Op, OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, all_reduce_us
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import LayerType, ModelConfig
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.models.quantization import (
    QUANTISED,
    WITH_FP8,
    published_encoding,
    stored_word,
)
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.expand import FEW_ROWS, SORTED_AT_ONCE
from tokenspeed_plan.planner.passes.limits import CapacityOptions, plan_capacity
from tokenspeed_plan.planner.passes.op_terms import EXPERTS, Formats
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.planner.passes.quantised_products import QUANTISED_ROWS
from tokenspeed_plan.planner.passes.reduction import largest_reduction
from tokenspeed_plan.planner.spec import WorkloadSpec
from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.types import DType, Format, Phase, RollbackWord

UNCHECKED = PassOptions(checks=False)
KERNEL_TIME_KINDS = ("memory", "matrix", "launch", "collective")


def activation_dtype(weights: str, hardware: HardwareSpec) -> DType:
    """The dtype of activations beside weights of a format; a CPU computes quantised ones in fp32.

    Args:
        weights: a key of `FORMATS`.
        hardware: the target.
    """
    if weights == "fp32" or (weights in QUANTISED and hardware.sm == 0):
        return "fp32"
    return "bf16"


def stored_formats(kv_dtype: str = "bf16") -> Formats:
    """How keys and values are stored; weights are in a graph as they are.

    Args:
        kv_dtype: `fp8`, or `bf16` for keys and values in the dtype of the graph.
    """
    kv = None
    if kv_dtype == "fp8":
        kv = Format(dtype="fp8")
    return Formats(kv=kv)


def _graph_size(count: int) -> int:
    """A number of tokens or sequences with the same graph as this number."""
    for largest in (GEMV_ROWS, FEW_ROWS, NORMED_ROWS):
        if count <= largest:
            return largest
    if count <= SORTED_AT_ONCE:
        return NORMED_ROWS + 1  # few enough for kernels that push, which are priced as such
    return SORTED_AT_ONCE + 1


def _near(count: int) -> int:
    """The next power of two, or three quarters of it: activations are quantised by price of a size.

    Programs have such sizes.
    """
    power = 1 << (count - 1).bit_length()
    quarters = 3 * power // 4
    return quarters if count <= quarters else power


# Layout, phase, tokens, sequences, depth: the first with the same graph; whether kernels push.
GraphKey = tuple[ParallelLayout, Phase, int, int, int, bool]


@dataclass(frozen=True, slots=True)
class _PricedOp:
    """An operator with its costs, how many layers it stands for, and whose tokens it works on.

    Where attention is data-parallel, the experts, the embedding and the head see the tokens of all
    groups (`spans_groups`). `is_shared_expert`: its product is the shared expert's, by itself.
    """

    op: NumberedOp
    count: int
    spans_groups: bool
    is_shared_expert: bool


@dataclass
class StepModel:
    """The time of steps of one model on one kind of machine; graphs and prices are kept.

    Attributes:
        weights: format of the weights, a key of `FORMATS`.
        skew: exponent of the Zipf law of experts.
        engine: another engine to model in place of our runtime.
        rollback: how rejected drafts are taken back.
        draft_vocab: tokens that drafts are chosen from; None for all.
        grammar: whether grammars may mask tokens.
        penalties: whether penalties and biases may change logits.
        head: format of the LM head, `auto` or `fp8`.
        stored_state: how recurrent state is stored; None for as it is computed.
        whole, sharded, graphs, priced_ops, prices, arenas: what was computed so far.
    """

    config: ModelConfig
    hardware: HardwareSpec
    weights: str = "bf16"
    skew: float = 0.0
    engine: Engine | None = None
    rollback: RollbackWord = "snapshot"
    draft_vocab: int | None = None
    grammar: bool = False
    penalties: bool = False
    head: str = "auto"
    stored_state: DType | None = None
    whole: dict[tuple[Phase, int], OpGraph] = field(default_factory=dict)
    sharded: dict[tuple[ParallelLayout, Phase, int], OpGraph] = field(default_factory=dict)
    graphs: dict[GraphKey, OpGraph] = field(default_factory=dict)
    priced_ops: dict[tuple[GraphKey, Formats, int], tuple[_PricedOp, ...]] = field(
        default_factory=dict
    )
    prices: dict[tuple[ParallelLayout, Phase, int, Load], StepTime] = field(default_factory=dict)
    arenas: dict[tuple[ParallelLayout, Phase, int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = stored_word(self.weights, self.config.quantization)
        if self.engine is not None:
            self.hardware = self.engine.machine(self.hardware)
            if self.engine.state_dtype != "fp32":
                self.stored_state = self.engine.state_dtype

    @cached_property
    def op_prices(self) -> OpPrices:
        """The prices of operators so far."""
        return OpPrices(self.hardware)

    @property
    def dtype(self) -> DType:
        """The dtype in which graphs are built, quantised weights apart."""
        return activation_dtype(self.weights, self.hardware)

    def decode(
        self,
        layout: ParallelLayout,
        seqs: int,
        context: int,
        depth: int = 0,
        kv_dtype: str = "bf16",
    ) -> StepTime:
        """The time of one decode step.

        Args:
            layout: of the pool.
            seqs: sequences in the whole pool.
            context: tokens of context of each sequence.
            depth: drafts of each sequence that the step verifies; it makes as many new ones.
            kv_dtype: how keys and values are stored.
        """
        local_seqs = ceil_div(seqs, layout.attention_dp)
        tokens = local_seqs * (depth + 1)
        load = self._load(tokens, local_seqs, context, layout, kv_dtype)
        step = self.priced(layout, "decode", load, depth)
        step += _exchange(self.config, self.hardware, layout, load)
        return self._as_engine(step, depth, 0)

    def prefill(
        self,
        layout: ParallelLayout,
        tokens: int,
        context: int,
        kv_dtype: str = "bf16",
        depth: int = 0,
        seqs: int = 1,
    ) -> StepTime:
        """The time of one chunk of a prompt, or of as many new tokens of several prompts.

        Each group of data-parallel attention has prompts of its own; one prompt keeps one group
        busy.

        Args:
            layout: of the pool.
            tokens: tokens of the chunk.
            context: tokens of the prompt that were computed before.
            kv_dtype: how keys and values are stored.
            depth: drafts that are made of what follows the prompt.
            seqs: prompts that share the chunk, all alike.
        """
        middle = context + (tokens // seqs + 1) // 2
        load = self._load(tokens, seqs, middle, layout, kv_dtype)
        step = self.priced(layout, "prefill", load, depth)
        step += _exchange(self.config, self.hardware, layout, load)
        late_us = max(step.launches * self.hardware.host_launch_us - step.total_us, 0.0)
        step += StepTime(host=self.hardware.host_us + late_us)
        return self._as_engine(step, 0, tokens)

    def priced(self, layout: ParallelLayout, phase: Phase, load: Load, depth: int = 0) -> StepTime:
        """The time of the graph's kernels and collectives for a load on one data-parallel group."""
        key = (layout, phase, depth, load)
        if key not in self.prices:
            self.prices[key] = self._price(layout, phase, load, depth)
        return self.prices[key]

    def count_of(self, layer: int | None) -> int:
        """How many layers of the model a layer of the short graph stands for.

        Args:
            layer: its number in the short graph; None outside of the layers.
        """
        counts = self._layer_counts
        if layer is None or layer >= len(counts):  # the MTP layer comes after the last
            return 1
        return counts[layer]

    def _load(
        self, tokens: int, seqs: int, context: int, layout: ParallelLayout, kv_dtype: str
    ) -> Load:
        formats = stored_formats(kv_dtype)
        if self.engine is not None:
            formats = replace(formats, quantised_products=True)
        return Load(tokens, seqs, context, self.skew, layout.context_split, formats)

    def _price(self, layout: ParallelLayout, phase: Phase, load: Load, depth: int) -> StepTime:
        all_groups = _of_all_groups(load, layout)
        key = self._graph_key(layout, phase, all_groups.num_tokens, all_groups.num_seqs, depth)
        if phase == "prefill":  # a lone prompt is in one group only
            all_groups = load
        hidden = phase == "decode" and self.engine is not None and self.engine.hides_shared_expert
        alone = load, self.op_prices.of_load(load)
        together = all_groups, self.op_prices.of_load(all_groups)
        times = []
        for each in self._priced_ops(key, load):
            if hidden and each.is_shared_expert:
                continue
            own_load, known = together if each.spans_groups else alone
            times.append((each, self.op_prices.price(each.op, own_load, known)))
        return _sum(times)

    def _priced_ops(self, graph_key: GraphKey, load: Load) -> tuple[_PricedOp, ...]:
        """The operators of a graph with what their prices need, for loads of one format."""
        key = (graph_key, load.formats, load.context_split)
        if key not in self.priced_ops:
            graph = self._graph(graph_key)
            self.priced_ops[key] = tuple(
                _PricedOp(
                    self.op_prices.numbered(graph, op, load),
                    self.count_of(op.layer),
                    _spans_groups(op),
                    self.config.moe is not None and _is_shared_expert(op),
                )
                for op in graph.ops
            )
        return self.priced_ops[key]

    def _as_engine(self, step: StepTime, drafts: int, tokens: int) -> StepTime:
        if self.engine is None:
            return step
        return self.engine.run(step, self.hardware, self.config, drafts, tokens)

    def _short_layers(self) -> tuple[LayerType, ...]:
        """The first layer, then one of each kind of the others, that of the first leading."""
        first, *others = self.config.layer_types
        kinds = sorted(set(others))
        if first in kinds:
            kinds.remove(first)
            kinds.insert(0, first)
        return (first, *kinds)

    @cached_property
    def _layer_counts(self) -> list[int]:
        _, *others = self.config.layer_types
        _, *kinds = self._short_layers()
        return [1, *map(others.count, kinds)]

    def graph(
        self, layout: ParallelLayout, phase: Phase, tokens: int, seqs: int = 1, depth: int = 0
    ) -> OpGraph:
        """The fused graph of the short model; sizes with the same kernels share one graph."""
        return self._graph(self._graph_key(layout, phase, tokens, seqs, depth))

    def _graph(self, key: GraphKey) -> OpGraph:
        if key not in self.graphs:
            layout, phase, max_tokens, max_seqs, depth, pushes = key
            options = replace(UNCHECKED, pushes=pushes)
            context = PassContext(layout, self.hardware, max_tokens, max_seqs, options=options)
            sharded = self.sharded_graph(layout, phase, depth)
            self.graphs[key] = run(sharded, context, until=Stage.RECOMPUTED)
        return self.graphs[key]

    def _graph_key(
        self, layout: ParallelLayout, phase: Phase, tokens: int, seqs: int, depth: int
    ) -> GraphKey:
        pushes = False
        if layout.num_ranks > 1:
            sharded = self.sharded_graph(layout, phase, depth)
            found = largest_reduction(sharded, self.hardware, tokens, seqs)
            pushes = found is not None and found.pushes
        size = _graph_size(tokens)
        if self.weights in WITH_FP8 and tokens >= QUANTISED_ROWS:
            size = _near(tokens)
        return _of_graph(layout), phase, size, _graph_size(seqs), depth, pushes

    def sharded_graph(self, layout: ParallelLayout, phase: Phase, depth: int) -> OpGraph:
        """The graph of a rank of the short model, before it is fused."""
        key = (_of_graph(layout), phase, depth)
        if key not in self.sharded:
            whole = self._whole(phase, depth)
            context = PassContext(layout, self.hardware, options=UNCHECKED)
            self.sharded[key] = run(whole, context, until=Stage.SHARDED)
        return self.sharded[key]

    def _whole(self, phase: Phase, depth: int) -> OpGraph:
        key = (phase, depth)
        if key not in self.whole:
            self.whole[key] = build(self._context(depth), phase, depth)
        return self.whole[key]

    def _context(self, depth: int) -> BuildContext:
        short = replace(self.config, layer_types=self._short_layers())
        workload = WorkloadSpec(first_turn_tokens=1, output_tokens=1, concurrency=1)
        options = CapacityOptions(depth=depth, rollback=self.rollback)
        capacity = plan_capacity(workload, self.config, self.hardware, options)
        return BuildContext(
            short,
            self.dtype,
            capacity,
            self.config.vocab_size,
            _has_fused_experts,
            self.draft_vocab,
            self._encoding,
            grammar=self.grammar,
            penalties=self.penalties,
            fp8_head=self.head == "fp8",
            stored_state=self.stored_state,
        )

    def _encoding(self, name: str) -> Encoding | None:
        """How a matrix is encoded, as far as its name and the config say."""
        return published_encoding(self.weights, self.config, name)


def _sum(times: Iterable[tuple[_PricedOp, OpPrice]]) -> StepTime:
    """The time of all layers, from the prices of operators, in microseconds."""
    us = dict.fromkeys(KERNEL_TIME_KINDS, 0.0)
    counts: dict[str, float] = dict.fromkeys(
        ("launches", "collectives", "floor_us", "small", "small_us", "quantised"), 0.0
    )
    for priced, price in times:
        count, op, time = priced.count, priced.op.op, price.time
        us[time.bound] += count * time.busy_us
        us[time.waits_for] += count * time.latency_us
        counts["launches"] += count
        counts["collectives"] += count * (time.waits_for == "collective")
        counts["floor_us"] += count * price.floor_us
        counts["small"] += count * op.is_small
        counts["small_us"] += count * op.is_small * time.latency_us
        counts["quantised"] += count * op.has_quantised_product
    return StepTime(**us, **counts)


def host_us(steps: StepModel, seqs: int, prompts: float = 0.0) -> float:
    """The host's work before a step; that of another engine is in its steps.

    Args:
        steps: of the engine.
        seqs: of the step.
        prompts: that it begins.
    """
    if steps.engine is not None:
        return 0.0
    hardware = steps.hardware
    each_us = hardware.host_seq_us * seqs + hardware.host_prompt_us * prompts
    prefill_us = hardware.host_prefill_us * min(prompts, 1.0)
    return hardware.host_step_us + prefill_us + each_us


def _exchange(
    config: ModelConfig, hardware: HardwareSpec, layout: ParallelLayout, load: Load
) -> StepTime:
    """Collectives that the graph does not have, since no plan can hold such layouts yet.

    Ranks that split a context exchange queries and partial results in each full-attention
    layer; data-parallel groups exchange their tokens in each layer.
    """
    attention = config.attention
    tokens_bytes = 2.0 * load.num_tokens
    splits = layout.context_split
    us = launches = 0.0
    if splits > 1:
        count = 2 * config.layer_types.count("full_attention")
        width = attention.num_qo_heads * attention.head_dim
        moved = tokens_bytes * width / layout.attention_tp * splits
        us += count * all_reduce_us(hardware, moved, splits)
        launches += count
    if layout.attention_dp > 1:
        count = config.num_layers
        moved = tokens_bytes * config.hidden_size * layout.attention_dp / 2
        us += count * all_reduce_us(hardware, moved, layout.num_ranks)
        launches += count
    return StepTime(
        collective=us,
        launches=launches,
        collectives=launches,
    )


def _has_fused_experts(prefix: str) -> bool:
    """Prices do not depend on how a checkpoint stores the experts."""
    return True


def _of_graph(layout: ParallelLayout) -> ParallelLayout:
    """The layout as far as graphs depend on it: ranks that split a context have the same one."""
    return replace(layout, context_split=1)


def _of_all_groups(load: Load, layout: ParallelLayout) -> Load:
    """The load of all data-parallel groups together."""
    groups = layout.attention_dp
    return replace(
        load,
        num_tokens=load.num_tokens * groups,
        num_seqs=load.num_seqs * groups,
    )


def _is_shared_expert(op: Op) -> bool:
    """Whether an operator of a block of experts is a product without routed ones."""
    is_routed = any(member.kind in EXPERTS for member in op.members)
    products = (member.role for member in op.members if member.kind == "linear")
    return "ffn" in products and not is_routed


def _spans_groups(op: Op) -> bool:
    """Whether an operator works on the tokens of all data-parallel groups."""
    if op.layer is None:
        return True
    return any(member.role in ("ffn", "router") for member in op.members)
