"""`tokenspeed predict` and `tokenspeed sweep`: what a deployment would do, and which to rent; nothing is planned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.advisor.advise import option
from tokenspeed_plan.planner.advisor.candidate import ALL_CAPABILITIES, SUPPORTED, check_formats
from tokenspeed_plan.planner.advisor.engine_profile import load_engine
from tokenspeed_plan.planner.advisor.hardware import find_hardware
from tokenspeed_plan.planner.advisor.prediction import Prediction, Predictor, digits
from tokenspeed_plan.planner.advisor.rollback import kept_first
from tokenspeed_plan.planner.advisor.search import Search, SearchResult
from tokenspeed_plan.planner.advisor.step_model import Engine
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.spec import Spec, load_spec
from tokenspeed_plan.plans.errors import SpecError, TokenspeedError
from tokenspeed_plan.plans.report import DEFINITIONS

Folder = click.Path(path_type=Path)
SHOWN = 4


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
    type=Folder,
    help="Model another engine: the profile with its launches and host work.",
)
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def predict(spec: Path, changes: tuple[str, ...], engine: Path | None, as_json: bool) -> None:
    """Predict what SPEC would do, as stated or as best found; also what the runtime does not replay yet."""
    asked = load_spec(spec, changes)
    config = find_model(asked, spec).config
    modelled = load_engine(engine) if engine else None
    predictor, found = search(asked, config, modelled)
    click.echo(
        json.dumps(_as_json(predictor, found), indent=1) if as_json else _as_text(predictor, found)
    )


@click.command()
@click.argument("spec", type=Folder)
@click.option("--gpus", required=True, help="Names or profiles: H200,B200.")
@click.option("--count", "counts", default="1,2,4,8", show_default=True, help="How many of them.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the spec first.")
@click.option("--reserved", is_flag=True, help="Prices of reserved machines instead of on demand.")
@click.option("--json", "as_json", is_flag=True, help="Stable fields for programs.")
def sweep(
    spec: Path, gpus: str, counts: str, changes: tuple[str, ...], reserved: bool, as_json: bool
) -> None:
    """Find the best deployment of SPEC on each machine: what should I rent?"""
    numbers = [
        int(text) if text.isdecimal() and 1 <= int(text) <= 1024 else 0
        for text in counts.split(",")
    ]
    if not all(numbers):
        raise SpecError(
            f"`--count {counts}` is not a list of numbers from 1 to 1024", "such as 1,2,4,8"
        )
    asked = load_spec(spec, changes)
    config = find_model(asked, spec).config
    machines = [
        find_hardware(name).name if not name.endswith(".yaml") else name for name in gpus.split(",")
    ]
    rows = [_row(asked, config, gpu, count, reserved) for gpu in machines for count in numbers]
    click.echo(json.dumps(rows, indent=1) if as_json else _table(rows, asked))


def search(
    spec: Spec, config: ModelConfig, engine: Engine | None = None, reserved: bool = False
) -> tuple[Predictor, SearchResult]:
    """Everything that the spec leaves open, replayed today or not.

    Raises:
        SpecError: nothing that the spec allows is legal and fits, or the machine cannot multiply
            such weights.
    """
    hardware = find_hardware(spec.target.gpu)
    check_formats(spec.model.weights, hardware)
    recomputes = engine is None and kept_first(spec, config, hardware)[0]
    predictor = Predictor(spec, config, hardware, engine, reserved, recomputes)
    found = Search(predictor, ALL_CAPABILITIES, spec.target.count).run()
    _ = found.best
    return predictor, found


def _as_json(predictor: Predictor, found: SearchResult) -> dict[str, Any]:
    best = found.best
    missing = SUPPORTED.missing(best.candidate)
    memory = predictor.memory(best.candidate.layout)
    workload = predictor.spec.workload
    return {
        "engine": predictor.engine.name if predictor.engine else "tokenspeed-plan",
        "target": {"gpu": predictor.hardware.name, "count": best.candidate.num_gpus},
        "deployment": str(best.candidate),
        "layout": asdict(best.candidate.layout),
        "prefill_layout": asdict(best.candidate.prefill) if best.candidate.prefill else None,
        "replicas": best.candidate.replicas,
        "knobs": asdict(best.candidate.knobs),
        "recomputed": not missing,
        "not_replayed_yet": missing,
        "predicted": _numbers(best),
        "limits": {
            "largest_concurrency": memory.max_seqs_that_fit(
                best.candidate.knobs, workload.max_conversation_tokens, 65_536
            ),
            "largest_context_tokens": memory.max_tokens_that_fit(
                best.candidate.knobs, workload.concurrency
            ),
        },
        "memory_bytes_per_rank": asdict(best.memory) | {"total": best.memory.total},
        "slo_missed": found.binding,
        "runners_up": [option(p).model_dump() for p in found.by_layout[1 : SHOWN + 1]],
    }


def _numbers(best: Prediction) -> dict[str, Any]:
    step = {key: digits(value) for key, value in asdict(best.step).items()}
    intervals = {name: [digits(end) for end in best.interval(name)] for name in best.metrics}
    return {
        **best.as_json(),
        "interval": intervals,
        "decode_batch": digits(best.served.batch),
        "decode_step_us": step | {"total": digits(best.step.total_us)},
        "limited_by": best.step.bound,
        "saturated": best.served.saturated,
        "definitions": DEFINITIONS,
    }


def _as_text(predictor: Predictor, found: SearchResult) -> str:
    best, engine = found.best, predictor.engine
    missing = SUPPORTED.missing(best.candidate)
    lines = [
        f"{predictor.config.name} on {best.candidate.num_gpus} x {predictor.hardware.name}"
        + (f", as {engine.name} would replay it" if engine else ""),
        f"{best.candidate}",
        f"not replayed yet: {', '.join(missing)}"
        if missing
        else "`tokenspeed plan` can freeze this",
    ]
    lines += [f"service level missed: {found.binding}"] * bool(found.binding)
    lines += ["more turns arrive than it can answer"] * best.served.saturated
    for name, meaning in DEFINITIONS.items():
        low, high = best.interval(name)
        lines.append(
            f"  {name:<28} {best.metrics[name]:>10.4g}  ({low:.4g} to {high:.4g})  {meaning}"
        )
    lines += [
        "next",
        *(
            f"  {p.candidate}: {found.objective} {p.metrics[found.objective]:.4g}"
            for p in found.by_layout[1 : SHOWN + 1]
        ),
    ]
    return "\n".join(lines)


def _row(spec: Spec, config: ModelConfig, gpu: str, count: int, reserved: bool) -> dict[str, Any]:
    asked = spec.model_copy(
        update={"target": spec.target.model_copy(update={"gpu": gpu, "count": count})}
    )
    try:
        predictor, found = search(asked, config, reserved=reserved)
    except TokenspeedError as error:
        return {"gpu": gpu, "count": count, "error": error.message}
    best = found.best
    return {
        "gpu": predictor.hardware.name,
        "count": count,
        "used": best.candidate.num_gpus,
        "deployment": str(best.candidate),
        "predicted": best.as_json(),
        "slo_missed": found.binding,
        "not_replayed_yet": SUPPORTED.missing(best.candidate),
    }


def _table(rows: Sequence[dict[str, Any]], spec: Spec) -> str:
    names = (
        "turn_time_ms",
        "ttft_ms",
        "tpot_ms",
        "tokens_per_s_gpu",
        "cost_per_million_tokens_usd",
    )
    heads = ("turn ms", "ttft ms", "tpot ms", "tokens/s/GPU", "USD/M")
    lines = [
        f"least {spec.objective.minimize} of each machine; what the runtime does not replay yet is marked *",
        f"{'gpu':<8} {'of':>4} {'used':>4} "
        + " ".join(f"{head:>12}" for head in heads)
        + "  deployment",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['gpu']:<8} {row['count']:>4}    - {row['error']}")
            continue
        numbers = " ".join(f"{row['predicted'][name]:>12.4g}" for name in names)
        mark = "*" if row["not_replayed_yet"] else ""
        missed = f" (service level missed: {row['slo_missed']})" if row["slo_missed"] else ""
        lines.append(
            f"{row['gpu']:<8} {row['count']:>4} {row['used']:>4} {numbers}  {row['deployment']}{mark}{missed}"
        )
    return "\n".join(lines)
