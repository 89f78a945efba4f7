"""The search: predicts every legal layout that fits, and tunes its knobs one after the other.

What is evaluated depends neither on the objective nor on the service levels, so that a tighter
service level can only take deployments away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter

from tokenspeed_plan.planner.advisor.candidate import Candidate, Capabilities
from tokenspeed_plan.planner.advisor.legality import check_layout
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import (
    OBJECTIVES,
    Rejected,
    SearchResult,
    search_result,
)
from tokenspeed_plan.planner.advisor.search_space import SearchSpace
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.plans.collector import no_garbage_collection
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.types import GIB

Progress = Callable[[int, int], None]  # how many of how many are done
POOL_LAYOUTS = 3  # layouts of each of two pools that are combined
# All layouts of pools up to this many GPUs are tuned: those that a machine holds. Of larger ones,
# of which there are hundreds, so many of each objective are.
TUNED_GPUS = 8
LARGE_LAYOUTS = 4


@dataclass
class Search:
    """One search for the deployments of a spec on so many GPUs.

    Attributes:
        predictor: predicts and measures a candidate.
        scope: what a candidate may use.
        num_gpus: how many GPUs there are.
        progress: is told how many starting points of how many are done.
        seen: what was evaluated. rejected: what was not, and why.
    """

    predictor: Predictor
    scope: Capabilities
    num_gpus: int
    progress: Progress | None = None
    seen: dict[Candidate, Prediction] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)

    def run(self) -> SearchResult:
        """Evaluate everything that the spec leaves open."""
        with no_garbage_collection():
            singles, pairs = self._single_pools(), self._pool_pairs()
            total = len(singles) + len(pairs)
            for done, candidate in enumerate(singles):
                self._report(done, total)
                self._tune(candidate)
            for done, pair in enumerate(pairs, start=len(singles)):
                self._report(done, total)
                self._try_two_pools(*pair)
        found = tuple(self.seen.values())
        if not self.space.has_single_pool:  # single pools were only parts of what is stated
            found = tuple(each for each in found if each.candidate.prefill)
        return search_result(self.predictor.spec, found, tuple(self.rejected))

    @cached_property
    def space(self) -> SearchSpace:
        """What is tried."""
        predictor = self.predictor
        return SearchSpace(
            predictor.spec, predictor.config, predictor.hardware, self.scope, self.num_gpus
        )

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)

    def _single_pools(self) -> list[Candidate]:
        """Layouts and numbers of replicas to tune, with the first value of each knob."""
        if not self.space.has_single_pool:
            return []
        knobs = self.space.default_knobs()
        legal = [layout for layout in self.space.pool_layouts() if self._is_legal(layout)]
        starts = []
        for num_gpus, alike in groupby(legal, key=attrgetter("num_ranks")):
            layouts = list(alike)
            replicas = self.space.replicas(num_gpus)
            if num_gpus > TUNED_GPUS:
                layouts = self._promising(layouts, replicas[-1])
            for layout in layouts:
                starts += [Candidate(layout, knobs, replicas=copies) for copies in replicas]
        return starts

    def _promising(self, layouts: list[ParallelLayout], replicas: int) -> list[ParallelLayout]:
        """The best layouts of a large pool by each objective, before any knob is tuned."""
        knobs = self.space.default_knobs()
        found = [self._evaluate(Candidate(each, knobs, replicas=replicas)) for each in layouts]
        predictions = [prediction for prediction in found if prediction]
        kept = []
        for metric in OBJECTIVES.values():
            predictions.sort(key=lambda p: (p.metrics[metric], str(p.candidate)))
            kept += [prediction.candidate.layout for prediction in predictions[:LARGE_LAYOUTS]]
        return list(dict.fromkeys(kept))

    def _pool_pairs(self) -> list[tuple[int, int]]:
        if not self.space.has_two_pools:
            return []
        return list(self.space.pool_pairs())

    def _try_two_pools(self, prefill_gpus: int, decode_gpus: int) -> None:
        """Combine the layouts that are fastest at prefill with those that are fastest at decode."""
        knobs = self.space.default_knobs()
        prefills = self._fastest(prefill_gpus, "first_turn_ttft_ms")
        decodes = self._fastest(decode_gpus, "tpot_ms")
        for prefill in prefills:
            for decode in decodes:
                self._tune(Candidate(decode, knobs, prefill=prefill))

    def _fastest(self, num_gpus: int, metric: str) -> list[ParallelLayout]:
        legal = [layout for layout in self.space.layouts_of(num_gpus) if self._is_legal(layout)]
        predictions = []
        for layout in legal:
            prediction = self._evaluate(Candidate(layout, self.space.default_knobs()))
            if prediction:
                predictions.append(prediction)
        predictions.sort(key=lambda p: (p.metrics[metric], str(p.candidate)))
        return [prediction.candidate.layout for prediction in predictions[:POOL_LAYOUTS]]

    def _is_legal(self, layout: ParallelLayout) -> bool:
        try:
            check_layout(layout, self.predictor.config, self.predictor.steps.weights)
        except SpecError as error:
            self.rejected.append(Rejected(str(layout), error.message))
            return False
        return True

    def _tune(self, start: Candidate) -> None:
        """Vary one knob after the other; the value with the shortest turn stays.

        Where the first ones do not fit, others may: a long chunk keeps fewer checkpoints.
        """
        space, best = self.space, start
        found = [self._evaluate(start)]
        for vary in (space.with_chunks, space.with_depths, space.with_kv_dtypes):
            for knobs in vary(best.knobs):
                found.append(self._evaluate(replace(best, knobs=knobs)))
            fitting = [each for each in found if each]
            if not fitting:
                return
            best = min(fitting, key=lambda p: p.metrics["turn_time_ms"]).candidate

    def _evaluate(self, candidate: Candidate) -> Prediction | None:
        """The prediction of a candidate; None where it does not fit."""
        if candidate in self.seen:
            return self.seen[candidate]
        if not self.predictor.fits(candidate):
            needed = self.predictor.fullest(candidate).total
            capacity = self.predictor.hardware.memory_bytes
            reason = f"needs {needed / GIB:.1f} GiB on each GPU, which has {capacity / GIB:.1f}"
            self.rejected.append(Rejected(str(candidate), reason))
            return None
        self.seen[candidate] = self.predictor.predict(candidate)
        return self.seen[candidate]
