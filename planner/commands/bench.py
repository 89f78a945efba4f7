"""`tokenspeed bench`: measure a bundle."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.advisor.plan_prices import (
    batch_prediction,
    step_floor_bytes,
    step_prediction,
)
from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    alike_on_all_ranks,
    freeze_gc,
    limit_cpu,
    on_all_ranks,
)
from tokenspeed_plan.planner.commands.note_run import note_programs, noted
from tokenspeed_plan.planner.commands.option_types import Chances
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.text import printable

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.bench import batch_rows
    from tokenspeed_plan.runtime.engine import Engine

Folder = click.Path(path_type=Path)
Some = click.IntRange(min=1)


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """Programs to measure.

    Attributes:
        batch: sequences that decode.
        context: tokens that each of them has; None takes what the plan holds, up to 1024.
        prefill: tokens of the prefill program; 0 measures none.
    """

    batch: int
    context: int | None
    prefill: int


@dataclass(frozen=True, slots=True)
class AgenticOptions:
    """Conversations to run through the engine; None takes the value of the spec's workload.

    Attributes:
        conversations: how many run at once.
        turns: of each conversation.
        acceptance: chance that each draft is right; empty takes the drafts as they are.
    """

    conversations: int | None
    turns: int | None
    first_turn_tokens: int | None
    turn_tokens: int | None
    output_tokens: int | None
    acceptance: tuple[float, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Rows of a batch; None takes the value of the plan's workload.

    Attributes:
        rows: how many.
        prompt: tokens of each prompt.
        out: tokens of each answer.
        lengths: a file with the lengths of rows, in place of both.
        shared: tokens with which all prompts begin, in addition.
        seed: of the random tokens.
    """

    rows: int | None
    prompt: int | None
    out: int | None
    lengths: Path | None
    shared: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of `tokenspeed bench`; `weights` None are random."""

    weights: Path | None
    work: ProgramOptions | AgenticOptions | BatchOptions
    as_json: bool


@click.command(name="bench")
@click.argument("bundle", type=Folder)
@click.option(
    "--workload",
    type=click.Choice(["programs", "agentic", "batch"]),
    default="programs",
    show_default=True,
    help="Each program by itself, or conversations or rows of a batch through the engine.",
)
@click.option("--weights", default="random", help="A checkpoint folder, or `random` (the default).")
@click.option(
    "--batch", type=Some, default=1, show_default=True, help="Programs: sequences that decode."
)
@click.option(
    "--context",
    type=Some,
    help="Programs: tokens that each has (default: 1024, or the most that the plan holds).",
)
@click.option(
    "--prefill",
    type=click.IntRange(min=0),
    default=0,
    help="Programs: also prefill so many tokens.",
)
@click.option(
    "--conversations", type=Some, help="Agentic: how many at once; the plan's most without it."
)
@click.option(
    "--turns",
    type=Some,
    help="Agentic: turns of each; this and what follows: the spec's without it.",
)
@click.option("--first-turn-tokens", type=Some, help="Agentic: tokens of the first prompt.")
@click.option(
    "--turn-tokens", type=click.IntRange(min=0), help="Agentic: new tokens of each later turn."
)
@click.option("--output-tokens", type=Some, help="Agentic: tokens of each answer.")
@click.option(
    "--acceptance",
    type=Chances(),
    help="Agentic: simulate that each draft is right with these chances, "
    "such as 0.9,0.8,0.7; what is said is then nonsense.",
)
@click.option("--rows", type=Some, help="Batch: how many; three for each sequence without it.")
@click.option("--prompt", type=Some, help="Batch: tokens in each prompt; the spec's without it.")
@click.option("--out", type=Some, help="Batch: tokens of each answer; the spec's without it.")
@click.option("--lengths", type=Folder, help="Batch: JSON lines with the lengths of rows.")
@click.option(
    "--shared",
    type=click.IntRange(min=0),
    help="Batch: so many more tokens, with which all prompts begin; the spec's without it.",
)
@click.option("--seed", type=int, default=0, help="Agentic, batch: of the random tokens.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def bench_command(
    bundle: Path,
    workload: str,
    weights: str,
    batch: int,
    context: int | None,
    prefill: int,
    conversations: int | None,
    turns: int | None,
    first_turn_tokens: int | None,
    turn_tokens: int | None,
    output_tokens: int | None,
    acceptance: tuple[float, ...] | None,
    rows: int | None,
    prompt: int | None,
    out: int | None,
    lengths: Path | None,
    shared: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure BUNDLE on this machine.

    Its programs are shown beside their floor and the prediction; `--workload agentic` runs whole
    conversations through the engine, `--workload batch` rows.
    """
    folder = None
    if weights != "random":
        folder = Path(os.path.expanduser(weights))
    work: ProgramOptions | AgenticOptions | BatchOptions = ProgramOptions(batch, context, prefill)
    if workload == "batch":
        work = BatchOptions(rows, prompt, out, lengths, shared, seed)
    if workload == "agentic":
        work = AgenticOptions(
            conversations,
            turns,
            first_turn_tokens,
            turn_tokens,
            output_tokens,
            acceptance or (),
            seed,
        )
    _measure(bundle, BenchOptions(folder, work, as_json))


