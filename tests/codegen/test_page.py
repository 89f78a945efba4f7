"""The HTML page is well-formed and self-contained, and a browser draws it without an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browsers import PageChecker, browse, pixels, with_browser
from conftest import ROOT

from tokenspeed_plan.codegen.page.plan_page import render_page
from tokenspeed_plan.planner.advisor.plan_prices import roofline
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.schema import KernelCall, Plan

NAMES = ("demo-cpu", "qwen3.5-397b-b200x8")


@pytest.fixture(scope="module", params=NAMES)
def page(request: pytest.FixtureRequest) -> tuple[Plan, str]:
    plan = load_plan(ROOT / "plans/frozen" / request.param)
    return plan, render_page(plan, roofline(plan))


def test_the_page_is_whole_and_fetches_nothing(page: tuple[Plan, str]) -> None:
    plan, text = page
    checker = PageChecker()
    checker.feed(text)
    assert checker.open == []
    assert checker.targets <= checker.ids
    assert {
        "numbers",
        "why",
        "layer",
        "timeline",
        "memory",
        "roofline",
        "front",
        "spec",
    } <= checker.ids
    assert not re.search(r"https?://|@import|url\(|fetch\(|\bnan\b", text)
    assert all(decision.name in text for decision in plan.decisions)


def test_the_figures_show_the_plans_numbers(page: tuple[Plan, str]) -> None:
    """A bar for each launch of a step at batch 1, memory to the byte, the time of the step."""
    plan, text = page
    decode = min((p for p in plan.pool.programs if p.phase == "decode"), key=lambda p: p.bucket)
    assert len(re.findall(r'data-say="[^"]*, stream \d+"', text)) == decode.launches
    assert all(
        f"{size:,}" in text
        for name, size in plan.pool.memory_bytes_per_rank.model_dump().items()
        if name not in ("total", "capacity")
    )
    if decode.num_streams == 1:
        total = sum(
            step.predicted_us
            for step in decode.steps
            if isinstance(step, KernelCall) or step.kind == "collective"
        )
        assert f"A lone user's step, {total:.1f} us" in text.replace("&#39;", "'")


def test_the_same_plan_gives_the_same_page(page: tuple[Plan, str]) -> None:
    plan, _ = page
    assert render_page(plan, None) == render_page(plan, None)
    assert 'id="roofline"' not in render_page(plan, None)


def test_what_a_spec_says_is_only_text(page: tuple[Plan, str]) -> None:
    plan, _ = page
    evil = plan.model_copy(update={"spec": {"model": "<script>alert(1)</script>"}})
    assert "<script>alert" not in render_page(evil, None)


@with_browser
def test_a_browser_draws_it_in_light_and_dark(page: tuple[Plan, str], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page[1])
    drawn = []
    for scheme in (1, 0):  # blink: 0 is dark, 1 is light
        shot = tmp_path / f"{scheme}.png"
        done = browse(
            path,
            tmp_path,
            f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        drawn.append(pixels(shot))
    assert all(len(set(shot)) > 100 for shot in drawn), "an empty page"
    assert drawn[0] != drawn[1], "dark is as light"


@with_browser
def test_a_browser_reports_errors_of_a_broken_page(page: tuple[Plan, str], tmp_path: Path) -> None:
    """A page with an error shows that the test above can fail."""
    path = tmp_path / "page.html"
    path.write_text(page[1].replace('"use strict";', '"use strict"; nothing();'))
    assert "CONSOLE" in browse(path, tmp_path, f"--screenshot={tmp_path / 'x.png'}").stderr


WALK = """<script>
const press = (figure, key) => figure.dispatchEvent(new KeyboardEvent("keydown", { key }));
const walk = (figure) => {
  figure.focus();
  press(figure, "ArrowRight");
  const first = figure.querySelector(".say").textContent;
  press(figure, "End");
  const last = figure.querySelector(".say").textContent;
  return document.activeElement === figure && first && last && first !== last ? 1 : 0;
};
document.body.dataset.walked = [...document.querySelectorAll("[data-walk]")].map(walk).join("");
</script></body>"""


@with_browser
def test_the_keyboard_walks_through_every_figure(page: tuple[Plan, str], tmp_path: Path) -> None:
    """Each figure takes focus, and arrow keys and End describe what is under them."""
    path = tmp_path / "page.html"
    path.write_text(page[1].replace("</body>", WALK))
    figures = page[1].count("data-walk aria-label")
    assert figures >= 5
    assert f'data-walked="{"1" * figures}"' in browse(path, tmp_path, "--dump-dom").stdout
