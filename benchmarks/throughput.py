"""Tokens a second of a batch: plans on one GPU, and vLLM on another at the same time.

    python benchmarks/throughput.py --config CONFIG.json --ours DIR:ROWS ... --vllm SEQS:ROWS ...
        [--gpus 0,1] [--vllm-weights fp8] [--vllm-site FOLDER] [--vllm-limit S]
        [--vllm-log FILE]

ROWS are `768x1024x256` (rows, tokens in, tokens out), `2000~1024x256` (log-normal around these:
a 95th percentile of 2.3 times the mean, at most six times), `800x200x200+2000` (all prompts begin
with the same 2,000 tokens, then 200 of their own), or the path of a file of lengths. Weights and
prompts are random, greedy, ends are ignored. Ours is `tokenspeed bench DIR --workload batch`, one
process for each; its forecast is told before the run. vLLM starts once for all its cases
(`vllm_rows.py`), with the packages of `--vllm-site` before those of this Python; what it says goes
to a file, and after `--vllm-limit` seconds it is stopped. With one GPU it runs after ours. Figures
are printed as they come, one JSON line each, and at the end as one table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed_plan.planner.token_lengths import Lengths, rows_of
from tokenspeed_plan.plans.lengths_file import RowLengths, read_lengths

P95, LONGEST = 2.3, 6  # of lengths that vary, in means
COMMAND = "from tokenspeed_plan.planner.cli import main; main()"
LAST_LINES = 20  # of what vLLM said, where it failed
POLL_S = 0.5


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

    def for_vllm(self) -> dict[str, Any]:
        """As `vllm_rows.py` reads it."""
        rows = read_lengths(self.lengths)
        lengths = [(row.prompt_tokens, row.output_tokens or 1) for row in rows]
        return {
            "seqs": int(self.where),
            "rows": self.name,
            "shared": self.shared,
            "lengths": lengths,
        }


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


class Vllm:
    """vLLM in a process of its own, from its start on.

    Args:
        options: of the command line.
        folder: for the job, the figures and the log.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        cases = [Case.of(text, folder).for_vllm() for text in options.vllm]
        job = {"config": str(options.config), "weights": options.vllm_weights, "cases": cases}
        (folder / "vllm.json").write_text(json.dumps(job), encoding="utf-8")
        self.results, self.log = folder / "figures.jsonl", options.vllm_log or folder / "vllm.log"
        self.results.touch()
        path = [str(options.vllm_site)] if options.vllm_site else []
        path += filter(None, [os.environ.get("PYTHONPATH")])
        program = str(Path(__file__).with_name("vllm_rows.py"))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, program, str(folder / "vllm.json"), str(self.results)],
                env=on_gpu(options.gpus.split(",")[-1]) | {"PYTHONPATH": os.pathsep.join(path)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.ends_at = time.monotonic() + options.vllm_limit

    def figures(self) -> list[dict[str, Any]]:
        """Those that it makes until its end, or until its time is over; told as they come."""
        found: list[dict[str, Any]] = []
        code = None
        while code is None:
            if time.monotonic() > self.ends_at:
                self.process.kill()
            time.sleep(POLL_S)
            code = self.process.poll()  # before its figures are read: none comes after its end
            lines = self.results.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            found += [told(json.loads(line)) for line in whole[len(found) :]]
        if code:
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(said[-LAST_LINES:]), flush=True)
            told({"who": "vLLM", "error": f"ended with {code}"})
        return found


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
    parser.add_argument("--vllm-site", type=Path, help="a folder with vLLM's packages")
    parser.add_argument("--vllm-weights", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--vllm-limit", type=float, default=330.0, help="seconds for its start too")
    parser.add_argument("--vllm-log", type=Path, help="where its output is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        contest(options, Path(name))


def contest(options: argparse.Namespace, folder: Path) -> None:
    """Run all contestants and compare them."""
    gpus, theirs = options.gpus.split(","), None
    if options.vllm and len(gpus) > 1:
        theirs = Vllm(options, folder)
    found = []
    for text in options.ours:
        case = Case.of(text, folder)
        figures = ours(case, gpus[0])
        found.append(told({"who": f"ours, {case.where}", "rows": case.name, **figures}))
    if options.vllm:
        theirs = theirs or Vllm(options, folder)
        found += theirs.figures()
    print("\n".join(table(found)), flush=True)


def table(found: list[dict[str, Any]]) -> list[str]:
    """All figures in Markdown, each beside the best of vLLM for the same rows."""
    rated = [each for each in found if "out_per_s" in each]
    best: dict[str, float] = {}
    for each in rated:
        if each["who"].startswith("vLLM"):
            best[each["rows"]] = max(each["out_per_s"], best.get(each["rows"], 0.0))
    lines = [
        "| rows | engine | tokens/s out | forecast | GPU idle | of vLLM's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in rated:
        forecast = idle = share = ""
        if "predicted" in each:
            forecast = f"{each['predicted']:,.0f} ({each['off']:+.1%})"
            idle = f"{each['idle_share']:.2%}"
        if each["rows"] in best:
            share = f"{each['out_per_s'] / best[each['rows']]:.2f} x"
        cells = (each["rows"], each["who"], f"{each['out_per_s']:,.0f}", forecast, idle, share)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
