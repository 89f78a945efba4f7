"""Tokens a second of a batch: plans on one GPU, and vLLM on another at the same time.

    python benchmarks/throughput.py --config CONFIG.json --ours DIR:ROWS ... --vllm SEQS:ROWS ...
        [--gpus 0,1]

ROWS are `768x1024x256` (rows, tokens in, tokens out), `2000~1024x256` (log-normal around these:
a 95th percentile of 2.3 times the mean, at most six times), `800x200x200+2000` (all prompts begin
with the same 2,000 tokens, then 200 of their own), or the path of a file of lengths. Weights and
prompts are random, greedy, ends are ignored. Ours is `tokenspeed bench DIR --workload batch`, one
process for each; its forecast is told before the run. vLLM starts once, for the largest SEQS, and
its scheduler is limited to fewer for the others. With one GPU vLLM runs after ours. Figures are
printed as they come, one JSON line each, and at the end how ours compares with vLLM's best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import VLLM, vllm_config

from tokenspeed_plan.planner.token_lengths import Lengths, rows_of
from tokenspeed_plan.plans.lengths_file import RowLengths, read_lengths

P95, LONGEST = 2.3, 6  # of lengths that vary, in means
COMMAND = "from tokenspeed_plan.planner.cli import main; main()"
SPARE_TOKENS = 64  # of vLLM's longest sequence


@dataclass(frozen=True, slots=True)
class Case:
    """Rows for one contestant: of a bundle, or of vLLM with so many sequences at once."""

    where: str
    name: str
    lengths: Path
    shared: int

    @classmethod
    def of(cls, text: str, folder: Path) -> Case:
        """From `WHERE:ROWS`; the lengths are a file, which is written into the folder."""
        where, _, name = text.rpartition(":")
        rows, _, shared = name.partition("+")
        lengths = Path(rows)
        if not lengths.is_file():
            lengths = folder / f"{rows}.jsonl"
            lines = [json.dumps(row.as_json()) for row in made_lengths(rows)]
            lengths.write_text("\n".join(lines), encoding="utf-8")
        return cls(where, name, lengths, int(shared or 0))


def made_lengths(rows: str) -> list[RowLengths]:
    """The lengths of `768x1024x256` or `2000~1024x256`."""
    count, prompt, output = map(int, rows.replace("~", "x").split("x"))
    if "~" not in rows:
        return [RowLengths(prompt, output)] * count
    spread = [Lengths(mean, round(P95 * mean), LONGEST * mean) for mean in (prompt, output)]
    return [RowLengths(*row) for row in rows_of(spread[0], spread[1], count)]


def ours(case: Case, gpu: str) -> dict[str, Any]:
    """Figures of `tokenspeed bench`, in a process of its own."""
    command = [sys.executable, "-P", "-c", COMMAND, "bench", case.where, "--workload", "batch"]
    command += ["--lengths", str(case.lengths), "--shared", str(case.shared), "--json"]
    done = subprocess.run(command, env=on_gpu(gpu), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"ended with {done.returncode}"}
    found = json.loads(done.stdout)
    kept = ("wall_s", "idle_share", "host_us_per_step", "preemptions", "hit_tokens")
    figures = {name: round(found[name], 4) for name in kept}
    forecast = found["predicted"]["output_tokens_per_s"]
    rate = found["tokens_per_s_out"]
    steps = {
        f"{each['phase']}/{each['bucket']}": [each["steps"], *(round(each[key]) for key in US)]
        for each in found["programs"]
    }
    return {
        "out_per_s": round(rate, 1),
        "predicted": forecast,
        "off": round(forecast / rate - 1.0, 3),
        **figures,
        "steps_us_predicted_floor": steps,
    }


US = ("us", "predicted_us", "floor_us")


def on_gpu(gpu: str) -> dict[str, str]:
    """This environment, with one GPU in sight."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu}


