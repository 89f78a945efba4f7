"""`tokenspeed run --lease`: a batch that any number of machines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from tokenspeed_plan.planner.commands.option_types import seconds_option
from tokenspeed_plan.plans.errors import RequestError

if TYPE_CHECKING:
    from tokenspeed_plan.planner.commands.ray_driver import RayJob
    from tokenspeed_plan.runtime.serving.leases.lease_worker import WorkerOptions

Command = TypeVar("Command", bound=Callable[..., Any])
OUTPUT_NAME = "output.jsonl"  # where a folder is named for the output
DEFAULT_SHARDS = 64


def path_or_url(text: str) -> Path | str:
    """A path; what has a scheme, as `s3://bucket/rows.jsonl`, stays text."""
    if "://" in text:
        return text
    return Path(text)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a batch is shared.

    Attributes:
        lease: the folder or URL of its leases; None where it is not shared.
        shards: into which its rows are split.
        timeout_s: for how long a worker may be silent.
        ray: the address of a cluster that runs its workers; None where they are started by hand.
        workers: how many Ray starts; None is as many as there is room for.
        plans: other bundles with which its rows may be answered, by the kind of machine.
        leave_last: how many of the last shards this worker leaves to others.
    """

    lease: str | None
    shards: int | None
    timeout_s: float
    ray: str | None = None
    workers: int | None = None
    plans: tuple[tuple[str, Path], ...] = ()
    leave_last: int = 0


def _kind_and_bundle(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[tuple[str, Path], ...]:
    """Each `KIND=DIR`."""
    found: list[tuple[str, Path]] = []
    for word in words:
        kind, _, folder = word.partition("=")
        if not kind or not folder:
            raise click.BadParameter(f"`{word}` is not KIND=DIR", context, parameter)
        if kind in dict(found):
            raise click.BadParameter(f"`{kind}` has two plans", context, parameter)
        found.append((kind, Path(folder)))
    return tuple(found)


_OPTIONS = (
    click.option(
        "--lease",
        metavar="FOLDER",
        help="Share the batch: start the same command on each machine. A folder or bucket.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Let Ray place the workers of a shared batch: a cluster's address, or `auto`.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="With --ray: how many workers (default: as many as have room).",
    ),
    click.option(
        "--plan",
        "plans",
        multiple=True,
        metavar="KIND=DIR",
        callback=_kind_and_bundle,
        help="With --ray or --lease: the plan of nodes of a kind, as H200=DIR; once for each.",
    ),
    click.option(
        "--shards",
        type=click.IntRange(min=1),
        help=f"With --lease: parts of the input, each one worker's (default: {DEFAULT_SHARDS}).",
    ),
    seconds_option(
        "--lease-timeout",
        "lease_timeout_s",
        60.0,
        "With --lease: how long a worker may be silent before its shard is another's.",
    ),
    click.option(
        "--leave-last",
        type=click.IntRange(min=0),
        default=0,
        help="With --lease: begin none of the last N shards while others work, who are faster.",
    ),
)


def job_options(command: Command) -> Command:
    """Add `--lease` and what belongs to it; the command gets them as `job`."""

    @wraps(command)
    def with_job(
        *args: Any,
        lease: str | None,
        shards: int | None,
        lease_timeout_s: float,
        ray: str | None,
        workers: int | None,
        plans: tuple[tuple[str, Path], ...],
        leave_last: int,
        **rest: Any,
    ) -> Any:
        if ray is not None and lease is None:
            lease = f"{rest['output']}.lease"
        if shards is not None and lease is None:
            raise click.UsageError("--shards needs --lease, the folder that all workers see")
        if plans and lease is None:
            raise click.UsageError("--plan needs --lease or --ray: several machines share a batch")
        job = JobOptions(lease, shards, lease_timeout_s, ray, workers, plans, leave_last)
        return command(*args, job=job, **rest)

    made: Callable[..., Any] = with_job
    for option in reversed(_OPTIONS):
        made = option(made)
    return cast(Command, made)


def worker_options(
    job: JobOptions,
    source: Path | str,
    output: Path | str,
    limit: int | None,
    max_errors: int,
    max_concurrency: int | None,
    summary: Path | None,
    quiet: bool,
) -> WorkerOptions:
    """The options of this worker of a job; the output is a file, a folder for it, or a URL.

    Raises:
        RequestError: the output is not one that a job can have.
    """
    from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
    from tokenspeed_plan.runtime.serving.leases.lease_worker import WorkerOptions

    rows = JobInput(str(source), job.shards or DEFAULT_SHARDS, limit, max_errors)
    place = _output_of_job(output)
    return WorkerOptions(
        rows, place, job.timeout_s, max_concurrency, summary, quiet, job.leave_last
    )


def _output_of_job(output: Path | str) -> str:
    """The file that the last worker writes.

    Raises:
        RequestError: it cannot be a stream or compressed.
    """
    text = str(output)
    if text == "-" or text.endswith(".gz"):
        raise RequestError(
            f"the output of a shared batch cannot be `{text}`",
            "name a plain file, a folder or a bucket's URL",
        )
    if isinstance(output, str):
        return text
    if not output.suffix:
        output.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        return str(output / OUTPUT_NAME)
    return text


def ray_job(job: JobOptions, worker: WorkerOptions, address: str, lease: str) -> RayJob:
    """A shared batch for Ray; its workers may run in other folders, so paths are whole."""
    from tokenspeed_plan.planner.commands.ray_driver import RayJob

    places = {"--input": worker.input.place, "--output": worker.output, "--lease": lease}
    words = [word for name, place in places.items() for word in (name, _whole(place))]
    if worker.summary is not None:
        words += ["--summary", str(worker.summary.absolute())]
    return RayJob(
        address,
        job.workers,
        _whole(lease),
        tuple(words),
        worker.input.num_shards,
        worker.quiet,
        job.plans,
    )


def _whole(place: str) -> str:
    if "://" in place:
        return place
    return str(Path(place).absolute())


def only_local(source: Path | str, output: Path | str) -> tuple[Path, Path]:
    """The places of a batch that is not shared.

    Raises:
        RequestError: one is a URL.
    """
    for place in (source, output):
        if isinstance(place, str):
            raise RequestError(
                f"`{place}` is no file of this machine", "URLs are for batches with `--lease`"
            )
    return Path(source), Path(output)
