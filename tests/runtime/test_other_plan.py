"""When a finished output is kept from another plan."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from batch_fake import FakeEngine, FakeTokenizer, plan

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch import BatchOptions, run_batch
from tokenspeed_plan.runtime.serving.batch.other_plan import refuse_other_plan


def rows(prompts: list[str]) -> str:
    lines = []
    for index, prompt in enumerate(prompts):
        body = {"prompt": prompt, "max_tokens": 2}
        row: dict[str, Any] = {"custom_id": f"c{index}", "method": "POST", "body": body}
        lines.append(json.dumps(row | {"url": "/v1/completions"}))
    return "\n".join(lines) + "\n"


@pytest.fixture(params=["out.jsonl", "out.jsonl.gz"])
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """An input, and the output that the plan `d` wrote for it."""
    source, output = tmp_path / "in.jsonl", tmp_path / request.param
    source.write_text(rows([f"p{index}" for index in range(5)]), encoding="utf-8")
    options = BatchOptions(source, output, quiet=True)
    assert run_batch(options, plan("d"), FakeTokenizer(), FakeEngine) == 0
    return source, output


def test_another_plan_is_refused_and_the_same_is_not(finished: tuple[Path, Path]) -> None:
    refuse_other_plan(*finished, "d")
    with pytest.raises(RequestError, match="of another plan"):
        refuse_other_plan(*finished, "e")


def test_what_was_edited_or_added_is_answered_again(finished: tuple[Path, Path]) -> None:
    source, output = finished
    source.write_text(rows(["new", "p1", "p2", "p3", "p4", "p5"]), encoding="utf-8")
    refuse_other_plan(source, output, "d")


def test_what_is_not_finished_is_left_to_the_run(finished: tuple[Path, Path]) -> None:
    source, output = finished
    side = output.with_name(f"{output.name}.resume")
    side.touch()
    refuse_other_plan(source, output, "e")
    side.unlink()
    for text in (b"", b"mine\n", b"[]\n", b'{"response": {}, "id": 3}\n'):
        output.write_bytes(gzip.compress(text) if output.suffix == ".gz" else text)
        refuse_other_plan(source, output, "e")
    output.unlink()
    refuse_other_plan(source, output, "e")
    refuse_other_plan(Path("-"), Path("-"), "e")
