"""Rows of a batch through vLLM, in a process of its own: `benchmarks/throughput.py` starts it.

    python benchmarks/vllm_rows.py JOB.json FIGURES.jsonl

JOB has `config`, a preset's config.json, its `weights` (bf16, or fp8 as they are published), and
`cases`: sequences at once (`seqs`), a name (`rows`), tokens with which all prompts begin
(`shared`), and [tokens in, tokens out] of each row (`lengths`).
vLLM starts once, for the most sequences of any case, and its scheduler is limited to fewer for the
others. Figures are appended as they come, a JSON line each. Nothing of ours is imported, whose
packages may be other versions than vLLM's.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import VLLM, VLLM_MODEL, vllm_config

SPARE_TOKENS = 64  # of the longest sequence
WARM_UP_ROWS = 4
Case = Mapping[str, Any]


def figures(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Figures of each case; the first are those of the start."""
    os.environ.update(VLLM)
    cases: Sequence[Case] = job["cases"]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = vllm_config(Path(job["config"]), folder, job["weights"])["vocab_size"]
        from vllm import LLM, __version__

        spread_fp8()
        engine = LLM(
            folder,
            **VLLM_MODEL,
            max_model_len=max(map(longest, cases)) + SPARE_TOKENS,
            max_num_seqs=max(case["seqs"] for case in cases),
            enable_prefix_caching=any(case["shared"] for case in cases),
        )
    yield {"who": f"vLLM {__version__}", "ready_s": round(time.perf_counter() - begun, 1)}
    run(engine, vocab_size, cases[0], cases[0]["lengths"][:WARM_UP_ROWS])
    for case in cases:
        wall_s = run(engine, vocab_size, case, case["lengths"])
        made = sum(output for _, output in case["lengths"])
        yield {
            "who": f"vLLM at {case['seqs']}",
            "rows": case["rows"],
            "out_per_s": round(made / wall_s, 1),
            "wall_s": round(wall_s, 2),
        }


def spread_fp8() -> None:
    """Let the FP8 weights that vLLM makes up fill their range.

    Between -0.001 and 0.001, as it makes them, nearly all would be zero. Their factors stay so
    small, and weights are as large as those in bf16.
    """
    from vllm.model_executor.model_loader import weight_utils

    plain = weight_utils.initialize_single_dummy_weight

    def wide(param: Any, low: float = -1e-3, high: float = 1e-3, seed: int = 1234) -> None:
        if param.dtype.itemsize == 1:
            low, high = -1.0, 1.0
        plain(param, low, high, seed)

    weight_utils.initialize_single_dummy_weight = wide


def longest(case: Case) -> int:
    """Tokens of the longest sequence."""
    return int(case["shared"] + max(prompt + output for prompt, output in case["lengths"]))


def run(engine: Any, vocab_size: int, case: Case, lengths: Sequence[tuple[int, int]]) -> float:
    """Seconds that vLLM takes for rows, at most as many at once as the case says."""
    from vllm import SamplingParams

    # Its scheduler is in this process (VLLM_ENABLE_V1_MULTIPROCESSING).
    engine.llm_engine.engine_core.engine_core.scheduler.max_num_running_reqs = case["seqs"]
    dice = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [dice.randrange(vocab_size) for _ in range(count)]

    shared = tokens(case["shared"])
    prompts = [{"prompt_token_ids": shared + tokens(prompt)} for prompt, _ in lengths]
    params = [
        SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        for _, output in lengths
    ]
    begun = time.perf_counter()
    done = engine.generate(prompts, params, use_tqdm=False)
    wall_s = time.perf_counter() - begun
    assert [len(each.outputs[0].token_ids) for each in done] == [output for _, output in lengths]
    return wall_s


def main() -> None:
    job, results = map(Path, sys.argv[1:])
    with results.open("a", encoding="utf-8") as lines:
        for found in figures(json.loads(job.read_text(encoding="utf-8"))):
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main()
