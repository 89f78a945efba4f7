"""`tokenspeed bench`: measure a bundle."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import click
from tokenspeed_plan.planner.search.replayed import step_prediction
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import SpecError

Folder = click.Path(path_type=Path)


@click.command(name="bench")
@click.argument("bundle", type=Folder)
@click.option("--weights", default="random", help="A checkpoint folder, or `random` (the default).")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences that decode.")
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens that each has.")
@click.option("--prefill", type=click.IntRange(min=0), default=0, help="Also prefill so many tokens of one prompt.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def bench_command(bundle: Path, weights: str, as_json: bool, **options: int) -> None:
    """Measure BUNDLE on this machine: each program and kernel beside the floor and beside the prediction."""
    from tokenspeed_plan.runtime import bench

    frozen = load_plan(bundle)
    executor = bench.prepare(frozen, bundle, None if weights == "random" else Path(weights))
    chosen = bench.Options(options["batch"], options["context"], options["prefill"])
    found = bench.bench(frozen, executor, chosen)
    for program in found["programs"]:
        batch = (program["tokens"], program["batch"], program["context"])
        with suppress(SpecError):  # the model's folder is elsewhere: what the plan says of its own batch stays
            program |= step_prediction(frozen, bundle, program["phase"], *batch)
    click.echo(json.dumps(found, indent=2) if as_json else bench.as_text(found))
