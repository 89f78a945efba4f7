"""What a deployment costs its users: times with their intervals, rates and prices."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenspeed_plan.planner.advisor.batch_prices import BatchPrices, PriceSource
from tokenspeed_plan.planner.advisor.batch_run import BatchLimits, BatchRun, run_batch
from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.engine_profile import Engine
from tokenspeed_plan.planner.advisor.memory_model import MemoryMap, MemoryModel
from tokenspeed_plan.planner.advisor.numbers import ceil_div, digits, powers_of_two
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.advisor.transfer import Transfer, plan_transfer
from tokenspeed_plan.planner.advisor.workload import (
    ACCEPTANCE,
    Conversation,
    Demand,
    Turn,
    TurnTime,
    conversation,
    serve,
    tokens_per_step,
)
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.lengths import rows_of
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import Holding
from tokenspeed_plan.planner.spec import Spec, SpeculationSpec
from tokenspeed_plan.plans.types import RollbackWord

SHARING_ERROR = 0.10  # relative error of the model of a pool that several users share
ROWS_PER_SEQ = 8  # rows of a batch whose number the spec does not say, for each sequence


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a user of a candidate sees.

    Attributes:
        candidate: the deployment.
        turn: an average turn.
        step: a decode step at the average batch. prompt: the prefill of an average turn.
        first_turn_ttft_us: time to the first token of a conversation's first turn.
        token_us: of one token at the average batch, when nothing else happens.
        concurrency: users of the whole deployment.
        turns: of a conversation.
        output_tokens: of a turn. prompt_tokens: of an average turn.
        hit_rate: share of prompt tokens that come from the prefix cache.
        error: half the width of the interval of times, relative.
        price_per_hour: USD for one GPU.
        memory: of the fullest rank.
        transfer: of a prompt's cache, where there are two pools.
        run: of a batch on one replica, from its first row to its last; None for other workloads.
    """

    candidate: Candidate
    turn: TurnTime
    step: StepTime
    prompt: StepTime
    first_turn_ttft_us: float
    token_us: float
    concurrency: int
    turns: int
    output_tokens: float
    prompt_tokens: float
    hit_rate: float
    error: float
    price_per_hour: float
    memory: MemoryMap
    transfer: Transfer | None = None
    run: BatchRun | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers in a second, of all GPUs: over the whole batch, else at all times."""
        if self.run:
            return self.candidate.replicas * self.run.output_tokens_per_s
        users = min(self.candidate.replicas * self.turn.users, self.concurrency)
        return users * self.output_tokens / self.turn.turn_us * 1e6

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by their stable names; throughput and cost count output tokens."""
        turn = self.turn
        turn_s = turn.turn_us * 1e-6
        tpot_us = self.token_us
        if self.output_tokens > 1:
            tpot_us = turn.decode_us / (self.output_tokens - 1)
        gpus = self.candidate.num_gpus
        tokens_per_s = self.tokens_per_s
        total_tokens = self.prompt_tokens + self.output_tokens
        total_tokens_per_s = tokens_per_s / self.output_tokens * total_tokens
        usd_per_s = gpus * self.price_per_hour / 3600.0
        return {
            "ttft_ms": turn.first_token_us / 1e3,
            "first_turn_ttft_ms": self.first_turn_ttft_us / 1e3,
            "tpot_ms": tpot_us / 1e3,
            "turn_time_ms": turn.turn_us / 1e3,
            "tokens_per_s_user": self.output_tokens / turn_s,
            "decode_tokens_per_s_user": 1e6 / tpot_us,
            "tokens_per_s_gpu": tokens_per_s / gpus,
            "total_tokens_per_s_gpu": total_tokens_per_s / gpus,
            "cost_per_million_tokens_usd": usd_per_s / tokens_per_s * 1e6,
            "cache_hit_rate": self.hit_rate,
        }

    def interval(self, name: str) -> tuple[float, float]:
        """The low and the high end of a metric; both are the value where no time is in it."""
        value = self.metrics[name]
        if name == "cache_hit_rate":
            return value, value
        return value / (1.0 + self.error), value * (1.0 + self.error)

    def as_json(self) -> dict[str, float]:
        """The metrics, rounded."""
        rounded = {}
        for name, value in self.metrics.items():
            rounded[name] = digits(value)
        return rounded


