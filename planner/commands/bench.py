"""`tokenspeed bench`: measure a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import Plan

Folder = click.Path(path_type=Path)


@click.command(name="bench")
@click.argument("bundle", type=Folder)
@click.option("--weights", default="random", help="A checkpoint folder, or `random` (the default).")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences that decode.")
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens that each has.")
@click.option("--prefill", type=click.IntRange(min=0), default=0, help="Also prefill so many tokens of one prompt.")
@click.option("--workload", type=click.Choice(["programs", "agentic"]), default="programs", show_default=True,
              help="Programs one by one, or an agent's conversations, by default those of the spec.")  # fmt: skip
@click.option("--first-turn", type=click.IntRange(min=1), help="agentic: tokens of the first turn.")
@click.option("--turn", type=click.IntRange(min=1), help="agentic: tokens of each later turn.")
@click.option("--turns", type=click.IntRange(min=1), help="agentic: turns of a conversation.")
@click.option("--outputs", type=click.IntRange(min=1), help="agentic: tokens of an answer.")
@click.option("--users", type=click.IntRange(min=1), help="agentic: conversations at once.")
@click.option("--seed", type=int, default=0, help="agentic: of what the users say.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def bench_command(bundle: Path, weights: str, workload: str, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE on this machine: each program and kernel beside the floor and beside the prediction."""
    from tokenspeed_plan.runtime import bench

    frozen = load_plan(bundle)
    folder = None if weights == "random" else Path(weights)
    if workload == "agentic":
        told = _converse(frozen, bundle, folder, options)
        click.echo(json.dumps(told, indent=2) if as_json else bench.conversations_as_text(told))
        return
    executor = bench.prepare(frozen, bundle, folder)
    chosen = bench.Options(options["batch"], options["context"], options["prefill"])
    found = bench.bench(frozen, executor, chosen)
    click.echo(json.dumps(found, indent=2) if as_json else bench.as_text(found))


def _converse(frozen: Plan, bundle: Path, folder: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    from tokenspeed_plan.runtime import bench
    from tokenspeed_plan.runtime.engine import Engine, executor_of

    asked = {"first_turn_tokens": "first_turn", "turn_tokens": "turn", "turns": "turns", "output_tokens": "outputs",
             "users": "users", "seed": "seed"}  # fmt: skip
    workload = bench.Workload.of(frozen, **{field: options[name] for field, name in asked.items()})
    return bench.converse(Engine(frozen, bench.prepare(frozen, bundle, folder, executor_of(frozen))), workload)
