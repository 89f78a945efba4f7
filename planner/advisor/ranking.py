"""What is best: the predictions of a search, ranked by the objective and the service levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tokenspeed_plan.planner.advisor.prediction import Prediction
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError

OBJECTIVES = {
    "turn_time": "turn_time_ms",
    "tpot": "tpot_ms",
    "cost_per_token": "cost_per_million_tokens_usd",
}
TIME_SPENT = {
    "memory": "reading memory",
    "matrix": "multiplying",
    "launch": "launching kernels",
    "collective": "waiting for other GPUs",
    "host": "host work",
}


@dataclass(frozen=True, slots=True)
class Rejected:
    """A deployment that is not possible, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """What a search evaluated.

    Attributes:
        objective: name of the metric to minimise.
        slo: the largest allowed value of each metric that has a service level.
        predictions: every deployment that is legal and fits.
        rejected: those that are not, with the reasons.
    """

    objective: str
    slo: dict[str, float]
    predictions: tuple[Prediction, ...]
    rejected: tuple[Rejected, ...]

    @cached_property
    def ranked(self) -> list[Prediction]:
        """Best first: what meets the service levels, by the objective; then the nearest misses."""
        return sorted(self.predictions, key=self.order)

    def order(self, prediction: Prediction) -> tuple[float, float, float, int, str]:
        """Where a prediction ranks, the least first.

        Ties of the objective go to less time and cost, to fewer GPUs, then by name.
        """
        metrics = prediction.metrics
        candidate = prediction.candidate
        tie = metrics["turn_time_ms"] * metrics["cost_per_million_tokens_usd"]
        return (
            self.excess(prediction),
            metrics[self.objective],
            tie,
            candidate.num_gpus,
            str(candidate),
        )

    def excess(self, prediction: Prediction) -> float:
        """By which share it exceeds the service level that it misses most; 0 if none."""
        excesses = [prediction.level(name) / limit - 1.0 for name, limit in self.slo.items()]
        return max([0.0, *excesses])

    @property
    def best(self) -> Prediction:
        """The winner.

        Raises:
            SpecError: nothing is legal and fits.
        """
        if self.ranked:
            return self.ranked[0]
        if not self.rejected:
            raise SpecError(
                "the GPUs cannot be cut into what `parallelism` states",
                "its numbers divide `target.count`, and those of a section multiply to it",
            )
        first = self.rejected[0]
        raise SpecError(
            f"no layout of the model is legal and fits: {first.what}: {first.reason}",
            "raise `target.count`, or lower `workload.concurrency` or its tokens",
        )

    @property
    def binding(self) -> str | None:
        """The service level that even the best misses, with numbers; None if it meets all."""
        best = self.best
        if not self.excess(best):
            return None
        ratios = {name: best.level(name) / limit for name, limit in self.slo.items()}
        name = max(ratios, key=ratios.__getitem__)
        time = best.step
        if name.startswith("ttft"):
            time = best.prompt
        bound_us = getattr(time, time.bound)
        share = bound_us / time.total_us
        return (
            f"{name} is {best.level(name):.4g} against {self.slo[name]:g} at best; "
            f"{share:.0%} of that time is {TIME_SPENT[time.bound]}"
        )

    @property
    def percentiles(self) -> list[str]:
        """The service levels that only a simulation can judge."""
        return [name for name in self.slo if "_p" in name]

    def with_best(self, prediction: Prediction) -> SearchResult:
        """The result with another prediction of its best deployment in place of the one it has."""
        others = [each for each in self.predictions if each is not self.best]
        return replace(self, predictions=(prediction, *others))

    @cached_property
    def by_layout(self) -> list[Prediction]:
        """The best of each layout, best first."""
        seen: dict[str, Prediction] = {}
        for prediction in self.ranked:
            seen.setdefault(prediction.candidate.layouts, prediction)
        return list(seen.values())

    @cached_property
    def split(self) -> Prediction | None:
        """The best deployment with a prefill pool and a decode pool."""
        for prediction in self.ranked:
            if prediction.candidate.prefill is not None:
                return prediction
        return None

    @cached_property
    def unsplit(self) -> Prediction | None:
        """The best deployment in which one pool does both."""
        for prediction in self.ranked:
            if prediction.candidate.prefill is None:
                return prediction
        return None

    @cached_property
    def front(self) -> list[Prediction]:
        """The Pareto front of a user's speed and a GPU's throughput, fastest for the user first."""
        front: list[Prediction] = []
        for prediction in sorted(self.predictions, key=_by_speed):
            if not front or _throughput(prediction) > _throughput(front[-1]):
                front.append(prediction)
        return front


def search_result(
    spec: Spec, predictions: tuple[Prediction, ...], rejected: tuple[Rejected, ...]
) -> SearchResult:
    """The result of a search under the objective and the service levels of a spec."""
    objective = OBJECTIVES[spec.objective.minimize]
    return SearchResult(objective, spec.service_levels, predictions, rejected)


def _by_speed(prediction: Prediction) -> tuple[float, float, str]:
    speed = prediction.metrics["tokens_per_s_user"]
    throughput = _throughput(prediction)
    return -speed, -throughput, str(prediction.candidate)


def _throughput(prediction: Prediction) -> float:
    return prediction.metrics["tokens_per_s_gpu"]
