"""Try mutated inputs: python tools/fuzz.py TARGET --count 20000 [--seed 0] [--jobs 2].

Targets: bodies, rows, messages, specs, plans, checkpoints, tokenizers. Each example is taken or
refused in words; what is neither, takes more than 10 s or more than 1 GB is written to --out with
its seed.
The exit code is 1 if there was one. `--count 1 --seed N` runs one example again.
"""

from __future__ import annotations

import argparse
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
NAMES = ("bodies", "rows", "messages", "specs", "plans", "checkpoints", "tokenizers")
MAX_BYTES = 1 << 30
MAX_SHOWN = 40
SPAWN = multiprocessing.get_context("spawn")


def work(name: str, seeds: Sequence[int], kept: Path, pipe: Connection) -> None:
    """Send (seed, None) before each example and (seed, outcome) after it."""
    import fuzzing

    fuzzing.examine(name, -1)  # loads what the target needs
    for seed in seeds:
        pipe.send((seed, None))
        limit_memory()
        outcome = fuzzing.examine(name, seed, kept)
        if isinstance(outcome, fuzzing.Failure):
            pipe.send((seed, outcome.kind))
        else:
            pipe.send((seed, outcome))
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
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    args = parser.parse_args()
    every = range(args.seed, args.seed + args.count)
    workers = [
        Worker(args.target, every[number :: args.jobs], args.out) for number in range(args.jobs)
    ]
    counts, kinds = run(workers)
    return report(args.target, counts, kinds, args.out)


def run(workers: list[Worker]) -> tuple[Counter[str], dict[str, list[int]]]:
    """Counts of outcomes, and the seeds of each kind of failure."""
    counts: Counter[str] = Counter()
    kinds: dict[str, list[int]] = {}
    by_pipe = {worker.pipe: worker for worker in workers}
    shown_s = time.monotonic()
    while by_pipe:
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]
            try:
                seed, outcome = pipe.recv()
            except EOFError:
                del by_pipe[pipe]
                worker.process.join()
                if worker.process.exitcode:
                    seed, outcome = worker.current, worker.died()
                    kinds.setdefault(outcome, []).append(seed)
                    counts["failed"] += 1
                    if worker.seeds and seed is not None:
                        worker.start()
                        by_pipe[worker.pipe] = worker
                continue
            worker.current = seed
            if isinstance(outcome, str):
                counts["failed"] += 1
                kinds.setdefault(outcome, []).append(seed)
            elif outcome is not None:
                counts["accepted" if outcome else "refused"] += 1
        if time.monotonic() > shown_s + 10:
            shown_s = time.monotonic()
            print(dict(counts), file=sys.stderr, flush=True)
    return counts, kinds


def report(name: str, counts: Counter[str], kinds: dict[str, list[int]], out: Path) -> int:
    print(
        f"{name}: {counts['accepted']} accepted, {counts['refused']} refused, "
        f"{counts['failed']} failed"
    )
    for kind, seeds in sorted(kinds.items(), key=lambda item: -len(item[1]))[:MAX_SHOWN]:
        print(f"  {len(seeds)} x {kind}; seeds {seeds[:5]}")
    if kinds:
        print(f"the files of each are in {out}/{name}-SEED")
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
