"""One line of the history: the load of a run, what it took, and what had been predicted.

It has counts, lengths and times; no prompt, no answer, no path and no name of a user or a client.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenspeed_plan.plans.types import Phase

Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Text = Annotated[str, Field(max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Spread(_Part):
    """Of some numbers: the mean, two percentiles (nearest rank), the largest."""

    mean: Amount
    p50: Amount
    p95: Amount
    max: Amount

    @classmethod
    def of(cls, numbers: Collection[float]) -> Spread | None:
        """Of these numbers, to four digits; None where there are none."""
        if not numbers:
            return None
        ordered = sorted(numbers)
        count = len(ordered)
        p50, p95 = (ordered[-(-percent * count // 100) - 1] for percent in (50, 95))
        return cls(
            mean=digits(sum(ordered) / count),
            p50=digits(p50),
            p95=digits(p95),
            max=digits(ordered[-1]),
        )


class LoadFacts(_Part):
    """What was asked: requests and tokens of all that ended, and requests at once.

    `concurrency_mean` is over the time in which the engine worked. Lengths are in tokens.
    """

    requests: Count
    failed: Count
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    concurrency_mean: Amount
    concurrency_max: Count
    prompt_len: Spread | None = None
    output_len: Spread | None = None


class Measured(_Part):
    """What it was like: seconds in all, and those in which the engine worked; milliseconds."""

    total_s: Amount
    busy_s: Amount
    tokens_per_s_out: Amount
    ttft_ms: Spread | None = None
    tpot_ms: Spread | None = None
    queue_ms: Spread | None = None
    host_us_per_step: Amount
    preemptions: Count


class StepRow(_Part):
    """The steps of one program.

    Attributes:
        steps: how many there were.
        wall_s: of all of them, from one to the next.
        seqs, tokens, context: of a step on average; `context` is what a sequence had before it.
        committed: sequences of the step that the host committed in the same turn, on average.
        prompts: that a step began, on average.
        timed: steps that `device_us` is the median of.
        device_us: of the device; None where the host kept it waiting, or it was not measured.
        host_us: the median of the host's work.
        predicted_us, predicted_host_us: of a step with such a load; None where it is not priced.
    """

    phase: Phase
    bucket: Count
    depth: Count = 0
    steps: Count
    wall_s: Amount
    seqs: Amount
    tokens: Amount
    context: Amount
    committed: Amount = 0.0
    prompts: Amount = 0.0
    timed: Count
    device_us: Amount | None = None
    host_us: Amount | None = None
    predicted_us: Amount | None = None
    predicted_host_us: Amount | None = None


class Predicted(_Part):
    """What the same steps would take by the prices of a machine's profile.

    Attributes:
        profile: its name.
        prices: digest of its numbers.
        tokens_per_s_out: with these steps in the place of those that were measured.
    """

    profile: Text
    prices: Text
    tokens_per_s_out: Amount | None = None


class RunRecord(_Part):
    """One run.

    Attributes:
        at: when it ended, UTC.
        device: what the machine calls itself; `gpu` is what the plan is for.
        load, measured: None where programs were measured without requests.
    """

    format: Literal[1] = 1
    at: Text
    command: Literal["run", "serve", "bench"]
    plan: Text
    model: Text
    gpu: Text
    ranks: Count
    device: Text
    versions: dict[Text, Text]
    load: LoadFacts | None = None
    measured: Measured | None = None
    steps: Annotated[tuple[StepRow, ...], Field(max_length=1000)]
    predicted: Predicted | None = None


def digits(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
