"""`tokenspeed run --ray`: the workers of a shared batch, placed and kept alive by Ray.

An actor has the GPUs of one plan (or a CPU) on one node, and runs the command of a worker there. It
knows nothing of rows: all that is done is in the lease folder, so that actors, nodes and the driver
may end at any time and be started again.
"""

# Ray is of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tokenspeed_plan.planner.commands.engines import ARGS, EngineOptions
from tokenspeed_plan.planner.commands.rank_processes import child_environment, own_command
from tokenspeed_plan.plans.bundle import CUBIN, PLAN_FILE, load_plan
from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.kernel_file import KERNELS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.signature import SIGNATURE_FILE

_COMPLETE = (0, 1)  # exit codes: the job is done, 1 where rows have failed
_REFUSED = 2  # the worker refused the plan, the rows or the machine
_LOOK_S = 2.0  # between two lines of progress
_MAX_IDLE_FAILURES = 20  # of workers, one after the other, without a shard that is finished
_SHOWN_BYTES = 1 << 14  # of what a worker printed
_CACHE = "TOKENSPEED_PLANS"  # where a node keeps plans that it was sent


@dataclass(frozen=True, slots=True)
class RayJob:
    """A shared batch on a cluster.

    Attributes:
        address: of the cluster; `auto` is the one of this machine, or a new one.
        workers: how many; None is as many as there is room for.
        lease: the folder or URL of the job.
        places: options with the paths of the job, as every node sees them.
        num_shards: no more workers than that are of use.
        quiet: show no progress.
    """

    address: str
    workers: int | None
    lease: str
    places: tuple[str, ...]
    num_shards: int
    quiet: bool


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A plan as it travels: its digest, where the driver has it, and its files."""

    digest: str
    path: str
    archive: bytes


def run_on_ray(bundle: Path, options: EngineOptions, job: RayJob) -> int:
    """Run a shared batch on a cluster; returns the exit code of its workers.

    Raises:
        RequestError: Ray is missing or has no room, or the workers refuse the job.
    """
    if find_spec("ray") is None:
        raise RequestError(
            "`--ray` needs Ray",
            "install the extra `cluster`: `pip install 'tokenspeed-plan[cluster]'`",
        )
    import ray

    frozen = load_plan(bundle, options.signers)
    _connect(job.address)
    try:
        sent = ray.put(pack(bundle, frozen))
        return _Driver(frozen, job, _worker_args(bundle, frozen, options, job), sent).run()
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Join a cluster; `auto` begins a local one where none runs.

    Raises:
        RequestError: there is none.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address, **quiet)
    except ConnectionError as error:
        if address != "auto":
            raise RequestError(
                f"there is no Ray cluster at `{address}`", "`--ray auto` begins a local one"
            ) from error
        ray.init(include_dashboard=False, **quiet)


def _worker_args(
    bundle: Path, frozen: Plan, options: EngineOptions, job: RayJob
) -> tuple[str, ...]:
    """The command of a worker, which finds the bundle in its first place after `run`."""
    from tokenspeed_plan.runtime.loading.preflight import find_weights

    args: tuple[str, ...] = click.get_current_context().meta[ARGS]
    own = [word for word in args[1:] if word != str(bundle)]
    weights = find_weights(frozen, bundle, options.weights).resolve()
    return (*own, *job.places, "--weights", str(weights), "--ray", "off")


def pack(bundle: Path, frozen: Plan) -> SentPlan:
    """The files of a bundle."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", encoding="utf-8") as archive:
        for name in (PLAN_FILE, SIGNATURE_FILE, KERNELS, CUBIN):
            if (bundle / name).exists():
                archive.add(bundle / name, name)
    return SentPlan(frozen.digest, str(bundle.resolve()), buffer.getvalue())


def unpack(sent: SentPlan) -> Path:
    """A bundle with the digest of the plan: one that this node has, or the one that was sent.

    Raises:
        PlanError: what was sent is another plan.
    """
    cache = os.environ.get(_CACHE) or os.path.expanduser("~/.cache/tokenspeed-plan")
    kept = Path(cache) / sent.digest
    for folder in (Path(sent.path), kept):
        if _has(folder, sent.digest):
            return folder
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        draft = Path(scratch) / "bundle"
        try:
            with tarfile.open(fileobj=io.BytesIO(sent.archive), encoding="utf-8") as archive:
                archive.extractall(draft, filter="data")
        except tarfile.TarError as error:
            raise PlanError(
                f"the plan that was sent is damaged: {error}", "send it again"
            ) from error
        if not _has(draft, sent.digest):
            raise PlanError("the plan that was sent is not the one that was named", "send it again")
        with suppress(OSError):  # another worker of this node has put it there
            draft.rename(kept)
    return kept


