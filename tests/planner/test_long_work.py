"""Progress of a search: what it says, when it says it, and that the search counts right."""

from __future__ import annotations

import io
from pathlib import Path

from conftest import ROOT

from tokenspeed_plan.planner.commands.long_work import LongWork
from tokenspeed_plan.planner.commands.predict import search
from tokenspeed_plan.planner.compile import compile_bundle, find_model
from tokenspeed_plan.planner.spec import load_spec

SPEC = ROOT / "examples/qwen3.5-397b-b200x8/spec.yaml"
SMALL = (
    "model.preset=qwen3-0.6b",
    "target.count=2",
    "workload={first_turn_tokens: 64, output_tokens: 16, concurrency: 1}",
    "speculation=off",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Every look at it takes as long as it is told."""

    def __init__(self, step_s: float) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def shown(stream: io.StringIO, step_s: float, parts: int) -> str:
    with LongWork(stream, Clock(step_s)) as report:
        for done in range(parts):
            report("searching", done, parts)
    return stream.getvalue()


def test_a_terminal_sees_one_line_with_the_time_left() -> None:
    text = shown(Terminal(), 1.0, 5)
    assert "searching: 1 of 5, 4 s left" in text and "\n" not in text
    assert text.endswith("\r\x1b[K")


def test_a_pipe_sees_a_line_now_and_then() -> None:
    lines = shown(io.StringIO(), 1.0, 25).splitlines()
    assert lines == ["searching: 9 of 25, 16 s left", "searching: 19 of 25, 6 s left"]


def test_short_work_says_nothing() -> None:
    assert shown(Terminal(), 0.01, 5) == "\r\x1b[K"
    assert shown(io.StringIO(), 0.1, 50) == ""


def test_a_search_reports_every_start_once() -> None:
    spec = load_spec(SPEC, SMALL)
    seen: list[tuple[int, int]] = []
    search(spec, find_model(spec).config, progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert total == 4  # 1 GPU, tp 2, dp 2, two pools
    assert seen == [(done, total) for done in range(total)]


def test_a_plan_reports_its_stages(tmp_path: Path) -> None:
    spec = load_spec(SPEC, (*SMALL, "target={gpu: cpu}"))
    seen: list[tuple[str, int, int]] = []
    compile_bundle(spec, find_model(spec), report=lambda *stage: seen.append(stage))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "searching deployments",
        "making programs",
    ]
    assert all(done < total for _, done, total in seen)
