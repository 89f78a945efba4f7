"""The plans in git are what their specs compile to, and keep their promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tokenspeed_plan.planner.canary import with_canary
from tokenspeed_plan.planner.compile import compile_plan, find_model
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.bundle import dump_plan, load_plan, read_plan

FROZEN = {"demo": "demo-cpu", "qwen3.5-397b-b200x8": "qwen3.5-397b-b200x8", "qwen3.5-35b-h200": "qwen3.5-35b-h200"}


def test_every_frozen_plan_has_its_example() -> None:
    assert {path.name for path in (ROOT / "plans/frozen").iterdir()} == set(FROZEN.values())
    assert {path.parent.name for path in (ROOT / "examples").glob("*/spec.yaml")} == set(FROZEN)


@pytest.mark.parametrize("example", FROZEN)
def test_frozen_plans_are_fresh(example: str) -> None:
    path = ROOT / "examples" / example / "spec.yaml"
    spec = load_spec(path)
    model = find_model(spec, path)
    assert dump_plan(with_canary(compile_plan(spec, model), spec, model)) == read_plan(
        ROOT / "plans/frozen" / FROZEN[example]
    )


@pytest.mark.parametrize("name", FROZEN.values())
def test_frozen_plans_name_no_machine(name: str) -> None:
    text = read_plan(ROOT / "plans/frozen" / name)
    assert str(ROOT) not in text
    assert "/home/" not in text


def test_the_headline_fits_and_counts_its_launches() -> None:
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-397b-b200x8")
    memory = plan.memory_bytes_per_rank
    assert plan.target.count == 8
    # BF16 text weights over 8 GPUs, and on top of that only what every rank copies: routers, kv heads, norms.
    assert memory.weights == pytest.approx(2 * 396_346_350_336 / 8, rel=0.005)
    assert memory.state > 188_743_680 // 8
    decode = min((p for p in plan.programs if p.phase == "decode"), key=lambda p: p.bucket)
    assert decode.launches / plan.num_layers <= 12.5


def test_planning_the_headline_needs_little_memory(tmp_path: Path) -> None:
    code = "from tokenspeed_plan.planner.cli import main; import resource, sys\n"
    code += (
        f"main(['plan', 'examples/qwen3.5-397b-b200x8/spec.yaml', '-o', {str(tmp_path)!r}], standalone_mode=False)\n"
    )
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, text=True)
    assert int(done.stdout) < 1 << 20  # KiB: 1 GiB