@dataclass
class Predictor:
    """Predicts candidates of one spec on one kind of machine.

    Attributes:
        engine: another engine to model in place of our runtime.
        reserved_price: price GPUs as reserved, not as on demand.
        rollback: how rejected drafts are taken back.
        memories, maps: the memory model of each layout, and the map of each candidate, so far.
        shared_steps: the time of steps, if another predictor's.
    """

    spec: Spec
    config: ModelConfig
    hardware: HardwareSpec
    engine: Engine | None = None
    reserved_price: bool = False
    rollback: RollbackWord = "snapshot"
    memories: dict[ParallelLayout, MemoryModel] = field(default_factory=dict)
    maps: dict[Candidate, MemoryMap] = field(default_factory=dict)
    shared_steps: StepModel | None = None

    def with_concurrency(self, num_seqs: int) -> Predictor:
        """A predictor for so many sequences that shares what does not depend on their number."""
        spec = self.spec.with_concurrency(num_seqs)
        return replace(self, spec=spec, maps={}, shared_steps=self.steps)

    @cached_property
    def steps(self) -> StepModel:
        """The time of steps."""
        if self.shared_steps:
            return self.shared_steps
        return StepModel(
            self.config,
            self.hardware,
            weights=self.spec.model.weights,
            skew=self.spec.workload.skew,
            engine=self.engine,
            rollback=self.rollback,
            draft_vocab=self.spec.draft_vocab,
        )

    @cached_property
    def holding(self) -> Holding:
        """What a sequence of the workload holds, beside what the longest one does."""
        return Holding.of(self.spec.workload)

    def memory(self, layout: ParallelLayout) -> MemoryModel:
        """The memory of a layout."""
        if layout not in self.memories:
            self.memories[layout] = MemoryModel(self.steps, layout, self.holding)
        return self.memories[layout]

    def predict(
        self,
        candidate: Candidate,
        depths: Mapping[int, int] | None = None,
        interleaved_tokens: int | None = None,
    ) -> Prediction:
        """Predict a candidate that is legal and fits; neither is checked here.

        Args:
            candidate: what to predict.
            depths: drafts of a step by decode bucket; None for the candidate's at every batch.
            interleaved_tokens: of prompts between two decode steps; None for a chunk.
        """
        knobs, workload = candidate.knobs, self.spec.workload
        if interleaved_tokens:
            knobs = replace(knobs, prefill_chunk=interleaved_tokens)
        talk = conversation(workload, cached=knobs.checkpoint_tokens != 0)
        users = ceil_div(workload.num_seqs, candidate.replicas)
        prefill_layout = candidate.prefill or candidate.layout
        decode = _Decode(self, candidate.layout, knobs, talk.mean_context, depths or {})
        run = None
        if workload.is_batch_of_rows and candidate.prefill is None:
            run = self._run(candidate, decode, users, interleaved_tokens)
        first = self._prompt(prefill_layout, knobs, talk.first)
        later = self._prompt(prefill_layout, knobs, talk.later)
        prompt = (first + later * (talk.turns - 1)) * (1.0 / talk.turns)
        together_us = None
        if run and users > 1:
            step, tokens = self._mean_prefill(prefill_layout, knobs, run)
            first = prompt = step * (talk.first.new_tokens / tokens)
            knobs = replace(knobs, prefill_chunk=tokens)
            together_us = step.total_us
        transfer = handover_us = None
        if candidate.prefill:
            memory = self.memory(candidate.prefill)
            transfer = plan_transfer(memory, candidate, talk.later.new_tokens, prompt)
            handover_us = transfer.exposed_us
        arrivals_per_s = workload.arrivals_per_s
        if arrivals_per_s:
            arrivals_per_s /= candidate.replicas
        demand = replace(decode, knobs=knobs).demand(talk, prompt.total_us, users, together_us)
        demand = replace(demand, prefill_parallelism=prefill_layout.attention_dp)
        if interleaved_tokens:
            demand = replace(demand, longest_wait_us=demand.own_prompt_us / demand.chunks)
        served = serve(demand, users, arrivals_per_s, handover_us)
        batch = max(served.batch, 1.0)
        step = decode.at(round(batch))
        waiting_us = max(served.first_token_us - prompt.total_us, 0.0)
        return Prediction(
            candidate=candidate,
            turn=served,
            step=step,
            prompt=prompt,
            first_turn_ttft_us=first.total_us + waiting_us,
            token_us=demand.token_us_at(batch),
            concurrency=workload.num_seqs,
            turns=talk.turns,
            output_tokens=talk.output_tokens,
            prompt_tokens=talk.mean(lambda turn: turn.prompt_tokens),
            hit_rate=talk.hit_rate,
            error=self._error(step, prompt, demand.tokens / decode.accepted(round(batch)), users),
            price_per_hour=self._price_per_hour,
            memory=self.fullest(candidate),
            transfer=transfer,
            run=run,
        )

    def token_us(self, candidate: Candidate, batch: int, depth: int) -> float:
        """Microseconds for one token of a sequence, in the middle of the conversation."""
        kv_dtype = candidate.knobs.kv_dtype
        context = conversation(self.spec.workload).mean_context
        step = self.steps.decode(candidate.layout, batch, context, depth, kv_dtype)
        return step.total_us / self.accepted(depth)

    @cached_property
    def acceptance(self) -> tuple[float, ...]:
        """The share of drafts that are accepted if those before were, by place.

        The spec's comes first, then the model's own, then the usual one.
        """
        speculation = self.spec.speculation
        if isinstance(speculation, SpeculationSpec) and speculation.acceptance is not None:
            stated = speculation.acceptance
            if isinstance(stated, float):
                return (stated,)
            return stated
        return self.config.mtp_acceptance or ACCEPTANCE

    def accepted(self, depth: int) -> float:
        """Expected tokens of a step with so many drafts."""
        return tokens_per_step(depth, self.acceptance)

    def fullest(self, candidate: Candidate) -> MemoryMap:
        """The memory of the fullest pool, at the spec's concurrency and longest conversation."""
        if candidate not in self.maps:
            self.maps[candidate] = self._fullest(candidate)
        return self.maps[candidate]

    def _fullest(self, candidate: Candidate) -> MemoryMap:
        workload = self.spec.workload
        users = ceil_div(workload.num_seqs, candidate.replicas)
        tokens = workload.max_conversation_tokens
        decode = self.memory(candidate.layout)
        fullest = decode.map(candidate.knobs, users, tokens)
        if candidate.prefill:
            prefill = self.memory(candidate.prefill)
            other = prefill.map(candidate.knobs, users, tokens)
            if other.total > fullest.total:
                fullest = other
        return fullest

    def fits(self, candidate: Candidate) -> bool:
        """Whether each GPU has the memory."""
        return self.fullest(candidate).total <= self.hardware.memory_bytes

    def _prompt(self, layout: ParallelLayout, knobs: Knobs, turn: Turn) -> StepTime:
        """All chunks of a turn's prompt.

        Full chunks are priced in the middle of the new tokens, the rest at their end.
        """
        chunk = knobs.prefill_chunk
        full, rest = divmod(round(turn.new_tokens), chunk)
        total = StepTime()
        if full:
            cached = round(turn.cached_tokens)
            middle = cached + (full - 1) * chunk // 2
            step = self.steps.prefill(layout, chunk, middle, knobs.kv_dtype)
            total += step * full
        if rest:
            before = round(turn.prompt_tokens) - rest
            total += self.steps.prefill(layout, rest, before, knobs.kv_dtype)
        return total

    def _mean_prefill(
        self, layout: ParallelLayout, knobs: Knobs, run: BatchRun
    ) -> tuple[StepTime, int]:
        """The average prefill step of a run, which several prompts share, and its tokens."""
        tokens = max(round(run.mean_prefill_tokens), 1)
        return self._rows_prefill(layout, knobs, tokens), tokens

    def _rows_prefill(self, layout: ParallelLayout, knobs: Knobs, tokens: int) -> StepTime:
        """A prefill step of so many tokens of a batch's rows.

        Rows of the mean length share it. One that is longer than a chunk is in its middle.
        """
        mean = self.spec.workload.prompts.mean
        seqs = min(max(round(tokens / mean), 1), tokens)
        before = max(round(mean) - knobs.prefill_chunk, 0) // 2
        return self.steps.prefill(layout, tokens, before, knobs.kv_dtype, seqs=seqs)

    def _run(
        self, candidate: Candidate, decode: _Decode, users: int, interleaved: int | None
    ) -> BatchRun:
        """The batch on one replica; with depths by bucket its programs are padded to those."""
        workload, layout, knobs = self.spec.workload, candidate.layout, candidate.knobs
        num_rows = ceil_div(workload.rows or ROWS_PER_SEQ * workload.num_seqs, candidate.replicas)
        rows = rows_of(workload.prompts, workload.outputs, num_rows)
        chunk = knobs.prefill_chunk
        limits = BatchLimits(users, chunk, min(interleaved or chunk, chunk))
        buckets = sorted(decode.depths) or sorted({*powers_of_two(users), users})
        is_padded = bool(decode.depths) and self.hardware.sm > 0
        prices = BatchPrices(self._source(layout, knobs, decode), buckets, is_padded, chunk)
        return run_batch(rows, limits, prices)

    def _source(self, layout: ParallelLayout, knobs: Knobs, decode: _Decode) -> PriceSource:
        """The prices of a batch's steps; an engine's profile has its own host work."""
        workload = self.spec.workload

        def prefill_us(tokens: int) -> float:
            step = self._rows_prefill(layout, knobs, tokens)
            return step.total_us / layout.attention_dp

        begin = round(workload.prompts.mean)
        return PriceSource(
            prefill_us=prefill_us,
            decode_us=lambda bucket, context: decode.at(bucket, context).total_us,
            tokens=decode.accepted,
            host_us=0.0 if self.engine else self.hardware.host_seq_us,
            page_size=knobs.page_size,
            contexts=(begin, begin + max(round(workload.outputs.mean), 1)),
        )

    def _error(self, step: StepTime, prompt: StepTime, steps: float, users: int) -> float:
        """The error of the steps' times, and of the model of users who share a pool."""
        total = prompt + step * steps
        of_time = total.error_us(self.hardware.errors) / total.total_us
        if users == 1:
            return of_time
        return math.hypot(of_time, SHARING_ERROR)

    @property
    def _price_per_hour(self) -> float:
        if self.reserved_price:
            return self.hardware.usd_per_hour_reserved
        return self.hardware.usd_per_hour_on_demand


