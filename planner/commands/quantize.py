"""`tokenspeed quantize`: a checkpoint in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import click

from tokenspeed_plan.planner.commands.long_work import LongWork
from tokenspeed_plan.plans.errors import RequestError

Folder = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=Folder)
@click.argument("target", type=Folder)
@click.option("--to", "weights", required=True, help="fp8: blocks of 128 x 128, as Qwen publishes.")
def quantize(source: Path, target: Path, weights: str) -> None:
    """Write the checkpoint SOURCE to the new folder TARGET with its matrices quantised.

    Elements are rounded to nearest. It needs no GPU, and memory for one file of SOURCE.
    """
    if weights != "fp8":
        raise RequestError(f"`--to {weights}` is not made yet", "write `--to fp8`")
    from tokenspeed_plan.runtime.loading.fp8_checkpoint import quantize_checkpoint

    with LongWork() as report:
        made = quantize_checkpoint(source, target, report)
    click.echo(
        f"wrote {target}: {made.converted} matrices in FP8, {len(made.kept)} kept, "
        f"{made.size_bytes / 1e9:.3f} GB",
        err=True,
    )
