"""What a call costs: FLOPs and bytes, each as a linear function of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_serializer

from tokenspeed_plan.plans.types import Frozen

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What a cost is evaluated for.

    Attributes:
        num_tokens, num_seqs: of the step.
        context_tokens: that each sequence has.
        experts_hit: distinct experts of this rank that the call's tokens choose.
    """

    num_tokens: int
    num_seqs: int
    context_tokens: int
    experts_hit: float = 0.0


@dataclass(frozen=True, slots=True)
class Amounts:
    """`Terms` without validation, which the planner adds up by the hundred thousand."""

    once: float = 0.0
    per_token: float = 0.0
    per_seq: float = 0.0
    per_expert: float = 0.0
    per_token_context: float = 0.0
    per_seq_context: float = 0.0

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.once + other.once,
            self.per_token + other.per_token,
            self.per_seq + other.per_seq,
            self.per_expert + other.per_expert,
            self.per_token_context + other.per_token_context,
            self.per_seq_context + other.per_seq_context,
        )

    def at(self, batch: BatchSize) -> float:
        """The sum for a batch."""
        tokens, seqs, context = batch.num_tokens, batch.num_seqs, batch.context_tokens
        of_tokens = tokens * self.per_token + tokens * context * self.per_token_context
        of_seqs = seqs * self.per_seq + seqs * context * self.per_seq_context
        return self.once + of_tokens + of_seqs + batch.experts_hit * self.per_expert


class Terms(Frozen):
    """FLOPs or bytes as a sum of products. JSON has the terms that are not zero.

    Attributes:
        once: whatever the batch.
        per_token, per_seq, per_expert: for each token, each sequence, each expert that is hit.
        per_token_context: for each token and each token of the context that it attends to.
        per_seq_context: for each sequence and each token of its context.
    """

    once: Amount = 0.0
    per_token: Amount = 0.0
    per_seq: Amount = 0.0
    per_expert: Amount = 0.0
    per_token_context: Amount = 0.0
    per_seq_context: Amount = 0.0

    @model_serializer
    def _spell(self) -> dict[str, int | float]:
        return {name: _short(value) for name, value in self if value}

    def at(self, batch: BatchSize) -> float:
        """The sum for a batch."""
        return Amounts(**dict(self)).at(batch)


def _short(value: float) -> int | float:
    """The number as JSON has it: 512, not 512.0."""
    if value == int(value):
        return int(value)
    return value


@dataclass(frozen=True, slots=True)
class Work:
    """What one call does for a batch, on one rank: FLOPs and bytes."""

    product_flops: float
    mixer_flops: float
    weight_bytes: float
    activation_bytes: float
    state_bytes: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.product_flops + self.mixer_flops

    @property
    def floor_bytes(self) -> float:
        """Those that no fusion can avoid: weights and state."""
        return self.weight_bytes + self.state_bytes

    @property
    def moved_bytes(self) -> float:
        """All bytes read or written."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class CallAmounts:
    """`CallCost` without validation."""

    products: Amounts
    mixers: Amounts
    weights: Amounts
    activations: Amounts
    state: Amounts

    def at(self, batch: BatchSize) -> Work:
        """The cost for a batch."""
        return _work(self, batch)


class CallCost(Frozen):
    """FLOPs and bytes of one call on one rank. JSON has what is not zero.

    Attributes:
        products: FLOPs of products with weights.
        mixers: FLOPs of attention and of the delta rule.
        weights: bytes of weights that are read; of a table its rows, of a stack of experts those
            that are hit.
        activations: bytes that come from other kernels or go to them.
        state: bytes of keys, values and recurrent states that are read or written.
    """

    products: Terms = Terms()
    mixers: Terms = Terms()
    weights: Terms = Terms()
    activations: Terms = Terms()
    state: Terms = Terms()

    @model_serializer
    def _spell(self) -> dict[str, Terms]:
        return {name: terms for name, terms in self if terms != _ZERO}

    def at(self, batch: BatchSize) -> Work:
        """The cost for a batch."""
        return _work(self, batch)


def _work(cost: CallAmounts | CallCost, batch: BatchSize) -> Work:
    return Work(
        cost.products.at(batch),
        cost.mixers.at(batch),
        cost.weights.at(batch),
        cost.activations.at(batch),
        cost.state.at(batch),
    )


_ZERO = Terms()
