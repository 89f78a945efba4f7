"""What sharing a batch costs: engines by leases and by Ray, against what the machine itself can do.

    python benchmarks/cluster_scale.py scale BUNDLE [--rows 1000] [--engines 1 2 4] [--rounds 2]
    python benchmarks/cluster_scale.py borders BUNDLE [--rows 20000] [--shards 4] [--mean 512]

`scale`: the limit of the machine is as many single runs at once, each on a static part of the same
rows, with one thread each: no leases, no driver. Each round runs the limit, workers by leases, and
workers by Ray on a local cluster that is up, the next round in the opposite order; what counts are
ratios of times of one round. More engines than cores share the rows of as many engines as there are
cores, so that each run takes the same time. Rates are from when all engines have answered a row to
the last one, merge included: what comes before is a start (`cluster_start.py`); ratios of the whole
time are shown, too. Nothing else may use the cores. The exit code is 1 where a median ratio of
rates is below 0.9. CPU seconds are without Ray's, whose processes are not ours.

`borders` counts the steps that a batch takes with one shard after the other, and with the last rows
of one beside the first ones of the next. The worker, leases and files are real; its engine only
counts. BUNDLE gives the tokenizer and how many rows run at once, unless `--at-once` does.
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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster import TEXTS, lease_args, start
from cluster_start import one_node

LOOK_S = 0.05
MODES = ("limit", "leases", "ray")
MIN_RATIO = 0.9


def write_answers(path: Path, count: int, most: int) -> None:
    """Rows with answers of a quarter of `most` tokens to all of it."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = rng.randint(most // 4, most)
            prompt = rng.choice(TEXTS) + f"# {number}"
            body = {"prompt": prompt, "max_tokens": size, "temperature": 0, "ignore_eos": True}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")


@dataclass(frozen=True)
class Taken:
    """What a run took: seconds from the command on, rows/s once all engines answer; CPU seconds."""

    whole_s: float
    rate: float
    cpu_s: float


def timed(
    commands: Sequence[Sequence[object]],
    folder: Path,
    rows: int,
    engines: int,
    lines: Callable[[], dict[str, int]],
    has_ended: Callable[[], bool],
) -> Taken:
    """Run commands, each with one thread, until all have ended well.

    `lines` says how many rows each engine has answered so far.
    """
    begin_s, busy_s, answered = time.monotonic(), 0.0, 0
    log = folder / "log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = [start(command, log, OMP_NUM_THREADS="1") for command in commands]
    while not has_ended():
        time.sleep(LOOK_S)
        if not busy_s:
            found = lines()
            answered = sum(found.values())
            if len(found) == engines:
                busy_s = time.monotonic()
        assert all(process.poll() in (None, 0) for process in processes), said(log)
    end_s = time.monotonic()
    codes = [process.wait() for process in processes]
    assert set(codes) == {0}, said(log)
    assert busy_s, "one engine has answered nothing: name more --rows"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(end_s - begin_s, (rows - answered) / (end_s - busy_s), cpu_s)


def said(log: Path) -> str:
    return log.read_text(encoding="utf-8")[-2000:]


def lines_of(folder: Path, pattern: str) -> dict[str, int]:
    """The lines of some files that have any."""
    found = {}
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            found[path.name] = path.read_bytes().count(b"\n")
    return {name: count for name, count in found.items() if count}


def lines_of_workers(job: Path) -> dict[str, int]:
    """The same of a job's parts, by the worker that has the lease of each."""
    found = Counter[str]()
    for name, count in lines_of(job, "parts/*.jsonl").items():
        with suppress(FileNotFoundError):
            lease = json.loads((job / "leases" / name.removesuffix(".jsonl")).read_bytes())
            found[lease["owner"]] += count
    return found


