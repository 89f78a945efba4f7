"""What a simulated load was like."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.pools.handover_counts import HandoverCounts
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.simulation.virtual_steps import StepRecord


@dataclass(frozen=True, slots=True)
class Answered:
    """An answered request.

    Attributes:
        arrival_s: when it came.
        queue_s: from then until it started.
        ttft_s: from then to its first token.
        decode_s: from its first token to its last.
        prompt_tokens, cached_tokens, output_tokens: of it.
    """

    arrival_s: float
    queue_s: float
    ttft_s: float
    decode_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Seconds for each token after the first; 0 where there is none."""
        return self.decode_s / max(self.output_tokens - 1, 1)

    @classmethod
    def of(cls, arrival_s: float, completion: Completion) -> Answered:
        """From what the engine says of it."""
        return cls(
            arrival_s,
            completion.queue_s,
            completion.ttft_s,
            completion.decode_s,
            completion.num_prompt_tokens,
            completion.num_cached_tokens,
            len(completion.token_ids),
        )


@dataclass(frozen=True, slots=True)
class PromptsComputed:
    """What a pool that computes prompts for another one has done.

    Attributes:
        steps: all of them.
        metrics: the counters of its engine.
        counts: what came of its prompts at the other pool, and of answers that went back.
        busy_s: in which its device computed.
    """

    steps: list[StepRecord]
    metrics: Metrics
    counts: HandoverCounts
    busy_s: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a load was like.

    Attributes:
        answers: in the order of their ends.
        steps: all of them, of the pool that answers.
        metrics: the counters of its engine.
        total_s: from the beginning to the last answer.
        busy_s: in which its device computed.
        prompts: of the other pool; None where one pool does all.
    """

    answers: list[Answered]
    steps: list[StepRecord]
    metrics: Metrics
    total_s: float
    busy_s: float
    prompts: PromptsComputed | None = None
