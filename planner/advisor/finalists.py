"""The last round: the best deployments of a search, priced as their programs would be written.

A search gives a deployment one number of drafts; a plan has one for each decode bucket. What is
compared in a plan's reasons is priced here, all by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.draft_depths import BucketDepth, bucket_depths, max_depth
from tokenspeed_plan.planner.advisor.load_judge import Deployment, judged
from tokenspeed_plan.planner.advisor.predicted import MAX_OPTIONS
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.search_space import SearchSpace


@dataclass(frozen=True, slots=True)
class Finalist:
    """A deployment, the drafts of each bucket, and what the workload sees with them."""

    candidate: Candidate
    table: tuple[BucketDepth, ...]
    prediction: Prediction


def finalists(
    predictor: Predictor, result: SearchResult, space: SearchSpace, buckets: tuple[int, ...]
) -> list[Finalist]:
    """The best of each layout, and the best of all with each prefill chunk; best first."""
    found = []
    for candidate in _candidates(predictor, result, space):
        table = bucket_depths(predictor, candidate, buckets)
        depths = {each.bucket: each.depth for each in table}
        knobs = replace(candidate.knobs, depth=max_depth(table))
        prediction = predictor.predict(replace(candidate, knobs=knobs), depths)
        found.append(Finalist(candidate, table, prediction))
    found.sort(key=lambda each: result.order(each.prediction))
    if result.percentiles:
        return _judged(predictor, result, found)
    return found


def _judged(
    predictor: Predictor, result: SearchResult, found: Sequence[Finalist]
) -> list[Finalist]:
    """The finalists with the best of them simulated, best first."""
    known = {each.prediction.candidate: each for each in found}

    def deployed(prediction: Prediction) -> Deployment:
        table = known[prediction.candidate].table
        depths = {each.bucket: each.depth for each in table}
        return Deployment(predictor, prediction.candidate, depths)

    ranked = judged(final_result(result, found), deployed).ranked
    return [replace(known[each.candidate], prediction=each) for each in ranked]


def final_result(result: SearchResult, found: Sequence[Finalist]) -> SearchResult:
    """The finalists as a search's result."""
    return replace(result, predictions=tuple(each.prediction for each in found))


def _candidates(
    predictor: Predictor, result: SearchResult, space: SearchSpace
) -> Iterator[Candidate]:
    best = result.best.candidate
    for prediction in result.by_layout[: MAX_OPTIONS + 1]:
        yield prediction.candidate
    for knobs in space.with_chunks(best.knobs):
        other = replace(best, knobs=knobs)
        if other != best and predictor.fits(other):
            yield other
