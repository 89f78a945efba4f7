"""Predictions beside what was published and what was measured. Nothing here is fitted to either.

    python benchmarks/published.py > benchmarks/results/predictions_DATE.md

Published: lightseekorg/tokenspeed's figures for Qwen3.5-397B-A17B (NVFP4 experts, FP8 keys and
values), in its post of 2026-05-27 and the references of its CI; SGLang and vLLM by the sources of
`OTHERS`. Measured: benchmarks/results/advisor_h200_2026-11-24.md.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tokenspeed_plan.planner.advisor.candidate import Candidate, Knobs
from tokenspeed_plan.planner.advisor.engine_profile import Engine, load_engine, terms_us
from tokenspeed_plan.planner.advisor.load_judge import Deployment
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.advisor.workload import ACCEPTANCE, conversation, tokens_per_step
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.runtime.simulation.load import Turns, Users
from tokenspeed_plan.runtime.simulation.load_results import Simulated
from tokenspeed_plan.runtime.simulation.load_run import simulate

ENGINES = Path(__file__).parent / "engines"
THEIRS = load_engine(ENGINES / "tokenspeed.yaml")
# Real routers are uneven: 0.7 explains that a half of OLMoE-1B-7B's experts get 75 % of all choices
# (50,000 tokens of 520 prompts, JustVugg/colibri issue 864); TensorRT-LLM shapes its benchmarks of
# experts with 0.8 "to match observed MoE traces" (NVIDIA/TensorRT-LLM pull request 19148). Nobody
# published that of Qwen3.5; `tokenspeed measure-routing` measures it.
SKEW = 0.7
CONFIG = load_preset("qwen3.5-397b-a17b")[0]
DRAFTS = 3
TURNS = (10, 15)  # of a conversation


@dataclass(frozen=True)
class Point:
    gpu: str
    tp: int
    concurrency: int
    decode_tokens_per_s_user: float
    total_tokens_per_s_gpu: float
    chunk: int
    conversations: int  # of its run, by the recipe of its CI


POINTS = (
    Point("B200", 8, 1, 580, 4_500, 2048, 2),
    Point("GB200", 4, 1, 530, 11_600, 8192, 4),
    Point("GB200", 4, 2, 420, 17_800, 8192, 8),
    Point("GB200", 4, 4, 270, 24_400, 8192, 8),
    Point("GB200", 4, 8, 160, 31_600, 8192, 16),
    Point("GB200", 4, 16, 78, 29_000, 8192, 32),
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
                "skew": SKEW,
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
    inside: dict[str, int] = dict.fromkeys(errors, 0)
    for point in POINTS:
        found, ours = predicted(point, THEIRS), predicted(point, None).metrics
        theirs = found.metrics
        cells = []
        for name in errors:
            truth = getattr(point, name)
            errors[name].append(abs(theirs[name] / truth - 1))
            low, high = found.interval(name)
            inside[name] += low <= truth <= high
            cells += [f"{truth:.4g}", off(theirs[name], truth), f"{ours[name]:.4g}"]
        print(f"| TP{point.tp} {point.gpu}, {point.concurrency} | " + " | ".join(cells) + " |")
    for name, each in errors.items():
        print(
            f"\nTheir engine, `{name}`: mean absolute error {statistics.mean(each):.0%}, "
            f"{inside[name]} of {len(each)} inside the interval."
        )


def as_it_was_run() -> None:
    """The same points as loads: so many conversations of 10 to 15 turns, from first to last.

    The rates have the users who begin together and those who are left at the end in them.
    """
    print(
        "| GPUs, concurrency, conversations | published, tokens/s a user | their engine, simulated "
        "| published, tokens/s a GPU | their engine, simulated | hits |"
    )
    print("| --- |" + " --- |" * 5)
    errors: list[tuple[float, float]] = []
    for point in POINTS:
        found = simulated(point)
        tokens = sum(each.prompt_tokens + each.output_tokens for each in found.answers)
        cached = sum(each.cached_tokens for each in found.answers)
        prompts = sum(each.prompt_tokens for each in found.answers)
        decode = 1.0 / statistics.mean(each.tpot_s for each in found.answers)
        total = tokens / found.total_s / point.tp
        truths = point.decode_tokens_per_s_user, point.total_tokens_per_s_gpu
        errors.append((abs(decode / truths[0] - 1), abs(total / truths[1] - 1)))
        print(
            f"| TP{point.tp} {point.gpu}, {point.concurrency}, {point.conversations} "
            f"| {truths[0]} | {off(decode, truths[0])} | {truths[1]} | {off(total, truths[1])} "
            f"| {cached / prompts:.1%} |"
        )
    means = [statistics.mean(each) for each in zip(*errors, strict=True)]
    print(f"\nMean absolute error: decode {means[0]:.0%}, throughput {means[1]:.0%}.")


def simulated(point: Point) -> Simulated:
    """Their engine's steps under our scheduler; the front end is waited for between two turns."""
    wanted = spec(point.gpu, point.tp, point.concurrency)
    longest = wanted.workload.model_copy(update={"turns": TURNS[1]})
    predictor = Predictor(
        wanted.model_copy(update={"workload": longest}), CONFIG, find_hardware(point.gpu), THEIRS
    )
    knobs = Knobs(point.chunk, 64, DRAFTS, "fp8")
    candidate = Candidate(ParallelLayout(point.tp, point.tp, 1), knobs)
    one, dice = Deployment(predictor, candidate, {}), random.Random(0)
    talks = [Turns(50_000, 800, (500,) * dice.randint(*TURNS)) for _ in range(point.conversations)]
    wait_s = THEIRS.first_token_us(conversation(longest).later.prompt_tokens) * 1e-6
    load = Users(talks, point.concurrency, 0.0, wait_s, CONFIG.vocab_size)
    return simulate(one.outline, one.times, load, predictor.acceptance)