def run_alone(args: argparse.Namespace, folder: Path, engines: int) -> Taken:
    """As many single runs as engines, each with its part of the rows."""
    lines = (folder / "in.jsonl").read_text(encoding="utf-8").splitlines(True)
    commands: list[list[object]] = []
    summaries = []
    for number in range(engines):
        first, end = (len(lines) * each // engines for each in (number, number + 1))
        part = folder / f"part-{number}.jsonl"
        part.write_text("".join(lines[first:end]), encoding="utf-8")
        summaries.append(folder / f"summary-{number}.json")
        output = folder / f"alone-{number}.jsonl"
        words = ["run", args.bundle, "--input", part, "--output", output, "--no-canary"]
        commands.append([*words, "--summary", summaries[-1]])
    return timed(
        commands,
        folder,
        len(lines),
        engines,
        lambda: lines_of(folder, "alone-*.jsonl"),
        lambda: all(path.exists() for path in summaries),
    )


def shared_command(args: argparse.Namespace, folder: Path, engines: int) -> list[object]:
    command = lease_args(args.bundle, folder, args.shards * engines)
    command[command.index("--lease-timeout") + 1] = 60
    return command


def watched(commands: Sequence[Sequence[object]], folder: Path, engines: int) -> Taken:
    """Run workers or a driver of the job in a folder."""
    rows = (folder / "in.jsonl").read_bytes().count(b"\n")
    job, output = folder / "job", folder / "out.jsonl"
    return timed(commands, folder, rows, engines, lambda: lines_of_workers(job), output.exists)


def run_leases(args: argparse.Namespace, folder: Path, engines: int) -> Taken:
    return watched([shared_command(args, folder, engines)] * engines, folder, engines)


def run_ray(args: argparse.Namespace, folder: Path, engines: int) -> Taken:
    """On one node with a CPU for each engine, which is up before the command starts."""
    with one_node(engines) as address:
        words = ["--ray", address, "--workers", engines]
        return watched([[*shared_command(args, folder, engines), *words]], folder, engines)


RUNS = {"limit": run_alone, "leases": run_leases, "ray": run_ray}


def run_round(
    args: argparse.Namespace, modes: Sequence[str], engines: int, rows: int
) -> dict[str, Taken]:
    """Each mode once, in this order; all give the same answers."""
    found, wanted = {}, b""
    for mode in modes:
        with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
            folder = Path(scratch)
            write_answers(folder / "in.jsonl", rows, args.max_tokens)
            found[mode] = taken = RUNS[mode](args, folder, engines)
            outputs = sorted((*folder.glob("alone-*.jsonl"), *folder.glob("out.jsonl")))
            answers = b"".join(path.read_bytes() for path in outputs)
        assert answers.count(b"\n") == rows and wanted in (b"", answers), "other answers"
        wanted = answers
        print(
            f"{engines} engines, {mode}: {rows} rows in {taken.whole_s:.1f} s, "
            f"{taken.rate:.1f} rows/s once all answer, {taken.cpu_s:.1f} s of CPU",
            flush=True,
        )
    return found


def run_scale(args: argparse.Namespace) -> int:
    modes = [mode for mode in MODES if mode in args.modes and (mode != "ray" or find_spec("ray"))]
    cores = len(os.sched_getaffinity(0))
    lines, worst = [], 1.0
    for engines in args.engines:
        rows = args.rows * min(engines, cores)
        rounds = [
            run_round(args, modes[:: 1 - 2 * (number % 2)], engines, rows)
            for number in range(args.rounds)
        ]
        for mode in modes[1:]:
            pairs = [(found["limit"], found[mode]) for found in rounds]
            ratio = statistics.median(taken.rate / limit.rate for limit, taken in pairs)
            whole = statistics.median(limit.whole_s / taken.whole_s for limit, taken in pairs)
            rate = statistics.median(taken.rate for _, taken in pairs)
            lines.append(f"| {engines} | {mode} | {ratio:.3f} | {whole:.3f} | {rate:.1f} |")
            worst = min(worst, ratio)
    print(f"\n{cores} cores; shares of the limit, medians of {args.rounds} rounds")
    print("| engines | by | of the limit | with the start | rows/s |", "| --- " * 5 + "|", sep="\n")
    print(*lines, f"the worst median is {worst:.3f}", sep="\n")
    return int(worst < MIN_RATIO)


class CountingEngine:
    """Counts steps; a row takes as many as its `max_tokens`."""

    def __init__(self) -> None:
        self.startup_s: dict[str, float] = {}
        self.steps = self.busy = 0
        self._left: dict[str, list[Any]] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._left)

    def itself(self) -> CountingEngine:
        return self

    def add(self, request: Any) -> None:
        self._left[request.request_id] = [request, request.params.max_tokens]

    def cancel(self, request_id: str) -> bool:
        return self._left.pop(request_id, None) is not None

    def step(self) -> list[Any]:
        """As many steps as nobody ends in, and the one in which somebody does."""
        from tokenspeed_plan.runtime.request import Completion

        count = min(left for _, left in self._left.values())
        self.steps += count
        self.busy += count * len(self._left)
        done = []
        for name, entry in list(self._left.items()):
            entry[1] -= count
            if not entry[1]:
                del self._left[name]
                size = len(entry[0].prompt_ids)
                done.append(Completion(name, (1,), "a", "length", size, 0.01, 0.01))
        return done


