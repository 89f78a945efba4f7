"""Keeps what a run was like, beside what was predicted for it; a run never fails by it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.bench.clock import ROUNDS, RUNS
from tokenspeed_plan.runtime.bench.machine import provenance, this_machine
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.history.history_file import VARIABLE, append_record, history_path
from tokenspeed_plan.runtime.history.load_watch import LoadWatch
from tokenspeed_plan.runtime.history.run_record import Predicted, RunRecord, StepRow, digits
from tokenspeed_plan.runtime.simulation.virtual_steps import StepTimes

Command = Literal["run", "serve", "bench"]


@dataclass(frozen=True, slots=True)
class Prices:
    """What predicts steps.

    Attributes:
        profile: the machine's.
        digest: of the profile's numbers.
        times: of steps.
        hides_host: whether the host prepares a step while the device computes the one before it.
    """

    profile: str
    digest: str
    times: StepTimes
    hides_host: bool


# Prices of a plan, where they are known; they are asked for once everything else is done.
FindPrices = Callable[[], Prices | None]


@contextmanager
def kept(command: Command, engine: Engine, find: FindPrices) -> Iterator[None]:
    """Keep what the engine does here, unless the history is off or no request is answered."""
    if history_path() is None:
        yield
        return
    watch = LoadWatch(engine)
    yield
    engine.loop.watch = None
    load = watch.load()
    if load.requests:
        facts = {"load": load, "measured": watch.measured(), "steps": watch.rows()}
        _keep(_record(command, engine.plan, facts), find)


def keep_programs(plan: Plan, programs: Sequence[Mapping[str, Any]], find: FindPrices) -> None:
    """Keep programs that were measured by themselves, as `bench.bench` says it."""
    if history_path() is not None:
        rows = tuple(map(_measured_row, programs))
        _keep(_record("bench", plan, {"steps": rows}), find)


def _measured_row(program: Mapping[str, Any]) -> StepRow:
    count, us = ROUNDS * RUNS, program["measured_us"]
    seqs, tokens = program["batch"], program["tokens"]
    return StepRow(
        phase=program["phase"],
        bucket=program["bucket"],
        depth=program["depth"],
        steps=count,
        wall_s=digits(count * us * 1e-6),
        seqs=seqs,
        tokens=tokens,
        context=max(program["context"] - tokens / seqs, 0.0),
        timed=count,
        device_us=digits(us),
        host_us=None,
    )


def _record(command: Command, plan: Plan, facts: Mapping[str, Any]) -> RunRecord:
    device, name = this_machine(plan.target.device)
    known = provenance(device)
    versions: dict[str, str] = {key: known[key] for key in ("torch", "cuda") if key in known}
    return RunRecord(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        plan=plan.digest,
        model=plan.model.name,
        gpu=plan.target.gpu,
        ranks=plan.target.count,
        device=name,
        versions={"tokenspeed-plan": version("tokenspeed-plan"), **versions},
        **facts,
    )


def _keep(record: RunRecord, find: FindPrices) -> None:
    """Append a record with its prices; where that is not possible, a line says so."""
    path, prices = history_path(), find()
    assert path is not None
    if prices is not None:
        record = priced(record, prices)
    try:
        append_record(path, record)
    except OSError as error:
        reason = error.strerror or str(error)
        print(
            f"warning: the history `{path}` cannot be written: {reason} ({VARIABLE}=off ends it)",
            file=sys.stderr,
        )


def priced(record: RunRecord, prices: Prices) -> RunRecord:
    """The record with what its steps, and its load with such steps, would take."""
    rows = tuple(_priced_row(row, prices.times) for row in record.steps)
    predicted = Predicted(
        profile=prices.profile,
        prices=prices.digest,
        tokens_per_s_out=_rate(record, rows, prices.hides_host),
    )
    return record.model_copy(update={"steps": rows, "predicted": predicted})


def _priced_row(row: StepRow, times: StepTimes) -> StepRow:
    seqs = max(round(row.seqs), 1)
    if row.phase == "decode":
        us = times.decode_us(row.bucket, seqs, row.context + 1.0)
    else:
        us = times.prefill_us(max(round(row.tokens), 1), seqs, row.context)
    host_us = times.host_us(seqs, round(row.prompts))
    changed = {"predicted_us": digits(us), "predicted_host_us": digits(host_us)}
    return row.model_copy(update=changed)


def _rate(record: RunRecord, rows: Sequence[StepRow], hides_host: bool) -> float | None:
    """Tokens a second with predicted steps; the time between requests stays."""
    load, measured = record.load, record.measured
    if load is None or measured is None:
        return None
    busy_us = 0.0
    for row in rows:
        device_us, host_us = row.predicted_us or 0.0, row.predicted_host_us or 0.0
        step_us = max(device_us, host_us) if hides_host else device_us + host_us
        busy_us += row.steps * step_us
    idle_s = max(measured.total_s - measured.busy_s, 0.0)
    return digits(load.output_tokens / max(idle_s + busy_us * 1e-6, 1e-9))
