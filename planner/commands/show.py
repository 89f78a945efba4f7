"""`tokenspeed show` and `tokenspeed diff`: read plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.report import WIDTH, as_dict, as_text, why, why_as_dict
from tokenspeed_plan.plans.schema import Plan

Folder = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class ShowOptions:
    """The options of `tokenspeed show`."""

    bundle: Path
    as_json: bool
    kernels: bool
    field: tuple[str, ...]
    html: Path | None


@click.command()
@click.argument("bundle", type=Folder)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--kernels", is_flag=True, help="List the kernels too.")
@click.option(
    "--why",
    "field",
    multiple=True,
    help="Explain a decision or a predicted number, with the runners-up; may be given again.",
)
@click.option(
    "--html",
    type=Folder,
    help="Write one self-contained page: graphs, timeline, memory, roofline, front.",
)
def show(**options: Any) -> None:
    """Show what a plan decided: layout, memory, predicted numbers, what limits it."""
    _show(ShowOptions(**options))


def _show(options: ShowOptions) -> None:
    frozen = load_plan(options.bundle)
    if options.html is not None:
        options.html.write_text(_page(frozen), encoding="utf-8")
        click.echo(f"wrote {options.html}", err=True)
    elif options.field:
        _show_why(frozen, options.field, options.as_json)
    elif options.as_json:
        click.echo(json.dumps(as_dict(frozen), indent=1, allow_nan=False))
    else:
        width = WIDTH if sys.stdout.isatty() else None
        click.echo(as_text(frozen, options.kernels, width))


def _show_why(frozen: Plan, names: Sequence[str], as_json: bool) -> None:
    """As JSON one decision is an object, several are a list of them."""
    if not as_json:
        click.echo("\n".join(why(frozen, name) for name in names))
        return
    found = [why_as_dict(frozen, name) for name in names]
    click.echo(json.dumps(found if len(found) > 1 else found[0], indent=1, allow_nan=False))


def _page(frozen: Plan) -> str:
    """The page; without the roofline where the GPU's profile is not at hand."""
    from tokenspeed_plan.codegen.page.plan_page import render_page
    from tokenspeed_plan.planner.advisor.plan_prices import roofline

    roof = None
    with suppress(SpecError):
        roof = roofline(frozen)
    return render_page(frozen, roof)


@click.command("diff")
@click.argument("old", type=Folder)
@click.argument("new", type=Folder)
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def diff_command(old: Path, new: Path, as_json: bool) -> None:
    """Show what changed between two plans; exit 1 if anything did."""
    changes = diff(load_plan(old), load_plan(new))
    if as_json:
        click.echo(json.dumps([asdict(change) for change in changes], indent=1, allow_nan=False))
    else:
        for change in changes:
            click.echo(str(change))
    if changes:
        raise click.exceptions.Exit(1)
