"""`tokenspeed plan`: a spec becomes a bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.codegen.build import default_cache
from tokenspeed_plan.planner.commands.long_work import LongWork
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
from tokenspeed_plan.plans.diff import Change, diff
from tokenspeed_plan.plans.errors import PlanError, StalePlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.text import printable_line

Folder = click.Path(path_type=Path)
MAX_CHANGES = 20  # that a terminal is shown


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options of `tokenspeed plan`."""

    spec: Path
    out: Path
    check: bool
    dry_run: bool
    no_compile: bool


@click.command()
@click.argument("spec", type=Folder)
@click.option("-o", "--out", type=Folder, required=True, help="Folder of the plan bundle.")
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing; exit 1 if the bundle is not what SPEC compiles to.",
)
@click.option(
    "--dry-run", is_flag=True, help="Write nothing; show what would change in the bundle."
)
@click.option(
    "--no-compile",
    is_flag=True,
    help="Skip compiling the kernels for the target's GPU; a comparison leaves binaries out.",
)
def plan(**options: Any) -> None:
    """Compile SPEC into a plan."""
    _plan(PlanOptions(**options))


def _plan(options: PlanOptions) -> None:
    if options.check and options.dry_run:
        raise click.UsageError("give --check or --dry-run, not both")
    bundle = _compile(options)
    if options.dry_run:
        _echo_dry(bundle, options)
        return
    if options.check:
        _refuse_stale(bundle, options)
        click.echo(f"{options.out} is up to date", err=True)
        return
    old = _old_plan(options.out)
    save_plan(bundle.plan, options.out, bundle.sources, bundle.cubins)
    if old:
        _echo_changes(diff(old, bundle.plan))
    _echo_written(bundle, options.out)


def _echo_dry(bundle: Compiled, options: PlanOptions) -> None:
    """Show on stdout what would be written."""
    old = _old_plan(options.out)
    if old is None:
        click.echo(f"there is no plan in {options.out}; a new one would be written")
        return
    changes = diff(_comparable(old, options), bundle.plan)
    for change in changes:
        click.echo(str(change))
    if not changes:
        click.echo(f"{options.out} would not change")


def _comparable(old: Plan, options: PlanOptions) -> Plan:
    """The old plan, without binaries where none were compiled for the new one."""
    if options.no_compile:
        return _without_binaries(old)
    return old


def _compile(options: PlanOptions) -> Compiled:
    spec = load_spec(options.spec)
    model = find_model(spec, options.spec)
    with LongWork() as report:
        if options.no_compile:
            kept = _proved_kernels(options)
            bundle = compile_bundle(spec, model, report=report, kept=kept)
        else:
            bundle = build_bundle(spec, model, default_cache(), report)
        report("making golden prompts", 0, 1)
        return replace(bundle, plan=with_canary(bundle.plan, spec, model))


def _proved_kernels(options: PlanOptions) -> frozenset[str]:
    """Kernels of the bundle that is compared with: the compiler refused better tilings before."""
    old = _old_plan(options.out)
    if old is None or not (options.check or options.dry_run):
        return frozenset()
    return frozenset(binary.kernel for binary in old.binaries)


def _echo_written(bundle: Compiled, out: Path) -> None:
    plan, target = bundle.plan, bundle.plan.target
    path = out / PLAN_FILE
    what = f"{plan.model.name} on {target.count} x {target.gpu}"
    click.echo(printable_line(f"wrote {path} ({plan.digest[:16]}): {what}"), err=True)
    compiled = "not compiled"
    if plan.binaries:
        compiled = f"compiled for sm_{target.sm} by {plan.kernel_compiler}"
    click.echo(f"{len(bundle.sources)} kernels, {compiled}", err=True)
    for line in _warnings(plan):
        click.echo(f"warning: {line}", err=True)


def _warnings(plan: Plan) -> Iterator[str]:
    """What a plan does not keep: service levels and arrivals."""
    for decision in plan.decisions:
        if decision.name == "service_levels" and decision.value != "met":
            yield f"{decision.value}: {decision.reason}"
        if decision.name == "interleaving" and "warning: " in decision.reason:
            yield decision.reason.partition("warning: ")[2]


_BINARIES_HINT = (
    "use the Triton of the plan, where personality(2) may switch address space randomisation off "
    "(Docker's default seccomp profile forbids it); `--no-compile` leaves binaries out"
)


def _refuse_stale(bundle: Compiled, options: PlanOptions) -> None:
    """Refuse a bundle that differs from a fresh one; binaries only count if they were compiled."""
    fresh, frozen = dump_plan(bundle.plan), read_plan(options.out)
    if options.no_compile and frozen != fresh:
        frozen = dump_plan(_without_binaries(load_plan(options.out)))
    if frozen != fresh:
        kept = _old_plan(options.out)
        if kept is not None:
            _echo_changes(diff(_comparable(kept, options), bundle.plan))
        raise _stale(bundle.plan, options)
    check_sources(bundle.plan, options.out)


def _stale(fresh: Plan, options: PlanOptions) -> StalePlanError:
    """The error of a bundle that differs; it says so where nothing but the binaries does."""
    message = f"`{options.out}` is not what `{options.spec}` compiles to"
    kept = _old_plan(options.out)
    if (
        kept is not None
        and kept.binaries != fresh.binaries
        and _equal_but_for_binaries(kept, fresh)
    ):
        return StalePlanError(f"{message}: only the binaries differ", _BINARIES_HINT)
    hint = f"run `tokenspeed plan {options.spec} -o {options.out}` and look at the diff"
    return StalePlanError(message, hint)


def _equal_but_for_binaries(one: Plan, other: Plan) -> bool:
    return _without_binaries(one) == _without_binaries(other)


def _without_binaries(plan: Plan) -> Plan:
    return seal(plan.model_copy(update={"binaries": (), "kernel_compiler": ""}))


def _old_plan(out: Path) -> Plan | None:
    """The plan in a bundle; None where there is none that this version can read."""
    if not (out / PLAN_FILE).is_file():
        return None
    try:
        return load_plan(out)
    except PlanError:
        return None


def _echo_changes(changes: Sequence[Change]) -> None:
    """Show changes: the first ones on a terminal, all of them in a pipe."""
    shown = changes
    if sys.stderr.isatty():
        shown = changes[:MAX_CHANGES]
    for change in shown:
        click.echo(str(change), err=True)
    if len(changes) > len(shown):
        click.echo(f"  and {len(changes) - len(shown)} more changes", err=True)
