"""Predictions beside what was published and what was measured. Nothing here is fitted to either.

    python benchmarks/published.py > benchmarks/results/predictions_DATE.md

Published: lightseekorg/tokenspeed's figures for Qwen3.5-397B-A17B (NVFP4 experts, FP8 keys and
values), in its post of 2026-05-27 and the references of its CI. Measured:
benchmarks/results/advisor_h200_2026-11-24.md.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.engine_profile import Engine, load_engine
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.advisor.workload import ACCEPTANCE, tokens_per_step
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec

THEIRS = load_engine(Path(__file__).parent / "engines/tokenspeed.yaml")
CONFIG = load_preset("qwen3.5-397b-a17b")[0]
DRAFTS = 3


@dataclass(frozen=True)
class Point:
    gpu: str
    tp: int
    concurrency: int
    decode_tokens_per_s_user: float
    total_tokens_per_s_gpu: float
    chunk: int


POINTS = (
    Point("B200", 8, 1, 580, 4_500, 2048),
    Point("GB200", 4, 1, 530, 11_600, 8192),
    Point("GB200", 4, 2, 420, 17_800, 8192),
    Point("GB200", 4, 4, 270, 24_400, 8192),
    Point("GB200", 4, 8, 160, 31_600, 8192),
    Point("GB200", 4, 16, 78, 29_000, 8192),
)
LONG = ((131_072, 530), (262_144, 495), (1_048_576, 445))
MEASURED = (  # batch, context, chunk, milliseconds
    ("decode", 1, 1024, 1.943),
    ("decode", 2, 1024, 2.654),
    ("decode", 4, 1024, 3.782),
    ("decode", 1, 50_000, 2.330),
    ("prefill", 1, 8192, 133.3),
)


def spec(gpu: str, count: int, concurrency: int) -> Spec:
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": "qwen3.5-397b-a17b", "weights": "nvfp4"},
            "target": {"gpu": gpu, "count": count},
            "workload": {
                "kind": "agentic",
                "first_turn_tokens": 50_000,
                "turn_tokens": 800,
                "turns": 12,
                "output_tokens": 500,
                "concurrency": concurrency,
            },
        }
    )


def predicted(
    point: Point, engine: Engine | None, depth: int = DRAFTS, chunk: int | None = None
) -> Prediction:
    predictor = Predictor(
        spec(point.gpu, point.tp, point.concurrency), CONFIG, find_hardware(point.gpu), engine
    )
    knobs = Knobs(chunk or point.chunk, 64, depth, "fp8")
    return predictor.predict(Candidate(ParallelLayout(point.tp, point.tp, 1), knobs))


def off(value: float, truth: float) -> str:
    return f"{value:.4g} ({value / truth - 1:+.0%})"


def agentic() -> None:
    print(
        "| GPUs, concurrency "
        "| published, tokens/s a user (decode) | their engine, predicted | ours, predicted "
        "| published, tokens/s a GPU (in + out) | their engine, predicted | ours, predicted |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    errors: dict[str, list[float]] = {"decode_tokens_per_s_user": [], "total_tokens_per_s_gpu": []}
    for point in POINTS:
        theirs, ours = predicted(point, THEIRS).metrics, predicted(point, None).metrics
        cells = []
        for name in errors:
            truth = getattr(point, name)
            errors[name].append(abs(theirs[name] / truth - 1))
            cells += [f"{truth:.4g}", off(theirs[name], truth), f"{ours[name]:.4g}"]
        print(f"| TP{point.tp} {point.gpu}, {point.concurrency} | " + " | ".join(cells) + " |")
    for name, each in errors.items():
        print(f"\nTheir engine, `{name}`: mean absolute error {statistics.mean(each):.0%}.")


def long_context() -> None:
    print(
        "| context | published, tokens/s (decode, TP8 B200) "
        "| their engine, predicted | ours, predicted |"
    )
    print("| --- | --- | --- | --- |")
    layout, accepted = ParallelLayout(8, 8, 1), tokens_per_step(DRAFTS, ACCEPTANCE)
    for context, truth in LONG:
        rates = [
            accepted
            / StepModel(CONFIG, find_hardware("B200"), "nvfp4", engine=engine)
            .decode(layout, 1, context, DRAFTS, "fp8")
            .total_us
            * 1e6
            for engine in (THEIRS, None)
        ]
        print(f"| {context:,} | {truth} | {off(rates[0], truth)} | {rates[1]:.4g} |")


def speculation() -> None:
    print("| batch | published gain of 3 drafts | their engine, predicted | ours, predicted |")
    print("| --- | --- | --- | --- |")
    for batch, truth in (
        (1, "+100 to +159 %"),
        (16, "not published"),
        (32, "+38 to +90 %"),
        (64, "about 0 to +90 %"),
    ):
        gains = []
        for engine in (THEIRS, None):
            steps = StepModel(CONFIG, find_hardware("B200"), "nvfp4", engine=engine)
            layout = ParallelLayout(8, 8, 1)
            alone = steps.decode(layout, batch, 8000, 0, "fp8").total_us
            drafted = steps.decode(layout, batch, 8000, DRAFTS, "fp8").total_us
            gains.append(tokens_per_step(DRAFTS, ACCEPTANCE) * alone / drafted - 1)
        print(f"| {batch} | {truth} | {gains[0]:+.0%} | {gains[1]:+.0%} |")


def turns() -> None:
    """Concurrency 1; from the references of their CI follow 1.57 s a turn on TP8, 1.22 s on TP4."""
    print(
        "| deployment | derived from the CI's references "
        "| their engine, predicted | ours, predicted |"
    )
    print("| --- | --- | --- | --- |")
    eight, four = POINTS[0], POINTS[1]
    for point, chunk, truth in (
        (eight, 2048, 1.57),
        (eight, 8192, None),
        (four, 8192, 1.22),
        (four, 2048, None),
    ):
        theirs, ours = (predicted(point, engine, chunk=chunk).metrics for engine in (THEIRS, None))
        seconds = theirs["turn_time_ms"] / 1e3
        cell = off(seconds, truth) if truth else f"{seconds:.3g}"
        print(
            f"| TP{point.tp} {point.gpu}, chunk {chunk} | {truth or '-'} | {cell} "
            f"| {ours['turn_time_ms'] / 1e3:.3g} |"
        )


def measured() -> None:
    print("| Qwen3.5-35B-A3B, one H200, bf16 | measured, ms | predicted, ms |")
    print("| --- | --- | --- |")
    steps = StepModel(load_preset("qwen3.5-35b-a3b")[0], find_hardware("H200"))
    layout, errors = ParallelLayout(1, 1, 1), []
    for phase, batch, tokens, truth in MEASURED:
        step = (
            steps.decode(layout, batch, tokens)
            if phase == "decode"
            else steps.prefill(layout, tokens, 0)
        )
        value = step.total_us / 1e3
        errors.append(abs(value / truth - 1))
        print(f"| {phase}, batch {batch}, {tokens} tokens | {truth} | {off(value, truth)} |")
    print(
        f"\nMean absolute error {statistics.mean(errors):.1%}, "
        f"of decode alone {statistics.mean(errors[:-1]):.1%}."
    )


def speed() -> None:
    for gpu, concurrency in (("B200", 1), ("B200", 16)):
        begun = time.perf_counter()
        _, result = search(spec(gpu, 8, concurrency), CONFIG)
        taken = time.perf_counter() - begun
        print(
            f"Search for 397B on 8 x {gpu}, concurrency {concurrency}: "
            f"{len(result.predictions)} deployments predicted, {len(result.rejected)} refused, "
            f"{taken:.1f} s. Best: {result.best.candidate}.\n"
        )


def main() -> None:
    for title, part in (
        ("Agentic workload: 50K, then 800 a turn, 500 out, 12 turns", agentic),
        ("Long context", long_context),
        ("Speculation", speculation),
        ("Seconds a turn, TP8 against TP4, concurrency 1", turns),
        ("Measured on an H200", measured),
        ("The search", speed),
    ):
        print(f"\n## {title}\n")
        part()


if __name__ == "__main__":
    main()
