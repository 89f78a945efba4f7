"""Numbers of a batch run, kept in constant memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenspeed_plan.runtime.request import Completion

_BINS_PER_E = 100  # bins of one per cent


class Histogram:
    """Percentiles of positive numbers, exact to one per cent: logarithmic bins."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a value; zero counts as a nanosecond."""
        self._bins[round(math.log(max(value, 1e-9)) * _BINS_PER_E)] += 1

    def percentile(self, share: float) -> float | None:
        """The value below which `share` of all lie, None without any."""
        target = share * sum(self._bins.values())
        seen = 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if seen >= target:
                return math.exp(index / _BINS_PER_E)
        return None

    def in_ms(self) -> dict[str, float | None]:
        """p50, p95 and p99 of seconds, in milliseconds."""
        values = {f"p{share}": self.percentile(share / 100) for share in (50, 95, 99)}
        return {
            name: None if value is None else round(value * 1e3, 3) for name, value in values.items()
        }


@dataclass
class Tally:
    """Counts of a run. TTFT runs from the row's start to its first token; TPOT is over the tokens after it."""

    num_rows: int
    begun_s: float = field(default_factory=time.perf_counter)
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in the prefix cache
    generated_tokens: int = 0
    ttft_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)
    startup_s: dict[str, float] = field(default_factory=dict)
    running_s: float | None = None  # when the engine was ready

    @property
    def done(self) -> int:
        """Rows that need no more work."""
        return self.answered + self.failed + self.skipped

    def start_running(self) -> None:
        """The engine is ready: rates count from here."""
        self.running_s = time.perf_counter()

    def add(self, completion: Completion) -> None:
        """Count one choice of a row."""
        self.prompt_tokens += completion.num_prompt_tokens
        self.cached_tokens += completion.num_cached_tokens
        self.generated_tokens += len(completion.token_ids)
        self.ttft_s.add(completion.ttft_s)
        if len(completion.token_ids) > 1:
            self.tpot_s.add(completion.decode_s / (len(completion.token_ids) - 1))

    def fail(self, code: str) -> None:
        """Count a row without an answer."""
        self.failed += 1
        self.errors[code] += 1

    def rates(self) -> tuple[float, float]:
        """Tokens a second, in and out, since the engine was ready."""
        elapsed = max(time.perf_counter() - (self.running_s or self.begun_s), 1e-9)
        return self.prompt_tokens / elapsed, self.generated_tokens / elapsed

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
                "tpot_ms": "time after the first token over tokens after the first; TTFT is not in it"
            },
            "predicted": dict(predicted),
            "measured": {"tpot_ms": tpot["p50"], "ttft_ms": ttft["p50"]},
        }


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    rows, tokens, rates = summary["rows"], summary["tokens"], summary["tokens_per_s"]
    lines = [
        f"{rows['answered']} answered, {rows['failed']} failed, {rows['skipped']} done before, of {rows['total']} rows"
        f" in {summary['wall_s']:.2f} s",
        f"tokens: {tokens['prompt']} in ({tokens['cached']} of them cached), {tokens['generated']} out;"
        f" {rates['prompt']:.0f}/s in, {rates['generated']:.0f}/s out",
    ]
    if summary["startup_s"]:
        lines.append(
            "start-up: "
            + ", ".join(
                f"{k.removesuffix('_s')} {v:.3f} s" for k, v in summary["startup_s"].items()
            )
        )
    for name in ("ttft_ms", "tpot_ms"):
        if summary[name]["p50"] is not None:
            lines.append(
                f"{name.removesuffix('_ms')}: "
                + ", ".join(f"{k} {v:.2f} ms" for k, v in summary[name].items())
            )
    for name, value in summary["predicted"].items():
        measured = summary["measured"].get(name)
        if measured:
            lines.append(
                f"{name}: predicted {value:.2f}, measured {measured:.2f} ({measured / value:.2f} x)"
            )
    return "\n".join(lines)
