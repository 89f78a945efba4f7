"""`tokenspeed run --ray`: the workers of a shared batch, placed and kept alive by Ray.

An actor has a place of the cluster, and runs the command of a worker there. It knows nothing of
rows: all that is done is in the lease folder, so that actors, nodes and the driver may end at any
time and be started again.

Each kind of node may have a plan of its own. Workers take a shard when they are done with the one
before, so each kind gets rows as fast as it answers them; at the end the slower ones leave the last
shards to the faster.
"""

# Ray is of an extra that not every checkout has.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.commands.engines import EngineOptions
from tokenspeed_plan.planner.commands.ray_actor import LOST, REFUSED, RayWorker
from tokenspeed_plan.planner.commands.ray_cluster import (
    Resources,
    cluster,
    no_room,
    pack,
    place_for,
    resources_of,
    room_for,
    start_at,
    words_given,
)
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan

_COMPLETE = (0, 1)  # exit codes: the job is done, 1 where rows have failed
_LOOK_S = 2.0  # between two lines of progress
_END_S = 5.0  # for workers that see that the job is done
_MAX_IDLE_FAILURES = 20  # of workers, one after the other, without a shard that is finished
# Said anew to each worker.
_OF_THE_DRIVER = (
    "source", "output", "lease", "summary", "weights", "ray", "workers", "plans", "leave_last"
)  # fmt: skip


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
        plans: bundles by the kind of node that takes them; empty where all take the same.
    """

    address: str
    workers: int | None
    lease: str
    places: tuple[str, ...]
    num_shards: int
    quiet: bool
    plans: tuple[tuple[str | None, Path], ...]


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of one plan.

    Attributes:
        speed: what one of them should do, in tokens per second.
        resources: what each takes of its node.
        count: how many there are.
        args: of their command, behind the plan.
        number: of their plan, among those that are sent.
    """

    speed: float
    resources: Resources
    count: int
    args: tuple[str, ...]
    number: int


def run_on_ray(bundle: Path, options: EngineOptions, job: RayJob) -> int:
    """Run a shared batch on a cluster; returns the exit code of its workers.

    Raises:
        RequestError: Ray is missing or has no room, or the workers refuse the job.
    """
    bundles = dict(job.plans or ((None, bundle),))
    plans = {kind: load_plan(path, options.signers) for kind, path in bundles.items()}
    with cluster(job.address):
        import ray

        crews = crews_of(bundles, plans, options, job)
        sent = [ray.put(pack(bundles[kind], plans[kind])) for kind in plans]
        return _Driver(job, crews, [kind for kind, _ in job.plans], sent).run()


def crews_of(
    bundles: Mapping[str | None, Path],
    plans: Mapping[str | None, Plan],
    options: EngineOptions,
    job: RayJob,
) -> list[Crew]:
    """How many workers each plan gets, the faster plans first, as far as there is room.

    Raises:
        RequestError: there is room for none.
    """
    left = min(job.workers or job.num_shards, job.num_shards)
    crews: list[Crew] = []
    for kind in sorted(plans, key=lambda kind: _speed(plans[kind]), reverse=True):
        frozen = plans[kind]
        resources = resources_of(frozen, kind)
        count = min(room_for(resources), left)
        left -= count
        args = _worker_args(bundles[kind], frozen, options, job, _left_to(crews, _speed(frozen)))
        crews.append(Crew(_speed(frozen), resources, count, args, list(plans).index(kind)))
    if not any(crew.count for crew in crews):
        raise no_room(frozen, resources, 0)
    return crews


def _speed(frozen: Plan) -> float:
    """Tokens per second of one engine, as predicted for the plan's own workload."""
    return frozen.predicted.values["tokens_per_s_gpu"] * frozen.target.count


def _left_to(faster: Sequence[Crew], speed: float) -> int:
    """How many of the last shards a worker leaves to faster ones, who then end sooner without it.

    A shard takes it 1 / speed; together they finish n of them in about n / sum of speeds, and the
    one that each is at meanwhile in 1 / speed of theirs.
    """
    total = sum(crew.speed * crew.count for crew in faster)
    if not total:
        return 0
    fastest = max(crew.speed for crew in faster if crew.count)
    return int(total * (1 / speed - 1 / fastest))


def _worker_args(
    bundle: Path, frozen: Plan, options: EngineOptions, job: RayJob, leave_last: int
) -> tuple[str, ...]:
    """The command of a worker behind `run` and the bundle."""
    from tokenspeed_plan.runtime.loading.preflight import find_weights

    weights = find_weights(frozen, bundle, options.weights).resolve()
    own = words_given(but=_OF_THE_DRIVER)
    return (*own, *job.places, "--weights", str(weights), "--leave-last", str(leave_last))


class _Driver:
    """Keeps workers alive until the job is done; it may die, as it knows nothing."""

    def __init__(
        self, job: RayJob, crews: Sequence[Crew], kinds: Sequence[str | None], sent: Sequence[Any]
    ) -> None:
        from tokenspeed_plan.runtime.serving.leases.job_store import open_store

        self._job = job
        self._crews = crews
        self._kinds = kinds
        self._sent = sent
        self._store = open_store(job.lease)
        self._pending: dict[Any, tuple[Crew, Any]] = {}  # crew and actor, by task
        self._num_restarts = 0
        self._idle_failures = 0
        self._num_done = 0

    def run(self) -> int:
        """Start the workers, start them again where they fail, and wait for the job."""
        import ray

        crews = [crew for crew in self._crews for _ in range(crew.count)]
        for crew in crews:
            # Ray starts an actor again on another node where its own is lost.
            actor = start_at(
                place_for(crew.resources),
                crew.resources,
                RayWorker,
                max_restarts=-1,
                max_task_retries=-1,
            )
            self._submit(crew, actor)
        code = None
        while code is None:  # of one: the job is done, whoever else is lost or waits for a node
            ready, _ = ray.wait(list(self._pending), timeout=_LOOK_S)
            self._look()
            if ready:
                code = self._finish(ready[0])
        if self._pending:  # let those end by themselves that see it soon
            ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_END_S)
        self._say(f"{self._num_done} shards done\n")
        return code

    def _submit(self, crew: Crew, actor: Any) -> None:
        task = actor.work.remote(list(crew.args), crew.number, list(self._kinds), *self._sent)
        self._pending[task] = crew, actor

    def _finish(self, task: Any) -> int | None:
        """Take the end of a worker: the exit code of the job; None where it has to begin again.

        Raises:
            RequestError: it refuses the job, or no worker gets anything done.
        """
        import ray
        from ray.exceptions import RayError

        crew, actor = self._pending.pop(task)
        code: int
        try:
            code, printed = ray.get(task)
        except RayError as error:
            code, printed = LOST, f"{error}\n"
        if code in _COMPLETE:
            return code
        self._idle_failures += 1
        if code == REFUSED or self._idle_failures > _MAX_IDLE_FAILURES:
            sys.stderr.write(printed)
            raise RequestError(
                f"a worker has ended with code {code}", "what it printed is shown above"
            )
        self._num_restarts += 1
        self._submit(crew, actor)
        return None

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
