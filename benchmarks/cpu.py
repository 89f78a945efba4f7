"""`tokenspeed run` against transformers' `generate` with the same checkpoint, prompts and lengths.

    python benchmarks/cpu.py [--rounds 5]

Both sides run in turn, A B A B, and the figure is the ratio of each pair. Ours is the whole path of
a batch file (reading, checking, scheduling, writing); transformers gets its prompts already
tokenised and padded, in its default settings, fp32, greedy. Loading is left out on both sides, and
only tokens that a row asked for are counted.

Two tables: the demo batch as it is, whose rows ask for 16 to 256 tokens, so that `generate` runs
each of its batches to the longest row; and the same rows at 64 tokens each, where nothing is left
but the speed of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime import Engine
from tokenspeed_plan.runtime.serving.batch import BatchOptions, BatchPlan, RequestLimits, run_batch
from tokenspeed_plan.runtime.serving.batch.lines import parse_row
from tokenspeed_plan.runtime.serving.openai.conversion import to_requests

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "plans/frozen/demo-cpu"
BATCH = ROOT / "examples/demo/batch.jsonl"
UNIFORM_TOKENS = 64


def greedy_rows(max_tokens: int | None) -> list[dict[str, Any]]:
    """The demo batch, every row greedy; each of its own length, or all of `max_tokens`."""
    rows = [json.loads(line) for line in BATCH.read_text().splitlines()]
    for row in rows:
        body = row["body"]
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        body["max_tokens"] = max_tokens or body["max_tokens"]
    return rows


class Ours:
    """A loaded engine, and the batch file."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path) -> None:
        self.folder, self.input = folder, folder / "in.jsonl"
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.plan = load_plan(BUNDLE)
        self.model = ROOT / str(self.plan.model.location)
        self.engine = Engine.load(BUNDLE, self.model, chat=ChatTemplate.load(self.model))
        limits = self.plan.pool.limits
        row_limits = RequestLimits(
            limits.max_seq_len, limits.default_max_tokens, self.plan.model.vocab_size
        )
        self.facts = BatchPlan(self.plan.digest, "demo", limits.max_seqs, row_limits, {})
        assert self.engine.tokenizer is not None
        self.tokenizer = self.engine.tokenizer
        lines = self.input.read_bytes().splitlines()
        parsed = [parse_row(line, i, self.plan.digest) for i, line in enumerate(lines)]
        self.prompts = [
            list(to_requests(row.body, row.key, self.tokenizer, row_limits)[0].prompt_ids)
            for row in parsed
        ]

    def run(self) -> tuple[float, list[list[int]]]:
        """Seconds, and the answers."""
        output = self.folder / "out.jsonl"
        output.unlink(missing_ok=True)
        begun = time.perf_counter()
        run_batch(
            BatchOptions(self.input, output, quiet=True),
            self.facts,
            self.tokenizer,
            lambda: self.engine,
        )
        seconds = time.perf_counter() - begun
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        return seconds, [line["response"]["body"]["choices"][0]["token_ids"] for line in lines]


class Theirs:
    """transformers in its default settings, in batches of as many rows as the plan runs at once."""

    def __init__(
        self, folder: Path, prompts: list[list[int]], lengths: list[int], batch_size: int
    ) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        starts = range(0, len(prompts), batch_size)
        self.batches = [(prompts[i : i + batch_size], lengths[i : i + batch_size]) for i in starts]

    def run(self) -> tuple[float, list[list[int]]]:
        """Seconds, and the answers."""
        begun = time.perf_counter()
        answers = [ids for batch in self.batches for ids in self.one_batch(*batch)]
        return time.perf_counter() - begun, answers

    @torch.no_grad()
    def one_batch(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Answers of prompts that are padded on the left to the longest one."""
        width, steps = max(map(len, prompts)), max(lengths)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [row[:length] for row, length in zip(out[:, width:].tolist(), lengths, strict=True)]


def compare(title: str, rows: list[dict[str, Any]], rounds: int) -> None:
    """Print one table."""
    lengths = [row["body"]["max_tokens"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(rows, Path(folder))
        theirs = Theirs(ours.model, ours.prompts, lengths, ours.facts.max_seqs)
        found, wanted = ours.run()[1], theirs.run()[1]  # warm-up
        pairs = [(ours.run()[0], theirs.run()[0]) for _ in range(rounds)]
    tokens, same = sum(lengths), sum(a == b for a, b in zip(found, wanted, strict=True))
    num_prompt_tokens = sum(map(len, ours.prompts))
    print(
        f"{title}: {len(rows)} rows, batch size {ours.facts.max_seqs}, "
        f"{num_prompt_tokens} prompt tokens, {tokens} new tokens; {same} rows have equal answers"
    )
    for name, side in (("tokenspeed run", 0), ("transformers generate", 1)):
        seconds = statistics.median(pair[side] for pair in pairs)
        print(f"  {name:<22} {seconds:7.3f} s {tokens / seconds:8.0f} tokens/s")
    ratios = sorted(b / a for a, b in pairs)
    print(
        f"  ratio {statistics.median(ratios):.2f} "
        f"(of {rounds} pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {versions}")
    compare("the demo batch", greedy_rows(None), rounds)
    compare(f"all rows at {UNIFORM_TOKENS} tokens", greedy_rows(UNIFORM_TOKENS), rounds)


if __name__ == "__main__":
    main()