def _plan_of(bundle: Path) -> Plan:
    """The plan of the pool that answers; it is measured without the other one."""
    plan = load_plan(bundle)
    return plan.view(plan.pool)


def _measure(bundle: Path, options: BenchOptions) -> None:
    """Measure and print; all ranks of a plan replay its programs, rank 0 leads rows and agents."""
    engine, work = EngineOptions(options.weights), options.work
    if isinstance(work, AgenticOptions):
        on_all_ranks(
            bundle,
            engine,
            lambda: _agentic(bundle, options, work),
            follower=lambda: _agentic_engine(_plan_of(bundle), bundle, options, work).executor,
        )
    elif isinstance(work, BatchOptions):
        on_all_ranks(
            bundle,
            engine,
            lambda: _batch(bundle, options, work),
            follower=lambda: _batch_engine(_plan_of(bundle), bundle, options)[0].executor,
        )
    else:
        alike_on_all_ranks(bundle, engine, lambda: _programs(bundle, options, work))


def _show(options: BenchOptions, found: dict[str, Any], text: str) -> None:
    """Print the figures, once."""
    from tokenspeed_plan.runtime.execution.rank_links import joined

    if options.as_json:
        text = json.dumps(found, indent=2, allow_nan=False)
    if joined().rank == 0:
        click.echo(printable(text))


def _programs(bundle: Path, shown: BenchOptions, options: ProgramOptions) -> None:
    from tokenspeed_plan.runtime import bench
    from tokenspeed_plan.runtime.execution.rank_links import joined

    frozen = _plan_of(bundle)
    executor = bench.prepare(frozen, bundle, shown.weights)
    limit_cpu(frozen)
    context = options.context or bench.default_context(frozen, options.batch)
    sizes = bench.Options(options.batch, context, options.prefill)
    found = bench.bench(frozen, executor, sizes)
    for program in found["programs"]:
        batch = (program["tokens"], program["batch"], program["context"])
        # The step model needs the model's folder. Where it is not found, the plan's own prediction
        # stays.
        with suppress(SpecError):
            program |= step_prediction(frozen, bundle, program["phase"], *batch, program["depth"])
    _show(shown, found, bench.as_text(found))
    if joined().rank == 0:
        note_programs(frozen, bundle, found)


def _agentic(bundle: Path, shown: BenchOptions, options: AgenticOptions) -> None:
    from tokenspeed_plan.runtime.bench import agentic

    frozen = _plan_of(bundle)
    conversations = agentic.Conversations.of(
        frozen,
        conversations=options.conversations,
        turns=options.turns,
        first_turn_tokens=options.first_turn_tokens,
        turn_tokens=options.turn_tokens,
        output_tokens=options.output_tokens,
        seed=options.seed,
    )
    engine = _agentic_engine(frozen, bundle, shown, options)
    freeze_gc()
    with noted("bench", bundle, engine):
        found = agentic.agentic(engine, conversations, options.acceptance)
        _show(shown, found, agentic.as_text(found))


