"""What users of a deployment see under the load of the spec: its scheduler is simulated.

Formulas have means; a service level on a percentile needs the queue. Nothing is planned yet when a
deployment is judged, so the simulation gets an outline of its plan: the limits and the sizes of
programs, which is all that a scheduler reads, and steps of the times that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tokenspeed_plan.planner.advisor.answer_returns import ReturnPrices, choose_answer_returns
from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.filling import filled_tokens
from tokenspeed_plan.planner.advisor.load_capacity import largest_count, largest_rate
from tokenspeed_plan.planner.advisor.numbers import ceil_div
from tokenspeed_plan.planner.advisor.plan_steps import PlanSteps
from tokenspeed_plan.planner.advisor.pool_times import PoolBytes, pair_times
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.spec_load import LoadSize, spec_load
from tokenspeed_plan.planner.advisor.transfer import transport_of
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.ledger import Ledger
from tokenspeed_plan.planner.passes.limits import (
    CapacityOptions,
    decode_buckets,
    plan_capacity,
    plan_limits,
    prefill_buckets,
)
from tokenspeed_plan.planner.spec import MAX_CONCURRENCY, WorkloadSpec
from tokenspeed_plan.plans.schema import (
    AnswerReturns,
    AttentionLayout,
    BufferSpec,
    Layout,
    Limits,
    ModelFacts,
    Plan,
    Pool,
    Program,
)
from tokenspeed_plan.plans.types import Phase, TensorSpec

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes

# Turns that are counted: four of them are over the 99th percentile.
LEAST_REQUESTS = 400
WAVES = 2  # users begin together, so that as many turns of each are counted at least
# The share of turns at both ends of a load with arrivals, when fewer are there, that do not count.
RAMP = 0.1
MOST_LEADERS = 8  # deployments that are simulated for one search
CLOSE_ENOUGH = 1.05  # of the largest good number of users to the least bad one
NO_DIGEST = "0" * 64  # an outline is nowhere kept


@dataclass(frozen=True)
class Deployment:
    """A candidate as its programs would be written.

    Attributes:
        predictor: of its spec, whose load is that of all replicas.
        candidate: one pool and its replicas, or two pools.
        depths: drafts of a step by decode bucket; where it is empty, the candidate's.
        interleaved_tokens: of prompts between two decode steps; None for a chunk.
        gathered_tokens: for which prompts wait while all sequences are taken.
    """

    predictor: Predictor
    candidate: Candidate
    depths: Mapping[int, int]
    interleaved_tokens: int | None = None
    gathered_tokens: int = 0

    @cached_property
    def num_seqs(self) -> int:
        """Sequences at the same time, of one replica."""
        return ceil_div(self.predictor.spec.workload.num_seqs, self.candidate.replicas)

    @cached_property
    def table(self) -> dict[int, int]:
        """Drafts of a step by decode bucket."""
        if self.depths:
            return dict(self.depths)
        return dict.fromkeys(decode_buckets(self.num_seqs), self.candidate.knobs.depth)

    @cached_property
    def _workload(self) -> WorkloadSpec:
        return self.predictor.spec.with_concurrency(self.num_seqs).workload

    @cached_property
    def _limits(self) -> Limits:
        """Of each pool."""
        predictor, knobs = self.predictor, self.candidate.knobs
        options = CapacityOptions(
            knobs.prefill_chunk, knobs.checkpoint_tokens, knobs.depth, predictor.rollback
        )
        capacity = plan_capacity(self._workload, predictor.config, predictor.hardware, options)
        return plan_limits(
            capacity,
            self.interleaved_tokens,
            self.gathered_tokens,
            filled_tokens(predictor, self.candidate),
        )

    @cached_property
    def outline(self) -> Plan:
        """What a scheduler reads of the plan that this would be, and nothing else."""
        config, prefill = self.predictor.config, self.candidate.prefill
        chunks = prefill_buckets(self._limits, self._workload.turn_tokens)
        depth = self.candidate.knobs.depth
        prompts = [self._program("prefill", bucket, depth) for bucket in chunks]
        decodes = [self._program("decode", *each) for each in self.table.items()]
        pools: tuple[Pool, ...] = (self._pool(self.candidate.layout, (*prompts, *decodes)),)
        if prefill is not None:
            other = self._pool(prefill, tuple(prompts))
            pools += (other.model_copy(update={"answer_returns": self._answer_returns}),)
        model = ModelFacts.model_construct(
            vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids
        )
        return Plan.model_construct(digest=NO_DIGEST, model=model, pools=pools)

    def _program(self, phase: Phase, bucket: int, depth: int) -> Program:
        decodes = phase == "decode"
        return Program.model_construct(
            phase=phase,
            bucket=bucket,
            max_tokens=bucket * (depth + 1 if decodes else 1),
            max_seqs=min(bucket, self._limits.max_seqs),
            captured=decodes and self.predictor.hardware.sm > 0,
            depth=depth,
        )

    def _pool(self, layout: ParallelLayout, programs: tuple[Program, ...]) -> Pool:
        ranks = Layout.model_construct(attention=AttentionLayout(tp=layout.num_ranks))
        return Pool.model_construct(
            layout=ranks, limits=self._limits, programs=programs, buffers=self._buffers(layout)
        )

    def _buffers(self, layout: ParallelLayout) -> tuple[BufferSpec, ...]:
        """A page and a state slot, whose bytes say what is worth most to be kept."""
        page_bytes, slot_bytes = self._slot_sizes(layout)
        sizes = {"kv_cache": page_bytes, "state": slot_bytes}
        return tuple(
            BufferSpec.model_construct(
                name=arena, arena=arena, tensor=TensorSpec.of(shape=(1, size // 4), dtype="i32")
            )
            for arena, size in sizes.items()
            if size
        )

    def _slot_sizes(self, layout: ParallelLayout) -> tuple[int, int]:
        """Bytes of a page and of a state slot on a rank, in all layers."""
        return self.predictor.memory(layout).slot_sizes(self.candidate.knobs)

    @property
    def _answer_returns(self) -> AnswerReturns | None:
        """Whether answers go back to the pool of prompts, as a plan would have it."""
        predictor, limits, pair = self.predictor, self._limits, self.pair
        assert pair is not None, "of two pools"
        chunk_us = pair.steps.prefill_us(limits.max_tokens, 1, 0.0)
        prices = ReturnPrices(
            limits.page_size,
            *self._slot_sizes(self.candidate.layout),
            transport_of(predictor.hardware, self.candidate.num_gpus),
            pair.back.bytes_per_s,
            chunk_us / limits.max_tokens,
        )
        return choose_answer_returns(Ledger(), predictor.spec, self._workload, limits, prices)

    @cached_property
    def pair(self) -> PairTimes | None:
        """What belongs to the pool of prompts; None where one pool does all."""
        candidate, predictor = self.candidate, self.predictor
        if candidate.prefill is None:
            return None
        knobs, kinds = candidate.knobs, predictor.config.layer_types
        token_bytes, state_bytes = predictor.memory(candidate.prefill).layer_bytes(knobs)
        of_kind = {"full_attention": (token_bytes * knobs.page_size, 0)}
        layers = [of_kind.get(kind, (0, state_bytes)) for kind in kinds]
        sizes = PoolBytes(layers, *self._slot_sizes(candidate.layout))
        hardware, num_gpus = predictor.hardware, candidate.num_gpus
        return pair_times(self.times, candidate.prefill, sizes, hardware, num_gpus)

    @cached_property
    def times(self) -> PlanSteps:
        """What its steps are predicted to take."""
        limits, hardware = self._limits, self.predictor.hardware
        return PlanSteps(
            self.predictor.steps,
            self.candidate.layout,
            self.table,
            hardware.sm > 0,
            limits.max_tokens,
            limits.max_seq_len,
            self.candidate.knobs.kv_dtype,
        )

    def simulated(self, users: int | None, turns_per_s: float | None) -> dict[str, float]:
        """Means and percentiles of a load on one replica, by the names of service levels.

        Args:
            users: that are there all the time; None with arrivals.
            turns_per_s: that arrive, in place of users.
        """
        known, key = self.predictor.simulated, self._key(users, turns_per_s)
        if key not in known:
            known[key] = self._simulate(users, turns_per_s)
        return known[key]

    def _key(self, users: int | None, turns_per_s: float | None) -> Hashable:
        """All that the load on one replica depends on: many replicas of it have the same."""
        predictor, candidate = self.predictor, self.candidate
        spec = predictor.spec.with_concurrency(self.num_seqs)
        text = spec.model_dump_json(
            exclude={"slo": True, "objective": True, "parallelism": True, "target": {"count"}}
        )
        pools = (candidate.layout, candidate.prefill, candidate.knobs, *self.table.items())
        waits = (self.interleaved_tokens, self.gathered_tokens)
        return text, repr(predictor.engine), predictor.rollback, pools, waits, users, turns_per_s

    def _simulate(self, users: int | None, turns_per_s: float | None) -> dict[str, float]:
        from tokenspeed_plan.runtime.simulation.load_report import levels_of
        from tokenspeed_plan.runtime.simulation.load_run import simulate

        size, ramp = load_size(users, turns_per_s)
        predictor, plan = self.predictor, self.outline
        load = spec_load(predictor.spec.workload, size, plan.model.vocab_size)
        found = simulate(plan, self.times, load, predictor.acceptance, pair=self.pair)
        levels = levels_of(found.answers[ramp:-ramp])
        engine = predictor.engine
        if engine is None:
            return levels
        wait_ms = engine.first_token_us(predictor.spec.workload.prompts.mean) / 1e3
        return {
            name: ms if name.startswith("tpot") else ms + wait_ms for name, ms in levels.items()
        }

    def within(self, levels: Mapping[str, float], users: int | None, rate: float | None) -> bool:
        """Whether a load on one replica meets service levels; see `simulated`."""
        found = self.simulated(users, rate)
        return all(found[name] <= limit for name, limit in levels.items())


def load_size(users: int | None, turns_per_s: float | None) -> tuple[LoadSize, int]:
    """A load that is long enough to be judged, and the turns at both ends that do not count.

    Users begin together, with nothing cached; at the end fewer and fewer of them are left.
    """
    if users is None:
        ramp = round(RAMP * LEAST_REQUESTS)
        return LoadSize(LEAST_REQUESTS + 2 * ramp, None, turns_per_s), ramp
    counted = max(LEAST_REQUESTS, WAVES * users)
    return LoadSize(counted + 2 * users, users), users


def with_load(prediction: Prediction, deployment: Deployment) -> Prediction:
    """The prediction with what users see under the load of the spec."""
    rate = deployment.predictor.spec.workload.arrivals_per_s
    if rate is None:
        simulated = deployment.simulated(deployment.num_seqs, None)
    else:
        simulated = deployment.simulated(None, rate / deployment.candidate.replicas)
    return replace(prediction, simulated=simulated)


def judged(result: SearchResult, deployed: Callable[[Prediction], Deployment]) -> SearchResult:
    """The result whose best was simulated, where the spec has service levels on percentiles.

    Formulas rank; the leader is simulated, and whoever leads then, until the leader has been. Where
    `MOST_LEADERS` were, the best of those is it.

    Args:
        result: of a search.
        deployed: how a prediction's programs would be written.
    """
    if not result.percentiles:
        return result
    for _ in range(MOST_LEADERS):
        best = result.best
        if best.simulated is not None:
            return result
        result = result.with_best(with_load(best, deployed(best)))
    known = tuple(each for each in result.predictions if each.simulated is not None)
    return replace(result, predictions=known)


def most_users(deployment: Deployment, levels: Mapping[str, float]) -> int | None:
    """The most users of all replicas within service levels, each with memory of its own.

    None where not even one is, or not one fits.
    """
    candidate = deployment.candidate
    replicas = candidate.replicas

    def is_good(users: int) -> bool:
        predictor = deployment.predictor.with_concurrency(users * replicas)
        sized = Deployment(predictor, candidate, {})
        return predictor.fits(candidate) and sized.within(levels, users, None)

    found = largest_count(is_good, MAX_CONCURRENCY // replicas, CLOSE_ENOUGH)
    return None if found is None else found * replicas


def most_arrivals(deployment: Deployment, levels: Mapping[str, float]) -> float | None:
    """The most turns a second of all replicas within service levels; None where none are."""
    workload, replicas = deployment.predictor.spec.workload, deployment.candidate.replicas
    first = (workload.arrivals_per_s or 1.0) / replicas
    found = largest_rate(lambda rate: deployment.within(levels, None, rate), first)
    return None if found is None else found * replicas