def _has(folder: Path, digest: str) -> bool:
    """Whether a folder holds the plan; reading a plan compares its digest with what it holds."""
    try:
        return load_plan(folder).digest == digest
    except (PlanError, OSError):
        return False


class RayWorker:
    """The actor: runs a worker's command on its node."""

    def work(self, sent: SentPlan, args: Sequence[str]) -> tuple[int, str]:
        """Run it to its end; returns its exit code, and what it has printed last."""
        try:
            bundle = unpack(sent)
        except PlanError as error:
            return _REFUSED, str(error)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                own_command(["run", str(bundle), *args]),
                env=os.environ | child_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
            code = process.wait()
            output.seek(max(output.tell() - _SHOWN_BYTES, 0))
            return code, output.read().decode(errors="replace")


class _Driver:
    """Keeps workers alive until the job is done; it may die, as it knows nothing."""

    def __init__(self, frozen: Plan, job: RayJob, args: Sequence[str], sent: Any) -> None:
        from tokenspeed_plan.runtime.serving.leases.job_store import open_store

        self._frozen = frozen
        self._job = job
        self._args = args
        self._sent = sent
        self._store = open_store(job.lease)
        self._pending: dict[Any, Any] = {}  # actors by what they work at
        self._codes: list[int] = []
        self._num_restarts = 0
        self._idle_failures = 0
        self._num_done = 0

    def run(self) -> int:
        """Start the workers, start them again where they fail, and wait for the job."""
        import ray

        for _ in range(self._num_workers()):
            self._start()
        while self._pending:
            ready, _ = ray.wait(list(self._pending), timeout=_LOOK_S)
            self._look()
            for task in ready:
                self._finish(task)
        self._say(f"{self._num_done} shards done\n")
        return max(self._codes)

    def _num_workers(self) -> int:
        """How many workers there are: as many as was said, or as have room.

        Raises:
            RequestError: there is room for none.
        """
        import ray

        wanted = self._job.workers
        if wanted is None:
            resources, total = self._resources(), ray.cluster_resources()
            wanted = int(min(total.get(name, 0) // share for name, share in resources.items()))
        if wanted < 1:
            raise RequestError(
                f"the cluster has no room for {self._resources()}",
                f"add a node with {self._frozen.target.count} x {self._frozen.target.gpu}",
            )
        return min(wanted, self._job.num_shards)

    def _resources(self) -> dict[str, float]:
        if self._frozen.target.device == "cpu":
            return {"CPU": 1}
        return {"CPU": 1, "GPU": self._frozen.target.count}

    def _start(self) -> None:
        """Place a worker on one node; Ray starts it again on another where that one is lost."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = self._resources()
        place = placement_group([resources], strategy="STRICT_PACK")
        actor = ray.remote(RayWorker).options(
            num_cpus=1,
            num_gpus=resources.get("GPU", 0),
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(place),
        )
        self._submit(actor.remote())

    def _submit(self, worker: Any) -> None:
        self._pending[worker.work.remote(self._sent, list(self._args))] = worker

    def _finish(self, task: Any) -> None:
        """Take the end of a worker; one that failed begins again.

        Raises:
            RequestError: it refuses the job, or no worker gets anything done.
        """
        import ray

        worker = self._pending.pop(task)
        code, printed = ray.get(task)
        if code in _COMPLETE:
            self._codes.append(code)
            return
        self._idle_failures += 1
        if code == _REFUSED or self._idle_failures > _MAX_IDLE_FAILURES:
            sys.stderr.write(printed)
            raise RequestError(
                f"a worker has ended with code {code}", "what it printed is shown above"
            )
        self._num_restarts += 1
        self._submit(worker)

    def _look(self) -> None:
        """Show how far all of them are."""
        from tokenspeed_plan.runtime.serving.leases.shard_lease import finished_units

        num_done = sum(unit.isdecimal() for unit in finished_units(self._store))
        if num_done != self._num_done:
            self._idle_failures = 0
            self._num_done = num_done
        self._say(
            f"{num_done} of {self._job.num_shards} shards done, {len(self._pending)} workers, "
            f"{self._num_restarts} restarts"
        )

    def _say(self, text: str) -> None:
        if self._job.quiet:
            return
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
        else:
            sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()
