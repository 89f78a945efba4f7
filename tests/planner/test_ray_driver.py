"""What travels to the nodes of a cluster: a plan by its digest, and the command of a worker."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import ray_driver
from tokenspeed_plan.planner.commands.engines import ARGS, EngineOptions
from tokenspeed_plan.planner.commands.ray_driver import RayJob, SentPlan, pack, unpack
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.schema import Plan

BUNDLE = ROOT / "plans" / "frozen" / "demo-cpu"


@pytest.fixture(scope="module")
def frozen() -> Plan:
    return load_plan(BUNDLE)


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SentPlan:
    monkeypatch.setenv("TOKENSPEED_PLANS", str(tmp_path / "cache"))
    shutil.copytree(BUNDLE, tmp_path / "plan")
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
    with tarfile.open(fileobj=buffer, mode="w:gz", encoding="utf-8") as archive:
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
    bundle = str(BUNDLE)
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
    bundle = str(BUNDLE)
    done = CliRunner().invoke(
        main, ["run", bundle, "--input", "i.jsonl", "--output", "o.jsonl", "--ray", "auto"]
    )
    assert done.exit_code == 2 and "tokenspeed-plan[cluster]" in done.output


class ScriptedRay:
    """What the driver calls of Ray; the n-th task ends as the script says."""

    def __init__(self, ends: list[tuple[int, str]], cpus: int = 2) -> None:
        self.ends = ends
        self.cpus = cpus
        self.placed: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.tasks = 0

    def modules(self) -> dict[str, Any]:
        def placement_group(bundles: Any, strategy: str) -> Any:
            self.placed.append((bundles, strategy))
            return len(self.placed)

        group = SimpleNamespace(placement_group=placement_group)
        strategies = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group: group)
        return {
            "ray": self,
            "ray.util": SimpleNamespace(placement_group=group, scheduling_strategies=strategies),
            "ray.util.placement_group": group,
            "ray.util.scheduling_strategies": strategies,
        }

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, actor: Any) -> Any:
        def submit(sent: Any, args: list[str]) -> int:
            self.tasks += 1
            return self.tasks

        def placed(**options: Any) -> Any:
            self.options.append(options)
            worker = SimpleNamespace(work=SimpleNamespace(remote=submit))
            return SimpleNamespace(remote=lambda: worker)

        return SimpleNamespace(options=placed)

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return tasks[:1], tasks[1:]

    def get(self, task: int) -> tuple[int, str]:
        return self.ends[task - 1]


def drive(
    plan: Plan, folder: Path, patch: pytest.MonkeyPatch, ray: ScriptedRay, workers: int | None
) -> int:
    for name, module in ray.modules().items():
        patch.setitem(sys.modules, name, module)
    job = RayJob("auto", workers, str(folder), (), num_shards=4, quiet=True)
    return ray_driver._Driver(plan, job, ("--input", "x"), sent=None).run()


def test_a_worker_that_is_killed_begins_again(
    frozen: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ScriptedRay([(-9, ""), (0, ""), (1, "killed"), (0, "")])
    assert drive(frozen, tmp_path, monkeypatch, ray, None) == 1  # some rows have failed
    assert ray.tasks == 3
    assert ray.placed == [([{"CPU": 1}], "STRICT_PACK")] * 2
    assert all(each["max_restarts"] == -1 and each["num_gpus"] == 0 for each in ray.options)


@pytest.mark.parametrize(("cpus", "workers", "count"), [(9, None, 4), (9, 2, 2), (3, None, 3)])
def test_as_many_workers_as_are_of_use(
    frozen: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    workers: int | None,
    count: int,
) -> None:
    ray = ScriptedRay([(0, "")] * 9, cpus)
    assert drive(frozen, tmp_path, monkeypatch, ray, workers) == 0
    assert ray.tasks == count


def test_a_refused_job_ends_the_driver(
    frozen: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray = ScriptedRay([(2, "error: no such rows\n")])
    with pytest.raises(RequestError, match="ended with code 2"):
        drive(frozen, tmp_path, monkeypatch, ray, 1)
    assert "no such rows" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no room"):
        drive(frozen, tmp_path, monkeypatch, ScriptedRay([], cpus=0), None)


def test_workers_that_get_nothing_done_end_the_driver(
    frozen: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ScriptedRay([(-9, "")] * 99)
    with pytest.raises(RequestError, match="ended with code -9"):
        drive(frozen, tmp_path, monkeypatch, ray, 1)
    assert ray.tasks == 21
