"""Calibration: what is put in comes out, and what is written is a profile that plans."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tokenspeed_plan.planner.advisor import calibration as calibrate
from tokenspeed_plan.planner.advisor import held_out, measured_probes, probe_plans
from tokenspeed_plan.planner.advisor.step_model import StepModel
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import (
    find_hardware,
    gather_us,
    library_us,
    push_us,
    read_profile,
    to_hardware,
)
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.passes.cost import Load, Roof, variant_of
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.schema import KernelSpec, Param, Part
from tokenspeed_plan.plans.types import Format, TensorSpec


def samples(wait_us: float, factors: dict[str, float], noise: float) -> list[calibrate.Sample]:
    dice = random.Random(0)
    made = []
    for name, factor in factors.items():
        for busy_us in (0.2, 1.0, 5.0, 20.0, 80.0):
            taken_us = (wait_us + factor * busy_us) * (1 + dice.uniform(-noise, noise))
            made.append(calibrate.Sample(name, taken_us, busy_us))
    return made


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_fit_finds_what_made_the_samples(noise: float) -> None:
    factors = {"stream": 1.1, "product": 1.4, "delta_chunk": 3.0, "attention_prefill": 2.2}
    found = calibrate.fit(samples(1.8, factors, noise), launch_us=0.9)
    assert found.waits_us["stream"] == pytest.approx(1.8, rel=0.1)
    for name, factor in factors.items():
        assert found.residuals[name] == pytest.approx(factor, rel=0.05)
        assert found.errors[name] <= noise + 1e-9


def test_tokens_that_wait_for_each_other_have_a_time_of_their_own() -> None:
    plain = samples(1.5, {"stream": 1.2, "delta_step": 1.3}, 0.0)
    drafting = [
        calibrate.Sample("delta_step", 1.5 + 1.3 * busy + 0.7 * waiting, busy, 0.0, waiting)
        for busy, waiting in ((0.5, 7), (2.0, 7), (9.0, 3))
    ]
    found = calibrate.fit([*plain, *drafting], 0.9)
    assert found.delta_token_us == pytest.approx(0.7)
    assert found.residuals == pytest.approx(calibrate.fit(plain, 0.9).residuals)
    base = calibrate.base_profile("NVIDIA H200")
    made = calibrate.calibrated(base, found, 0.9, "a test", {})
    assert made.numbers["delta_token_us"].value == pytest.approx(0.7)
    slower = calibrate.fit([*plain, calibrate.Sample("delta_step", 1.0, 1.0, 0.0, 3)], 0.9)
    assert slower.delta_token_us == 0.0


def test_a_class_has_a_factor_for_its_bytes_and_one_for_its_products() -> None:
    """Short samples wait for memory, long ones for the tensor cores; one factor would mix them."""
    made = []
    for memory_us, matrix_us in ((4, 1), (9, 2), (30, 12), (30, 80), (31, 160), (33, 300)):
        taken_us = 2.0 + max(1.1 * memory_us, 1.9 * matrix_us)
        made.append(calibrate.Sample("grouped", taken_us, memory_us, matrix_us))
    found = calibrate.fit([*made, *samples(1.8, {"stream": 1.1}, 0.0)], 0.9)
    assert found.waits_us["grouped"] == pytest.approx(2.0)
    assert found.residuals["grouped"] == pytest.approx(1.1)
    assert found.matrix_residuals == pytest.approx({"grouped": 1.9})
    assert found.errors["grouped"] == pytest.approx(0.0, abs=1e-9)
    base = calibrate.base_profile("NVIDIA H200")
    profile = calibrate.calibrated(base, found, 0.9, "a test", {})
    assert to_hardware(profile).matrix_residual("grouped") == pytest.approx(1.9)
    assert calibrate.bare(profile).matrix_residuals == {}


def test_kernels_too_small_to_tell_have_no_voice() -> None:
    found = calibrate.fit(
        [*samples(2.0, {"stream": 1.0}, 0.0), calibrate.Sample("rows", 9.0, 1e-4)], 1.0
    )
    assert found.residuals["rows"] == calibrate.MAX_RESIDUAL
    assert (
        calibrate.fit([calibrate.Sample("rows", 1.0, 5.0)], 1.5).residuals["rows"]
        == calibrate.MIN_RESIDUAL
    )


def test_what_is_written_can_be_read_and_plans(tmp_path: Path) -> None:
    base = calibrate.base_profile("NVIDIA H200")
    found = calibrate.fit(samples(1.5, {"stream": 1.2, "grouped": 1.7}, 0.01), 0.9)
    made = calibrate.calibrated(base, found, 0.9, "a test", {"machine": "none"})
    path = tmp_path / "mine.yaml"
    path.write_text(calibrate.dump(made, "A test."))
    machine = find_hardware(str(path))
    assert machine.launch_us == pytest.approx(0.9) and machine.waits_us["stream"] == pytest.approx(
        0.6, rel=0.05
    )
    assert machine.residuals["stream"] == pytest.approx(1.2, rel=0.02)
    assert machine.residuals["product"] == find_hardware("H200").residuals["product"]
    assert machine.sources["launch_us"] == "a test"
    assert machine.one_shot_us == find_hardware("H200").one_shot_us


def test_measured_collectives_take_the_place_of_tables(tmp_path: Path) -> None:
    """Each is priced as it was measured; what the old tables were from is not named any more."""
    base = calibrate.base_profile("NVIDIA H200")
    tables = {
        "push": {2: {8192: 3.0, 1 << 26: 200.0}, 4: {8192: 4.0}},
        "library": {2: {8192: 9.0, 1 << 26: 300.0}},
        "gather": {2: {65536: 8.0}},
    }
    made = calibrate.with_tables(base, "ranks", tables, "a test")
    path = tmp_path / "mine.yaml"
    path.write_text(calibrate.dump(made, "A test."))
    machine = find_hardware(str(path))
    assert push_us(machine, 1 << 26, 2) == 200.0 and push_us(machine, 8192, 4) == 4.0
    assert library_us(machine, 1 << 26, 2) == 300.0 and gather_us(machine, 65536, 2) == 8.0
    assert machine.one_shot_us == find_hardware("H200").one_shot_us
    assert made.sources["ranks"] == "a test" and "pair" not in made.sources


def test_machines_are_found_by_what_they_call_themselves() -> None:
    for name, wanted in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("cpu", "cpu"),
    ):
        assert calibrate.base_profile(name).name == wanted
    with pytest.raises(SpecError, match="no profile of `Radeon`"):
        calibrate.base_profile("Radeon")


def test_a_gpu_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = CliRunner().invoke(
        main, ["calibrate", "-o", str(tmp_path / "x.yaml"), "--device", "cuda"]
    )
    assert done.exit_code == 2 and done.stderr.startswith("error: there is no GPU here")


@pytest.mark.slow
def test_the_command_measures_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Any
) -> None:
    from tokenspeed_plan.planner.models.config import load_model_config

    tiny = replace(load_model_config(checkpoint("moe")), name="tiny")
    monkeypatch.setattr(probe_plans, "probe", lambda name: tiny)
    monkeypatch.setattr("tokenspeed_plan.runtime.bench.machine.READ_BYTES", {"cpu": 1 << 22})
    out = tmp_path / "cpu.yaml"
    done = CliRunner().invoke(
        main, ["calibrate", "-o", str(out), "--device", "cpu"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    profile = read_profile(out.read_text(), str(out))
    assert profile.measured["machine"] == "cpu"
    measured = {name for name, number in profile.residuals.items() if number.source == "probes"}
    assert {
        "stream",
        "attention_decode",
        "attention_prefill",
        "delta_step",
        "delta_chunk",
    } <= measured
    assert find_hardware(str(out)).read_bytes_per_s > 1e8


def kernel_of(*kinds: str, formats: tuple[Format, ...] = ()) -> KernelSpec:
    """A kernel with parts of these kinds, and an input of each of these formats."""
    parts = tuple(Part(kind=kind, operands=(), outputs=(), attrs={}) for kind in kinds)
    params = tuple(
        Param(name=f"x{i}", role="input", tensor=TensorSpec(shape=(128, 128), format=each))
        for i, each in enumerate(formats)
    )
    return KernelSpec(name="", params=params, parts=parts)


def test_products_of_fp8_have_prices_of_their_own(tmp_path: Path) -> None:
    """Where a profile has them; else those of bf16."""
    assert variant_of(kernel_of("linear")) == ""
    assert variant_of(kernel_of("linear", formats=(FP8,))) == "_fp8"
    assert variant_of(kernel_of("linear", formats=(FP8_ROWS, FP8))) == "_quantised"
    base = calibrate.base_profile("NVIDIA H100")
    found = calibrate.fit(samples(1.5, {"stream": 1.2, "stream_fp8": 1.7}, 0.0), 0.9)
    made = calibrate.calibrated(base, found, 0.9, "a test", {"machine": "none"})
    path = tmp_path / "mine.yaml"
    path.write_text(calibrate.dump(made, "A test."), encoding="utf-8")
    machine = find_hardware(str(path))
    assert machine.priced("stream", "_fp8") == "stream_fp8"
    assert machine.residuals["stream_fp8"] == pytest.approx(1.7, rel=0.05)
    assert machine.priced("grouped", "_quantised") == "grouped"
    bare = calibrate.bare(made)
    assert bare.residuals["stream_fp8"].value == 1.0
    assert bare.waits["stream_fp8"].value == 0.0


def test_times_add_up_to_the_programs() -> None:
    """Kernels that overlap wait less than alone; a sample of no time does not decide the fit."""
    kernels = [
        {"kernel": "a", "us": 10.0, "calls": 4, "total_us": 40.0},
        {"kernel": "b", "us": 20.0, "calls": 3, "total_us": 60.0},
    ]
    parts = {"a": ["rms_norm", "linear"], "b": ["attention", "gate"]}
    kinds = {name: kernel_of(*kinds) for name, kinds in parts.items()}
    for taken_us, alone in ((86.0, (8.0, 18.0)), (120.0, (12.0, 24.0))):
        program = {"measured_us": taken_us, "tokens": 1, "batch": 1, "kernels": kernels}
        made = calibrate.samples(program, kinds, {"a": (6.0, 1.0), "b": (2.0, 3.0)})
        assert [(s.op_class, s.busy_us) for s in made] == [
            ("stream", 6.0),
            ("attention_decode", 3.0),
        ]
        assert [s.measured_us for s in made] == pytest.approx(alone)
        assert sum(
            s.measured_us * k["calls"] for s, k in zip(made, kernels, strict=True)
        ) == pytest.approx(taken_us)
    odd = [*samples(1.8, {"stream": 1.1}, 0.0), calibrate.Sample("stream", 1e-3, 1.0)]
    assert calibrate.fit(odd, 1.0).residuals["stream"] == pytest.approx(1.1, rel=0.15)


def test_tokens_that_wait_for_each_other_are_told() -> None:
    """Four tokens of a sequence: three wait for the one before."""
    part = Part(kind="delta_rule", operands=(), outputs=(), attrs={"query_len": 4})
    kernel = KernelSpec(name="a", params=(), parts=(part,))
    row = {"kernel": "a", "us": 9.0, "calls": 1, "total_us": 9.0}
    program = {"measured_us": 9.0, "tokens": 4, "batch": 1, "kernels": [row]}
    (sample,) = calibrate.samples(program, {"a": kernel}, {"a": (5.0, 1.0)})
    assert sample == calibrate.Sample("delta_step", 9.0, 5.0, 1.0, 3)


def test_libraries_are_priced_where_they_ran() -> None:
    """A probe calls them at half of a kernel's price, and their fit becomes their price."""
    base = calibrate.base_profile("NVIDIA H200")
    functions = calibrate.functions_of(base)
    assert {"cublas.linear", "fa3.attention_prefill"} <= set(functions)
    assert not calibrate.bare(base).libraries
    cheap = calibrate.bare(base, libraries=True).libraries
    assert set(cheap) == set(functions)
    assert all(price.residual.value < 1.0 for price in cheap.values())
    row = {"kernel": functions[0], "us": 30.0, "calls": 1, "total_us": 30.0}
    program = {"measured_us": 30.0, "tokens": 4096, "batch": 1, "kernels": [row]}
    (sample,) = calibrate.samples(program, {}, {functions[0]: (4.0, 20.0)})
    assert sample == calibrate.Sample(functions[0], 30.0, 4.0, 20.0)
    found = calibrate.fit(samples(21.0, {"stream": 1.0, functions[0]: 1.5}, 0.0), 0.9)
    made = calibrate.calibrated(base, found, 0.9, "a test", {})
    price = made.libraries[functions[0]]
    assert price.wait.value == pytest.approx(20.1)
    assert price.residual.value == pytest.approx(1.5)
    kept = made.libraries["fa3.attention_prefill"]
    assert kept == base.libraries["fa3.attention_prefill"]
    assert functions[0] not in made.waits


