"""The summary of a batch: predictions are compared with the load that they are for."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from batch_fake import FakeEngine, FakeTokenizer, plan

from tokenspeed_plan.runtime.serving.batch import BatchOptions, run_batch
from tokenspeed_plan.runtime.serving.batch.summary import Load


def summary_of(folder: Path, load: Load | None) -> str:
    """The summary of ten rows of the same size on a plan for a load."""
    body = {"prompt": "0123456789", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    row = {"method": "POST", "url": "/v1/completions", "body": body}
    source = folder / "in.jsonl"
    lines = [json.dumps({"custom_id": f"c{index}"} | row) for index in range(10)]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = BatchOptions(source, folder / "out.jsonl")
    with contextlib.redirect_stderr(io.StringIO()) as talk:
        assert run_batch(options, replace(plan(), load=load), FakeTokenizer(), FakeEngine) == 0
    return talk.getvalue()


@pytest.mark.parametrize(
    ("load", "is_compared"),
    [
        (Load(10, 2, 8), True),
        (Load(1000, 2, 8), False),
        (Load(10, 400, 8), False),
        (Load(10, 2, 64), False),
        (None, True),
    ],
)
def test_predictions_are_compared_with_their_own_load(
    load: Load | None, is_compared: bool, tmp_path: Path
) -> None:
    text = summary_of(tmp_path, load)
    assert ("predicted 1.00, measured" in text) == is_compared
    assert (f"are for another load: {load}; these rows were 8 at once" in text) != is_compared


def test_a_load_is_like_another_within_a_quarter() -> None:
    asked = Load(1000, 200, 16)
    assert Load(1100, 180, 13).is_like(asked)
    for other in (Load(1300, 200, 16), Load(1000, 100, 16), Load(1000, 200, 4)):
        assert not other.is_like(asked)
