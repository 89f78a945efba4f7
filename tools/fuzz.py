"""Try mutated inputs: python tools/fuzz.py TARGET --count 20000 [--seed 0] [--jobs 2].

Targets: bodies, rows, messages, forms, specs, plans, checkpoints, tokenizers. Each example is taken
or refused in words; what is neither, takes more than 10 s or more than 1 GB is written to --out
with its seed, and the first of each kind to stderr. The exit code is 1 if there was one. `--count 1
--seed N` runs one example again. --seconds ends it early; what was done until then is reported.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
NAMES = ("bodies", "rows", "messages", "forms", "specs", "plans", "checkpoints", "tokenizers")
MAX_BYTES = 1 << 30
MAX_SHOWN = 40
MAX_TEXT = 3000  # characters of a traceback or a file
SPAWN = multiprocessing.get_context("spawn")


def work(name: str, seeds: Sequence[int], kept: Path, pipe: Connection) -> None:
    """Send (seed, None, "") before each example; after it its outcome or kind, and traceback."""
    import fuzzing

    fuzzing.target_of(name).load()
    fuzzing.examine(name, -1)
    for seed in seeds:
        pipe.send((seed, None, ""))
        limit_memory()
        outcome = fuzzing.examine(name, seed, kept)
        if isinstance(outcome, fuzzing.Failure):
            pipe.send((seed, outcome.kind, outcome.text))
        else:
            pipe.send((seed, outcome, ""))
    pipe.close()


def limit_memory() -> None:
    """Let this process grow by `MAX_BYTES` from here: MemoryError beyond."""
    with open("/proc/self/status", encoding="utf-8") as status:
        used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + MAX_BYTES, hard))


class Worker:
    """A process that goes through some seeds; a new one goes on where it died."""

    def __init__(self, name: str, seeds: Sequence[int], kept: Path) -> None:
        self.name = name
        self.seeds = list(seeds)
        self.kept = kept
        self.current: int | None = None
        self.start()

    def start(self) -> None:
        self.pipe, theirs = SPAWN.Pipe(duplex=False)
        args = (self.name, self.seeds, self.kept, theirs)
        self.process = SPAWN.Process(target=work, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def died(self) -> str:
        """Skip the example that killed the process; returns how it ended."""
        self.process.join()
        if self.current in self.seeds:
            del self.seeds[: self.seeds.index(self.current) + 1]
        return f"the process died: exit code {self.process.exitcode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    args = parser.parse_args()
    every = range(args.seed, args.seed + args.count)
    workers = [
        Worker(args.target, every[number :: args.jobs], args.out) for number in range(args.jobs)
    ]
    tally = Tally(args.target, args.count, args.out)
    run(workers, tally, time.monotonic() + args.seconds)
    return tally.report()


class Tally:
    """Counts of outcomes, and the seeds of each kind of failure."""

    def __init__(self, name: str, count: int, kept: Path) -> None:
        self.name = name
        self.count = count
        self.kept = kept
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, list[int]] = {}
        self.shown_s = time.monotonic()

    def add(self, seed: int, outcome: bool | str, text: str = "") -> None:
        if not isinstance(outcome, str):
            self.counts["accepted" if outcome else "refused"] += 1
            return
        self.counts["failed"] += 1
        seeds = self.kinds.setdefault(outcome, [])
        seeds.append(seed)
        if len(seeds) == 1:
            self.show(seed, outcome, text)

    def show(self, seed: int, kind: str, text: str) -> None:
        """The first example of a kind, as far as it is short."""
        again = f"python tools/fuzz.py {self.name} --count 1 --seed {seed}"
        print(f"{self.name}: {kind}: {again}\n{text[-MAX_TEXT:]}", file=sys.stderr)
        for path in sorted((self.kept / f"{self.name}-{seed}").rglob("*")):
            if path.is_file() and path.stat().st_size <= MAX_TEXT and path.name != "failure.txt":
                print(f"{path.name}: {path.read_bytes()!r}", file=sys.stderr)
        sys.stderr.flush()

    def progress(self) -> None:
        if time.monotonic() > self.shown_s + 10:
            self.shown_s = time.monotonic()
            print(self.head(), file=sys.stderr, flush=True)

    def head(self) -> str:
        done, parts = self.counts.total(), self.counts
        return (
            f"{self.name}: {done} of {self.count}: {parts['accepted']} accepted, "
            f"{parts['refused']} refused, {parts['failed']} failed"
        )

    def report(self) -> int:
        print(self.head())
        for kind, seeds in sorted(self.kinds.items(), key=lambda item: -len(item[1]))[:MAX_SHOWN]:
            print(f"  {len(seeds)} x {kind}; seeds {seeds[:5]}")
        if self.kinds:
            print(f"the files of each are in {self.kept}/{self.name}-SEED")
        return int(bool(self.kinds))


def run(workers: list[Worker], tally: Tally, until_s: float) -> None:
    """Gather what the workers send; end them at a time of the monotonic clock."""
    by_pipe = {worker.pipe: worker for worker in workers}
    while by_pipe and time.monotonic() < until_s:
        for pipe in wait(list(by_pipe), timeout=1):
            worker = by_pipe[pipe]
            try:
                seed, outcome, text = pipe.recv()
            except EOFError:
                del by_pipe[pipe]
                if more := ended(worker, tally):
                    by_pipe[more] = worker
                continue
            worker.current = seed
            if outcome is not None:
                tally.add(seed, outcome, text)
        tally.progress()
    for worker in by_pipe.values():
        worker.process.kill()


def ended(worker: Worker, tally: Tally) -> Connection | None:
    """Of a worker whose pipe is closed; its new pipe if it has to go on behind what killed it."""
    worker.process.join()
    if not worker.process.exitcode:
        return None
    seed = worker.current
    tally.add(-1 if seed is None else seed, worker.died())
    if not worker.seeds or seed is None:
        return None
    worker.start()
    return worker.pipe


if __name__ == "__main__":
    sys.exit(main())
