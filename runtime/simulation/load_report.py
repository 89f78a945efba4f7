"""What a simulated load was like, as figures, as text, and as a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tokenspeed_plan.runtime.simulation.load_results import Answered, PromptsComputed, Simulated
from tokenspeed_plan.runtime.simulation.virtual_steps import StepRecord

PERCENTILES = (50, 90, 95, 99)
NO_LEVELS: Mapping[str, float] = {}
DEFINITIONS = {
    "ttft_ms": "from a request to its first token, by percentile of requests",
    "tpot_ms": "time after the first token over tokens after the first",
    "queue_ms": "from a request until it starts",
    "turn_time_ms": "from a request to its last token",
    "tokens_per_s_out": "tokens of all answers over the whole time; `in` has those of all prompts",
    "device_busy": "share of the time in which the device computed",
    "hit_rate": "prompt tokens that came from the prefix cache, over all prompt tokens",
    "in_time": "share of requests within `--ttft-ms` and `--tpot-ms`",
    "service_levels": "means and percentiles of all requests, beside those of the spec",
    "prompts": "the pool that computes prompts: its device, what it computed, what it handed over; "
    "`wait_ms` is from an order to its arrival, `exposed_ms` the part after the last token",
}


@dataclass(frozen=True, slots=True)
class Levels:
    """What is in time for a request, in milliseconds; None where anything is."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def are_met_by(self, answer: Answered) -> bool:
        """Whether a request was answered in time."""
        if self.ttft_ms is not None and answer.ttft_s * 1e3 > self.ttft_ms:
            return False
        return self.tpot_ms is None or answer.tpot_s * 1e3 <= self.tpot_ms


def figures(
    found: Simulated, in_time: Levels, service_levels: Mapping[str, float] = NO_LEVELS
) -> dict[str, Any]:
    """The figures of a load with at least one answer.

    Args:
        found: the load.
        in_time: what is in time for a request.
        service_levels: limits of means and percentiles, by the names of a spec.
    """
    answers, total_s = found.answers, found.total_s
    prompts = sum(answer.prompt_tokens for answer in answers)
    outputs = sum(answer.output_tokens for answer in answers)
    metrics, of_name = found.metrics, levels_of(answers)
    return {
        "requests": len(answers),
        "total_s": round(total_s, 3),
        "tokens_per_s_out": round(outputs / total_s, 1),
        "tokens_per_s_in": round(prompts / total_s, 1),
        "requests_per_s": round(len(answers) / total_s, 3),
        "ttft_ms": percentiles_ms(answer.ttft_s for answer in answers),
        "tpot_ms": percentiles_ms(answer.tpot_s for answer in answers),
        "queue_ms": percentiles_ms(answer.queue_s for answer in answers),
        "turn_time_ms": percentiles_ms(answer.ttft_s + answer.decode_s for answer in answers),
        "in_time": round(sum(map(in_time.are_met_by, answers)) / len(answers), 4),
        "service_levels": {
            name: {"ms": of_name[name], "at_most_ms": limit, "met": of_name[name] <= limit}
            for name, limit in service_levels.items()
        },
        "device_busy": round(found.busy_s / total_s, 4),
        "hit_rate": round(sum(answer.cached_tokens for answer in answers) / prompts, 4),
        "tokens_per_pass": round(metrics.tokens_per_pass, 3),
        "preemptions": metrics.preemptions,
        "evicted_checkpoints": metrics.evicted_checkpoints,
        "host_hits": metrics.host_hits,
        "programs": programs(found.steps),
        "prompts": None if found.prompts is None else _prompts(found.prompts, total_s),
        "definitions": DEFINITIONS,
    }


def _prompts(pool: PromptsComputed, total_s: float) -> dict[str, Any]:
    """The figures of a pool that computes prompts."""
    counts, metrics = pool.counts, pool.metrics
    done = max(counts.done, 1)
    return {
        "device_busy": round(pool.busy_s / total_s, 4),
        "computed_tokens": metrics.computed_tokens,
        "evicted_checkpoints": metrics.evicted_checkpoints,
        "preemptions": metrics.preemptions,
        "handed_over": counts.done,
        "computed_by_the_other": counts.alone,
        "wait_ms": round(counts.wait_s / done * 1e3, 3),
        "exposed_ms": round(counts.exposed_s / done * 1e3, 3),
        "handed_bytes": counts.size_bytes,
        "answers_returned": counts.returned,
        "answer_hit_tokens": counts.returned_tokens,
        "programs": programs(pool.steps),
    }


