"""Decisions with their reasons, and what the plan promises for the workload."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenspeed_plan.plans.types import Frozen


class Option(Frozen):
    """An alternative to a decision: its numbers, or the reason why it is impossible."""

    what: str
    numbers: dict[str, float] = Field(default_factory=dict)
    reason: str = ""


class Decision(Frozen):
    """One choice, with its reason, the runner-up, and the other options that were compared."""

    name: str
    value: str
    reason: str
    runner_up: str | None = None
    options: tuple[Option, ...] = ()


class LayerMove(Frozen):
    """The transfer of one layer's cache to a decode pool.

    Times count from the start of the prompt's last prefill chunk.
    """

    layer: int
    size_bytes: int
    start_us: float
    end_us: float


class Transfers(Frozen):
    """How a prefill pool would hand a prompt over to a decode pool.

    `size_bytes` is what each sender sends, `exposed_us` the part of the time that computation does
    not hide.
    """

    transport: Literal["nvlink", "rdma", "tcp"]
    bytes_per_s: float
    size_bytes: int
    exposed_us: float
    ttft_ms_with: float
    ttft_ms_without: float
    layers: tuple[LayerMove, ...]


class Predicted(Frozen):
    """What the spec's workload will see: values, and intervals from `low` to `high`.

    TPOT is the time of a token after the first. `decode_step_us` splits a step at `decode_batch` by
    what limits it, `limited_by` is the largest share. `slo_missed` says which service level is not
    met, and by how much. `front` (the Pareto front) and `rejected` are deployments that were
    compared; the runtime may not support all of them.
    """

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    largest_concurrency: int
    largest_context_tokens: int
    decode_batch: float
    decode_step_us: dict[str, float]
    decode_floor_us: float
    limited_by: str
    slo_missed: str | None = None
    front: tuple[Option, ...] = ()
    rejected: tuple[Option, ...] = ()
    transfers: Transfers | None = None


class CanaryPrompt(Frozen):
    """A prompt and its greedy continuation in fp64.

    Each token has its logprob, and its margin over the second best token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
