"""Kill batch runs at random moments: python tools/kill.py --count 1000 [--seed 0] [--jobs 2].

Each run is the demo model's, in a process forked from one that has loaded the engine. It is killed
with SIGKILL at a random moment and started again until it gets through. After each kill the rows
that were finished must still be there, and right; at the end the output must have the rows of a
run that nobody killed. Drafts on and off, plain and .gz, both orders, whole and in two shards.
The exit code is 1 if a row was lost, doubled or changed. Jobs differ in their seeds, which count on
from --seed; --seconds ends all of them early, and what they did until then counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

from tokenspeed_plan.planner import find_model
from tokenspeed_plan.planner.commands.run import _batch_plan
from tokenspeed_plan.planner.compile import compile_bundle
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.bundle import save_plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.serving.batch import BatchOptions, Selection, run_batch
from tokenspeed_plan.runtime.serving.batch.resume import sidecar_path
from tokenspeed_plan.runtime.serving.batch.writers import read_whole_lines

MODEL = Path(__file__).parents[1] / "examples" / "demo" / "model"
NUM_ROWS = 24
MAX_LOGPROB_ERROR = 1e-3
Rows = dict[str, Any]


@dataclass(frozen=True)
class Variety:
    """How a run is made."""

    drafts: bool
    name: str
    order: str
    shards: int


VARIETIES = [
    Variety(*values)
    for values in itertools.product(
        (False, True), ("out.jsonl", "out.jsonl.gz"), ("input", "completion"), (1, 2)
    )
]


def load_engine(folder: Path, drafts: bool) -> Engine:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"path": str(MODEL), "weights": "fp32"},
            "target": {"gpu": "cpu"},
            "workload": {
                "kind": "batch",
                "first_turn_tokens": 64,
                "output_tokens": 32,
                "concurrency": 4,
            },
            "speculation": {"depth": 2} if drafts else "off",
        }
    )
    made = compile_bundle(spec, find_model(spec))
    save_plan(made.plan, folder, made.sources)
    return Engine.load(folder)


def write_input(path: Path) -> list[str]:
    """Rows of several lengths, with choices and probabilities; returns their ids."""
    rng, names = random.Random(0), []
    with path.open("w", encoding="utf-8") as file:
        for number in range(NUM_ROWS):
            body = {
                "prompt": rng.choice(("def f(x):\n", "import os\n", "class A:\n")) + f"# {number}",
                "max_tokens": rng.choice((1, 4, 12, 24)),
                "temperature": rng.choice((0, 0.8)),
                "n": rng.choice((1, 1, 2)),
                "logprobs": rng.choice((None, 2)),
            }
            body = {key: value for key, value in body.items() if value is not None}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")
            names.append(f"row-{number}")
    return names


class Runs:
    """Runs of one variety in one folder."""

    def __init__(self, engine: Engine, source: Path, folder: Path, variety: Variety) -> None:
        self.engine = engine
        self.source = source
        self.variety = variety
        self.output = folder / variety.name

    def start(self, shard: int) -> int:
        """Fork a run; returns its process id."""
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            code = self._run(shard)
        except BaseException as error:
            print(f"{self.variety}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def _run(self, shard: int) -> int:
        engine = self.engine
        assert engine.tokenizer is not None
        options = BatchOptions(
            self.source,
            self.output,
            order=self.variety.order,  # type: ignore[arg-type]
            selection=Selection(None, shard, self.variety.shards),
            quiet=True,
        )
        facts = _batch_plan(engine.plan, engine.tokenizer)
        return run_batch(options, facts, engine.tokenizer, lambda: engine)

    def finished(self) -> tuple[Rows, list[str]]:
        """Finished rows of both files by id, and the ids of the output in its order."""
        rows: Rows = {}
        names: list[str] = []
        for path in (sidecar_path(self.output), self.output):
            if not path.exists():
                continue
            for line in read_whole_lines(path):
                row = json.loads(line)
                rows[row["custom_id"]] = row
                if path == self.output:
                    names.append(row["custom_id"])
        return rows, names


def faults(wanted: Rows, before: Rows, rows: Rows, names: list[str]) -> list[str]:
    """What a kill did to rows that were finished."""
    found = [f"{name} was lost" for name in before if name not in rows]
    found += [
        f"{name} was changed: {text}"
        for name, row in rows.items()
        if (text := difference(wanted.get(name), row))
    ]
    found += [f"{name} is there twice" for name, count in Counter(names).items() if count > 1]
    return found


def difference(wanted: Any, found: Any, path: str = "it") -> str:
    """The first place where two JSON values differ, with both; empty where they are alike.

    The last digits of probabilities depend on the rows that ran beside a row.
    """
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        pairs = [(wanted[name], found[name], f"{path}.{name}") for name in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = [
            (old, new, f"{path}[{i}]")
            for i, (old, new) in enumerate(zip(wanted, found, strict=True))
        ]
    elif isinstance(wanted, float) and isinstance(found, float):
        if abs(wanted - found) <= MAX_LOGPROB_ERROR:
            return ""
    elif wanted == found:
        return ""
    if pairs or wanted == found:
        return next(filter(None, (difference(*pair) for pair in pairs)), "")
    return f"{path} is {found!r:.300}, not {wanted!r:.300}"


def clean_rows(runs: Runs) -> tuple[Rows, float]:
    """The rows of a run that nobody kills, and how long it takes."""
    begin_s = time.monotonic()
    for shard in range(1, runs.variety.shards + 1):
        _, status = os.waitpid(runs.start(shard), 0)
        assert status == 0, f"{runs.variety} ended with {os.waitstatus_to_exitcode(status)}"
    took_s = time.monotonic() - begin_s
    rows, names = runs.finished()
    assert len(names) == len(rows) == NUM_ROWS
    runs.output.unlink()
    return rows, took_s


def kill_until_done(runs: Runs, wanted: Rows, took_s: float, rng: random.Random) -> tuple[int, Any]:
    """Kill runs of one output until it is complete; returns how many, and what was wrong."""
    kills, found, before = 0, list[str](), Rows()
    for shard in range(1, runs.variety.shards + 1):
        while True:
            process = runs.start(shard)
            time.sleep(rng.random() * rng.choice((0.02, 0.3, 1.1)) * took_s)
            os.kill(process, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            rows, names = runs.finished()
            found += faults(wanted, before, rows, names)
            before = rows
            if status != -signal.SIGKILL:
                found += [f"exit code {status}"] * (status != 0)
                break
            kills += 1
    found += [f"{name} is missing at the end" for name in wanted if name not in names]
    if runs.variety.order == "input" and names != [name for name in wanted if name in names]:
        found.append("the order is not that of the input")
    if sidecar_path(runs.output).exists():
        found.append("finished lines are still beside a complete output")
    runs.output.unlink()
    return kills, list(dict.fromkeys(found))  # a changed row is found after each later kill, too


@dataclass
class Tally:
    """What came of some runs."""

    kills: int = 0
    runs: int = 0
    varieties: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.runs += other.runs
        self.varieties += other.varieties
        self.faults += other.faults

    def head(self) -> str:
        """One line of it."""
        runs = f"{self.kills} kills of {self.runs} runs of {NUM_ROWS} rows"
        return f"{runs}: {len(self.faults)} faults"


class Job:
    """A process that goes through the varieties, in an order of its own, and sends tallies."""

    def __init__(self, every: list[Runs], source: Path, seed: int, count: int) -> None:
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = os.fork()
        if self.process == 0:
            os.setpgid(0, 0)  # with the runs that it forks
            code = 70
            try:
                kill_many(every, source, seed, count, theirs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def kill_many(every: list[Runs], source: Path, seed: int, count: int, pipe: Connection) -> None:
    """Kill runs of one variety after the other, and send a tally of each."""
    rng, kills, names = random.Random(seed), 0, write_input(source)
    rng.shuffle(every)
    clean: dict[Variety, tuple[Rows, float]] = {}
    for runs in itertools.cycle(every):
        if kills >= count:
            break
        if runs.variety not in clean:
            rows, took_s = clean_rows(runs)
            clean[runs.variety] = {name: rows[name] for name in names}, took_s
        more, faulty = kill_until_done(runs, *clean[runs.variety], rng)
        kills += more
        text = str(runs.variety)
        texts = [f"seed {seed}: {text}: {fault}" for fault in faulty]
        pipe.send(Tally(more, 1, Counter({text: more}), texts))


def follow(jobs: list[Job], until_s: float) -> Tally:
    """Gather what jobs send; end them at a time of the monotonic clock."""
    tally, shown_s = Tally(), time.monotonic()
    pipes = {job.pipe: job for job in jobs}
    try:
        while pipes and time.monotonic() < until_s:
            for pipe in wait(list(pipes), timeout=1):
                try:
                    tally.add(pipe.recv())
                except EOFError:
                    job = pipes.pop(pipe)
                    tally.faults += ["a job died"] * (job.wait() != 0)
            if time.monotonic() > shown_s + 10:
                shown_s = time.monotonic()
                print(tally.head(), file=sys.stderr, flush=True)
    finally:
        for job in pipes.values():
            os.killpg(job.process, signal.SIGKILL)
            job.wait()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="Kills.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", default="", help="Varieties with this in their text: shards=2")
    args = parser.parse_args()
    until_s = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        folder = Path(scratch)
        engines = [load_engine(folder / f"drafts-{drafts}", drafts) for drafts in (False, True)]
        each = math.ceil(args.count / args.jobs)
        varieties = [item for item in VARIETIES if args.only in str(item)]
        jobs = []
        for seed in range(args.seed, args.seed + args.jobs):
            place = folder / f"seed-{seed}"
            place.mkdir()
            source = place / "in.jsonl"
            every = [Runs(engines[item.drafts], source, place, item) for item in varieties]
            jobs.append(Job(every, source, seed, each))
        tally = follow(jobs, until_s)
    print(tally.head())
    print(
        "".join(f"  {count} of {name}\n" for name, count in sorted(tally.varieties.items())), end=""
    )
    print("".join(f"  {text}\n" for text in tally.faults[:40]), end="")
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
