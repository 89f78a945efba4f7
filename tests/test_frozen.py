"""The plans in git are what their specs compile to, and keep their promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT
from frozen_plans import FROZEN, frozen_plan

from tokenspeed_plan.planner import compile_plan, find_model, load_spec
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import check_sources, load_plan, read_plan
from tokenspeed_plan.plans.encodings import NVFP4


def test_every_frozen_plan_has_its_example() -> None:
    assert {path.name for path in (ROOT / "plans/frozen").iterdir()} == set(FROZEN.values())
    assert {path.parent.name for path in (ROOT / "examples").glob("*/spec.yaml")} == set(FROZEN)


HEADLINE = "qwen3.5-397b-b200x8"


def plan_again(example: str) -> list[str]:
    """The words of a command that plans an example, and compares."""
    spec = ROOT / "examples" / example / "spec.yaml"
    frozen = ROOT / "plans/frozen" / FROZEN[example]
    return ["plan", str(spec), "-o", str(frozen), "--check", "--no-compile"]


@pytest.mark.slow
@pytest.mark.parametrize("example", [name for name in FROZEN if name != HEADLINE])
def test_frozen_plans_are_fresh(example: str) -> None:
    """Planned again: the same plan and texts, byte for byte.

    A sample of the binaries is made again by tests of the compiler, all of them, twice, by
    `make check-plans`.
    """
    result = CliRunner().invoke(main, plan_again(example))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", FROZEN.values())
def test_frozen_plans_name_no_machine(name: str) -> None:
    text = read_plan(ROOT / "plans/frozen" / name)
    assert str(ROOT) not in text
    assert "/home/" not in text


@pytest.mark.slow
def test_the_headline_fits_and_counts_its_launches() -> None:
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-397b-b200x8")
    memory = plan.pool.memory_bytes_per_rank
    assert plan.target.count == 8
    own = [w for w in plan.pool.weights if not w.name.startswith(("mtp.", "L60.", "draft_"))]
    in_fp4 = sum(w.tensor.size_bytes() for w in own if w.tensor.format == NVFP4)
    # Half a byte an element and a scale for 16; a factor for each row, of which each rank has all
    # those of the down projections.
    experts, hidden, inner = 60 * 512, 4096, 1024
    elements = experts * 3 * hidden * inner
    assert in_fp4 == (elements * 9 // 16 + 4 * experts * (2 * inner + 8 * hidden)) // 8
    # The other text weights are FP8 or BF16; every rank copies routers and kv heads.
    others = sum(w.tensor.size_bytes() for w in own) - in_fp4
    assert 1.0 < others / ((396_346_350_336 - elements) / 8) < 2.0
    assert memory.state > 188_743_680 // 8
    decode = min((p for p in plan.pool.programs if p.phase == "decode"), key=lambda p: p.bucket)
    # Products of NVFP4 have no norm in them: one launch more for two of them.
    assert decode.launches / (plan.num_layers + decode.depth) <= 9.75


@pytest.mark.slow
@pytest.mark.parametrize("speculation", ["auto", "off"])
def test_one_gpu_counts_its_launches(speculation: str) -> None:
    plan = frozen_plan("qwen3.5-35b-h200")
    if speculation == "off":
        spec = load_spec(ROOT / "examples/qwen3.5-35b-h200/spec.yaml")
        spec = spec.model_copy(update={"speculation": "off"})
        plan = compile_plan(spec, find_model(spec))
    for program in (program for program in plan.pool.programs if program.phase == "decode"):
        # From 4 rows on norms are launches of their own: fewer launches were measured to take
        # longer there.
        most = 6.5 if program.max_tokens <= 2 else 8
        if program.max_tokens > 16:
            most = 12  # experts are sorted, and norms and sums of experts are launches
        assert program.launches / (plan.num_layers + program.depth) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN.values())
def test_every_kernel_has_a_text_and_layers_share_them(name: str) -> None:
    plan = load_plan(ROOT / "plans/frozen" / name)
    assert all(kernel.launch is not None for kernel in plan.kernels)
    assert check_sources(plan, ROOT / "plans/frozen" / name) == len(plan.kernels)
    for program in plan.pool.programs:
        assert len({step.kernel for step in program.steps if step.kind == "kernel"}) <= 60
    compiled = {binary.kernel for binary in plan.binaries if binary.spill_bytes == 0}
    assert plan.target.sm == 0 or compiled == {kernel.name for kernel in plan.kernels}


@pytest.mark.slow
def test_the_headline_is_fresh_and_planning_it_needs_little_memory() -> None:
    code = "from tokenspeed_plan.planner.cli import main\n"
    code += f"main({plan_again(HEADLINE)!r}, standalone_mode=False)\n"
    # The peak of getrusage would include the process that this one was forked from.
    code += (
        "lines = open('/proc/self/status').readlines()\n"
        "print(*(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1 << 20  # KiB: 1 GiB
