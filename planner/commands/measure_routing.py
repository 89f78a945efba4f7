"""`tokenspeed measure-routing`: how unevenly the router of a real model chooses its experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.advisor.routing import Routing
from tokenspeed_plan.planner.compile import compile_plan, find_model
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import RequestError, SpecError

Folder = click.Path(path_type=Path)
FILE = "routing.json"
MAX_PROMPT, AT_ONCE = 4096, 8


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """The options of `tokenspeed measure-routing`."""

    folder: Path
    batch: Path
    out: Path | None


@click.command("measure-routing")
@click.argument("folder", metavar="DIR", type=Folder)
@click.option("--input", "batch", type=Folder, required=True, help="Rows, as for `run`.")
@click.option("-o", "--out", type=Folder, help=f"The file; {FILE} beside the weights by default.")
def measure_routing_command(**options: Any) -> None:
    """Count which experts the tokens of the prompts of rows choose, for `workload.skew` in a spec.

    DIR is a model's folder with its weights. It runs on this machine's CPU, in fp32.
    """
    _measure(RoutingOptions(**options))


def _measure(options: RoutingOptions) -> None:
    from tokenspeed_plan.planner.commands.lengths import tokenizer_of
    from tokenspeed_plan.runtime.routing_counts import count_routing
    from tokenspeed_plan.runtime.serving.batch.row_lengths import row_prompts

    tokenizer = tokenizer_of(str(options.folder))
    prompts = [ids[:MAX_PROMPT] for ids in row_prompts(options.batch, tokenizer)]
    if not prompts:
        raise RequestError(f"`{options.batch}` has no prompts", "name a file with rows to run")
    spec = _spec(options.folder, max(map(len, prompts)))
    model = find_model(spec)
    if model.config.moe is None or model.folder is None or not model.headers:
        raise SpecError(
            f"`{options.folder}` has no experts with weights", "measure a model that has"
        )
    counted = count_routing(compile_plan(spec, model, dtype="fp32"), model.folder, prompts)
    counts = [counted.counts[layer].tolist() for layer in sorted(counted.counts)]
    found = Routing(counts, counted.num_tokens, counted.per_token)
    path = options.out or model.folder / FILE
    path.write_text(json.dumps(_as_json(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    click.echo(f"workload: {{skew: {path}}}  # {found.skew:g}")
    click.echo(f"wrote {path}: {found.num_tokens} tokens, {len(counts)} routers", err=True)


def _spec(folder: Path, longest: int) -> Spec:
    """One CPU that computes prompts of such a length."""
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"path": str(folder)},
            "target": {"gpu": "cpu"},
            "speculation": "off",
            "disaggregation": "off",
            "workload": {
                "kind": "batch",
                "first_turn_tokens": longest,
                "output_tokens": 1,
                "concurrency": AT_ONCE,
            },
        }
    )


def _as_json(found: Routing) -> dict[str, Any]:
    """What a spec reads, and what a reader can check it by."""
    return {
        "skew": found.skew,
        "tokens": found.num_tokens,
        "routers": len(found.counts),
        "experts": found.num_experts,
        "experts_per_token": found.per_token,
        "distinct_experts": {
            str(batch): round(found.distinct(batch), 2) for batch in found.batches
        },
    }
