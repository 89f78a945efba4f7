"""Whether answers go back to the pool that computes prompts, and which.

The prefill pool has every prompt, and no answer: a later turn begins with the last one. Either the
pool computes it again, while its user waits, or the decode pool pushes its keys, values and state
back, for which nobody waits. That pays where the link takes less time than the computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.advisor.candidate import Candidate
from tokenspeed_plan.planner.advisor.memory_model import MemoryModel
from tokenspeed_plan.planner.advisor.transfer import (
    HANDSHAKE_US,
    Transport,
    rate_of,
    transport_of,
)
from tokenspeed_plan.planner.advisor.workload import Conversation
from tokenspeed_plan.planner.ledger import AS_STATED, Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.passes.host_cache import slot_bytes, token_us
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.planner.spec import Spec, WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import AnswerReturns, Capacity, Limits


@dataclass(frozen=True, slots=True)
class ReturnPrices:
    """What an answer takes of the link of a rank, and what it saves.

    Attributes:
        page_size: tokens of a page.
        page_bytes, state_bytes: of a rank that answers, in all layers; no state where the model has
            none.
        transport: how the pools reach each other.
        bytes_per_s: of that, in one direction.
        token_us: of computing a token of a prompt, in the largest program of the prefill pool.
    """

    page_size: int
    page_bytes: int
    state_bytes: int
    transport: Transport
    bytes_per_s: float
    token_us: float

    @classmethod
    def of(
        cls,
        programs: Sequence[LoweredProgram],
        prompts: Sequence[LoweredProgram],
        capacity: Capacity,
        hardware: HardwareSpec,
        num_gpus: int,
    ) -> ReturnPrices:
        """Those of the programs of both pools, which have so many GPUs in all."""
        transport = transport_of(hardware, num_gpus)
        return cls(
            capacity.page_size,
            slot_bytes(programs, "kv_cache"),
            slot_bytes(programs, "state"),
            transport,
            rate_of(hardware, transport),
            token_us(prompts),
        )

    @classmethod
    def predicted(cls, memory: MemoryModel, candidate: Candidate, token_us: float) -> ReturnPrices:
        """Those of a candidate that is not planned yet; `memory` is of the pool that answers."""
        hardware = memory.steps.hardware
        transport = transport_of(hardware, candidate.num_gpus)
        page_bytes, state_bytes = memory.slot_sizes(candidate.knobs)
        rate = rate_of(hardware, transport)
        page_size = candidate.knobs.page_size
        return cls(page_size, page_bytes, state_bytes, transport, rate, token_us)

    def slots(self, num_seqs: int, num_checkpoints: int) -> int:
        """Answers that can go back at once; hand-overs keep as many as they may have at once."""
        if self.state_bytes:
            return min(num_seqs, num_checkpoints - num_seqs)
        return num_seqs

    def pushed_us(self, tokens: float) -> float:
        """Pushing the pages of so many tokens, and the state after them."""
        size_bytes = tokens / self.page_size * self.page_bytes + self.state_bytes
        return HANDSHAKE_US[self.transport] + size_bytes / self.bytes_per_s * 1e6

    @property
    def least_tokens(self) -> int | None:
        """Tokens from which on a push takes less than computing them, in whole pages.

        None where each token takes longer by the link than to compute.
        """
        fixed_us = self.pushed_us(0)
        gain_us = self.token_us - (self.pushed_us(1) - fixed_us)
        if gain_us <= 0:
            return None
        return max(math.ceil(fixed_us / gain_us / self.page_size), 1) * self.page_size

    def in_words(self, tokens: float) -> str:
        """Both ways for an answer of so many tokens."""
        return (
            f"{tokens:.0f} tokens of an answer go back in {self.pushed_us(tokens) / 1e3:.3g} ms by "
            f"{self.transport}, computing them takes {tokens * self.token_us / 1e3:.3g}"
        )


def choose_answer_returns(
    ledger: Ledger, spec: Spec, workload: WorkloadSpec, limits: Limits, prices: ReturnPrices
) -> AnswerReturns | None:
    """Whether answers go back, and how many at once; recorded.

    Raises:
        SpecError: they should, and there is no state slot for them.
    """
    stated = spec.stated_answers
    slots = prices.slots(limits.max_seqs, limits.num_checkpoints)
    why_not = why_answers_stay(stated, slots, workload, prices)
    if stated == "return" and slots < 1:
        raise SpecError(
            f"answers have no state slot to go back to: {limits.num_checkpoints} checkpoints, "
            f"{limits.max_seqs} sequences",
            "leave `disaggregation.answers` out",
        )
    if why_not:
        ledger.record("answer_returns", "off", why_not)
        return None
    least_tokens = prices.least_tokens or limits.page_size
    reason = prices.in_words(workload.outputs.mean)
    if stated == "return":
        reason = f"{AS_STATED}; {reason}"
    value = f"{slots} at once, of at least {least_tokens} tokens"
    ledger.record("answer_returns", value, reason, "computed again by the next turn")
    return AnswerReturns(slots=slots, least_tokens=least_tokens, token_us=prices.token_us)


def computed_prompts(
    talk: Conversation, spec: Spec, decode: MemoryModel, candidate: Candidate
) -> Conversation:
    """The conversation as it is for the pool that computes a candidate's prompts.

    One pool has what it said itself. `decode` is the memory of the pool that answers.
    """
    if candidate.prefill is None:
        return talk
    knobs, workload = candidate.knobs, spec.workload
    chunk, context = knobs.prefill_chunk, talk.mean_context
    step = decode.steps.prefill(candidate.prefill, chunk, context, knobs.kv_dtype)
    prices = ReturnPrices.predicted(decode, candidate, step.total_us / chunk)
    num_pages = -(-workload.max_conversation_tokens // knobs.page_size)
    seq_len, num_seqs = num_pages * knobs.page_size, workload.num_seqs
    num_checkpoints = decode.holding.checkpoints(num_seqs, seq_len, knobs.spacing)
    slots = prices.slots(num_seqs, num_checkpoints)
    if why_answers_stay(spec.stated_answers, slots, workload, prices):
        return talk.where_answers_stay
    return talk


def why_answers_stay(stated: str, slots: int, workload: WorkloadSpec, prices: ReturnPrices) -> str:
    """Why answers stay where they are; empty where they go back."""
    if stated == "stay":
        return AS_STATED
    if stated == "return":
        return ""
    if workload.turns == 1:
        return "no turn comes after an answer"
    if slots < 1:
        return "there is no state slot for them"
    least_tokens = prices.least_tokens
    if least_tokens is None or workload.outputs.mean < least_tokens:
        return prices.in_words(workload.outputs.mean)
    return ""