@dataclass(frozen=True, slots=True)
class _Decode:
    """Decode steps of a pool by their batch, each with the drafts of its bucket."""

    predictor: Predictor
    layout: ParallelLayout
    knobs: Knobs
    context_tokens: int
    depths: Mapping[int, int]

    def depth(self, batch: int) -> int:
        """Drafts of the smallest bucket that holds the batch."""
        buckets = sorted(self.depths)
        if not buckets:
            return self.knobs.depth
        index = min(bisect_left(buckets, batch), len(buckets) - 1)
        return self.depths[buckets[index]]

    def at(self, batch: int, context_tokens: int | None = None) -> StepTime:
        """One step; by default in the middle of the conversation."""
        context = self.context_tokens
        if context_tokens is not None:
            context = context_tokens
        depth, kv_dtype = self.depth(batch), self.knobs.kv_dtype
        return self.predictor.steps.decode(self.layout, batch, context, depth, kv_dtype)

    def accepted(self, batch: int) -> float:
        """Tokens that a step yields for each sequence."""
        return self.predictor.accepted(self.depth(batch))

    def demand(
        self, talk: Conversation, prefill_us: float, users: int, together_us: float | None = None
    ) -> Demand:
        """What an average turn asks of the pool.

        Args:
            talk: the conversation.
            prefill_us: the pool's time for the prompt.
            users: of the pool.
            together_us: of a prefill step that several prompts share; None where none do.
        """
        chunk = self.knobs.prefill_chunk
        chunks = talk.mean(lambda turn: math.ceil(turn.new_tokens / chunk))
        own_us = None
        if together_us is not None:
            own_us = chunks * together_us
        return Demand(
            prefill_us=prefill_us,
            chunks=chunks,
            own_us=own_us,
            tokens=talk.output_tokens - 1,
            step_us=self.step_us(users),
            token_us=self.token_us(users),
        )

    def step_us(self, users: int) -> Callable[[float], float]:
        """Microseconds of a step by its batch, linear between powers of two."""
        return self._between(users, lambda batch: self.at(batch).total_us)

    def token_us(self, users: int) -> Callable[[float], float]:
        """Microseconds of a token of a sequence by the batch."""
        return self._between(users, lambda batch: self.at(batch).total_us / self.accepted(batch))

    def _between(self, users: int, of: Callable[[int], float]) -> Callable[[float], float]:
        batches = sorted({*powers_of_two(users), users})
        times_us = [of(batch) for batch in batches]

        def at(batch: float) -> float:
            upper = min(bisect_left(batches, batch), len(batches) - 1)
            lower = upper - 1
            above, above_us = batches[upper], times_us[upper]
            if batch >= above or upper == 0:
                return above_us
            below, below_us = batches[lower], times_us[lower]
            share = (batch - below) / (above - below)
            return below_us + share * (above_us - below_us)

        return at
