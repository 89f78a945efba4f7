"""`tokenspeed plan`: a spec becomes a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.compile import Compiled, build_bundle, compile_bundle, find_model
from tokenspeed_plan.planner.golden import with_canary
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.bundle import (
    PLAN_FILE,
    check_sources,
    dump_plan,
    load_plan,
    read_plan,
    save_plan,
    seal,
)
from tokenspeed_plan.plans.diff import diff
from tokenspeed_plan.plans.errors import PlanError, StalePlanError
from tokenspeed_plan.plans.schema import Plan

Folder = click.Path(path_type=Path)
SHOWN_CHANGES = 20


@click.command()
@click.argument("spec", type=Folder)
@click.option("-o", "--out", type=Folder, required=True, help="Folder of the plan bundle.")
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing; exit 1 if the bundle is not what SPEC compiles to.",
)
@click.option("--no-compile", is_flag=True, help="Skip compiling the kernels for the target's GPU.")
def plan(spec: Path, out: Path, check: bool, no_compile: bool) -> None:
    """Compile SPEC into a plan."""
    made = _compile(spec, no_compile)
    if check:
        _refuse_stale(made, out, spec, no_compile)
        click.echo(f"{out} is up to date", err=True)
        return
    old = _old_plan(out)
    save_plan(made.plan, out, made.sources, made.cubins)
    _echo_changes(old, made.plan)
    _echo_written(made, out)


def _compile(spec_path: Path, no_compile: bool) -> Compiled:
    spec = load_spec(spec_path)
    model = find_model(spec, spec_path)
    made = compile_bundle(spec, model) if no_compile else build_bundle(spec, model, default_cache())
    return replace(made, plan=with_canary(made.plan, spec, model))


def _echo_written(made: Compiled, out: Path) -> None:
    plan, binaries = made.plan, made.plan.binaries
    click.echo(
        f"wrote {out / PLAN_FILE} ({plan.digest[:16]}): {plan.model.name} on {plan.target.count} x {plan.target.gpu}",
        err=True,
    )
    compiled = (
        f"compiled for sm_{plan.target.sm} by {plan.kernel_compiler}"
        if binaries
        else "not compiled"
    )
    click.echo(f"{len(made.sources)} kernels, {compiled}", err=True)


def _refuse_stale(made: Compiled, out: Path, spec: Path, no_compile: bool) -> None:
    """The frozen bundle must be what was just made; without compiling, what the compiler said of it is not compared."""
    fresh, frozen = dump_plan(made.plan), read_plan(out)
    if no_compile and frozen != fresh:
        kept = load_plan(out)
        frozen = dump_plan(seal(kept.model_copy(update={"binaries": (), "kernel_compiler": ""})))
    if frozen != fresh:
        raise StalePlanError(
            f"`{out}` is not what `{spec}` compiles to",
            f"run `tokenspeed plan {spec} -o {out}` and look at the diff",
        )
    check_sources(made.plan, out)


def _old_plan(out: Path) -> Plan | None:
    try:
        return load_plan(out) if (out / PLAN_FILE).is_file() else None
    except PlanError:
        return None  # a damaged or older plan is simply replaced


def _echo_changes(old: Plan | None, new: Plan) -> None:
    changes = diff(old, new) if old else ()
    for change in changes[:SHOWN_CHANGES]:
        click.echo(str(change), err=True)
    if len(changes) > SHOWN_CHANGES:
        click.echo(f"  and {len(changes) - SHOWN_CHANGES} more changes", err=True)
