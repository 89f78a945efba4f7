"""Lets the user's history have what a run was like, and the planner's prices for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Plan

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.history.keeping import Command, Prices


@contextmanager
def noted(command: Command, bundle: Path, engine: Engine) -> Iterator[None]:
    """Note what an engine does here."""
    from tokenspeed_plan.runtime.history.keeping import kept

    with kept(command, engine, lambda: _prices(engine.plan, bundle)):
        yield


def note_programs(plan: Plan, bundle: Path, found: Mapping[str, Any]) -> None:
    """Note programs that `bench` has measured by themselves."""
    from tokenspeed_plan.runtime.history.keeping import keep_programs

    keep_programs(plan, found["programs"], lambda: _prices(plan, bundle))


def _prices(plan: Plan, bundle: Path) -> Prices | None:
    """The advisor's prices of a plan; None where its model is not found, or its spec is older."""
    # Only once a run has ended: a worker that replays a plan need not wait for the advisor.
    from tokenspeed_plan.planner.advisor.plan_prices import plan_steps, spec_of
    from tokenspeed_plan.planner.machines.hardware import find_hardware, prices_digest
    from tokenspeed_plan.runtime.history.keeping import Prices

    with suppress(SpecError):
        spec, steps = spec_of(plan), plan_steps(plan, bundle)
        hardware = find_hardware(spec.target.gpu, spec.folder)
        return Prices(hardware.name, prices_digest(hardware), steps, steps.is_padded)
    return None
