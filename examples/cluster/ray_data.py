"""Rows of a Ray dataset through an engine: python ray_data.py PLAN ROWS.parquet ANSWERS/.

For a pipeline that has its rows in Ray already. One actor has one engine, and gets blocks of rows;
each row has a column `prompt`, and gets one more, `answer`. What Ray Data loses with an actor it
computes again from the block's begin; a batch file is safer with `tokenspeed run --ray`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime import Engine, SamplingParams

ROWS_PER_SEQUENCE = 8  # a block has so many rows for each sequence that runs at once


class Answer:
    """An engine that stays, and answers block after block."""

    def __init__(self, bundle: str) -> None:
        self.engine = Engine.load(Path(bundle))
        if self.engine.tokenizer is None:
            raise SystemExit("the model has no tokenizer")
        self.tokenizer = self.engine.tokenizer

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Add the answers to a block of rows."""
        prompts = [self.tokenizer.encode(str(prompt)) for prompt in block["prompt"]]
        room = min(self.engine.max_seq_len - len(prompt) for prompt in prompts)
        params = SamplingParams(max_tokens=max(min(self.engine.default_max_tokens, room), 1))
        answers = self.engine.generate(prompts, params)
        return block | {"answer": [answer.text for answer in answers]}


def main(bundle: str, rows: str, answers: str) -> None:
    """Answer all rows."""
    import ray

    plan = load_plan(Path(bundle))
    ray.init(ignore_reinit_error=True)
    num_gpus = plan.target.count * (plan.target.device == "cuda")
    total = ray.cluster_resources()
    most = total.get("GPU", 0) // num_gpus if num_gpus else total["CPU"]
    dataset = ray.data.read_parquet(rows).map_batches(
        Answer,
        fn_constructor_args=(bundle,),
        batch_size=ROWS_PER_SEQUENCE * plan.pool.limits.max_seqs,
        concurrency=max(int(most), 1),
        num_gpus=num_gpus,
    )
    dataset.write_parquet(answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
