"""The search: every legal layout, its knobs one after the other, what fits, what is best, and why the rest is not.

What is evaluated does not depend on the objective or on the service levels, so that a tighter one
can only take away.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenspeed_plan.planner.advisor.candidate import (
    DEPTHS,
    Candidate,
    Capabilities,
    Knobs,
    KvDtype,
    check_layout,
    layouts,
)
from tokenspeed_plan.planner.advisor.hardware import GIB
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.limits import prefill_chunk
from tokenspeed_plan.planner.spec import ParallelismSpec, ServingSpec
from tokenspeed_plan.plans.errors import SpecError

OBJECTIVES = {
    "turn_time": "turn_time_ms",
    "tpot": "tpot_ms",
    "cost_per_token": "cost_per_million_tokens_usd",
}
POOL_LAYOUTS = 3  # of each pool of a split deployment, the fastest alone


@dataclass(frozen=True, slots=True)
class Rejected:
    """A deployment that cannot be, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """What the search saw; `binding` says which service level nothing meets, and by how much."""

    objective: str
    slo: dict[str, float]
    predictions: tuple[Prediction, ...]
    rejected: tuple[Rejected, ...]

    @cached_property
    def ranked(self) -> list[Prediction]:
        """Best first: those that meet the service levels by the objective, then those that come nearest."""
        return sorted(self.predictions, key=lambda p: (self.excess(p), *self._order(p)))

    def _order(self, prediction: Prediction) -> tuple[float, float, int, str]:
        metrics = prediction.metrics
        others = metrics["turn_time_ms"] * metrics["cost_per_million_tokens_usd"]
        return (
            metrics[self.objective],
            others,
            prediction.candidate.num_gpus,
            str(prediction.candidate),
        )

    def excess(self, prediction: Prediction) -> float:
        """How far it is over the service level that it misses most, as a share; 0 where it meets them all."""
        return max(
            [prediction.metrics[name] / most - 1.0 for name, most in self.slo.items()] + [0.0]
        )

    @property
    def best(self) -> Prediction:
        """The winner.

        Raises:
            SpecError: nothing is legal and fits.
        """
        if not self.ranked:
            reason = (
                f": {self.rejected[0].what}: {self.rejected[0].reason}" if self.rejected else ""
            )
            raise SpecError(
                f"no layout of the model is legal and fits{reason}",
                "raise `target.count`, or lower `workload.concurrency` or its tokens",
            )
        return self.ranked[0]

    @property
    def binding(self) -> str | None:
        """The service level that even the nearest deployment misses, with numbers; None where the best meets them."""
        best = self.best
        if not self.excess(best):
            return None
        name = max(self.slo, key=lambda key: best.metrics[key] / self.slo[key])
        part = best.prompt if name.startswith("ttft") else best.step
        share = getattr(part, part.bound) / part.total_us
        return (
            f"{name} is {best.metrics[name]:.4g} against {self.slo[name]:g} at best; "
            f"{share:.0%} of that time is {_KINDS[part.bound]}"
        )

    @cached_property
    def by_layout(self) -> list[Prediction]:
        """The best of each layout, best first."""
        seen: dict[str, Prediction] = {}
        for prediction in self.ranked:
            seen.setdefault(prediction.candidate.layouts, prediction)
        return list(seen.values())

    @cached_property
    def front(self) -> list[Prediction]:
        """Deployments that no other beats in both a user's speed and a GPU's throughput, fastest for the user first."""
        made: list[Prediction] = []
        for prediction in sorted(
            self.predictions, key=lambda p: (-_speed(p), -_throughput(p), str(p.candidate))
        ):
            if not made or _throughput(prediction) > _throughput(made[-1]):
                made.append(prediction)
        return made


_KINDS = {
    "memory": "reading memory",
    "matrix": "multiplying",
    "launch": "launching kernels",
    "collective": "waiting for other GPUs",
    "host": "host work",
}


def _speed(prediction: Prediction) -> float:
    return prediction.metrics["tokens_per_s_user"]


def _throughput(prediction: Prediction) -> float:
    return prediction.metrics["tokens_per_s_gpu"]


