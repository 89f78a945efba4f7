"""What a deployment costs its users: times with their intervals, rates and prices."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from tokenspeed_plan.planner.advisor.answer_returns import computed_prompts
from tokenspeed_plan.planner.advisor.batch_prices import BatchModel, RowShape
from tokenspeed_plan.planner.advisor.batch_run import BatchRun
from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.engine_profile import Engine
from tokenspeed_plan.planner.advisor.memory_model import MemoryMap, MemoryModel
from tokenspeed_plan.planner.advisor.numbers import ceil_div, digits, powers_of_two
from tokenspeed_plan.planner.advisor.step_model import StepModel, host_us
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
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import Holding
from tokenspeed_plan.planner.spec import Spec, SpeculationSpec, WorkloadSpec
from tokenspeed_plan.planner.token_lengths import rows_of
from tokenspeed_plan.plans.types import RollbackWord

SHARING_ERROR = 0.10  # relative error of the model of a pool that several users share
# Rows of a batch for each sequence: where the spec does not say their number, while deployments are
# compared; of a plan; and at most, since more of them are like these.
SEARCH_ROWS_PER_SEQ, ROWS_PER_SEQ, MAX_ROWS_PER_SEQ = 3, 8, 16


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
        memory_of: computes the memory of the fullest rank.
        transfer: of a prompt's cache, where there are two pools.
        run: of a batch on one replica, from its first row to its last; None for other workloads.
        simulated: means and percentiles under the load of the spec, by the names of service levels;
            None until it is simulated.
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
    memory_of: Callable[[], MemoryMap] = field(repr=False, compare=False)
    transfer: Transfer | None = None
    run: BatchRun | None = None
    simulated: Mapping[str, float] | None = None

    @property
    def memory(self) -> MemoryMap:
        """Of the fullest rank."""
        return self.memory_of()

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

    def level(self, name: str) -> float:
        """What a service level is judged by; a mean stands for a percentile until that is known."""
        metrics, simulated = self.metrics, self.simulated or {}
        if name in metrics:
            return metrics[name]
        time, _, _ = name.partition("_")
        return simulated.get(name, metrics[f"{time}_ms"])

    def interval(self, name: str) -> tuple[float, float]:
        """The low and the high end of a metric; both are the value where no time is in it."""
        value = self.level(name)
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
        simulated: what loads were like so far, by all that they depend on; other machines' too.
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
    simulated: dict[Hashable, dict[str, float]] = field(default_factory=dict)
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
            skew=self.spec.workload.routing_skew,
            engine=self.engine,
            rollback=self.rollback,
            draft_vocab=self.spec.draft_vocab,
            grammar=self.spec.grammar,
            penalties=self.spec.penalties,
            head=self.spec.model.head,
            stored_state=self.spec.stored_state,
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
        gathered_tokens: int = 0,
    ) -> Prediction:
        """Predict a candidate that is legal and fits; neither is checked here.

        Args:
            candidate: what to predict.
            depths: drafts of a step by decode bucket; None for the candidate's at every batch.
            interleaved_tokens: of prompts between two decode steps; None for a chunk.
            gathered_tokens: for which a batch's prompts wait while all sequences are taken.
        """
        workload = self.spec.workload
        knobs = candidate.knobs.with_chunk(interleaved_tokens)
        talk = conversation(workload, cached=knobs.checkpoint_tokens != 0)
        asked = computed_prompts(talk, self.spec, self.memory(candidate.layout), candidate)
        users = ceil_div(workload.num_seqs, candidate.replicas)
        prefill_layout = candidate.prefill or candidate.layout
        decode = _Decode(self, candidate.layout, knobs, talk.mean_context, depths or {})
        first, prompt = self._prompts(prefill_layout, knobs, asked)
        shared = transfer = handover_us = None
        if workload.is_batch_of_rows and candidate.prefill is None:
            shared = self._share(candidate, decode, users, (interleaved_tokens, gathered_tokens))
            if users > 1:
                first = prompt = shared.part(talk.first.new_tokens)
        if candidate.prefill:
            memory, lacking = self.memory(candidate.prefill), talk.later.new_tokens
            transfer = plan_transfer(memory, candidate, asked.later.new_tokens, lacking, prompt)
            handover_us = transfer.exposed_us + decode.step_us(users)(1.0)  # of the last token
        demand = decode.demand(asked, prompt.total_us, users, prefill_layout.attention_dp)
        if interleaved_tokens:
            demand = demand.interleaved()
        if shared and users > 1:
            demand = shared.demand(demand, talk.first.new_tokens)
        served = serve(demand, users, _arrivals_per_s(workload, candidate), handover_us)
        prompt_tokens = talk.mean(lambda turn: turn.prompt_tokens)
        served = served.later_by(_front_end_us(self.engine, prompt_tokens))
        batch = max(served.batch, 1.0)
        step = decode.at(round(batch))
        return Prediction(
            candidate=candidate,
            turn=served,
            step=step,
            prompt=prompt,
            first_turn_ttft_us=first.total_us + max(served.first_token_us - prompt.total_us, 0.0),
            token_us=demand.token_us_at(batch),
            concurrency=workload.num_seqs,
            turns=talk.turns,
            output_tokens=talk.output_tokens,
            prompt_tokens=prompt_tokens,
            hit_rate=asked.hit_rate,
            error=self._error(step, prompt, demand.tokens / decode.accepted(round(batch)), users),
            price_per_hour=self._price_per_hour,
            memory_of=partial(self.fullest, candidate),
            transfer=transfer,
            run=shared.run if shared else None,
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
        fullest = self.memory(candidate.layout).map(candidate.knobs, users, tokens)
        if candidate.prefill:
            other = self.memory(candidate.prefill).map(candidate.knobs, users, tokens)
            if other.total > fullest.total:
                fullest = other
        return fullest

    def fits(self, candidate: Candidate) -> bool:
        """Whether each GPU has the memory."""
        workload, capacity = self.spec.workload, self.hardware.memory_bytes
        users = ceil_div(workload.num_seqs, candidate.replicas)
        tokens = workload.max_conversation_tokens
        pools = [layout for layout in (candidate.layout, candidate.prefill) if layout]
        return all(
            self.memory(layout).fits(candidate.knobs, users, tokens, capacity) for layout in pools
        )

    def _prompts(
        self, layout: ParallelLayout, knobs: Knobs, talk: Conversation
    ) -> tuple[StepTime, StepTime]:
        """The prompts of the first and of an average turn, each computed alone."""
        first = self._prompt(layout, knobs, talk.first)
        later = self._prompt(layout, knobs, talk.later)
        return first, (first + later * (talk.turns - 1)) * (1.0 / talk.turns)

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

    def _share(
        self, candidate: Candidate, decode: _Decode, users: int, waits: tuple[int | None, int]
    ) -> _Shared:
        """A batch of the workload's rows, and its average prefill step.

        `waits` are the interleaved and the gathered tokens.
        """
        interleaved_tokens, gathered_tokens = waits
        batch = self.batch(candidate, decode.depths, users)
        per_seq = ROWS_PER_SEQ if decode.depths else SEARCH_ROWS_PER_SEQ
        rows = _rows(self.spec.workload, per_seq)[:: candidate.replicas]
        workload, wait_us = self.spec.workload, math.inf
        shared = workload.shared_tokens
        run = batch.run(rows, users, interleaved_tokens, gathered_tokens, shared)
        tokens = max(round(run.mean_prefill_tokens), 1)
        shape = RowShape(workload.prompts.mean, workload.outputs.mean, shared)
        if interleaved_tokens:
            wait_us = batch.prefill(shape, interleaved_tokens).total_us
        return _Shared(run, batch.prefill(shape, tokens), tokens, wait_us)

    def batch(self, candidate: Candidate, depths: Mapping[int, int], users: int) -> BatchModel:
        """How a batch runs on one replica.

        Args:
            candidate: the deployment.
            depths: drafts of a step by decode bucket, whose programs are then padded to; where it
                is empty, those of the candidate.
            users: sequences at once.
        """
        decode = _Decode(self, candidate.layout, candidate.knobs, 0, depths)
        return BatchModel(
            self.steps,
            candidate.layout,
            candidate.knobs,
            decode.depth,
            self.accepted,
            sorted(decode.depths) or sorted({*powers_of_two(users), users}),
            bool(decode.depths) and self.hardware.sm > 0,
        )

    def _error(self, step: StepTime, prompt: StepTime, steps: float, users: int) -> float:
        """The error of the steps' times, and of the model of users who share a pool."""
        total = prompt + step * steps
        of_time = total.error_us(self.hardware) / total.total_us
        if users == 1:
            return of_time
        return math.hypot(of_time, SHARING_ERROR)

    @property
    def _price_per_hour(self) -> float:
        if self.reserved_price:
            return self.hardware.usd_per_hour_reserved
        return self.hardware.usd_per_hour_on_demand