def run_borders(args: argparse.Namespace) -> int:
    from tokenspeed_plan.planner.commands.engines import EngineOptions
    from tokenspeed_plan.planner.commands.run import _facts
    from tokenspeed_plan.runtime.serving.leases import shard_runs
    from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
    from tokenspeed_plan.runtime.serving.leases.job_store import FolderStore
    from tokenspeed_plan.runtime.serving.leases.lease_worker import Worker, WorkerOptions

    plan, tokenizer = _facts(args.bundle, EngineOptions())
    limits = replace(plan.limits, max_seq_len=1 << 20)
    plan = replace(plan, limits=limits, max_seqs=args.at_once or plan.max_seqs)
    found = {}
    for most in (1, shard_runs.MOST_SHARDS):
        shard_runs.MOST_SHARDS = most
        with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
            folder, engine = Path(scratch), CountingEngine()
            write_lengths(folder / "in.jsonl", args.rows, args.mean, args.sigma)
            rows = JobInput(str(folder / "in.jsonl"), args.shards)
            options = WorkerOptions(rows, str(folder / "out.jsonl"), quiet=True)
            store = FolderStore(folder / "job")
            begin_s = time.process_time()
            worker = Worker(store, options, plan, tokenizer, engine.itself)
            assert worker.run() == 0
            host_s = time.process_time() - begin_s
        found[most] = engine
        print(
            f"at most {most} shards at once: {engine.steps} steps with "
            f"{engine.busy / engine.steps:.1f} of {plan.max_seqs} rows; {host_s:.1f} s of CPU"
        )
    first, last = found.values()
    print(
        f"{1 - last.steps / first.steps:.1%} fewer steps, {args.rows / args.shards:g} rows a shard"
    )
    return 0


def write_lengths(path: Path, count: int, mean: int, sigma: float) -> None:
    """Rows whose answers have lengths of a log-normal distribution."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = max(round(rng.lognormvariate(0, sigma) / 2.718 ** (sigma**2 / 2) * mean), 1)
            body = {"prompt": f"# {number}", "max_tokens": size}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    mode = modes.add_parser("scale")
    mode.set_defaults(run=run_scale)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--rows", type=int, default=1000, help="Of as many engines as cores, each.")
    mode.add_argument("--shards", type=int, default=4, help="Of each engine.")
    mode.add_argument("--max-tokens", type=int, default=64, help="The longest answer.")
    mode.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4])
    mode.add_argument("--rounds", type=int, default=2)
    mode.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    mode = modes.add_parser("borders")
    mode.set_defaults(run=run_borders)
    mode.add_argument("bundle", type=Path)
    mode.add_argument("--rows", type=int, default=20_000)
    mode.add_argument("--shards", type=int, default=4)
    mode.add_argument("--at-once", type=int, help="Rows that run at once; the plan's by default.")
    mode.add_argument("--mean", type=int, default=512, help="Tokens of an answer.")
    mode.add_argument("--sigma", type=float, default=0.8, help="Of the logarithm of its length.")
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
