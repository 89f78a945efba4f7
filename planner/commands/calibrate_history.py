"""`tokenspeed calibrate --from-history`: a profile from what earlier runs here took."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tokenspeed_plan.planner.advisor import calibration
from tokenspeed_plan.planner.machines.hardware import (
    Profile,
    prices_digest,
    read_profile,
    to_hardware,
)
from tokenspeed_plan.plans.errors import SpecError

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.bench.host_terms import HostTerms
    from tokenspeed_plan.runtime.history.history_file import History
    from tokenspeed_plan.runtime.history.lessons import Lessons

MORE = "run, serve or bench plans here, or measure probes: `tokenspeed calibrate -o FILE`"


def calibrate_from_history(base: str | None, device: str | None, out: Path | None) -> None:
    """Write a profile, or print it where no file is named.

    Raises:
        SpecError: there is no history, or too little in it of this machine.
    """
    from tokenspeed_plan.runtime.bench.machine import this_machine
    from tokenspeed_plan.runtime.history.lessons import as_text, learn, too_little

    _, name = this_machine(device)
    profile = calibration.base_profile(base or name)
    history = _history()
    own = [record for record in history.records if record.device == name]
    lessons = learn(own, prices_digest(to_hardware(profile)), _known_host(profile))
    if not lessons.is_enough:
        raise SpecError(too_little(lessons, name, history.damaged), MORE)
    text = calibration.dump(_taught(profile, lessons, name), f"Learnt from runs on {name}.")
    read_profile(text, str(out or "the profile"))
    click.echo("\n".join(as_text(lessons, profile.name)), err=True)
    others = len(history.records) - len(own)
    click.echo(
        f"passed over: {len(own) - lessons.runs} short runs, {others} of other machines, "
        f"{history.damaged} damaged lines",
        err=True,
    )
    write_profile(text, out)


def write_profile(text: str, out: Path | None) -> None:
    """Write the text of a profile, or print it."""
    if out is None:
        click.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}; use it with `target: {{gpu: {out}}}`", err=True)


def _history() -> History:
    from tokenspeed_plan.runtime.history.history_file import VARIABLE, history_path, read_history

    path = history_path()
    if path is None:
        raise SpecError("the history is off", f"unset `{VARIABLE}`, and run plans here")
    return read_history(path)


def _known_host(profile: Profile) -> HostTerms:
    from tokenspeed_plan.runtime.bench.host_terms import HostTerms

    hardware = to_hardware(profile)
    return HostTerms(hardware.host_step_us, hardware.host_seq_us, hardware.host_prompt_us)


def _taught(profile: Profile, lessons: Lessons, name: str) -> Profile:
    """The profile with what was learnt, and where it is from."""
    seen = f"`tokenspeed calibrate --from-history` on {name}: {lessons.runs} runs"
    made = profile
    if lessons.host is not None:
        numbers = {f"host_{key}": value for key, value in asdict(lessons.host).items()}
        text = f"{seen}, {lessons.steps} steps of the engine, less what it waited for tokens"
        made = calibration.with_numbers(made, "history_host", numbers, text)
    if lessons.factor is not None:
        text = (
            f"{seen}, {lessons.programs} programs of {lessons.plans} plans: the number of "
            f"`{profile.name}` times {lessons.factor:.4g}"
        )
        factor, spread, sums = lessons.factor, lessons.spread, lessons.has_sums
        made = calibration.slower(made, factor, spread, sums, "history", text)
    measured = {"machine": name, "date": date.today().isoformat()}
    return made.model_copy(update={"measured": measured})
