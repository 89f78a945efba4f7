"""The pipeline: all passes in order, as one value, and the one function that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenspeed_plan.planner.graph import OpGraph, Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.expand import expand
from tokenspeed_plan.planner.passes.fuse import FUSIONS, Fusion, fuse, with_sums_in_norms
from tokenspeed_plan.planner.passes.grammar import check
from tokenspeed_plan.planner.passes.library import Loads
from tokenspeed_plan.planner.passes.lower import lower
from tokenspeed_plan.planner.passes.place import place
from tokenspeed_plan.planner.passes.quantised_products import quantise_products
from tokenspeed_plan.planner.passes.recompute_topk import recompute_topk
from tokenspeed_plan.planner.passes.reduction import largest_reduction
from tokenspeed_plan.planner.passes.schedule import schedule
from tokenspeed_plan.planner.passes.shard import shard
from tokenspeed_plan.planner.passes.simulate import MAX_STREAMS, schedule_best
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What a caller may ask of the passes.

    Attributes:
        fusions: the rewrites to use.
        num_streams: schedule on at most so many streams, without simulating which number is best.
        pushes: whether kernels add up ranks; None decides it by price.
        checks: check the grammar after each pass. The advisor leaves this out: it runs the passes
            hundreds of times, and the graphs of the plan itself are checked.
        quantises: multiply FP8 by FP8 in all products of weights in FP8, or in none; by price where
            None.
    """

    fusions: tuple[Fusion, ...] = FUSIONS
    num_streams: int | None = None
    pushes: bool | None = None
    checks: bool = True
    quantises: bool | None = None


DEFAULT_OPTIONS = PassOptions()
FP8_PRODUCTS = "cublas.linear_fp8"
FEWEST_TOKENS = LIBRARY_FUNCTIONS[FP8_PRODUCTS].least_tokens
ONE_TOKEN = Load(1, 1, 0)


@dataclass(frozen=True, slots=True)
class PassContext:
    """What the passes know of a program besides its graph.

    Attributes:
        layout: how the model is cut over the ranks.
        hardware: the target.
        num_tokens, num_seqs: the most tokens and sequences that the program takes.
        load: the batch that the program is priced for.
        context_tokens: that sequences of the workload have on average, before a prompt's chunk.
        max_streams: the most streams that the runtime replays.
        options: what the caller asked for.
    """

    layout: ParallelLayout
    hardware: HardwareSpec
    num_tokens: int = 1
    num_seqs: int = 1
    load: Load = ONE_TOKEN
    context_tokens: int = 0
    max_streams: int = MAX_STREAMS
    options: PassOptions = DEFAULT_OPTIONS

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens and sequences."""
        return self.num_tokens, self.num_seqs


@dataclass(frozen=True, slots=True)
class Pass:
    """A pure function of a graph and its context, and the stage that it takes the graph to."""

    reaches: Stage
    apply: Callable[[OpGraph, PassContext], OpGraph]


def _shard(graph: OpGraph, context: PassContext) -> OpGraph:
    return shard(graph, context.layout)


def _expand(graph: OpGraph, context: PassContext) -> OpGraph:
    expanded = expand(graph, *context.sizes)
    load = Load(*context.sizes, 0)
    return quantise_products(expanded, context.hardware, load, context.options.quantises)


def _fuse(graph: OpGraph, context: PassContext) -> OpGraph:
    pushes = context.options.pushes
    if pushes is None:
        reduction = largest_reduction(graph, context.hardware, *context.sizes)
        pushes = reduction is not None and reduction.pushes
    fusions = context.options.fusions
    if FP8_PRODUCTS in context.hardware.libraries and context.num_tokens >= FEWEST_TOKENS:
        fusions = with_sums_in_norms(fusions)
    return fuse(graph, *context.sizes, fusions, pushes)


def _recompute_topk(graph: OpGraph, context: PassContext) -> OpGraph:
    return recompute_topk(graph, context.num_tokens, context.num_seqs)


def _schedule(graph: OpGraph, context: PassContext) -> OpGraph:
    num_streams = context.options.num_streams
    if num_streams is not None:
        return schedule(graph, num_streams)
    return schedule_best(
        graph,
        context.load,
        context.hardware,
        context.max_streams,
    )


def _place(graph: OpGraph, context: PassContext) -> OpGraph:
    return place(graph, context.num_tokens, context.num_seqs)


def _lower(graph: OpGraph, context: PassContext) -> OpGraph:
    sizes = (context.num_tokens, context.num_seqs)
    loads = Loads(context.load, context.context_tokens)
    return lower(graph, context.hardware, loads, sizes)


PASSES: tuple[Pass, ...] = (
    Pass(Stage.SHARDED, _shard),
    Pass(Stage.EXPANDED, _expand),
    Pass(Stage.FUSED, _fuse),
    Pass(Stage.RECOMPUTED, _recompute_topk),
    Pass(Stage.SCHEDULED, _schedule),
    Pass(Stage.PLACED, _place),
    Pass(Stage.LOWERED, _lower),
)
_ORDER = {stage: index for index, stage in enumerate(Stage)}


def run(graph: OpGraph, context: PassContext, until: Stage = Stage.LOWERED) -> OpGraph:
    """Run the passes that the graph still needs to be at stage `until`.

    The grammar is checked after each of them, unless the options say otherwise.

    Raises:
        SpecError: the layout does not divide the model.
        GraphError: a pass broke the grammar.
    """
    last = _ORDER[until]
    for each in PASSES:
        stage = _ORDER[each.reaches]
        if not _ORDER[graph.stage] < stage <= last:
            continue
        graph = each.apply(graph, context)
        if context.options.checks:
            check(graph)
    return graph
