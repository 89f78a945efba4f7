"""What travels to the nodes of a cluster: a plan by its digest, and the command of a worker."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import ray_driver
from tokenspeed_plan.planner.commands.engines import ARGS, EngineOptions
from tokenspeed_plan.planner.commands.ray_driver import RayJob, SentPlan, pack, unpack
from tokenspeed_plan.plans.bundle import load_plan, save_plan
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan


@pytest.fixture
def sent(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SentPlan:
    monkeypatch.setenv("TOKENSPEED_PLANS", str(tmp_path / "cache"))
    save_plan(tiny_plan, tmp_path / "plan")
    return pack(tmp_path / "plan", load_plan(tmp_path / "plan"))


def test_a_node_takes_the_plan_that_it_has(sent: SentPlan, tmp_path: Path) -> None:
    assert unpack(sent) == (tmp_path / "plan").resolve()
    assert not (tmp_path / "cache").exists()


def test_a_node_without_the_plan_keeps_what_is_sent(sent: SentPlan, tmp_path: Path) -> None:
    elsewhere = replace(sent, path=str(tmp_path / "none"))
    kept = unpack(elsewhere)
    assert kept == tmp_path / "cache" / sent.digest and load_plan(kept).digest == sent.digest
    assert unpack(replace(elsewhere, archive=b"")) == kept  # it has it now


def test_what_is_no_such_plan_is_refused(sent: SentPlan, tmp_path: Path) -> None:
    other = replace(sent, path=str(tmp_path / "none"), digest="0" * 64)
    with pytest.raises(PlanError, match="not the one that was named"):
        unpack(other)
    assert not (tmp_path / "cache" / other.digest).exists()


def test_an_archive_writes_nothing_outside(sent: SentPlan, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../../evil"))
    with pytest.raises(PlanError, match="damaged"):
        unpack(replace(sent, path="", digest="0" * 64, archive=buffer.getvalue()))
    assert not list(tmp_path.parent.rglob("evil"))


def test_a_worker_is_the_same_command_with_whole_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver starts `run` with all that the user said; the last of equal options counts."""
    made: dict[str, Any] = {}

    def run_on_ray(bundle: Path, options: EngineOptions, job: RayJob) -> int:
        made["job"] = job
        frozen = load_plan(bundle)
        made["args"] = ray_driver._worker_args(bundle, frozen, options, job)
        made["all"] = click.get_current_context().meta[ARGS]
        return 0

    monkeypatch.setattr("tokenspeed_plan.planner.commands.run.run_on_ray", run_on_ray)
    monkeypatch.chdir(tmp_path)
    bundle = str(ROOT / "plans" / "frozen" / "demo-cpu")
    words = ["--input", "in.jsonl", "--output", "out.jsonl", "--ray", "auto", "--workers", "3"]
    done = CliRunner().invoke(main, ["run", bundle, *words, "--max-concurrency", "2"])
    assert done.exit_code == 0, done.output
    assert made["job"].workers == 3 and made["job"].lease == str(tmp_path / "out.jsonl.lease")
    context = main.commands["run"].make_context(
        "run", [bundle, *made["args"]], parent=click.Context(main)
    )
    params = context.params
    assert params["source"] == tmp_path / "in.jsonl" and params["ray"] == "off"
    assert params["output"] == tmp_path / "out.jsonl" and params["max_concurrency"] == 2
    assert params["weights"] == (ROOT / "examples/demo/model").resolve()


def test_without_ray_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_driver, "find_spec", lambda name: None)
    bundle = str(ROOT / "plans" / "frozen" / "demo-cpu")
    done = CliRunner().invoke(
        main, ["run", bundle, "--input", "i.jsonl", "--output", "o.jsonl", "--ray", "auto"]
    )
    assert done.exit_code == 2 and "tokenspeed-plan[cluster]" in done.output
