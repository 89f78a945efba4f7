"""`tokenspeed simulate`: a plan under a load, priced step by step, with no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.advisor.load_capacity import largest_count, largest_rate
from tokenspeed_plan.planner.advisor.plan_prices import (
    drafts_accepted,
    plan_pair,
    plan_steps,
    spec_of,
)
from tokenspeed_plan.planner.advisor.plan_steps import PlanSteps
from tokenspeed_plan.planner.advisor.spec_load import LoadSize, spec_load
from tokenspeed_plan.planner.commands.long_work import LongWork
from tokenspeed_plan.planner.commands.option_types import Chances, Number
from tokenspeed_plan.planner.spec import MAX_ARRIVALS, MIN_ARRIVALS, Spec, WorkloadSpec
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.text import printable

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.simulation.load import Load
    from tokenspeed_plan.runtime.simulation.load_results import Simulated
    from tokenspeed_plan.runtime.simulation.load_series import PageLooks
    from tokenspeed_plan.runtime.simulation.one_pool import Look
    from tokenspeed_plan.runtime.simulation.pool_pair import PairTimes

Folder = click.Path(path_type=Path)
Some = click.IntRange(min=1)
Milliseconds = Number(min=0, min_open=True, max=1e9)
MAX_REQUESTS = 1_000_000
MAX_USERS = 65_536
ROWS_AHEAD = 2  # rows of a batch that are queued, for each that runs


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """The options of `tokenspeed simulate`; None takes the value of the plan's spec.

    Attributes:
        requests: turns of all conversations together, about.
        users: conversations at once.
        turns_per_s: that arrive in a second, in place of users.
        think_s: from an answer to the next turn.
        recorded: a file of requests, in place of all these.
        ttft_ms, tpot_ms: of each request, in place of the service levels of the spec.
        most: the load that is raised until requests are late, `users` or `arrivals`.
        in_time: the share of requests that must not be late, where these are given.
        acceptance: chance that each draft is right.
        trace: where to write what happened.
        html: where to draw it.
        seed: of tokens, times and accepted drafts.
    """

    bundle: Path
    requests: int
    users: int | None
    turns_per_s: float | None
    think_s: float
    recorded: Path | None
    ttft_ms: float | None
    tpot_ms: float | None
    most: str | None
    in_time: float
    acceptance: tuple[float, ...] | None
    trace: Path | None
    html: Path | None
    seed: int
    as_json: bool


@click.command("simulate")
@click.argument("bundle", type=Folder)
@click.option(
    "--requests",
    type=click.IntRange(1, MAX_REQUESTS),
    default=1000,
    show_default=True,
    help="Requests to simulate; every turn of a conversation is one.",
)
@click.option("--users", type=Some, help="Conversations at once; the spec's without it.")
@click.option(
    "--arrivals",
    "turns_per_s",
    type=Number(MIN_ARRIVALS, MAX_ARRIVALS),
    help="Requests that come in a second, at random times, in place of --users.",
)
@click.option(
    "--think",
    "think_s",
    type=Number(0, 1e6),
    default=0.0,
    show_default=True,
    help="Seconds from an answer to the next turn of its conversation.",
)
@click.option(
    "--recorded",
    type=Folder,
    help="JSON lines with `arrival_s`, `prompt_tokens` and `output_tokens`, in place of the load.",
)
@click.option("--ttft-ms", type=Milliseconds, help="In time: a first token; else the spec's `slo`.")
@click.option("--tpot-ms", type=Milliseconds, help="In time: each token after it.")
@click.option(
    "--most",
    type=click.Choice(["users", "arrivals"]),
    help="Find the largest load of this kind that is answered in time.",
)
@click.option(
    "--in-time",
    type=Number(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the requests that must meet --ttft-ms and --tpot-ms.",
)
@click.option(
    "--acceptance",
    type=Chances(),
    help="The chance of each draft, such as 0.9,0.8,0.7; the spec's without it.",
)
@click.option("--trace", type=Folder, help="Write steps and requests as a trace for Perfetto.")
@click.option(
    "--html",
    type=Folder,
    help="Write one self-contained page: steps, queue, cache and percentiles over time.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of tokens and times.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def simulate_command(**options: Any) -> None:
    """Run a load through BUNDLE's scheduler and cache, each step taking the time predicted for it.

    Says what no formula can: queues, percentiles, preemptions, hits of the cache. Needs no GPU.
    """
    _simulate(SimulateOptions(**options))


def _simulate(options: SimulateOptions) -> None:
    named = [options.users, options.turns_per_s, options.recorded, options.most]
    if sum(one is not None for one in named) > 1:
        raise RequestError(
            "--users, --arrivals, --recorded and --most are four loads", "give one of them, or none"
        )
    plan = load_plan(options.bundle)
    from tokenspeed_plan.runtime.simulation.load_series import PageLooks

    accepted, pages = _accepted(plan, options), PageLooks()
    with LongWork() as report:
        times = plan_steps(plan, options.bundle)
        work = _Work(plan, spec_of(plan), times, plan_pair(plan, times), accepted, report)
        options = work.with_load(options)
        found = work.run(options, pages if options.html else None)
    figures = work.figures(found, options)
    _show(figures, options)
    if options.trace is not None:
        _write_trace(found, options.trace)
    if options.html is not None:
        _write_page(plan, figures, found, pages, options.html)


def _accepted(plan: Plan, options: SimulateOptions) -> tuple[float, ...]:
    return options.acceptance or drafts_accepted(plan, options.bundle)


def _show(figures: dict[str, Any], options: SimulateOptions) -> None:
    from tokenspeed_plan.runtime.simulation import load_report

    if options.as_json:
        text = json.dumps(figures, indent=2, allow_nan=False)
    else:
        text = load_report.as_text(figures, _load_words(options), _has_own_levels(options))
    click.echo(printable(text))


def _load_words(options: SimulateOptions) -> str:
    if options.recorded is not None:
        return f"as in {options.recorded}"
    if options.turns_per_s is not None:
        return f"{options.turns_per_s:.4g} a second"
    plural = "s" * (options.users != 1)
    return f"{options.users} user{plural} at once"


def _write_trace(found: Simulated, path: Path) -> None:
    from tokenspeed_plan.runtime.simulation import load_report

    path.write_text(json.dumps(load_report.trace(found), allow_nan=False), encoding="utf-8")
    click.echo(f"wrote {path}", err=True)


def _write_page(
    plan: Plan, figures: dict[str, Any], found: Simulated, pages: PageLooks, path: Path
) -> None:
    from tokenspeed_plan.codegen.page.load_page import render_load_page
    from tokenspeed_plan.runtime.simulation.load_series import series

    drawn = series(found, pages, plan.pool.limits.num_pages)
    path.write_text(render_load_page(plan, figures, drawn), encoding="utf-8")
    click.echo(f"wrote {path}", err=True)


@dataclass(frozen=True, slots=True)
class _Work:
    """A plan that loads are tried on."""

    plan: Plan
    spec: Spec
    times: PlanSteps
    pair: PairTimes | None
    accepted: tuple[float, ...]
    report: LongWork

    def with_load(self, options: SimulateOptions) -> SimulateOptions:
        """The options with the load that is asked for, or that of the spec."""
        asked = self.spec.workload
        if options.most:
            return self.largest(options)
        if options.recorded is not None or options.users or options.turns_per_s:
            return options
        if asked.arrivals_per_s is not None:
            return replace(options, turns_per_s=asked.arrivals_per_s)
        return replace(options, users=_num_users(self.plan, asked))

    def run(self, options: SimulateOptions, look: Look | None = None) -> Simulated:
        """Simulate a load."""
        from tokenspeed_plan.runtime.simulation.load_run import simulate

        load, count = _load(self.plan, self.spec, options)
        stage = f"simulating {_load_words(options)}"

        def progress(num_answered: int) -> None:
            self.report(stage, num_answered, count)

        own = self.accepted, options.seed
        return simulate(
            self.plan, self.times, load, *own, progress=progress, look=look, pair=self.pair
        )

    def figures(self, found: Simulated, options: SimulateOptions) -> dict[str, Any]:
        """What it was like, and what was asked."""
        from tokenspeed_plan.runtime.simulation import load_report

        load: dict[str, Any] = {"users": options.users, "arrivals_per_s": options.turns_per_s}
        load["pools"] = [pool.role for pool in self.plan.pools]
        in_time = load_report.Levels(options.ttft_ms, options.tpot_ms)
        levels = {} if _has_own_levels(options) else self.spec.service_levels
        return load | load_report.figures(found, in_time, levels)

    def largest(self, options: SimulateOptions) -> SimulateOptions:
        """The options with the largest load that is answered in time.

        Raises:
            RequestError: there are no service levels, or no load meets them.
        """
        if not _has_own_levels(options) and not self.spec.service_levels:
            raise RequestError(
                "no service level says what is in time",
                "give --ttft-ms or --tpot-ms, or plan with `slo` in the spec",
            )

        def is_good(changed: SimulateOptions) -> bool:
            found = self.figures(self.run(changed), changed)
            is_met = all(each["met"] for each in found["service_levels"].values())
            return is_met and bool(found["in_time"] >= options.in_time)

        if options.most == "users":
            found = _most_users(options, is_good)
        else:
            found = _most_arrivals(options, is_good)
        if found is None:
            missed = "the service levels of the spec are not met"
            if _has_own_levels(options):
                missed = f"{options.in_time:.0%} of the requests are not in time"
            raise RequestError(
                f"{missed} under any load", "allow more time, or plan for another GPU"
            )
        return found


def _has_own_levels(options: SimulateOptions) -> bool:
    """Whether it is said what is in time for each request."""
    return options.ttft_ms is not None or options.tpot_ms is not None


IsGood = Callable[[SimulateOptions], bool]


def _most_users(options: SimulateOptions, is_good: IsGood) -> SimulateOptions | None:
    found = largest_count(lambda users: is_good(replace(options, users=users)), MAX_USERS)
    return None if found is None else replace(options, users=found)


def _most_arrivals(options: SimulateOptions, is_good: IsGood) -> SimulateOptions | None:
    found = largest_rate(lambda rate: is_good(replace(options, turns_per_s=rate)), first=1.0)
    return None if found is None else replace(options, turns_per_s=found)


def _load(plan: Plan, spec: Spec, options: SimulateOptions) -> tuple[Load, int]:
    """What was recorded, or the conversations of the spec's workload; and how many requests."""
    from tokenspeed_plan.runtime.simulation.recorded import Recorded, read_recorded

    vocab_size = plan.model.vocab_size
    if options.recorded is not None:
        rows = read_recorded(options.recorded, plan.pool.limits.max_seq_len)
        return Recorded(rows, vocab_size), len(rows)
    users, rate = options.users, options.turns_per_s
    size = LoadSize(options.requests, users, rate, options.think_s, options.seed)
    load = spec_load(spec.workload, size, vocab_size)
    return load, len(load.talks) * spec.workload.turns


def _num_users(plan: Plan, workload: WorkloadSpec) -> int:
    """Conversations at once: all that a plan runs; of the rows of a batch more, which wait."""
    if workload.is_batch_of_rows:
        return ROWS_AHEAD * plan.pool.limits.max_seqs
    return plan.pool.limits.max_seqs