@contextmanager
def _no_collector() -> Iterator[None]:
    """A search keeps what it makes; walking over it again and again takes Python's collector a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass
class Search:
    """One search for the deployments of a spec on so many GPUs."""

    predictor: Predictor
    scope: Capabilities
    num_gpus: int
    seen: dict[Candidate, Prediction] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)

    def run(self) -> SearchResult:
        """Everything that was evaluated."""
        with _no_collector():
            return self._run()

    def _run(self) -> SearchResult:
        spec = self.predictor.spec
        whole = [layout for layout in self._layouts() if self._legal(layout)]
        for layout in whole if isinstance(spec.disaggregation, str) or not self.scope.pools else ():
            for replicas in self._replicas(layout.num_ranks):
                self._tune(Candidate(layout, self._plain(), replicas=replicas))
        if self.scope.pools and spec.disaggregation != "off" and self.num_gpus > 1:
            for candidate in self._split():
                self._tune(candidate)
        levels = (spec.objective.slo, spec.slo)
        slo = {
            k: v
            for level in levels
            if level
            for k, v in level.model_dump(exclude_none=True).items()
        }
        return SearchResult(
            OBJECTIVES[spec.objective.minimize],
            slo,
            tuple(self.seen.values()),
            tuple(self.rejected),
        )

    @property
    def _serving(self) -> ServingSpec:
        return self.predictor.spec.serving or ServingSpec()

    def _layouts(self) -> Iterator[ParallelLayout]:
        """Of the whole target, and of parts of it where replicas can share it."""
        asked = self.predictor.spec.parallelism
        counts = [self.num_gpus]
        if self.scope.replicas:
            counts = [
                1 << bits for bits in range(self.num_gpus.bit_length()) if 1 << bits < self.num_gpus
            ] + counts
        for count in counts:
            for layout in layouts(count, self.predictor.config, self.scope):
                if asked == "auto" or matches(layout, asked):
                    yield layout

    def _replicas(self, size: int) -> list[int]:
        most = self.num_gpus // size if self.scope.replicas else 1
        return sorted({*(1 << bits for bits in range(most.bit_length())), most})

    def _legal(self, layout: ParallelLayout) -> bool:
        spec = self.predictor.spec
        try:
            check_layout(layout, self.predictor.config, spec.model.weights)
        except SpecError as error:
            self.rejected.append(Rejected(str(layout), error.message))
            return False
        return True

    def _plain(self) -> Knobs:
        """The defaults, with what the spec fixes."""
        hardware, spec = self.predictor.hardware, self.predictor.spec
        depth = spec.stated_depth or 0
        kv_dtype = self._kv_dtypes()[0]["kv_dtype"]
        chunk = self._chunks()[0]["prefill_chunk"]
        return Knobs(chunk, hardware.page_size, depth, kv_dtype, self._serving.checkpoint_tokens)

    def _tune(self, start: Candidate) -> None:
        """One knob after the other: each value is evaluated, the fastest turn goes on."""
        if self._evaluate(start) is None:
            return
        best = start
        for values in (self._chunks(), self._depths(), self._kv_dtypes()):
            tried = [replace(best, knobs=replace(best.knobs, **value)) for value in values]
            made = [prediction for candidate in tried if (prediction := self._evaluate(candidate))]
            best = min([*made, self.seen[best]], key=lambda p: p.metrics["turn_time_ms"]).candidate

    def _chunks(self) -> list[dict[str, int]]:
        """The profile's, a half and a quarter of it; none that is longer than the longest conversation."""
        largest, longest = (
            self.predictor.hardware.prefill_chunk,
            self.predictor.spec.workload.max_conversation_tokens,
        )
        if self._serving.prefill_chunk:
            return [{"prefill_chunk": prefill_chunk(self._serving.prefill_chunk, longest)}]
        sizes = {prefill_chunk(largest // ways, longest) for ways in (1, 2, 4)}
        return [{"prefill_chunk": size} for size in sorted(sizes, reverse=True)]

    def _depths(self) -> list[dict[str, int]]:
        fixed = (
            self.predictor.spec.stated_depth is not None or not self.predictor.config.num_mtp_layers
        )
        return [] if fixed else [{"depth": depth} for depth in DEPTHS]

    def _kv_dtypes(self) -> list[dict[str, KvDtype]]:
        """Where weights are quantised already."""
        if self._serving.kv_dtype in self.scope.kv_dtypes:
            return [{"kv_dtype": self._serving.kv_dtype}]
        quantised = self.predictor.spec.model.weights in ("fp8", "nvfp4")
        return [
            {"kv_dtype": dtype} for dtype in self.scope.kv_dtypes if quantised or dtype == "bf16"
        ]

    def _evaluate(self, candidate: Candidate) -> Prediction | None:
        if candidate in self.seen:
            return self.seen[candidate]
        memory = self.predictor.fullest(candidate)
        capacity = self.predictor.hardware.memory_bytes
        if memory.total > capacity:
            reason = (
                f"needs {memory.total / GIB:.1f} GiB on each GPU, which has {capacity / GIB:.1f}"
            )
            self.rejected.append(Rejected(str(candidate), reason))
            return None
        self.seen[candidate] = self.predictor.predict(candidate)
        return self.seen[candidate]

    def _split(self) -> Iterator[Candidate]:
        """Prefill and decode pools: the layouts that are fastest at their one job."""
        for before, after in self._pool_sizes():
            knobs = self._plain()
            prefills = self._fastest(before, lambda p: p.metrics["first_turn_ttft_ms"])
            decodes = self._fastest(after, lambda p: p.metrics["tpot_ms"])
            yield from (Candidate(d, knobs, prefill=p) for p in prefills for d in decodes)

    def _pool_sizes(self) -> list[tuple[int, int]]:
        asked = self.predictor.spec.disaggregation
        if not isinstance(asked, str):
            return [(asked.prefill, asked.decode)]
        return [
            (1 << bits, self.num_gpus - (1 << bits))
            for bits in range(self.num_gpus.bit_length() - 1)
        ] + [
            (self.num_gpus - (1 << bits), 1 << bits)
            for bits in range(self.num_gpus.bit_length() - 2)
        ]

    def _fastest(self, count: int, key: Callable[[Prediction], float]) -> list[ParallelLayout]:
        known = [
            layout
            for layout in layouts(count, self.predictor.config, self.scope)
            if self._legal(layout)
        ]
        made = [p for layout in known if (p := self._evaluate(Candidate(layout, self._plain())))]
        return [
            p.candidate.layout
            for p in sorted(made, key=lambda p: (key(p), str(p.candidate)))[:POOL_LAYOUTS]
        ]


def matches(layout: ParallelLayout, asked: ParallelismSpec) -> bool:
    """Whether a layout is the one that a spec states, as far as it does."""
    wanted: Iterable[tuple[int | None, int]] = ()
    if asked.attention:
        a = asked.attention
        wanted = (
            (a.tp, layout.attention_tp),
            (a.dp, layout.attention_dp),
            (a.context_split, layout.context_split),
        )
    if asked.moe:
        given = asked.moe.model_fields_set
        wanted = (
            *wanted,
            (asked.moe.tp if "tp" in given else None, layout.moe_tp),
            (asked.moe.ep if "ep" in given else None, layout.moe_ep),
        )
    return all(value is None or value == found for value, found in wanted)