def test_a_batch_is_priced_as_it_is_measured() -> None:
    """Not as the plan's program is: tokens of a prompt attend to its middle."""
    assert probe_plans.Batch("prefill", 1, 8192, 8192).load == Load(8192, 1, 4096)
    assert probe_plans.Batch("prefill", 1, 1024, 16_384).load == Load(1024, 1, 15_872)
    assert probe_plans.Batch("decode", 128, 1, 1024).load == Load(128, 128, 1024)


def test_plans_of_probes_are_made_once_and_know_their_rooflines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Any
) -> None:
    from tokenspeed_plan.planner.models.config import load_model_config

    tiny = replace(load_model_config(checkpoint("moe")), name="tiny")
    monkeypatch.setattr(probe_plans, "probe", lambda name: tiny)
    base = calibrate.base_profile("cpu")
    work = probe_plans.works(base)[0]
    made = probe_plans.planned("tiny", work, base, tmp_path)
    kernels = {kernel.name for kernel in made.plan.kernels}
    for batch, roofs in zip(work.batches, made.roofs, strict=True):
        assert set(roofs) <= kernels
        assert all(max(times) > 0 for times in roofs.values()), batch
    first, *_, last = (sum(map(max, roofs.values())) for roofs in made.roofs)
    assert first < last
    written = (made.folder / "plan.json").stat().st_mtime_ns
    again = probe_plans.planned("tiny", work, base, tmp_path)
    assert again.plan == made.plan and list(again.roofs) == list(made.roofs)
    assert (made.folder / "plan.json").stat().st_mtime_ns == written


