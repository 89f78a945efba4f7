"""What a batch on many machines costs beside its rows, on this one.

    python benchmarks/cluster_limits.py index BUNDLE [--rows 200000] [--kinds chats ...]
    python benchmarks/cluster_limits.py driver [--nodes 1000] [--rows 10000000] [--shards 2000]

`index` splits rows of several kinds, and checks what the index leaves to all workers. `driver` is
the driver of `run --ray` with real leases; its nodes only wait, for as long as checks and engines
would take. What sharing costs is in `cluster_scale.py`, a worker's start in `cluster_start.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster import write_rows


def write_chats(path: Path, count: int, is_ascii: bool) -> None:
    """Chats of two messages whose texts differ."""
    rng = random.Random(0)
    said = ["Sort these lines: ", "Translate: ", "What does this do? "]
    if not is_ascii:
        said = ["Übersetze: ", "请翻译: ", "Trie ces lignes\u00a0: "]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = {"role": "user", "content": f"{rng.choice(said)}{rng.random()}"}
            messages = [{"role": "system", "content": "Be brief."}, asked]
            body = {"messages": messages, "max_tokens": 4, "temperature": 0}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")


def write_various(path: Path, count: int) -> None:
    """Completions, each with fields of other values."""
    write_rows(path, count)
    lines = path.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            file.write(line.replace('"temperature": 0', f'"temperature": {number / count}') + "\n")


WRITERS = {
    "completions": write_rows,
    "various": write_various,
    "chats": lambda path, count: write_chats(path, count, True),
    "other-scripts": lambda path, count: write_chats(path, count, False),
}


def run_index(args: argparse.Namespace) -> int:
    from tokenspeed_plan.planner.commands.engines import EngineOptions
    from tokenspeed_plan.planner.commands.run import _facts
    from tokenspeed_plan.runtime.serving.leases.job_index import make_index
    from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
    from tokenspeed_plan.runtime.serving.leases.row_checks import RowChecker, check_shards

    plan, tokenizer = _facts(args.bundle, EngineOptions())
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
            job = JobInput(str(Path(scratch) / "in.jsonl"), 200)
            WRITERS[kind](Path(job.place), args.rows)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            begin_s, begin_cpu_s = time.monotonic(), time.process_time()
            index = make_index(job, plan, tokenizer, lambda: None)
            seconds, cpu_s = time.monotonic() - begin_s, time.process_time() - begin_cpu_s
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert index.rows == args.rows
            num_left = sum(shard.unchecked for shard in index.shards)
            print(
                f"{kind}: index of {args.rows} rows: {seconds:.2f} s ({cpu_s:.2f} of CPU), "
                f"{args.rows / seconds:.0f} rows/s, {more * 1024 / args.rows:.0f} bytes a row; "
                f"{num_left} are left to all workers"
            )
            shards = [shard for shard in index.shards if shard.unchecked][: args.checked]
            if not shards:
                continue
            begin_s, begin_cpu_s = time.monotonic(), time.process_time()
            found = check_shards(job, shards, RowChecker(plan, tokenizer, lambda: None))
            seconds, cpu_s = time.monotonic() - begin_s, time.process_time() - begin_cpu_s
            assert found.num_bad == 0
            print(
                f"  which a worker checks at {found.num_rows / seconds:.0f} rows/s "
                f"({found.num_rows / cpu_s:.0f} by its own CPU time)"
            )
    return 0


@dataclass
class Simulated:
    """What a thousand workers did; times in seconds."""

    takes_s: list[float] = field(default_factory=list)
    commits_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, take_s: float, commit_s: float) -> None:
        with self.lock:
            self.takes_s.append(take_s)
            self.commits_s.append(commit_s)


@dataclass(frozen=True)
class Phase:
    """Units that all nodes do before they go on: their names, and what each takes."""

    units: list[str]
    work_s: float
    tally: Simulated = field(default_factory=Simulated)


def simulate_worker(store: Any, phases: Sequence[Phase], number: int, timeout_s: float) -> None:
    from tokenspeed_plan.runtime.serving.leases.shard_lease import Leases

    leases, rng = Leases(store, f"worker-{number}", timeout_s), random.Random(number)
    for phase in phases:
        simulate_phase(leases, phase, rng)


def simulate_phase(leases: Any, phase: Phase, rng: random.Random) -> None:
    """As `Worker` does: it polls soon at first, then as often as an idle one may."""
    from tokenspeed_plan.runtime.serving.leases.pauses import Pauses
    from tokenspeed_plan.runtime.serving.leases.shard_lease import finished_units

    pauses = Pauses(leases.timeout_s, rng)
    while True:
        begin_s = time.monotonic()
        lease = leases.take(phase.units)
        taken_s = time.monotonic()
        if lease is None:
            if finished_units(leases.store) >= set(phase.units):
                return
            time.sleep(pauses.begin())
            continue
        pauses.reset()
        time.sleep(phase.work_s * (0.8 + 0.4 * rng.random()))
        worked_s = time.monotonic()
        lease.commit({"rows": 1})
        lease.end()
        phase.tally.add(taken_s - begin_s, time.monotonic() - worked_s)


class WaitingNodes:
    """What the driver calls of Ray: nodes whose workers take leases, and wait."""

    def __init__(self, count: int, work: Any) -> None:
        self.count = count
        self._work = work
        self.threads: list[threading.Thread] = []

    def enter(self) -> None:
        group = SimpleNamespace(placement_group=lambda bundles, strategy: None)
        strategies = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group: group)
        sys.modules |= {  # type: ignore[assignment]
            "ray": self,
            "ray.exceptions": SimpleNamespace(RayError=ConnectionError),
            "ray.util": SimpleNamespace(placement_group=group, scheduling_strategies=strategies),
            "ray.util.placement_group": group,
            "ray.util.scheduling_strategies": strategies,
        }

    def remote(self, actor: Any) -> Any:
        worker = SimpleNamespace(work=SimpleNamespace(remote=self._start))
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda: worker))

    def _start(self, *args: Any) -> Future[tuple[int, str]]:
        future: Future[tuple[int, str]] = Future()
        number = len(self.threads)

        def work() -> None:
            self._work(number)
            future.set_result((0, ""))

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()
        return future

    def wait(
        self, tasks: list[Any], timeout: float, num_returns: int = 1
    ) -> tuple[list[Any], list[Any]]:
        done, left = wait(tasks, timeout, FIRST_COMPLETED)
        return list(done)[:1], list(left)

    def get(self, task: Future[tuple[int, str]]) -> tuple[int, str]:
        return task.result()


def run_driver(args: argparse.Namespace) -> int:
    from tokenspeed_plan.planner.commands.ray_driver import Crew, RayJob, _Driver
    from tokenspeed_plan.runtime.serving.leases.job_store import FolderStore
    from tokenspeed_plan.runtime.serving.leases.row_checks import CHECK_ROWS

    work_s = args.rows / args.shards / args.rows_per_s / args.faster
    num_checks, timeout_s = -(-args.rows // CHECK_ROWS), 60.0 / args.faster
    checks = Phase(
        [f"check-{number:05d}" for number in range(num_checks)],
        CHECK_ROWS / args.checked_per_s / args.faster,
    )
    shards = Phase([f"{number:05d}" for number in range(args.shards)], work_s)
    threading.stack_size(256 << 10)
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        store = FolderStore(Path(scratch))
        nodes = WaitingNodes(
            args.nodes,
            lambda number: simulate_worker(store, [checks, shards], number, timeout_s),
        )
        nodes.enter()
        job = RayJob("auto", None, scratch, (), args.shards, quiet=True, plans=())
        crew = Crew(1.0, {"CPU": 1}, args.nodes, (), 0)
        begin_s, begin_cpu_s = time.monotonic(), time.thread_time()
        code = _Driver(job, [crew], (), []).run()
        total_s, cpu_s = time.monotonic() - begin_s, time.thread_time() - begin_cpu_s
        for thread in nodes.threads:
            thread.join()
        takeovers = sum(not name.endswith(".1") for name in store.names("leases"))
    ideal_s = work_s * -(-args.shards // args.nodes) + checks.work_s
    tally = shards.tally
    gaps = [take + commit for take, commit in zip(tally.takes_s, tally.commits_s, strict=True)]
    print(
        f"{args.nodes} nodes, {args.rows} rows in {args.shards} shards, {args.faster:g} x faster: "
        f"{total_s:.0f} s, {ideal_s:.0f} s of them checks and engines; "
        f"{args.rows / total_s:.0f} rows/s; {takeovers} takeovers"
    )
    print(
        f"  between two shards {statistics.mean(gaps):.3f} s: to take one "
        f"{statistics.mean(tally.takes_s):.3f}, at most {max(tally.takes_s):.2f}; to commit it "
        f"{statistics.mean(tally.commits_s):.3f}, at most {max(tally.commits_s):.2f}"
    )
    print(
        f"  the driver's own thread: {cpu_s:.2f} s of CPU, {args.rows / cpu_s:.0f} rows for each; "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    mode = modes.add_parser("index")
    mode.set_defaults(run=run_index)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--rows", type=int, default=200_000)
    mode.add_argument("--kinds", nargs="+", choices=[*WRITERS], default=[*WRITERS])
    mode.add_argument("--checked", type=int, default=20, help="Shards that are checked.")
    mode = modes.add_parser("driver")
    mode.set_defaults(run=run_driver)
    mode.add_argument("--nodes", type=int, default=1000)
    mode.add_argument("--rows", type=int, default=10_000_000)
    mode.add_argument("--shards", type=int, default=2000)
    mode.add_argument("--rows-per-s", type=float, default=28.0, help="Of one engine, predicted.")
    mode.add_argument("--checked-per-s", type=float, default=7000.0, help="Rows, by one worker.")
    mode.add_argument("--faster", type=float, default=4.0, help="Than the predicted times.")
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
