"""`tokenspeed predict` and `tokenspeed sweep`: what a deployment would do, and which to rent."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.advisor.batch_run import BatchRun
from tokenspeed_plan.planner.advisor.candidate import ALL, OTHER_ENGINE, SUPPORTED
from tokenspeed_plan.planner.advisor.engine_profile import Engine, load_engine
from tokenspeed_plan.planner.advisor.fleet_size import (
    Job,
    fleet_for,
    machines_for,
    parse_count,
    parse_seconds,
)
from tokenspeed_plan.planner.advisor.legality import check_formats, check_possible
from tokenspeed_plan.planner.advisor.load_judge import (
    Deployment,
    judged,
    most_arrivals,
    most_users,
    with_load,
)
from tokenspeed_plan.planner.advisor.numbers import digits
from tokenspeed_plan.planner.advisor.predicted import (
    max_concurrency,
    max_context_tokens,
    option,
)
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor
from tokenspeed_plan.planner.advisor.ranking import SearchResult
from tokenspeed_plan.planner.advisor.reasons import service_lines
from tokenspeed_plan.planner.advisor.resolve import chosen_concurrency
from tokenspeed_plan.planner.advisor.rollback import allowed_rollbacks
from tokenspeed_plan.planner.advisor.search import Progress, Search
from tokenspeed_plan.planner.commands.engine_terms import OURS, compare
from tokenspeed_plan.planner.commands.long_work import LongWork
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.machines.target import target_hardware
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.models.quantization import stored_word
from tokenspeed_plan.planner.spec import MAX_GPUS, SLO_PERCENTILES, SLO_TIMES, Spec, load_spec
from tokenspeed_plan.plans.errors import SpecError, TokenspeedError
from tokenspeed_plan.plans.figures import plain, without_exponents
from tokenspeed_plan.plans.report import DEFINITIONS
from tokenspeed_plan.plans.types import RollbackWord

Folder = click.Path(path_type=Path)
MAX_RUNNERS_UP = 4
SWEEP_COLUMNS = {
    "turn_time_ms": "turn ms",
    "ttft_ms": "ttft ms",
    "tpot_ms": "tpot ms",
    "tokens_per_s_gpu": "tokens/s/GPU",
    "cost_per_million_tokens_usd": "USD/M",
}


FLEET_COLUMNS = {
    "machines": "machines",
    "gpus": "GPUs",
    "rows_per_s": "rows/s each",
    "total_s": "seconds",
    "cost_usd": "USD",
}


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The options of `tokenspeed predict`."""

    spec: Path
    changes: tuple[str, ...]
    engines: tuple[Path, ...]
    as_json: bool


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """The options of `tokenspeed sweep`; `gpus` and `counts` are lists with commas.

    `rows` in a time of `deadline` ask for a fleet.
    """

    spec: Path
    changes: tuple[str, ...]
    gpus: str
    counts: str
    reserved: bool
    rows: str | None
    deadline: str | None
    as_json: bool


@click.command()
@click.argument("spec", type=Folder)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the spec: parallelism.attention.tp=4.",
)
@click.option(
    "--engine",
    "engines",
    type=Folder,
    multiple=True,
    help="Model another engine, by its profile, beside ours term by term; or beside a second one.",
)
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def predict(**options: Any) -> None:
    """Predict what SPEC would do, as stated or at best, also where no plan can hold it yet."""
    _predict(PredictOptions(**options))


def _predict(options: PredictOptions) -> None:
    spec = load_spec(options.spec, options.changes)
    config = find_model(spec, options.spec).config
    engines = _engines(options.engines)
    engine = next(iter(engines), None)
    with LongWork() as report:
        progress = partial(report, "searching deployments")
        predictor, result = search(spec, config, engine, progress=progress)
        result = _under_load(spec, predictor, result)
    terms = None
    if engine is not None:
        terms = compare(predictor, result.best, next(iter(engines[1:]), None))
    if options.as_json:
        data = _as_json(predictor, result)
        data["terms"] = terms.as_json() if terms else None
        click.echo(json.dumps(data, indent=1, allow_nan=False))
    else:
        lines = [*_as_text(predictor, result), *(terms.lines() if terms else ())]
        click.echo(without_exponents("\n".join(lines)))


def _engines(paths: Sequence[Path]) -> list[Engine]:
    """The engine that is modelled, and the one that it is compared with, if another than ours.

    Raises:
        SpecError: there are more.
    """
    if len(paths) > 2:
        raise SpecError(f"`--engine` is given {len(paths)} times", "two engines are compared")
    return [load_engine(path) for path in paths]