def _front_end_us(engine: Engine | None, prompt_tokens: float) -> float:
    """What another engine's front end adds to a first token; ours is in the host's terms."""
    return engine.first_token_us(prompt_tokens) if engine else 0.0


def _arrivals_per_s(workload: WorkloadSpec, candidate: Candidate) -> float | None:
    """Turns that arrive at one replica."""
    if workload.arrivals_per_s is None:
        return None
    return workload.arrivals_per_s / candidate.replicas


def _rows(workload: WorkloadSpec, per_seq: int) -> Sequence[tuple[int, int]]:
    """The rows of a batch."""
    stated = workload.rows or per_seq * workload.num_seqs
    count = min(stated, MAX_ROWS_PER_SEQ * workload.num_seqs)
    rows = rows_of(workload.prompts, workload.outputs, count)
    least = workload.shared_tokens + 1
    return [(max(prompt, least), output) for prompt, output in rows]


@dataclass(frozen=True, slots=True)
class _Shared:
    """Prompts that are computed together: a run, its average prefill step, and its tokens.

    `wait_us`: the most time of prompts between two decode steps, where that is limited.
    """

    run: BatchRun
    step: StepTime
    tokens: int
    wait_us: float

    def part(self, new_tokens: float) -> StepTime:
        """What a prompt takes of the steps that compute it with others."""
        return self.step * (new_tokens / self.tokens)

    def demand(self, demand: Demand, new_tokens: float) -> Demand:
        """The demand of a turn that waits for whole steps, and takes a part of them."""
        chunks = math.ceil(new_tokens / self.tokens)
        own_us = chunks * self.step.total_us
        return replace(demand, chunks=chunks, own_us=own_us, longest_wait_us=self.wait_us)


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

    def at(self, batch: int) -> StepTime:
        """One step, with the work of the host that it does not hide."""
        steps = self.predictor.steps
        step = steps.decode(
            self.layout, batch, self.context_tokens, self.depth(batch), self.knobs.kv_dtype
        )
        if not steps.hardware.sm:
            return step
        return step + StepTime(host=max(host_us(steps, batch) - step.total_us, 0.0))

    def accepted(self, batch: int) -> float:
        """Tokens that a step yields for each sequence."""
        return self.predictor.accepted(self.depth(batch))

    def demand(self, talk: Conversation, prefill_us: float, users: int, parallelism: int) -> Demand:
        """What an average turn asks of the pool."""
        chunk = self.knobs.prefill_chunk
        return Demand(
            prefill_us=prefill_us,
            chunks=talk.mean(lambda turn: math.ceil(turn.new_tokens / chunk)),
            tokens=talk.output_tokens - 1,
            step_us=self.step_us(users),
            token_us=self.token_us(users),
            prefill_parallelism=parallelism,
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
