"""Rows of a batch through a plan's engine, case after case with one load of random weights.

    python benchmarks/our_rows.py DIR JOB.json FIGURES.jsonl

As `vllm_rows.py`, of whose jobs this reads the `cases`: random prompts, greedy, ends are ignored.
Rows of a case with fewer `seqs` than the plan has are handed over in groups of so many. Figures are
appended as they come, a JSON line each. The time of a token in a batch of N rows is that of N
answers of many tokens less that of N answers of one, over the tokens between.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.commands.engines import freeze_gc
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.loading.engine_loader import default_launch
from tokenspeed_plan.runtime.request import Request

WARM_UP_ROWS = 4
Case = dict[str, Any]


def figures(bundle: Path, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Figures of each case; the first are those of the start."""
    begun = time.perf_counter()
    plan = load_plan(bundle)
    engine = Engine(plan, prepare(plan, bundle, None, default_launch(plan)))
    freeze_gc()
    yield {"who": bundle.name, "ready_s": round(time.perf_counter() - begun, 1)}
    run(engine, cases[0] | {"lengths": cases[0]["lengths"][:WARM_UP_ROWS]}, 0)
    for number, case in enumerate(cases, 1):
        wall_s = run(engine, case, number)
        made = sum(output for _, output in case["lengths"])
        yield {
            "who": f"{bundle.name} at {case['seqs']}",
            "rows": case["rows"],
            "out_per_s": round(made / wall_s, 1),
            "wall_s": round(wall_s, 4),
        }


def run(engine: Engine, case: Case, seed: int) -> float:
    """Seconds that the engine takes for rows, at most as many at once as the case says.

    Each case has a seed of its own, so that no prompt is in the cache.
    """
    requests, seqs = list(requests_of(engine, case, seed)), case["seqs"]
    if seqs >= engine.plan.pool.limits.max_seqs:
        seqs = len(requests)  # its scheduler knows how many
    begun = time.perf_counter()
    for at in range(0, len(requests), seqs):
        for request in requests[at : at + seqs]:
            engine.add(request)
        while engine.num_unfinished:
            for done in engine.step():
                done.check()
    return time.perf_counter() - begun


def requests_of(engine: Engine, case: Case, seed: int) -> Iterator[Request]:
    """The rows of a case."""
    dice = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [dice.randrange(engine.vocab_size) for _ in range(count)]

    shared = tokens(case["shared"])
    for number, (prompt, output) in enumerate(case["lengths"]):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        yield Request(f"{seed}-{number}", (*shared, *tokens(prompt)), params)


def main() -> None:
    bundle, job, results = map(Path, sys.argv[1:])
    cases = json.loads(job.read_text(encoding="utf-8"))["cases"]
    with results.open("a", encoding="utf-8") as lines:
        for found in figures(bundle, cases):
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main()
