"""`concurrency: auto`: how many rows of a batch run at once.

More sequences share the bytes of the weights, and each takes memory and time of its own; the last
rows of a batch leave most of them empty. So the cost of a token falls, and then hardly any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.candidate import Candidate, Capabilities
from tokenspeed_plan.planner.advisor.legality import check_layout
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import OBJECTIVES, SearchResult
from tokenspeed_plan.planner.advisor.search_space import SearchSpace
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Option
from tokenspeed_plan.plans.types import GIB

MOST_SEQS = 512  # decode kernels were measured up to so many
# The share of the cost of a token that more sequences must save: less is within what is not known.
WORTH_MORE_SEQS = 0.01
METRIC = OBJECTIVES["cost_per_token"]


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The number that was chosen, and the best deployment of each that was tried."""

    num_seqs: int
    curve: tuple[Prediction, ...]
    reason: str


def choose_concurrency(
    predictor: Predictor, scope: Capabilities, num_gpus: int
) -> Concurrency | None:
    """The fewest sequences whose tokens cost about the least, among those in the service levels.

    None where not even one fits.

    Args:
        predictor: of a spec that leaves the number open.
        scope: what a deployment may use.
        num_gpus: how many GPUs there are.
    """
    curve = tuple(_curve(predictor, scope, num_gpus))
    if not curve:
        return None
    levels = predictor.spec.service_levels
    judge = SearchResult(METRIC, levels, curve, ())
    least = min(judge.excess(each) for each in curve)
    allowed = [each for each in curve if judge.excess(each) == least]
    best = min(each.metrics[METRIC] for each in allowed)
    limit = best * (1.0 + WORTH_MORE_SEQS)
    chosen = next(each for each in allowed if each.metrics[METRIC] <= limit)
    reason = (
        f"the fewest within {WORTH_MORE_SEQS:.0%} of the least {METRIC}: "
        f"{chosen.metrics[METRIC]:.4g} of {best:.4g}"
    )
    if least:
        reason += ", among those nearest to the service levels"
    elif levels:
        reason += ", among those in the service levels"
    if chosen is curve[-1] and chosen.concurrency < _most(predictor):
        reason += "; more do not fit"
    return Concurrency(chosen.concurrency, curve, reason)


def record_concurrency(ledger: Ledger, choice: Concurrency) -> None:
    """Record the number, and the curve that it lies on."""
    beside = [each for each in choice.curve if each.concurrency != choice.num_seqs]
    runner_up = None
    if beside:
        second = min(beside, key=lambda each: each.metrics[METRIC])
        runner_up = f"{second.concurrency}: {second.metrics[METRIC]:.4g}"
    options = tuple(map(_option, choice.curve))
    value = f"{choice.num_seqs} sequences"
    ledger.record("concurrency", value, choice.reason, runner_up, options)


def _option(each: Prediction) -> Option:
    metrics = each.metrics
    numbers = {
        "tokens_per_s_gpu": digits(metrics["tokens_per_s_gpu"]),
        "total_tokens_per_s_gpu": digits(metrics["total_tokens_per_s_gpu"]),
        "tpot_ms": digits(metrics["tpot_ms"]),
        "memory_gib": digits(each.memory.total / GIB),
    }
    return Option(what=f"{each.concurrency} sequences: {each.candidate}", numbers=numbers)


def _most(predictor: Predictor) -> int:
    return min(predictor.spec.workload.rows or MOST_SEQS, MOST_SEQS)


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... 64, 96, 128, 192, ... and the most itself."""
    powers = [1 << bits for bits in range(most.bit_length())]
    between = [3 * power // 2 for power in powers if power >= 64]
    return sorted({size for size in (*powers, *between, most) if size <= most})


def _curve(predictor: Predictor, scope: Capabilities, num_gpus: int) -> Iterator[Prediction]:
    """The best deployment of each number, while any fits; the last is the largest that does."""
    layouts = _legal_layouts(predictor, scope, num_gpus)
    fitting = 0
    for size in _sizes(_most(predictor)):
        found = _best(predictor, scope, num_gpus, layouts, size)
        if found is None:
            largest = _largest_fitting(predictor, scope, num_gpus, layouts, fitting, size)
            if largest > fitting:
                last = _best(predictor, scope, num_gpus, layouts, largest)
                assert last is not None
                yield last
            return
        fitting = size
        yield found


def _legal_layouts(
    predictor: Predictor, scope: Capabilities, num_gpus: int
) -> list[ParallelLayout]:
    """The layouts that cut the model evenly."""
    spec, config = predictor.spec, predictor.config
    space = SearchSpace(spec, config, predictor.hardware, scope, num_gpus)
    found = []
    for layout in space.layouts_of(num_gpus):
        with suppress(SpecError):
            check_layout(layout, config, spec.model.weights)
            found.append(layout)
    return found


def _candidates(
    predictor: Predictor, scope: Capabilities, num_gpus: int, layouts: Iterable[ParallelLayout]
) -> list[Candidate]:
    """Each layout that fits, with the first value of each knob."""
    spec, config = predictor.spec, predictor.config
    space = SearchSpace(spec, config, predictor.hardware, scope, num_gpus)
    found = [Candidate(layout, space.default_knobs()) for layout in layouts]
    return [candidate for candidate in found if predictor.fits(candidate)]


def _best(
    predictor: Predictor,
    scope: Capabilities,
    num_gpus: int,
    layouts: Iterable[ParallelLayout],
    num_seqs: int,
) -> Prediction | None:
    """The cheapest deployment of so many sequences; None where none fits.

    The number of drafts is tried with the best layout alone.
    """
    sized = predictor.with_concurrency(num_seqs)
    spec, config = sized.spec, sized.config
    judge = SearchResult(METRIC, spec.service_levels, (), ())
    candidates = _candidates(sized, scope, num_gpus, layouts)
    best = min(map(sized.predict, candidates), key=judge.order, default=None)
    if best is None:
        return None
    space = SearchSpace(spec, config, sized.hardware, scope, num_gpus)
    for knobs in space.with_depths(best.candidate.knobs):
        candidate = replace(best.candidate, knobs=knobs)
        if candidate != best.candidate and sized.fits(candidate):
            best = min(best, sized.predict(candidate), key=judge.order)
    return best


def _largest_fitting(
    predictor: Predictor,
    scope: Capabilities,
    num_gpus: int,
    layouts: Iterable[ParallelLayout],
    fits: int,
    too_many: int,
) -> int:
    """The most sequences that fit, in eighths of the last step."""
    step = max((too_many - fits) // 8, 1)
    for num_seqs in range(too_many - step, fits, -step):
        sized = predictor.with_concurrency(num_seqs)
        if _candidates(sized, scope, num_gpus, layouts):
            return num_seqs
    return fits