def by_term() -> None:
    """What a decode step of each point is predicted to be spent on, and what was left over."""
    print(
        "| GPUs, concurrency | memory | matrix | kernels | small kernels | collectives | host "
        "| predicted, us | published, us | left over |"
    )
    print("| --- |" + " --- |" * 9)
    for point in POINTS:
        found = predicted(point, THEIRS)
        cells = [f"{us:.0f}" for us in terms_us(found.step).values()]
        waits = found.metrics["tpot_ms"] * 1e3 / found.token_us  # for prompts of others
        truth_us = (
            1e6 / point.decode_tokens_per_s_user / waits * tokens_per_step(DRAFTS, ACCEPTANCE)
        )
        total_us = found.step.total_us
        cells += [f"{total_us:.0f}", f"{truth_us:.0f}", f"{truth_us / total_us - 1:+.0%}"]
        print(f"| TP{point.tp} {point.gpu}, {point.concurrency} | " + " | ".join(cells) + " |")
    print(
        "\nPublished: 3.39 tokens of a step over the rate, less the share of prompts by our model."
    )


@dataclass(frozen=True)
class Other:
    """A published figure of another engine: milliseconds of a token, and of the first, if known."""

    engine: str
    source: str
    preset: str
    weights: str
    gpu: str
    layout: tuple[int, int]
    lengths: tuple[int, int]
    concurrency: int
    depth: int
    tpot_ms: float
    ttft_ms: float | None


INFERENCEX = "SemiAnalysisAI/InferenceX pull request 3290, SGLang 0.5.19"
FLASHINFER = "flashinfer-ai/flashinfer issue 4249, vLLM of 2026-07"
_397B = ("sglang", INFERENCEX, "qwen3.5-397b-a17b", "fp8", "H100", (8, 8), (8192, 1024))
_35B = ("vllm", FLASHINFER, "qwen3.5-35b-a3b")
OTHERS = (
    Other(*_397B, 4, 3, 5.15, 330),
    Other(*_397B, 8, 3, 7.01, 407),
    Other(*_397B, 16, 3, 10.24, 508),
    Other(*_397B, 32, 3, 15.83, 746),
    Other(*_35B, "fp8", "B200", (1, 1), (1024, 128), 1, 0, 3.61, 88.3),
    Other(*_35B, "nvfp4", "B200", (1, 1), (1024, 128), 1, 0, 3.29, 102.7),
    Other(
        "vllm", "ours, vLLM 0.25.1", _35B[2], "bf16", "H200", (1, 1), (1024, 64), 1, 0, 4.28, None
    ),
)


def others() -> None:
    """SGLang and vLLM, in versions near those whose kernels were measured."""
    print(
        "| engine, model, GPUs, users | published ms a token | predicted "
        "| first token | predicted |"
    )
    print("| --- | --- | --- | --- | --- |")
    errors = []
    for each in OTHERS:
        ranks, experts = each.layout
        wanted = Spec.model_validate(
            {
                "version": 1,
                "model": {"preset": each.preset, "weights": each.weights},
                "target": {"gpu": each.gpu, "count": ranks},
                "workload": {
                    "kind": "agentic",
                    "first_turn_tokens": each.lengths[0],
                    "output_tokens": each.lengths[1],
                    "concurrency": each.concurrency,
                    "skew": SKEW,
                },
            }
        )
        engine = load_engine(ENGINES / f"{each.engine}.yaml")
        predictor = Predictor(wanted, load_preset(each.preset)[0], find_hardware(each.gpu), engine)
        layout = ParallelLayout(ranks, ranks // experts, experts)
        found = predictor.predict(Candidate(layout, Knobs(8192, 64, each.depth))).metrics
        errors.append(abs(found["tpot_ms"] / each.tpot_ms - 1))
        first = off(found["ttft_ms"], each.ttft_ms) if each.ttft_ms else "-"
        name = f"{each.source}: {each.preset} {each.weights}, {ranks} x {each.gpu}"
        print(
            f"| {name}, {each.concurrency} | {each.tpot_ms} "
            f"| {off(found['tpot_ms'], each.tpot_ms)} | {each.ttft_ms or '-'} | {first} |"
        )
    print(f"\nMean absolute error of a token {statistics.mean(errors):.0%}.")


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
            / StepModel(CONFIG, find_hardware("B200"), "nvfp4", SKEW, engine)
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
            steps = StepModel(CONFIG, find_hardware("B200"), "nvfp4", SKEW, engine)
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
        ("As loads, from their first conversation to their last", as_it_was_run),
        ("A decode step of theirs by term", by_term),
        ("SGLang and vLLM", others),
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