def _under_load(spec: Spec, predictor: Predictor, result: SearchResult) -> SearchResult:
    """The result with the percentiles of its best, where the spec states arrivals or users."""
    best, asked = result.best, spec.workload
    is_alone = asked.concurrency in ("auto", 1) and asked.arrivals_per_s is None
    if is_alone or best.simulated is not None:
        return result
    return result.with_best(with_load(best, Deployment(predictor, best.candidate, {})))


@click.command()
@click.argument("spec", type=Folder)
@click.option("--gpus", required=True, help="Names or profiles: H200,B200.")
@click.option("--count", "counts", default="1,2,4,8", show_default=True, help="How many of them.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the spec first.")
@click.option("--reserved", is_flag=True, help="Prices of reserved machines instead of on demand.")
@click.option("--rows", help="With --deadline: how many machines answer so many rows: 10M.")
@click.option("--deadline", help="The time that they may take: 6h.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def sweep(**options: Any) -> None:
    """Find the best deployment of SPEC on each machine: what should I rent?"""
    _sweep(SweepOptions(**options))


def _sweep(options: SweepOptions) -> None:
    counts = _parse_counts(options.counts)
    spec = load_spec(options.spec, options.changes)
    job = _parse_job(options, spec)
    config = find_model(spec, options.spec).config
    gpus = [_checked_name(name) for name in options.gpus.split(",")]
    targets = [_with_target(spec, gpu, count) for gpu in gpus for count in counts]
    entries = []
    simulated: dict[Hashable, dict[str, float]] = {}
    with LongWork() as report:
        for done, each in enumerate(targets):
            machine = f"{each.target.gpu} x {each.target.count}"
            report.title = f"machine {done + 1} of {len(targets)}, {machine}: "
            progress = partial(report, "searching deployments")
            searched = partial(
                search,
                each,
                config,
                reserved=options.reserved,
                progress=progress,
                simulated=simulated,
            )
            entries.append(_sweep_entry(each, searched, job))
    if options.as_json:
        click.echo(json.dumps(entries, indent=1, allow_nan=False))
    else:
        click.echo(without_exponents("\n".join(_sweep_table(entries, spec))))
        if job is not None:
            click.echo(without_exponents("\n".join(_fleet_table(entries, job))))
        if spec.service_levels:
            click.echo(without_exponents("\n".join(_capacity_table(entries))))


def _parse_job(options: SweepOptions, spec: Spec) -> Job | None:
    """The batch of `--rows` and `--deadline`.

    Raises:
        SpecError: one goes without the other, or the spec's workload is no batch of rows.
    """
    if options.rows is None and options.deadline is None:
        return None
    if options.rows is None or options.deadline is None:
        raise SpecError("`--rows` and `--deadline` go together", "give both, or neither")
    if not spec.workload.is_batch_of_rows:
        raise SpecError(
            "`--rows` needs a workload that is a batch of rows",
            "`--set workload.kind=batch --set workload.turns=1`",
        )
    return Job(parse_count(options.rows), parse_seconds(options.deadline))


def _parse_counts(text: str) -> list[int]:
    counts = []
    for word in text.split(","):
        if not word.isdecimal() or len(word) > 9 or not 1 <= int(word) <= MAX_GPUS:
            raise SpecError(
                f"`--count {text:.40}` is not a list of numbers from 1 to {MAX_GPUS}",
                "such as 1,2,4,8",
            )
        counts.append(int(word))
    return counts


def _checked_name(name: str) -> str:
    """The name of a machine that we know; the path of a profile as it is."""
    if name.endswith(".yaml"):
        return name
    return find_hardware(name).name


def _with_target(spec: Spec, gpu: str, count: int) -> Spec:
    target = spec.target.model_copy(update={"gpu": gpu, "count": count})
    return spec.model_copy(update={"target": target})


def search(
    spec: Spec,
    config: ModelConfig,
    engine: Engine | None = None,
    reserved: bool = False,
    progress: Progress | None = None,
    simulated: dict[Hashable, dict[str, float]] | None = None,
) -> tuple[Predictor, SearchResult]:
    """Search everything that the spec leaves open, whether or not the runtime replays it yet.

    Args:
        spec: what was asked.
        config: of the model.
        engine: another engine to model; all of them take drafts back by snapshots.
        reserved: price GPUs as reserved.
        progress: is told how far the search is.
        simulated: what is known of loads; others are added to it.

    Raises:
        SpecError: nothing that the spec allows is legal and fits, or the machine cannot multiply
            such weights.
    """
    hardware = target_hardware(spec)
    check_possible(spec, config)
    check_formats(stored_word(spec.model.weights, config.quantization), hardware)
    if spec.workload.concurrency == "auto":
        chosen = chosen_concurrency(spec, config, hardware)
        spec = spec.with_concurrency(chosen.num_seqs if chosen else 1)
    rollback: RollbackWord = "snapshot"
    capabilities = OTHER_ENGINE
    if engine is None:
        capabilities = ALL
        rollback, *_ = allowed_rollbacks(spec, config, hardware)
    predictor = Predictor(spec, config, hardware, engine, reserved, rollback)
    if simulated is not None:
        predictor.simulated = simulated
    result = Search(predictor, capabilities, spec.target.count, progress).run()
    _ = result.best
    return predictor, judged(result, lambda each: Deployment(predictor, each.candidate, {}))


def _as_json(predictor: Predictor, result: SearchResult) -> dict[str, Any]:
    best, engine = result.best, predictor.engine
    candidate = best.candidate
    missing = SUPPORTED.missing(candidate)
    return {
        "engine": engine.title if engine else OURS,
        "target": {
            "gpu": predictor.hardware.name,
            "count": candidate.num_gpus,
            "calibrated": not predictor.hardware.borrows_prices,
        },
        "deployment": str(candidate),
        "layout": asdict(candidate.layout),
        "prefill_layout": asdict(candidate.prefill) if candidate.prefill else None,
        "replicas": candidate.replicas,
        "knobs": asdict(candidate.knobs),
        "replayed": not missing,
        "not_replayed_yet": missing,
        "predicted": _numbers(best),
        "limits": {
            "largest_concurrency": max_concurrency(predictor, candidate),
            "largest_context_tokens": max_context_tokens(predictor, candidate),
        },
        "load": _load_numbers(best),
        "batch": best.run.as_json() if best.run else None,
        "memory_bytes_per_rank": asdict(best.memory) | {"total": best.memory.total},
        "slo_missed": result.binding,
        "service_levels": service_lines(best, result.slo, predictor.spec.workload.arrivals_per_s),
        "runners_up": [option(each).model_dump() for each in _runners_up(result)],
    }


def _load_numbers(best: Prediction) -> dict[str, float] | None:
    """Means and percentiles of the simulated load; None where none was simulated."""
    if not best.simulated:
        return None
    return {name: digits(ms) for name, ms in best.simulated.items()}


def _runners_up(result: SearchResult) -> list[Prediction]:
    return result.by_layout[1 : MAX_RUNNERS_UP + 1]


def _numbers(best: Prediction) -> dict[str, Any]:
    step_us = {key: digits(value) for key, value in asdict(best.step).items()}
    intervals = {name: [digits(end) for end in best.interval(name)] for name in best.metrics}
    return {
        **best.as_json(),
        "interval": intervals,
        "decode_batch": digits(best.turn.batch),
        "decode_step_us": step_us | {"total": digits(best.step.total_us)},
        "limited_by": best.step.bound,
        "saturated": best.turn.saturated,
        "definitions": DEFINITIONS,
    }


def _as_text(predictor: Predictor, result: SearchResult) -> Iterator[str]:
    best, hardware = result.best, predictor.hardware
    title = f"{predictor.config.name} on {best.candidate.num_gpus} x {hardware.name}"
    if predictor.engine:
        title += f", as {predictor.engine.title} would run it"
    yield title
    if hardware.borrows_prices:
        yield f"nobody calibrated a {hardware.name}: each interval adds up what could be wrong"
    yield str(best.candidate)
    missing = SUPPORTED.missing(best.candidate)
    if not missing:
        yield "`tokenspeed plan` can freeze this"
    else:
        yield f"not replayed yet: {', '.join(missing)}"
    if result.binding:
        yield f"service level missed: {result.binding}"
    yield from service_lines(best, result.slo, predictor.spec.workload.arrivals_per_s)
    for name, meaning in DEFINITIONS.items():
        low, high = best.interval(name)
        value = best.metrics[name]
        interval = f"({plain(low)} to {plain(high)})"
        yield f"  {name:<28} {plain(value):>10}  {interval}  {meaning}"
    if best.simulated:
        yield from _load_lines(best.simulated)
    if best.run:
        yield from _batch_lines(best.run)
    yield "next"
    for each in _runners_up(result):
        yield f"  {each.candidate}: {result.objective} {plain(each.metrics[result.objective])}"


def _load_lines(simulated: Mapping[str, float]) -> Iterator[str]:
    """What users see under the load of the spec, in words."""
    for time in SLO_TIMES:
        parts = [f"mean {plain(simulated[f'{time}_ms'])}"]
        for percent in SLO_PERCENTILES:
            parts.append(f"p{percent} {plain(simulated[f'{time}_p{percent}_ms'])}")
        yield f"{time}_ms under the load, simulated: {', '.join(parts)}"


def _batch_lines(run: BatchRun) -> Iterator[str]:
    """A batch in words, on one replica."""
    facts = run.as_json()
    yield (
        f"{facts['rows']} rows: {plain(facts['input_tokens_per_s'])} tokens/s in, "
        f"{plain(facts['output_tokens_per_s'])} out, {plain(facts['total_s'])} s; "
        f"prefill {plain(facts['prefill_s'])}, decode {plain(facts['decode_s'])}, "
        f"host in the open {plain(facts['host_s'])}; {plain(facts['mean_batch'])} sequences a "
        f"decode step"
    )


def _sweep_entry(
    spec: Spec, searched: Callable[[], tuple[Predictor, SearchResult]], job: Job | None
) -> dict[str, Any]:
    """The best deployment on one machine, or why there is none; and how many a job needs."""
    count = spec.target.count
    try:
        predictor, result = searched()
    except TokenspeedError as error:
        return {"gpu": spec.target.gpu, "count": count, "error": error.message}
    candidate = result.best.candidate
    entry = {
        "gpu": predictor.hardware.name,
        "count": count,
        "used": candidate.num_gpus,
        "deployment": str(candidate),
        "predicted": result.best.as_json(),
        "slo_missed": result.binding,
        "not_replayed_yet": SUPPORTED.missing(candidate),
    }
    if job is not None:
        fleet = fleet_for(job, result.best)
        entry["fleet"] = fleet.as_json() if fleet else None
    if result.slo:
        entry["capacity"] = _capacity(predictor, result)
    return entry


def _capacity(predictor: Predictor, result: SearchResult) -> dict[str, Any] | None:
    """The largest load within the service levels, and how many machines the spec's load takes.

    None where no load is within them.
    """
    best, workload = result.best, predictor.spec.workload
    deployment = Deployment(predictor, best.candidate, {})
    users = arrivals_per_s = None
    if workload.arrivals_per_s is None:
        users = most_users(deployment, result.slo)
    else:
        arrivals_per_s = most_arrivals(deployment, result.slo)
    most = users or arrivals_per_s
    if most is None:
        return None
    asked = workload.arrivals_per_s or workload.num_seqs
    machines = machines_for(asked, most, best)
    return {"users": users, "arrivals_per_s": arrivals_per_s, **machines}


def _capacity_table(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The largest load of each machine, and how many machines the spec's load takes."""
    yield "\nlargest load within the service levels, simulated; machines for the load of the spec"
    heads = " ".join(f"{head:>12}" for head in ("load", "machines", "GPUs", "USD/h"))
    yield f"{'gpu':<8} {'of':>4} {heads}"
    for entry in (each for each in entries if "capacity" in each):
        machine, found = f"{entry['gpu']:<8} {entry['used']:>4}", entry["capacity"]
        if found is None:
            yield f"{machine} no load is within them"
            continue
        load = f"{plain(found['arrivals_per_s'])}/s" if found["arrivals_per_s"] else found["users"]
        numbers = (load, found["machines"], found["gpus"], plain(found["usd_per_hour"]))
        yield f"{machine} " + " ".join(f"{number:>12}" for number in numbers)


def _fleet_table(entries: Sequence[dict[str, Any]], job: Job) -> Iterator[str]:
    """Which machines, how many and for how much: the cheapest first."""
    yield f"\n{job.rows} rows within {plain(job.deadline_s)} s, at the slow end of the intervals"
    heads = " ".join(f"{head:>12}" for head in FLEET_COLUMNS.values())
    yield f"{'gpu':<8} {'of':>4} {heads}"
    able = [entry for entry in entries if entry.get("fleet")]
    for entry in sorted(able, key=lambda entry: float(entry["fleet"]["cost_usd"])):
        numbers = " ".join(f"{plain(entry['fleet'][name]):>12}" for name in FLEET_COLUMNS)
        yield f"{entry['gpu']:<8} {entry['used']:>4} {numbers}"
    for entry in entries:
        if "fleet" in entry and entry["fleet"] is None:
            yield f"{entry['gpu']:<8} {entry['used']:>4} one row takes longer than that"


def _sweep_table(entries: Sequence[dict[str, Any]], spec: Spec) -> Iterator[str]:
    yield (
        f"least {spec.objective.minimize} of each machine; "
        "what the runtime does not replay yet is marked *"
    )
    heads = " ".join(f"{head:>12}" for head in SWEEP_COLUMNS.values())
    yield f"{'gpu':<8} {'of':>4} {'used':>4} {heads}  deployment"
    for entry in entries:
        machine = f"{entry['gpu']:<8} {entry['count']:>4}"
        if "error" in entry:
            yield f"{machine}    - {entry['error']}"
            continue
        numbers = " ".join(f"{plain(entry['predicted'][name]):>12}" for name in SWEEP_COLUMNS)
        mark = "*" if entry["not_replayed_yet"] else ""
        if entry["slo_missed"]:
            mark += f" (service level missed: {entry['slo_missed']})"
        yield f"{machine} {entry['used']:>4} {numbers}  {entry['deployment']}{mark}"
