"""Counts and latencies of a batch run, in constant memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenspeed_plan.runtime.request import Completion

_BINS_PER_E = 100  # each bin is one per cent wide
LOAD_TOLERANCE = 0.25  # by which a load may differ from the one that was predicted


class Histogram:
    """Percentiles of positive numbers within one per cent, from logarithmic bins."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a value; zero counts as a nanosecond."""
        self._bins[round(math.log(max(value, 1e-9)) * _BINS_PER_E)] += 1

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self._bins.values())

    def percentile(self, share: float) -> float | None:
        """The value below which `share` (0 to 1) of all values lie; None without values."""
        target = share * self.count
        seen = 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if seen >= target:
                return math.exp(index / _BINS_PER_E)
        return None

    def in_ms(self) -> dict[str, float | None]:
        """p50, p95 and p99 of seconds, in milliseconds."""
        return {f"p{percent}": self._ms(percent / 100) for percent in (50, 95, 99)}

    def _ms(self, share: float) -> float | None:
        value_s = self.percentile(share)
        if value_s is None:
            return None
        return round(value_s * 1e3, 3)


@dataclass(frozen=True, slots=True)
class Load:
    """A load: tokens of a prompt and of an answer, and how many rows are answered at once."""

    prompt_tokens: float
    output_tokens: float
    rows_at_once: int

    def is_like(self, other: Load) -> bool:
        """Whether predictions for the other load say something about this one."""
        pairs = (
            (self.prompt_tokens, other.prompt_tokens),
            (self.output_tokens, other.output_tokens),
            (self.rows_at_once, other.rows_at_once),
        )
        return all(abs(mine - its) <= LOAD_TOLERANCE * its for mine, its in pairs)

    def __str__(self) -> str:
        return (
            f"{self.rows_at_once} at once with {self.prompt_tokens:.0f} tokens in "
            f"and {self.output_tokens:.0f} out"
        )


@dataclass
class Tally:
    """Counts of a run.

    TTFT runs from the start of a row to its first token. TPOT is the time after the first token
    divided by the tokens after it.

    Attributes:
        skipped: rows that an earlier run had answered.
        cached_tokens: prompt tokens that were found in the prefix cache.
        running_s: when the engine was ready (`time.perf_counter`); None before.
    """

    num_rows: int
    begun_s: float = field(default_factory=time.perf_counter)
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)
    startup_s: dict[str, float] = field(default_factory=dict)
    running_s: float | None = None

    @property
    def done(self) -> int:
        """Rows that need no more work."""
        return self.answered + self.failed + self.skipped

    def start_running(self) -> None:
        """Note that the engine is ready; rates count from here."""
        self.running_s = time.perf_counter()

    def add(self, completion: Completion) -> None:
        """Count one choice of a row."""
        self.prompt_tokens += completion.num_prompt_tokens
        self.cached_tokens += completion.num_cached_tokens
        self.generated_tokens += len(completion.token_ids)
        self.ttft_s.add(completion.ttft_s)
        num_later_tokens = len(completion.token_ids) - 1
        if num_later_tokens > 0:
            self.tpot_s.add(completion.decode_s / num_later_tokens)

    def fail(self, code: str) -> None:
        """Count a row without an answer."""
        self.failed += 1
        self.errors[code] += 1

    def rates(self) -> tuple[float, float]:
        """(prompt, generated) tokens per second since the engine was ready."""
        start_s = self.running_s or self.begun_s
        elapsed_s = max(time.perf_counter() - start_s, 1e-9)
        return self.prompt_tokens / elapsed_s, self.generated_tokens / elapsed_s

    def load(self, max_at_once: int) -> Load:
        """What was answered, on average."""
        count = max(self.ttft_s.count, 1)
        rows_at_once = min(max_at_once, self.answered)
        return Load(self.prompt_tokens / count, self.generated_tokens / count, rows_at_once)

    def as_dict(self, predicted: Mapping[str, float], interrupted: bool) -> dict[str, Any]:
        """The summary as JSON."""
        tokens_in, tokens_out = self.rates()
        ttft, tpot = self.ttft_s.in_ms(), self.tpot_s.in_ms()
        return {
            "rows": {
                "total": self.num_rows,
                "answered": self.answered,
                "failed": self.failed,
                "skipped": self.skipped,
            },
            "errors": dict(self.errors),
            "interrupted": interrupted,
            "wall_s": round(time.perf_counter() - self.begun_s, 4),
            "startup_s": {name: round(value, 4) for name, value in self.startup_s.items()},
            "tokens": {
                "prompt": self.prompt_tokens,
                "cached": self.cached_tokens,
                "generated": self.generated_tokens,
            },
            "tokens_per_s": {"prompt": round(tokens_in, 2), "generated": round(tokens_out, 2)},
            "ttft_ms": ttft,
            "tpot_ms": tpot,
            "definitions": {
                "tpot_ms": "time after the first token over tokens after the first; "
                "TTFT is not in it",
                "tokens_per_s": "since the engine was ready; `wall_s` has the start, too",
            },
            "predicted": dict(predicted),
            "measured": {"tpot_ms": tpot["p50"], "ttft_ms": ttft["p50"]},
        }


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = _count_lines(summary)
    startup_s = summary["startup_s"]
    if startup_s:
        parts = [f"{name.removesuffix('_s')} {value:.3f} s" for name, value in startup_s.items()]
        lines.append("start-up: " + ", ".join(parts))
    for name in ("ttft_ms", "tpot_ms"):
        percentiles = summary[name]
        if percentiles["p50"] is not None:
            parts = [f"{percent} {value:.2f} ms" for percent, value in percentiles.items()]
            lines.append(f"{name.removesuffix('_ms')}: " + ", ".join(parts))
    if summary.get("other_load"):
        lines.append(f"predictions are for another load: {summary['other_load']}")
        return "\n".join(lines)
    for name, predicted in summary["predicted"].items():
        measured = summary["measured"].get(name)
        if measured:
            ratio = measured / predicted
            lines.append(
                f"{name}: predicted {predicted:.2f}, measured {measured:.2f} ({ratio:.2f} x)"
            )
    return "\n".join(lines)


def _count_lines(summary: Mapping[str, Any]) -> list[str]:
    rows, tokens, rates = summary["rows"], summary["tokens"], summary["tokens_per_s"]
    return [
        f"{rows['answered']} answered, {rows['failed']} failed, {rows['skipped']} done before, "
        f"of {rows['total']} rows in {summary['wall_s']:.2f} s",
        f"tokens: {tokens['prompt']} in ({tokens['cached']} of them cached), "
        f"{tokens['generated']} out; {rates['prompt']:.0f}/s in, {rates['generated']:.0f}/s out "
        "after the start",
    ]
