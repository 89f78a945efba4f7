"""Resolve every `auto` of a spec, and record the reasons.

The best deployment that a plan can hold becomes the plan; the best of all becomes advice in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor import reasons
from tokenspeed_plan.planner.advisor.buckets import choose_buckets
from tokenspeed_plan.planner.advisor.candidate import ALL, SUPPORTED, Candidate, Knobs
from tokenspeed_plan.planner.advisor.concurrency import (
    Concurrency,
    choose_concurrency,
    record_concurrency,
)
from tokenspeed_plan.planner.advisor.filling import filled_tokens, record_filling
from tokenspeed_plan.planner.advisor.finalists import final_result, finalists
from tokenspeed_plan.planner.advisor.gathering import gather, record_gathering
from tokenspeed_plan.planner.advisor.interleaving import Interleaving, interleave
from tokenspeed_plan.planner.advisor.legality import (
    check_formats,
    check_layout,
    check_stated,
    matches,
)
from tokenspeed_plan.planner.advisor.predicted import predicted
from tokenspeed_plan.planner.advisor.prediction import Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.rollback import (
    Rollback,
    allowed_rollbacks,
    choose,
    rollbacks,
)
from tokenspeed_plan.planner.advisor.search import Progress, Search
from tokenspeed_plan.planner.advisor.search_space import SearchSpace, layouts
from tokenspeed_plan.planner.advisor.step_model import activation_dtype
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import prefill_chunk
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Predicted
from tokenspeed_plan.plans.types import DType, RollbackWord


@dataclass(frozen=True)
class Decided:
    """What is planned, and what the workload will see.

    Attributes:
        num_seqs: sequences at the same time.
        layout: how the model is cut over the ranks.
        prefill: the same for the pool that computes prompts; None where there is one pool.
        knobs: the rest of the deployment; `depth` is the most drafts of any bucket.
        depths: drafts of a step by decode bucket.
        predicted: the promised numbers.
        interleaving: prefill between two decode steps.
        gathered_tokens: for which prompts of a batch wait while all sequences are taken.
        filled_tokens: of a step in which a prompt ends, with a part of another.
        rollback: how rejected drafts are taken back.
    """

    num_seqs: int
    layout: ParallelLayout
    knobs: Knobs
    depths: Mapping[int, int]
    predicted: Predicted
    interleaving: Interleaving
    gathered_tokens: int = 0
    filled_tokens: int = 0
    rollback: RollbackWord = "snapshot"
    prefill: ParallelLayout | None = None


@dataclass(frozen=True)
class _Choice:
    """What is planned: the last round of a search, and the rollback that it was made with."""

    predictor: Predictor
    result: SearchResult
    num_layouts: int
    ways: list[Rollback]
    rollback: Rollback

    @property
    def depths(self) -> dict[int, int]:
        """Drafts of a step by decode bucket."""
        return {each.bucket: each.depth for each in self.rollback.table}


def weight_dtype(weights: str, hardware: HardwareSpec) -> DType:
    """The dtype of activations in a plan, and of the weights that are not quantised.

    Args:
        weights: their format, a key of `FORMATS`.
        hardware: the target.

    Raises:
        SpecError: there are no kernels for the format, or not for the target.
    """
    check_formats(weights, hardware)
    return activation_dtype(weights, hardware)


def resolve(
    spec: Spec,
    config: ModelConfig,
    hardware: HardwareSpec,
    ledger: Ledger,
    progress: Progress | None = None,
) -> Decided:
    """Choose the best deployment that a plan can hold, and record each decision.

    Args:
        spec: what was asked.
        config: of the model.
        hardware: the target.
        ledger: takes the decisions.
        progress: is told how far each search is.

    Raises:
        SpecError: what the spec states is illegal for this model or not planned yet, or nothing
            fits.
    """
    check_stated(spec, config)
    spec = _with_concurrency(spec, config, hardware, ledger)
    choice = _choose(spec, config, hardware, progress)
    predictor = choice.predictor
    unrestricted = Search(predictor, ALL, spec.target.count, progress).run()
    if not unrestricted.predictions:
        unrestricted = choice.result
    interleaving = interleave(predictor, choice.result, choice.depths)
    result = choice.result.with_best(interleaving.prediction)
    gathering = gather(predictor, result, choice.depths, interleaving.tokens)
    record_gathering(ledger, gathering)
    result = result.with_best(gathering.prediction)
    _record(ledger, replace(choice, result=result), unrestricted)
    best = result.best.candidate
    filled = filled_tokens(predictor, best)
    record_filling(ledger, filled)
    return Decided(
        num_seqs=spec.workload.num_seqs,
        layout=best.layout,
        knobs=best.knobs,
        depths=choice.depths,
        predicted=predicted(predictor, result, unrestricted),
        interleaving=interleaving,
        gathered_tokens=gathering.tokens,
        filled_tokens=filled,
        rollback=choice.rollback.word,
        prefill=best.prefill,
    )


def _with_concurrency(
    spec: Spec, config: ModelConfig, hardware: HardwareSpec, ledger: Ledger
) -> Spec:
    """The spec with a number of sequences, which is recorded where it leaves it open."""
    if spec.workload.concurrency != "auto":
        return spec
    chosen = chosen_concurrency(spec, config, hardware)
    if chosen is None:  # the search says what is lacking
        return spec.with_concurrency(1)
    record_concurrency(ledger, chosen)
    return spec.with_concurrency(chosen.num_seqs)


def chosen_concurrency(
    spec: Spec, config: ModelConfig, hardware: HardwareSpec
) -> Concurrency | None:
    """The number of sequences for a spec that leaves it open, of deployments that a plan can hold.

    None where not even one fits.
    """
    word, *_ = allowed_rollbacks(spec.with_concurrency(1), config, hardware)
    predictor = Predictor(spec, config, hardware, rollback=word)
    return choose_concurrency(predictor, SUPPORTED, spec.target.count)


def _choose(
    spec: Spec, config: ModelConfig, hardware: HardwareSpec, progress: Progress | None
) -> _Choice:
    """The deployment and its rollback; another rollback than the first needs a second search."""
    predictors = []
    for word in allowed_rollbacks(spec, config, hardware):
        predictor = Predictor(spec, config, hardware, rollback=word)
        predictors.append(predictor)
    num_gpus = spec.target.count
    predictor, result = _search(predictors, num_gpus, progress)
    buckets = choose_buckets(predictor, result.best)
    ways = rollbacks(predictors, result.best.candidate, buckets)
    chosen = choose(ways)
    if chosen.predictor is not predictor:
        predictor, result = _search([chosen.predictor], num_gpus, progress)
        ways = rollbacks(predictors, result.best.candidate, buckets)
    space = SearchSpace(spec, config, hardware, SUPPORTED, num_gpus)
    last = finalists(predictor, result, space, buckets)
    if last[0].candidate != result.best.candidate:
        ways = rollbacks(predictors, last[0].candidate, buckets)
    chosen = next(way for way in ways if way.predictor is predictor)
    return _Choice(predictor, final_result(result, last), len(result.by_layout), ways, chosen)


def _search(
    predictors: Sequence[Predictor], num_gpus: int, progress: Progress | None
) -> tuple[Predictor, SearchResult]:
    """The first rollback with which anything fits."""
    for predictor in predictors:
        result = Search(predictor, SUPPORTED, num_gpus, progress).run()
        if result.predictions:
            return predictor, result
    raise _refusal(predictors[0])


def _record(ledger: Ledger, choice: _Choice, unrestricted: SearchResult) -> None:
    """Record the decisions in the order in which the plan lists them."""
    predictor, result = choice.predictor, choice.result
    spec = predictor.spec
    stated = spec.parallelism != "auto"
    reasons.record_parallelism(ledger, result, choice.num_layouts, stated)
    reasons.record_speculation(ledger, predictor, choice.rollback.table)
    reasons.record_rollback(ledger, choice.ways, choice.rollback)
    reasons.record_disaggregation(ledger, spec, result, unrestricted)
    reasons.record_page_size(ledger, predictor.hardware)
    reasons.record_prefill_chunk(ledger, result)
    reasons.record_kv_dtype(ledger, spec, result)
    reasons.record_state_dtype(ledger, predictor.config.has_state, spec.stored_state)
    reasons.record_objective(ledger, spec, result)
    reasons.record_service(ledger, spec, result)
    reasons.record_advice(ledger, spec, result, unrestricted)


def _refusal(predictor: Predictor) -> SpecError:
    """Why nothing fits: the memory that the first legal layout lacks, else why none is legal."""
    spec, hardware = predictor.spec, predictor.hardware
    first: SpecError | None = None
    for layout in layouts(spec.target.count, predictor.config, SUPPORTED):
        if spec.parallelism != "auto" and not matches(layout, spec.parallelism):
            continue
        try:
            check_layout(layout, predictor.config, predictor.steps.weights)
        except SpecError as error:
            first = first or error
            continue
        chunk = prefill_chunk(hardware.prefill_chunk, spec.workload)
        candidate = Candidate(layout, Knobs(chunk, hardware.page_size))
        return SpecError(*reasons.memory_refusal(predictor, candidate))
    return first or SpecError(
        "no layout is the one that the spec states", "choose another `parallelism`"
    )