def vllm_figures(config: Path, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Figures of vLLM in this process, for each case; the first are those of its start."""
    os.environ.update(VLLM)
    rows = {case: read_lengths(case.lengths) for case in cases}
    longest = max(
        case.shared + row.prompt_tokens + (row.output_tokens or 1)
        for case in cases
        for row in rows[case]
    )
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = vllm_config(config, folder)["vocab_size"]
        from vllm import LLM

        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            language_model_only=True,
            dtype="bfloat16",
            max_model_len=longest + SPARE_TOKENS,
            max_num_seqs=max(int(case.where) for case in cases),
            enable_prefix_caching=any(case.shared for case in cases),
            attention_backend="FLASH_ATTN",
            gdn_prefill_backend="triton",
        )
    yield {"ready_s": round(time.perf_counter() - begun, 1)}
    vllm_run(engine, vocab_size, cases[0], rows[cases[0]][:4])
    for case in cases:
        wall_s = vllm_run(engine, vocab_size, case, rows[case])
        made = sum(row.output_tokens or 1 for row in rows[case])
        yield {
            "who": f"vLLM at {case.where}",
            "rows": case.name,
            "out_per_s": round(made / wall_s, 1),
            "wall_s": round(wall_s, 2),
        }


def vllm_run(engine: Any, vocab_size: int, case: Case, rows: list[RowLengths]) -> float:
    """Seconds that vLLM takes for rows, at most as many at once as the case says."""
    import random

    from vllm import SamplingParams

    # Its scheduler is in this process (VLLM_ENABLE_V1_MULTIPROCESSING).
    engine.llm_engine.engine_core.engine_core.scheduler.max_num_running_reqs = int(case.where)
    dice = random.Random(0)
    shared = [dice.randrange(vocab_size) for _ in range(case.shared)]
    prompts = [
        {
            "prompt_token_ids": shared
            + [dice.randrange(vocab_size) for _ in range(row.prompt_tokens)]
        }
        for row in rows
    ]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=row.output_tokens or 1, ignore_eos=True, detokenize=False
        )
        for row in rows
    ]
    begun = time.perf_counter()
    done = engine.generate(prompts, params, use_tqdm=False)
    wall_s = time.perf_counter() - begun
    assert [len(each.outputs[0].token_ids) for each in done] == [
        row.output_tokens or 1 for row in rows
    ]
    return wall_s


def start_vllm(options: argparse.Namespace, results: Path) -> subprocess.Popen[bytes]:
    """vLLM in a process of its own, which prints its figures and adds them to a file."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only-vllm", str(results)]
    return subprocess.Popen(command, env=on_gpu(options.gpus.split(",")[-1]))


def told(found: dict[str, Any]) -> dict[str, Any]:
    """The figures, printed."""
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="a preset's config.json")
    parser.add_argument("--ours", action="append", default=[], metavar="DIR:ROWS")
    parser.add_argument("--vllm", action="append", default=[], metavar="SEQS:ROWS")
    parser.add_argument("--gpus", default="0", help="ours runs on the first, vLLM on the last")
    parser.add_argument("--only-vllm", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.only_vllm is None:
            contest(options, Path(name))
            return
        cases = [Case.of(text, Path(name)) for text in options.vllm]
        with options.only_vllm.open("a", encoding="utf-8") as results:
            for found in vllm_figures(options.config, cases):
                print(json.dumps(told(found)), file=results, flush=True)


def contest(options: argparse.Namespace, folder: Path) -> None:
    """Run all contestants and compare them."""
    results = folder / "vllm.jsonl"
    results.touch()
    gpus, theirs = options.gpus.split(","), None
    if options.vllm and len(gpus) > 1:
        theirs = start_vllm(options, results)
    mine = []
    for text in options.ours:
        case = Case.of(text, folder)
        figures = ours(case, gpus[0])
        mine.append(told({"who": f"ours, {case.where}", "rows": case.name, **figures}))
    if options.vllm and theirs is None:
        theirs = start_vllm(options, results)
    if theirs is not None and theirs.wait():
        told({"who": "vLLM", "error": f"ended with {theirs.returncode}"})
    lines = results.read_text(encoding="utf-8").splitlines()
    compare(mine, [json.loads(line) for line in lines])


def compare(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Print our rate in vLLM's, where both had the same rows."""
    for own in mine:
        for other in theirs:
            if "out_per_s" in own and own["rows"] == other.get("rows"):
                ratio = own["out_per_s"] / other["out_per_s"]
                print(f"{own['who']}, {own['rows']}: {ratio:.2f} x {other['who']}", flush=True)


if __name__ == "__main__":
    main()
