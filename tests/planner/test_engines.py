"""Another engine's step: its launches by class, its host, its kernels' prices, and each source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenspeed_plan.planner.advisor.engine_profile import Engine, load_engine, terms_us
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.plans.errors import SpecError

ALONE = ParallelLayout(1, 1, 1)
SMALL = {"delta": 3, "attention": 2, "experts": 4, "dense": 1, "quantised": 1, "step": 10}
PROFILE: dict[str, Any] = {
    "name": "x",
    "version": "1",
    "format": "bf16",
    "state_dtype": "fp32",
    "small_kernels": SMALL,
    "hides_shared_expert": False,
    "collectives_per_layer": 2,
    "prefill": {
        "captured_tokens": 512,
        "captured_us_per_layer": 1000,
        "eager_us_per_layer": 2000,
        "host_us_per_step": 100,
    },
    "host_us_per_step": 50,
    "polling_ms": 4,
    "front_end_ms": 6,
    "front_end_us_per_token": 3,
}
LINES = ("state_dtype", "small_kernels", "collectives_per_layer", "prefill", "host_us_per_step")
MORE = ("polling_ms", "front_end_ms", "front_end_us_per_token", "hides_shared_expert")
SOURCES = dict.fromkeys((*LINES, *MORE), "counted")
ENGINES = Path(__file__).parents[2] / "benchmarks/engines"


def engine(**changes: Any) -> Engine:
    return Engine.model_validate({**PROFILE, "sources": SOURCES, **changes})


def steps(engine: Engine | None, gpu: str = "H200") -> StepModel:
    return StepModel(load_preset("qwen3.5-35b-a3b")[0], find_hardware(gpu), engine=engine)


def test_small_kernels_replace_ours_and_the_others_keep_the_waits_of_their_classes() -> None:
    """30 layers of the delta rule and 10 of attention, all with experts."""
    own, theirs = steps(None).decode(ALONE, 1, 1024), steps(engine()).decode(ALONE, 1, 1024)
    assert theirs.small == 30 * 3 + 10 * 2 + 40 * 4 + 10
    hardware = find_hardware("H200")
    each_us = hardware.launch_us + hardware.waits_us["rows"]
    assert theirs.small_us == pytest.approx(theirs.small * each_us)
    assert theirs.launch - theirs.small_us == pytest.approx(own.launch - own.small_us)
    assert theirs.launches - theirs.small == own.launches - own.small
    assert (theirs.memory, theirs.matrix, theirs.host) == (own.memory, own.matrix, 50)
    assert sum(terms_us(theirs).values()) == pytest.approx(theirs.total_us)


def test_products_of_fp8_are_quantised_by_a_launch_each() -> None:
    plain, quantised = (
        StepModel(
            load_preset("qwen3.5-27b")[0], find_hardware("H200"), weights, engine=engine()
        ).decode(ALONE, 4, 1024)
        for weights in ("bf16", "fp8")
    )
    assert plain.quantised == 0
    assert quantised.small - plain.small == quantised.quantised > 4 * 60


def test_a_short_prompt_takes_as_long_as_its_host() -> None:
    captured, eager = (steps(engine()).prefill(ALONE, tokens, 0) for tokens in (512, 513))
    assert captured.total_us == pytest.approx(40 * 1000 + 100)
    assert eager.total_us == pytest.approx(40 * 2000 + 100)
    long = steps(engine()).prefill(ALONE, 8192, 0)
    assert long.host == 100  # the GPU takes longer than the host's launches


def test_a_hidden_shared_expert_costs_no_time_of_its_own() -> None:
    shown, hidden = (
        steps(engine(hides_shared_expert=hides)).decode(ALONE, 32, 1024) for hides in (False, True)
    )
    assert shown.launches - hidden.launches == 2 * 40
    assert hidden.total_us < shown.total_us
    prompts = [
        steps(engine(hides_shared_expert=hides)).prefill(ALONE, 2048, 0).total_us
        for hides in (False, True)
    ]
    assert prompts[0] == prompts[1]


def test_the_front_end_waits_once_for_a_request_and_half_a_look_for_it() -> None:
    assert engine().first_token_us(1000) == 6000 + 2000 + 3 * 1000


def test_kernels_have_their_own_prices_where_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    price = {"wait": 5.0, "residual": 2.0, "error": 0.1}
    kernels = {
        "name": "k",
        "source": "a table",
        "machines": {"B200": {"launch_us": 2.0, "classes": {"stream": price}}},
    }
    (tmp_path / "kernels.yaml").write_text(yaml.safe_dump(kernels))
    path.write_text(yaml.safe_dump({**PROFILE, "sources": SOURCES, "prices": "kernels.yaml"}))
    found = load_engine(path)
    priced, h200 = found.machine(find_hardware("B200")), find_hardware("H200")
    assert (priced.launch_us, priced.waits_us["stream"], priced.residuals["stream"]) == (2, 5, 2)
    assert priced.residuals["grouped"] == find_hardware("B200").residuals["grouped"]
    assert found.machine(h200) == h200
    kernels["machines"]["B200"]["classes"] = {"streams": price}  # type: ignore[index]
    (tmp_path / "kernels.yaml").write_text(yaml.safe_dump(kernels))
    with pytest.raises(SpecError, match="no class `streams`"):
        load_engine(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kernels_per_layer": 20}, "kernels_per_layer"),
        ({"small_kernels": {**SMALL, "delta": -1}}, "small_kernels.delta"),
        ({"sources": {**SOURCES, "prefill": ""}}, "sources.prefill"),
        ({"kernels": {}}, "unknown key"),
        ({"prices": "no.yaml"}, "cannot read"),
    ],
)
def test_a_bad_profile_says_where(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "sources": SOURCES, **change}))
    with pytest.raises(SpecError, match=says):
        load_engine(path)


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_engine_that_we_ship_can_be_modelled_on_blackwell_and_hopper(path: Path) -> None:
    found = load_engine(path)
    assert found.kernels is not None
    for gpu in ("H200", "B200", "GB200", "B300", "GB300"):
        assert found.machine(find_hardware(gpu)) != find_hardware(gpu)
        assert steps(found, gpu).decode(ALONE, 1, 1024).total_us > 0


def test_errors_add_up_where_prices_are_borrowed() -> None:
    step = StepTime(memory=30.0, launch=40.0)
    machine = replace(
        find_hardware("B200"), errors=dict.fromkeys(find_hardware("B200").errors, 0.1)
    )
    assert step.error_us(machine) == pytest.approx(7.0)
    assert step.error_us(replace(machine, is_calibrated=True)) == pytest.approx(5.0)
    assert not find_hardware("H200").borrows_prices and not find_hardware("cpu").borrows_prices
