"""`tokenspeed quantize`: a checkpoint in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import click

from tokenspeed_plan.planner.commands.long_work import LongWork

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=Folder)
@click.argument("target", type=Folder)
@click.option(
    "--to",
    "weights",
    required=True,
    help="fp8: blocks of 128 x 128, as Qwen publishes. nvfp4: routed experts, of a dense model its "
    "MLPs, as NVIDIA publishes; nvfp4-mixed: and the other projections in FP8.",
)
def quantize(source: Path, target: Path, weights: str) -> None:
    """Write the checkpoint SOURCE to the new folder TARGET with its matrices quantised.

    Elements are rounded to nearest. It needs no GPU, and memory for one file of SOURCE.
    """
    from tokenspeed_plan.runtime.loading.quantised_checkpoint import quantize_checkpoint

    with LongWork() as report:
        made = quantize_checkpoint(source, target, weights, report)
    click.echo(
        f"wrote {target}: {len(made.converted)} matrices quantised, {len(made.kept)} kept, "
        f"{made.size_bytes / 1e9:.3f} GB",
        err=True,
    )
