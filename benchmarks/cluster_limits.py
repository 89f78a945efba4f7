"""What a batch on many machines costs beside its rows, on this one.

    python benchmarks/cluster_limits.py index BUNDLE [--rows 200000] [--kinds chats ...]
    python benchmarks/cluster_limits.py scale BUNDLE [--rows 1200] [--engines 1 2 4] [--pairs 3]
    python benchmarks/cluster_limits.py start BUNDLE [--times 5]
    python benchmarks/cluster_limits.py ray-start BUNDLE [--times 5]
    python benchmarks/cluster_limits.py driver [--nodes 1000] [--rows 10000000] [--shards 2000]

`index` splits rows of several kinds, and checks what the index leaves to all workers. `scale`
compares workers that share a batch by leases with as many single runs at once, each on its part of
the rows: what the machine itself can do; in pairs, one after the other; what other processes of the
machine take shows in the time and not in the CPU's. `start` is a worker from its command to its
first row, in parts, and `ray-start` the same of `run --ray` on a cluster that is up. `driver` is
the driver of `run --ray` with real leases; its nodes only wait, for as long as checks and engines
would take.
"""

from __future__ import annotations

import argparse
import json
import os
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

from cluster import lease_args, start, write_rows


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


def timed(commands: Sequence[Sequence[object]], log: Path) -> tuple[float, float]:
    """Seconds until all of some commands have ended well, each with one thread; and of CPU."""
    begin_s = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = [start(command, log, OMP_NUM_THREADS="1") for command in commands]
    codes = [process.wait() for process in processes]
    assert set(codes) == {0}, log.read_text(encoding="utf-8")[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begin_s, cpu_s


def run_scale(args: argparse.Namespace) -> int:
    worst = 1.0
    for engines in args.engines:
        ratios, rows = [], args.rows * engines
        for pair in range(args.pairs):
            with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
                folder = Path(scratch)
                write_rows(folder / "in.jsonl", rows)
                lines = (folder / "in.jsonl").read_text(encoding="utf-8").splitlines(True)
                alone = []
                for number in range(engines):
                    part = folder / f"part-{number}.jsonl"
                    part.write_text(
                        "".join(lines[number * args.rows : (number + 1) * args.rows]),
                        encoding="utf-8",
                    )
                    out = folder / f"out-{number}.jsonl"
                    alone.append(
                        ["run", args.bundle, "--input", part, "--output", out, "--no-canary"]
                    )
                command = lease_args(args.bundle, folder, args.shards * engines)
                command[command.index("--lease-timeout") + 1] = 60
                both = [
                    lambda alone=alone, folder=folder: timed(alone, folder / "log"),
                    lambda command=command, folder=folder, engines=engines: timed(
                        [command] * engines, folder / "log"
                    ),
                ]
                order = [0, 1] if pair % 2 else [1, 0]
                seconds = {number: both[number]() for number in order}
                (alone_s, alone_cpu_s), (shared_s, shared_cpu_s) = seconds[0], seconds[1]
                ratios.append(alone_s / shared_s)
                print(
                    f"{engines} engines, {rows} rows: {alone_s:.1f} s ({alone_cpu_s:.1f} of CPU) "
                    f"as single runs at once, {shared_s:.1f} s ({shared_cpu_s:.1f}) by leases: "
                    f"{ratios[-1]:.3f} ({alone_cpu_s / shared_cpu_s:.3f})",
                    flush=True,
                )
        worst = min(worst, statistics.median(ratios))
    print(f"the worst median is {worst:.3f}")
    return int(worst < 0.9)


# Runs a worker, and says when what has happened, in seconds from the begin of its process.
_WATCHED = """
import os, sys, time
begun = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - float(
    open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK"))
marks = [("python", time.time() - begun)]
def mark(name):
    marks.append((name, time.time() - begun))
from tokenspeed_plan.planner.cli import main
mark("command line")
import torch
mark("PyTorch")
from tokenspeed_plan.runtime.serving.leases import lease_worker
from tokenspeed_plan.runtime.engine import Engine
mark("runtime")
def watched(cls, name, label):
    inner = getattr(cls, name)
    def outer(self, *args, **more):
        done = inner(self, *args, **more)
        if label not in dict(marks):
            mark(label)
        return done
    setattr(cls, name, outer)
watched(lease_worker.Worker, "__init__", "plan, files, tokenizer")
watched(lease_worker.Worker, "_index", "index")
watched(lease_worker.Worker, "_ready_engine", "engine")
watched(lease_worker.WatchedEngine, "step", "first step")
step = lease_worker.WatchedEngine.step
def until_first(self):
    done = step(self)
    if done and "first row" not in dict(marks):
        mark("first row")
        import json
        startup = getattr(self._engine, "startup_s", {})
        print("MARKS", json.dumps([marks, startup]), file=sys.stderr, flush=True)
    return done
lease_worker.WatchedEngine.step = until_first
main()
"""


def run_start(args: argparse.Namespace) -> int:
    import subprocess

    every: list[dict[str, float]] = []
    for _ in range(args.times):
        with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
            folder = Path(scratch)
            write_rows(folder / "in.jsonl", 4)
            words = lease_args(args.bundle, folder, 1)
            words.remove("--no-canary")
            done = subprocess.run(
                [sys.executable, "-P", "-c", _WATCHED, *map(str, words)],
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            (line,) = (line for line in done.stderr.splitlines() if line.startswith("MARKS "))
            marks, startup = json.loads(line.removeprefix("MARKS "))
            before = 0.0
            parts = {}
            for name, at_s in marks:
                parts[name], before = at_s - before, at_s
            every.append(parts | {"total": before} | {f"  {k}": v for k, v in startup.items()})
    for name in every[0]:
        values = [parts.get(name, 0.0) for parts in every]
        print(f"{name:28} {statistics.median(values):6.2f} s  ({min(values):.2f})")
    return 0


# Files of a job, in the order in which they come, and what has happened then.
_FILES = (
    ("job/leases/index.1", "driver, actor, worker's files"),
    ("job/done/index.json", "index"),
    ("job/leases/00000.1", "first lease"),
    ("job/done/00000.json", "engine, rows"),
    ("out.jsonl", "merge"),
)


def run_ray_start(args: argparse.Namespace) -> int:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    every: list[dict[str, float]] = []
    for _ in range(args.times):
        with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
            folder = Path(scratch)
            write_rows(folder / "in.jsonl", 4)
            words = lease_args(args.bundle.resolve(), folder, 1)
            words.remove("--no-canary")
            begin_s, parts = time.monotonic(), dict[str, float]()
            driver = start([*words, "--ray", cluster.address], folder / "log", OMP_NUM_THREADS="1")
            while driver.poll() is None:
                for name, label in _FILES:
                    if label not in parts and (folder / name).exists():
                        parts[label] = time.monotonic() - begin_s
                time.sleep(0.005)
            assert driver.returncode == 0, (folder / "log").read_text(encoding="utf-8")
            every.append(parts | {"end of the driver": time.monotonic() - begin_s})
    ray.shutdown()
    cluster.shutdown()
    for name in every[0]:
        values = [parts[name] for parts in every]
        print(f"{name:30} {statistics.median(values):6.2f} s after the command ({min(values):.2f})")
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
    from tokenspeed_plan.runtime.serving.leases.lease_worker import (
        FIRST_POLL_S,
        POLLS_PER_TIMEOUT,
    )
    from tokenspeed_plan.runtime.serving.leases.shard_lease import finished_units

    polls = 0
    while True:
        begin_s = time.monotonic()
        lease = leases.take(phase.units)
        taken_s = time.monotonic()
        if lease is None:
            if finished_units(leases.store) >= set(phase.units):
                return
            most_s = leases.timeout_s / POLLS_PER_TIMEOUT
            time.sleep(min(FIRST_POLL_S * 2**polls, most_s) * rng.uniform(0.5, 1.5))
            polls += 1
            continue
        polls = 0
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
    mode = modes.add_parser("scale")
    mode.set_defaults(run=run_scale)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--rows", type=int, default=1200, help="Of each engine.")
    mode.add_argument("--shards", type=int, default=4, help="Of each engine.")
    mode.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    mode.add_argument("--pairs", type=int, default=3)
    mode = modes.add_parser("start")
    mode.set_defaults(run=run_start)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--times", type=int, default=5)
    mode = modes.add_parser("ray-start")
    mode.set_defaults(run=run_ray_start)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--times", type=int, default=5)
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