def _batch(bundle: Path, shown: BenchOptions, options: BatchOptions) -> None:
    from tokenspeed_plan.runtime.bench import batch_rows
    from tokenspeed_plan.runtime.bench.machine import measure_machine

    frozen = _plan_of(bundle)
    rows = batch_rows.Rows.of(
        frozen,
        options.rows,
        options.prompt,
        options.out,
        options.lengths,
        options.seed,
        options.shared,
    )
    forecast: dict[str, Any] = {}
    # The model of steps needs the model's folder. Where it is not found, nothing is predicted.
    with suppress(SpecError):
        forecast = {"predicted": _forecast(frozen, bundle, rows)}
    machine = measure_machine(frozen.target.device)
    engine, launch = _batch_engine(frozen, bundle, shown)
    freeze_gc()
    with noted("bench", bundle, engine):
        found = batch_rows.run_rows(engine, launch, rows) | forecast
    found["machine"] = asdict(machine)
    with suppress(SpecError):
        _price(frozen, bundle, found, machine.read_bytes_per_s)
    _show(shown, found, batch_rows.as_text(found))


def _batch_engine(
    frozen: Plan, bundle: Path, shown: BenchOptions
) -> tuple[Engine, batch_rows.TimedLaunch]:
    """An engine to measure, and the launch that times its steps, on each rank."""
    from tokenspeed_plan.runtime import bench
    from tokenspeed_plan.runtime.bench import batch_rows
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.execution.rank_links import joined
    from tokenspeed_plan.runtime.execution.ranks import lead_of
    from tokenspeed_plan.runtime.loading.engine_loader import default_launch

    links = joined()
    launch = batch_rows.TimedLaunch(default_launch(frozen), frozen.target.device)
    executor = bench.prepare(frozen, bundle, shown.weights, launch, lead_of(links))
    limit_cpu(frozen)
    engine = Engine(frozen, executor)
    links.meet(frozen.digest)
    return engine, launch


def _forecast(plan: Plan, bundle: Path, rows: batch_rows.Rows) -> dict[str, float]:
    """What the planner expects of the rows, told before any of them has run.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    from tokenspeed_plan.runtime.execution.rank_links import joined

    lengths = [(row.prompt_tokens, row.output_tokens) for row in rows.rows]
    forecast = batch_prediction(plan, bundle, lengths, rows.shared)
    if joined().rank == 0:
        rate, seconds = forecast["output_tokens_per_s"], forecast["total_s"]
        click.echo(f"predicted: {rate:g} tokens/s out, {seconds:g} s", err=True)
    return forecast


def _price(plan: Plan, bundle: Path, found: dict[str, Any], read_bytes_per_s: float) -> None:
    """Add the floor and the prediction of each program, for the steps that it had.

    Raises:
        SpecError: the plan's model is not where its spec says.
    """
    cached = found["hit_tokens"] / found["rows"]
    computed = max(found["tokens_in"] / found["rows"] - cached, 1.0)  # of a mean prompt
    for program in found["programs"]:
        tokens, context = round(program["mean_tokens"]), round(found["mean_context"])
        seqs = max(tokens // (program["depth"] + 1), 1)
        if program["phase"] == "prefill":
            seqs = max(1, round(tokens / computed))
            # A prompt that is longer than a step is in its middle.
            context = round(cached + tokens / seqs + max(computed - tokens, 0.0) / 2)
        priced = step_prediction(
            plan, bundle, program["phase"], tokens, seqs, context, program["depth"]
        )
        size = (tokens, seqs, context)
        floor_bytes = step_floor_bytes(plan, program["phase"], program["bucket"], size)
        floor_us = floor_bytes / read_bytes_per_s * 1e6
        program |= priced | {"floor_us": floor_us, "share_of_floor": floor_us / program["us"]}


def _agentic_engine(
    frozen: Plan, bundle: Path, shown: BenchOptions, options: AgenticOptions
) -> Engine:
    """An engine to measure, on each rank; what is simulated must be the same on all of them."""
    from tokenspeed_plan.runtime import bench
    from tokenspeed_plan.runtime.bench import agentic
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.execution.rank_links import joined
    from tokenspeed_plan.runtime.execution.ranks import lead_of
    from tokenspeed_plan.runtime.loading.engine_loader import default_launch

    links = joined()
    launch = default_launch(frozen)
    executor = bench.prepare(frozen, bundle, shown.weights, launch, lead_of(links))
    limit_cpu(frozen)
    engine = Engine(frozen, executor)
    if options.acceptance:
        agentic.simulate(engine, options.acceptance)
    links.meet(frozen.digest)
    return engine
