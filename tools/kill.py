"""Kill batch runs at random moments: python tools/kill.py --count 1000 [--seed 0].

Each run is the demo model's, in a process forked from one that has loaded the engine. It is killed
with SIGKILL at a random moment and started again until it gets through. After each kill the rows
that were finished must still be there, and right; at the end the output must have the rows of a
run that nobody killed. Drafts on and off, plain and .gz, both orders, whole and in two shards.
The exit code is 1 if a row was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
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
        return run_batch(options, _batch_plan(engine.plan), engine.tokenizer, lambda: engine)

    def finished(self) -> tuple[Rows, list[str]]:
        """Finished rows of both files by id, and the ids of the output in its order."""
        rows: Rows = {}
        names: list[str] = []
        for path in (sidecar_path(self.output), self.output):
            if not path.exists():
                continue
            for line in read_whole_lines(path):
                row = json.loads(line)
                rows[row["custom_id"]] = without_probabilities(row)
                if path == self.output:
                    names.append(row["custom_id"])
        return rows, names


def without_probabilities(row: Rows) -> Rows:
    """A row without numbers whose last digits depend on the rows that ran beside it."""
    for choice in row["response"]["body"]["choices"]:
        if choice["logprobs"]:
            choice["logprobs"] = choice["logprobs"]["tokens"]
    return row


def faults(wanted: Rows, before: Rows, rows: Rows, names: list[str]) -> list[str]:
    """What a kill did to rows that were finished."""
    found = [f"{name} was lost" for name in before if name not in rows]
    found += [f"{name} was changed" for name, row in rows.items() if row != wanted.get(name)]
    found += [f"{name} is there twice" for name, count in Counter(names).items() if count > 1]
    return found


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
    return kills, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="Kills.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, num_runs, found = random.Random(args.seed), 0, 0, list[str]()
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        folder = Path(scratch)
        source = folder / "in.jsonl"
        names = write_input(source)
        engines = [load_engine(folder / f"drafts-{drafts}", drafts) for drafts in (False, True)]
        every = [Runs(engines[item.drafts], source, folder, item) for item in VARIETIES]
        rng.shuffle(every)
        clean: dict[Variety, tuple[Rows, float]] = {}
        for runs in itertools.cycle(every):
            if kills >= args.count:
                break
            if runs.variety not in clean:
                rows, took_s = clean_rows(runs)
                clean[runs.variety] = {name: rows[name] for name in names}, took_s
            more, faulty = kill_until_done(runs, *clean[runs.variety], rng)
            kills, num_runs = kills + more, num_runs + 1
            found += [f"{runs.variety}: {text}" for text in faulty]
    print(f"{kills} kills of {num_runs} runs of {NUM_ROWS} rows: {len(found)} faults")
    print("".join(f"  {text}\n" for text in found[:40]), end="")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
