"""`tokenspeed show` and `tokenspeed diff`: read plans."""

from __future__ import annotations

import json
from pathlib import Path

import click
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.report import as_dict, as_text, why

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=Folder)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--kernels", is_flag=True, help="List the kernels too.")
@click.option("--why", "field", help="Explain a decision or a predicted number, with the runners-up.")
def show(bundle: Path, as_json: bool, kernels: bool, field: str | None) -> None:
    """Show what a plan decided: layout, memory, predicted numbers, what limits it."""
    frozen = load_plan(bundle)
    if field is not None:
        click.echo(why(frozen, field))
        return
    click.echo(json.dumps(as_dict(frozen), indent=1) if as_json else as_text(frozen, kernels))


@click.command("diff")
@click.argument("old", type=Folder)
@click.argument("new", type=Folder)
def diff_command(old: Path, new: Path) -> None:
    """Show what changed between two plans; exit 1 if anything did."""
    changes = diff(load_plan(old), load_plan(new))
    for change in changes:
        click.echo(str(change))
    if changes:
        raise click.exceptions.Exit(1)
