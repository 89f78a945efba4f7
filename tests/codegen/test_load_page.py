"""The page of a simulated load is whole and self-contained, and a browser draws it and zooms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsers import PageChecker, browse, pixels, with_browser
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.codegen.page.load_page import render_load_page
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import load_plan

DEMO = ROOT / "plans/frozen/demo-cpu"
REQUESTS = 60


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The page, and what `--json` says of the same load."""
    path = tmp_path_factory.mktemp("load") / "page.html"
    args = ("simulate", DEMO, "--requests", REQUESTS, "--arrivals", 40, "--html", path, "--json")
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    assert f"wrote {path}" in done.stderr
    return path.read_text(), json.loads(done.stdout)


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_is_whole_and_fetches_nothing(drawn: tuple[str, Any]) -> None:
    page, _ = drawn
    checker = PageChecker()
    checker.feed(page)
    assert checker.open == [] and checker.targets <= checker.ids
    assert {"numbers", "time", "programs", "data"} <= checker.ids
    assert not re.search(r"https?://|@import|url\(|fetch\(|\bnan\b|\bNaN\b", page)
    assert "default-src 'none'" in page


def test_the_page_has_the_numbers_of_the_load(drawn: tuple[str, Any]) -> None:
    page, figures = drawn
    data = data_of(page)
    assert len(data["requests"]) == figures["requests"] >= REQUESTS
    assert len(data["steps"]) == sum(program["steps"] for program in figures["programs"])
    share = sum(data["bins"]["prefill"] + data["bins"]["decode"]) / len(data["bins"]["decode"])
    assert share / 1e3 == pytest.approx(figures["device_busy"], abs=0.01)
    for name in ("ttft_ms", "tpot_ms", "queue_ms"):
        for value in figures[name].values():
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            assert f'<td class="number">{text}</td>' in page


def test_the_same_load_gives_the_same_page(drawn: tuple[str, Any]) -> None:
    page, figures = drawn
    plan = load_plan(DEMO)
    again = {"users": None, "arrivals_per_s": 40.0} | figures
    assert render_load_page(plan, again, data_of(page)) == page


def test_a_name_is_only_text(drawn: tuple[str, Any]) -> None:
    page, figures = drawn
    plan = load_plan(DEMO)
    model = plan.model.model_copy(update={"name": "</script><script>alert(1)</script>"})
    evil = render_load_page(plan.model_copy(update={"model": model}), figures, data_of(page))
    assert "<script>alert" not in evil


@with_browser
def test_a_browser_draws_it_in_light_and_dark(drawn: tuple[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(drawn[0])
    shots = []
    for scheme in (1, 0):  # blink: 0 is dark, 1 is light
        shot = tmp_path / f"{scheme}.png"
        options = (f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
        done = browse(path, tmp_path, *options)
        assert "CONSOLE" not in done.stderr, done.stderr
        shots.append(pixels(shot))
    assert all(len(set(shot)) > 100 for shot in shots), "an empty page"
    assert shots[0] != shots[1], "dark is as light"


WALK = """<script>
const texts = [], spans = [view[1] - view[0]];
const press = (key) => {
  figure.dispatchEvent(new KeyboardEvent("keydown", { key }));
  tell();
  texts.push(say.textContent);
};
figure.focus();
for (const key of ["ArrowRight", "End", "+", "Home"]) { press(key); spans.push(view[1] - view[0]); }
for (let i = 0; i < 40; i++) press("+");
devices();
document.body.dataset.each = each.textContent;
const least = (view[1] - view[0]) / total;
press("0");
const focus = document.activeElement === figure, different = new Set(texts).size;
const whole = view[1] - view[0] === total;
document.body.dataset.walked = JSON.stringify({ focus, different, spans, least, whole });
</script></body>"""


@with_browser
def test_the_keyboard_moves_and_zooms(drawn: tuple[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    # The second script sees what the first one has named.
    path.write_text(drawn[0].replace("</body>", WALK))
    dom = browse(path, tmp_path, "--dump-dom", "--virtual-time-budget=2000").stdout
    found = re.search(r'data-walked="([^"]*)"', dom)
    assert found is not None
    walked = json.loads(found[1].replace("&quot;", '"'))
    assert walked["focus"] and walked["whole"] and walked["different"] >= 4
    assert walked["spans"][3] == pytest.approx(walked["spans"][0] / 2)
    assert 0 < walked["least"] < 0.01
    assert "steps is drawn" in dom
