"""`tokenspeed bench`: measure a bundle."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.advisor.plan_prices import step_prediction
from tokenspeed_plan.planner.commands.engines import freeze_gc
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import SpecError

Folder = click.Path(path_type=Path)
Some = click.IntRange(min=1)


class Chances(click.ParamType):  # type: ignore[type-arg]
    """Numbers with commas between them."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """As floats."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"`{value}` is not a list of numbers, such as 0.9,0.8,0.7", param, ctx)


@click.command(name="bench")
@click.argument("bundle", type=Folder)
@click.option(
    "--workload",
    type=click.Choice(["programs", "agentic"]),
    default="programs",
    show_default=True,
    help="Each program by itself, or whole conversations through the engine.",
)
@click.option("--weights", default="random", help="A checkpoint folder, or `random` (the default).")
@click.option(
    "--batch", type=Some, default=1, show_default=True, help="Programs: sequences that decode."
)
@click.option(
    "--context", type=Some, default=1024, show_default=True, help="Programs: tokens that each has."
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
@click.option("--seed", type=int, default=0, help="Agentic: of the random tokens.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def bench_command(bundle: Path, workload: str, weights: str, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE on this machine: programs beside the floor and the prediction, or an agent's conversations."""
    folder = None if weights == "random" else Path(weights)
    measure = _agentic if workload == "agentic" else _programs
    found, text = measure(bundle, folder, options)
    click.echo(json.dumps(found, indent=2) if as_json else text)


def _programs(
    bundle: Path, folder: Path | None, options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    from tokenspeed_plan.runtime import bench

    frozen = load_plan(bundle)
    executor = bench.prepare(frozen, bundle, folder)
    found = bench.bench(
        frozen, executor, bench.Options(options["batch"], options["context"], options["prefill"])
    )
    for program in found["programs"]:
        batch = (program["tokens"], program["batch"], program["context"])
        with suppress(
            SpecError
        ):  # the model's folder is elsewhere: what the plan says of its own batch stays
            program |= step_prediction(frozen, bundle, program["phase"], *batch, program["depth"])
    return found, bench.as_text(found)


def _agentic(
    bundle: Path, folder: Path | None, options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    from tokenspeed_plan.runtime import bench
    from tokenspeed_plan.runtime.bench import agentic
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.engine_loader import default_launch

    frozen = load_plan(bundle)
    names = ("conversations", "turns", "first_turn_tokens", "turn_tokens", "output_tokens", "seed")
    told = agentic.Conversations.of(frozen, **{name: options[name] for name in names})
    engine = Engine(frozen, bench.prepare(frozen, bundle, folder, default_launch(frozen)))
    freeze_gc()
    found = agentic.agentic(engine, told, options["acceptance"] or ())
    return found, agentic.as_text(found)
