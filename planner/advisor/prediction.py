"""What a deployment would do: times with their intervals, rates, cost, and what binds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.advisor.memory_model import MemoryMap, MemoryModel
from tokenspeed_plan.planner.advisor.step_model import Engine, StepModel, StepTime
from tokenspeed_plan.planner.advisor.transfer import Transfer, plan_transfer
from tokenspeed_plan.planner.advisor.workload import (
    ACCEPTANCE,
    Conversation,
    Demand,
    Served,
    Turn,
    conversation,
    serve,
    tokens_a_step,
)
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import Spec, SpeculationSpec

SHARING_ERROR = 0.10  # of the model of a pool that several users share, where there are several


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a user of a candidate sees.

    `step` is a decode step at the average batch, `prompt` the prefill of an average turn, with
    their kinds of time. Throughput and cost count output tokens; `error` is the relative half-width
    of the interval of times.
    """

    candidate: Candidate
    served: Served
    step: StepTime
    prompt: StepTime
    first_turn_ttft_us: float
    concurrency: int
    output_tokens: int
    prompt_tokens: float
    hit_rate: float
    error: float
    price_per_hour: float
    memory: MemoryMap
    transfer: Transfer | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by their stable names."""
        turn_s = self.served.turn_us * 1e-6
        users = min(self.candidate.replicas * self.served.users, self.concurrency)
        tokens_per_s = users * self.output_tokens / turn_s
        read_per_s = tokens_per_s / self.output_tokens * (self.prompt_tokens + self.output_tokens)
        gpus = self.candidate.num_gpus
        return {
            "ttft_ms": self.served.first_token_us / 1e3,
            "first_turn_ttft_ms": self.first_turn_ttft_us / 1e3,
            "tpot_ms": self.served.decode_us / self.output_tokens / 1e3,
            "turn_time_ms": self.served.turn_us / 1e3,
            "tokens_per_s_user": self.output_tokens / turn_s,
            "decode_tokens_per_s_user": self.output_tokens / (self.served.decode_us * 1e-6),
            "tokens_per_s_gpu": tokens_per_s / gpus,
            "total_tokens_per_s_gpu": read_per_s / gpus,
            "cost_per_million_tokens_usd": gpus * self.price_per_hour / 3600.0 / tokens_per_s * 1e6,
            "cache_hit_rate": self.hit_rate,
        }

    def interval(self, name: str) -> tuple[float, float]:
        """The interval of a number; one that no time goes into has none."""
        value = self.metrics[name]
        if name == "cache_hit_rate":
            return value, value
        return value / (1.0 + self.error), value * (1.0 + self.error)

    def as_json(self) -> dict[str, float]:
        """Numbers to five digits."""
        return {name: digits(value) for name, value in self.metrics.items()}


def digits(value: float) -> float:
    """Five significant digits: more would be noise, and would differ between machines."""
    return float(f"{value:.5g}")


@dataclass
class Predictor:
    """Predicts candidates of one spec on one kind of machine."""

    spec: Spec
    config: ModelConfig
    hardware: HardwareSpec
    engine: Engine | None = None
    reserved_price: bool = False
    recomputes: bool = False
    memories: dict[ParallelLayout, MemoryModel] = field(default_factory=dict)

    @cached_property
    def steps(self) -> StepModel:
        """Prices of replays."""
        weights, skew = self.spec.model.weights, self.spec.workload.skew
        return StepModel(
            self.config,
            self.hardware,
            weights,
            skew,
            self.engine,
            self.recomputes,
            self.spec.draft_vocab,
        )

    def memory(self, layout: ParallelLayout) -> MemoryModel:
        """The memory of a layout."""
        if layout not in self.memories:
            self.memories[layout] = MemoryModel(self.steps, layout)
        return self.memories[layout]

    def predict(self, candidate: Candidate) -> Prediction:
        """What its users see. Whether it is legal and fits is for the caller to ask."""
        workload, knobs = self.spec.workload, candidate.knobs
        talk = conversation(workload, cached=knobs.checkpoint_tokens != 0)
        users = -(-workload.concurrency // candidate.replicas)
        prefill_layout = candidate.prefill or candidate.layout
        first, later = (
            self._prompt(prefill_layout, knobs, turn) for turn in (talk.first, talk.later)
        )
        prompt = (first + later * (talk.turns - 1)) * (1.0 / talk.turns)
        steps = talk.output_tokens / self.accepted(knobs.depth)
        step_us = self._step_us(candidate.layout, knobs, talk, users)
        chunks = talk.mean(lambda turn: math.ceil(turn.new_tokens / knobs.prefill_chunk))
        demand = Demand(prompt.total_us, chunks, steps, step_us, prefill_layout.attention_dp)
        arrivals = workload.arrivals_per_s
        arrivals = arrivals / candidate.replicas if arrivals else None
        transfer = (
            plan_transfer(self.steps, candidate, talk.later.new_tokens, prompt)
            if candidate.prefill
            else None
        )
        served = serve(demand, users, arrivals, transfer.exposed_us if transfer else None)
        step = self._step(candidate.layout, knobs, talk, round(served.batch))
        return Prediction(
            candidate=candidate,
            served=served,
            step=step,
            prompt=prompt,
            first_turn_ttft_us=first.total_us + max(served.first_token_us - prompt.total_us, 0.0),
            concurrency=workload.concurrency,
            output_tokens=talk.output_tokens,
            prompt_tokens=talk.mean(lambda turn: turn.prompt_tokens),
            hit_rate=talk.hit_rate,
            error=self._error(step, prompt, steps, users),
            price_per_hour=self._price(),
            memory=self.fullest(candidate),
            transfer=transfer,
        )

    def token_us(self, candidate: Candidate, batch: int, depth: int) -> float:
        """Time of a step a token of a sequence, at a decode batch in mid-conversation."""
        context = round(conversation(self.spec.workload).mean(lambda turn: turn.context_tokens))
        step = self.steps.decode(candidate.layout, batch, context, depth, candidate.knobs.kv_dtype)
        return step.total_us / self.accepted(depth)

    @cached_property
    def acceptance(self) -> tuple[float, ...]:
        """Of each place, the share of drafts that are right if those before were: the spec's, the model's, or usual."""
        asked = self.spec.speculation
        given = asked.acceptance if isinstance(asked, SpeculationSpec) else None
        if given is None:
            return self.config.mtp_acceptance or ACCEPTANCE
        return (given,) if isinstance(given, float) else given

    def accepted(self, depth: int) -> float:
        """Tokens of a step."""
        return tokens_a_step(depth, self.acceptance)

    def fullest(self, candidate: Candidate) -> MemoryMap:
        """The map of the pool that needs most, at the spec's concurrency and longest conversation."""
        users = -(-self.spec.workload.concurrency // candidate.replicas)
        tokens = self.spec.workload.max_conversation_tokens
        pools = [self.memory(candidate.layout).map(candidate.knobs, users, tokens)]
        if candidate.prefill:
            pools.append(self.memory(candidate.prefill).map(candidate.knobs, users, tokens))
        return max(pools, key=lambda pool: pool.total)

    def _prompt(self, layout: ParallelLayout, knobs: Knobs, turn: Turn) -> StepTime:
        """All chunks of a turn's prompt: full ones in the middle of it, and what is left at its end."""
        new, chunk = round(turn.new_tokens), knobs.prefill_chunk
        full, rest = divmod(new, chunk)
        total = StepTime()
        if full:
            middle = round(turn.cached_tokens) + (full - 1) * chunk // 2
            total += self.steps.prefill(layout, chunk, middle, knobs.kv_dtype) * full
        if rest:
            total += self.steps.prefill(
                layout, rest, round(turn.prompt_tokens) - rest, knobs.kv_dtype
            )
        return total

    def _step(
        self, layout: ParallelLayout, knobs: Knobs, talk: Conversation, batch: int
    ) -> StepTime:
        context = round(talk.mean(lambda turn: turn.context_tokens))
        return self.steps.decode(layout, max(batch, 1), context, knobs.depth, knobs.kv_dtype)

    def _step_us(
        self, layout: ParallelLayout, knobs: Knobs, talk: Conversation, users: int
    ) -> Callable[[float], float]:
        """A step's time by its batch: straight lines between powers of two."""
        sizes = sorted({*(1 << bits for bits in range(users.bit_length())), users})
        times = {size: self._step(layout, knobs, talk, size).total_us for size in sizes}

        def at(batch: float) -> float:
            above = next((size for size in sizes if size >= batch), sizes[-1])
            below = max((size for size in sizes if size <= batch), default=sizes[0])
            if above == below:
                return times[above]
            return times[below] + (batch - below) / (above - below) * (times[above] - times[below])

        return at

    def _error(self, step: StepTime, prompt: StepTime, steps: float, users: int) -> float:
        errors = self.hardware.errors
        total = prompt + step * steps
        sharing = SHARING_ERROR if users > 1 else 0.0
        return math.hypot(total.error_us(errors) / total.total_us, sharing)

    def _price(self) -> float:
        hardware = self.hardware
        return (
            hardware.usd_per_hour_reserved
            if self.reserved_price
            else hardware.usd_per_hour_on_demand
        )
