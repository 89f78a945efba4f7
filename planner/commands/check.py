"""`tokenspeed check`: prove a bundle, its weights and its tokens."""

from __future__ import annotations

from pathlib import Path

import click

from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    load_engine,
    on_all_ranks,
    replay_canary,
    work_of_rank_0,
)
from tokenspeed_plan.planner.commands.sign import signature_options, wanted_signers
from tokenspeed_plan.plans.bundle import CUBIN, check_cubins, check_sources, load_plan
from tokenspeed_plan.plans.errors import PlanError

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=Folder)
@click.option(
    "--weights", type=Folder, help="Check that this checkpoint is the plan's, byte for byte."
)
@click.option("--canary", is_flag=True, help="Replay the golden prompts.")
@signature_options
def check(
    bundle: Path,
    weights: Path | None,
    canary: bool,
    allowed_signers: Path | None,
    signer: str | None,
) -> None:
    """Check a plan's schema, rules and digests; on request its signature, weights and tokens."""
    signers = wanted_signers(allowed_signers, signer)
    frozen = load_plan(bundle, signers)
    click.echo(
        f"{bundle}: schema {frozen.schema_version}, {len(frozen.pool.programs)} programs, "
        "rules and digest hold"
    )
    if signers is not None:
        click.echo(f"signature: one of `{signers.allowed}` has signed it")
    click.echo(f"kernels: {check_sources(frozen, bundle)} texts have their digests")
    if (bundle / CUBIN).is_dir():
        click.echo(f"cubins: {check_cubins(frozen, bundle)} have their digests")
    if canary and not frozen.canary:
        raise PlanError(
            "the plan has no canary",
            "plan from a checkpoint, `model: {path: ...}`, and check again",
        )
    if weights is None and not canary:
        return
    has_digests = any(shard.file_sha256 for shard in frozen.model.shards.values())
    options = EngineOptions(weights, "reference", verify_weights=has_digests, signers=signers)
    on_all_ranks(bundle, options, lambda: _check_weights(bundle, options, canary))


def _check_weights(bundle: Path, options: EngineOptions, canary: bool) -> None:
    with work_of_rank_0() as report:
        engine = load_engine(bundle, options, report=report)
    compared = "names, shapes and dtypes fit"
    if options.verify_weights:
        compared += f", the bytes of {len(engine.plan.model.shards)} files have their digests"
    click.echo(f"weights: {compared}")
    if canary:
        click.echo(f"canary: {replay_canary(engine.plan, engine)} tokens agree")