def test_what_was_measured_is_fitted_again_without_the_machine(tmp_path: Path) -> None:
    path, out = tmp_path / "measured.jsonl", tmp_path / "mine.yaml"
    machine = measured_probes.MachineLine(
        name="NVIDIA H200",
        read_bytes_per_s=4.4e12,
        launch_us=0.8,
        matrix_flops_per_s=7.5e14,
        host_bytes_per_s=5e10,
        sizes={"num_sms": 132},
        versions={"date": "2026-12-01"},
    )
    rows = [{"kernel": "k", "calls": 1}] * 5
    made = samples(1.8, {"stream": 1.2}, 0.0)
    step = measured_probes.StepLine(
        probe="p",
        plan="decode",
        phase="decode",
        num_seqs=1,
        new_tokens=1,
        context=9,
        measured_us=9.0,
        kernels=measured_probes.kernel_lines(rows, made),
    )
    host = measured_probes.HostLine(probe="p", step_us=150.0, seq_us=2.0, prompt_us=30.0)
    for line in (machine, step, host):
        measured_probes.append(path, line)
    args = ["calibrate", "--base", "H200", "--from-samples", str(path), "-o", str(out)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found, before = find_hardware(str(out)), find_hardware("H200")
    # The roofline was drawn at the rates of the profile; the machine reads more slowly.
    assert found.residuals["stream"] == pytest.approx(
        1.2 * 4.4e12 / before.read_bytes_per_s, rel=1e-3
    )
    assert (found.host_step_us, found.host_seq_us, found.host_prompt_us) == (150.0, 2.0, 30.0)
    path.write_text("{}\n", encoding="utf-8")
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2 and f"`{path}`, line 1" in done.stderr


def test_a_prompt_waits_for_its_launches_where_they_take_longer() -> None:
    """A small model's kernels end before the next one is launched."""
    config = load_preset("qwen3.5-0.8b")[0]
    slow = replace(find_hardware("H200"), host_launch_us=50.0)
    alone = ParallelLayout(1, 1, 1)
    model, waiting = StepModel(config, find_hardware("H200")), StepModel(config, slow)
    short = waiting.prefill(alone, 32, 0)
    assert short.total_us == pytest.approx(50.0 * short.launches + slow.host_us)
    assert waiting.prefill(alone, 8192, 0) == model.prefill(alone, 8192, 0)
    assert waiting.decode(alone, 1, 32) == model.decode(alone, 1, 32)


def test_intervals_are_as_wide_as_other_probes_need_them() -> None:
    """Of ten steps nine lie inside; a probe is priced by what the other one was measured at."""

    def step(probe: str, slower: float) -> held_out.HeldStep:
        kernels = [(2, replace(each, measured_us=slower * each.measured_us)) for each in made]
        return held_out.HeldStep(probe, kernels)

    made = samples(0.0, {"stream": 1.5}, 0.0)
    plain = [step("first", 1.0) for _ in range(10)]
    other = [step("second", 1.1)] * 9 + [step("second", 2.0)]
    found = held_out.error_share([*plain, *other], 0.9)
    mean = 1.19  # the second probe's, by which steps of the first are priced
    assert found == pytest.approx(mean - 1.0, rel=0.2)
    assert held_out.error_share(plain, 0.9) is None
    assert held_out.error_share([plain[0], other[0]], 0.9) is None


def test_attention_of_prompts_adds_up_its_bytes_and_its_products(tmp_path: Path) -> None:
    """Its tiles load and store while none of their products run: no maximum explains that."""
    name = "fa3.attention_prefill"
    made = [
        calibrate.Sample(each, 5.0 + 3.0 * memory_us + 1.2 * matrix_us, memory_us, matrix_us)
        for each in ("attention_prefill", name)
        for memory_us, matrix_us in ((2, 1), (9, 17), (36, 274), (71, 1095), (92, 182), (96, 4380))
    ]
    found = calibrate.fit([*made, *samples(1.8, {"stream": 1.1}, 0.0)], 0.9)
    assert found.errors[name] == pytest.approx(0.0, abs=1e-6)
    profile = calibrate.calibrated(calibrate.base_profile("NVIDIA H200"), found, 0.9, "a test", {})
    path = tmp_path / "mine.yaml"
    path.write_text(calibrate.dump(profile, "A test."), encoding="utf-8")
    machine = find_hardware(str(path))
    price = machine.libraries[name]
    assert (price.wait_us, price.residual) == pytest.approx((4.1, 1.2), rel=1e-3)
    assert price.memory_residual == pytest.approx(3.0, rel=1e-3)
    assert machine.matrix_residual("attention_prefill") == pytest.approx(1.2, rel=1e-3)
    roof = Roof(100.0, 50.0)
    assert roof.added(3.0, 1.2) == (360.0, "memory")
    assert roof.busy(1.0, 3.0) == (150.0, "matrix")