def levels_of(answers: Iterable[Answered]) -> dict[str, float]:
    """Means and percentiles of times in milliseconds, by the names of service levels in a spec.

    A token after the first has none where there is no other.
    """
    known = list(answers)
    times = {
        "ttft": [answer.ttft_s for answer in known],
        "tpot": [answer.tpot_s for answer in known if answer.output_tokens > 1] or [0.0],
    }
    found = {}
    for name, seconds in times.items():
        found[f"{name}_ms"] = round(fmean(seconds) * 1e3, 3)
        of_percent = percentiles_ms(seconds)
        found |= {f"{name}_{percent}_ms": ms for percent, ms in of_percent.items()}
    return found


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Nearest-rank percentiles, in milliseconds."""
    ordered = sorted(seconds)
    found = {}
    for percent in PERCENTILES:
        rank = -(-percent * len(ordered) // 100)
        found[f"p{percent}"] = round(ordered[rank - 1] * 1e3, 3)
    return found


def programs(steps: Iterable[StepRecord]) -> list[dict[str, Any]]:
    """The steps of each program: how many, how full, how long."""
    of_program: dict[tuple[str, int], list[StepRecord]] = defaultdict(list)
    for step in steps:
        of_program[step.phase, step.bucket].append(step)
    return [_program(of_program[key]) for key in sorted(of_program)]


def _program(steps: list[StepRecord]) -> dict[str, Any]:
    count = len(steps)
    return {
        "phase": steps[0].phase,
        "bucket": steps[0].bucket,
        "steps": count,
        "mean_seqs": round(sum(step.seqs for step in steps) / count, 2),
        "mean_tokens": round(sum(step.tokens for step in steps) / count, 1),
        "mean_us": round(sum(step.end_s - step.begin_s for step in steps) / count * 1e6, 1),
    }


def as_text(found: dict[str, Any], load: str, has_levels: bool) -> str:
    """The figures as text.

    Args:
        found: the figures.
        load: in words.
        has_levels: whether it was said what is in time for a request.
    """
    in_time = f"; {found['in_time']:.1%} of the requests in time" if has_levels else ""
    lines = [
        f"{found['requests']} requests, {load}, in {found['total_s']:.1f} s, simulated: "
        f"{found['tokens_per_s_out']:.1f} tokens/s out, {found['tokens_per_s_in']:.1f} in, "
        f"{found['requests_per_s']:.3f} requests/s",
        f"  {'':<14}" + "".join(f"{f'p{percent}':>12}" for percent in PERCENTILES),
    ]
    for name in ("ttft_ms", "tpot_ms", "queue_ms", "turn_time_ms"):
        lines.append(f"  {name:<14}" + "".join(f"{ms:>12.2f}" for ms in found[name].values()))
    lines += [
        f"  cache: {found['hit_rate']:.1%} of the prompts' tokens, "
        f"{found['evicted_checkpoints']} evictions, {found['preemptions']} preemptions, "
        f"{found['host_hits']} hits of the host",
        f"  device busy {found['device_busy']:.1%}; {found['tokens_per_pass']:.2f} tokens a pass"
        f"{in_time}",
    ]
    for name, level in found["service_levels"].items():
        verdict = "met" if level["met"] else "missed"
        lines.append(f"  {name} {level['ms']:.2f}, at most {level['at_most_ms']:g}: {verdict}")
    lines += _program_lines(found["programs"])
    prompts = found["prompts"]
    if prompts is not None:
        lines.append(
            f"  pool of prompts: device busy {prompts['device_busy']:.1%}; "
            f"{prompts['handed_over']} prompts handed over, each in {prompts['wait_ms']:.2f} ms, "
            f"{prompts['exposed_ms']:.3f} of it after its last token; "
            f"{prompts['answers_returned']} answers went back"
        )
        lines += _program_lines(prompts["programs"])
    return "\n".join(lines)


def _program_lines(programs: Iterable[dict[str, Any]]) -> list[str]:
    return [
        f"  {program['phase']:<8}{program['bucket']:>6}: {program['steps']} steps of "
        f"{program['mean_seqs']:.1f} sequences, {program['mean_tokens']:.1f} tokens, "
        f"{program['mean_us']:.1f} us"
        for program in programs
    ]


def trace(found: Simulated) -> dict[str, Any]:
    """Steps and requests as a trace of Chrome's format, which Perfetto shows; microseconds.

    Source: the Trace Event Format, complete events ("X") and counters ("C").
    """
    events: list[dict[str, Any]] = [_step_event(step, "device") for step in found.steps]
    if found.prompts is not None:
        events += [_step_event(step, "device of prompts") for step in found.prompts.steps]
    for number, answer in enumerate(found.answers):
        events += _request_events(number, answer)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _step_event(step: StepRecord, device: str) -> dict[str, Any]:
    return {
        "name": f"{step.phase} {step.bucket}",
        "ph": "X",
        "pid": device,
        "tid": "steps",
        "ts": round(step.begin_s * 1e6, 3),
        "dur": round((step.end_s - step.begin_s) * 1e6, 3),
        "args": {"sequences": step.seqs, "tokens": step.tokens},
    }


def _request_events(number: int, answer: Answered) -> list[dict[str, Any]]:
    """The three parts of a request, one after the other."""
    parts = (
        ("queue", answer.arrival_s, answer.queue_s),
        ("prompt", answer.arrival_s + answer.queue_s, answer.ttft_s - answer.queue_s),
        ("answer", answer.arrival_s + answer.ttft_s, answer.decode_s),
    )
    args = {"prompt": answer.prompt_tokens, "cached": answer.cached_tokens}
    return [
        {
            "name": name,
            "ph": "X",
            "pid": "requests",
            "tid": number,
            "ts": round(begin_s * 1e6, 3),
            "dur": round(length_s * 1e6, 3),
            "args": args | {"output": answer.output_tokens},
        }
        for name, begin_s, length_s in parts
    ]
