"""What travels to the nodes of a cluster: a plan by its digest, and the command of a worker."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT
from scripted_ray import RayError, ScriptedRay

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands import ray_cluster, ray_driver
from tokenspeed_plan.planner.commands.engines import EngineOptions
from tokenspeed_plan.planner.commands.ray_actor import SentPlan, unpack
from tokenspeed_plan.planner.commands.ray_cluster import be_patient, pack, resources_of
from tokenspeed_plan.planner.commands.ray_driver import Crew, RayJob, crews_of
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
        made["args"] = ray_driver._worker_args(bundle, frozen, options, job, 3)
        return 0

    monkeypatch.setattr("tokenspeed_plan.planner.commands.run.run_on_ray", run_on_ray)
    monkeypatch.chdir(tmp_path)
    bundle = str(BUNDLE)
    words = ["--input", "in.jsonl", "--output", bundle + ".jsonl", "--ray", "auto"]
    words += [
        "--workers",
        "3",
        "--max-concurrency",
        "2",
        "--no-canary",
        "--require-signature",
        "keys",
    ]
    done = CliRunner().invoke(main, ["run", bundle, *words])
    assert done.exit_code == 0, done.output
    assert made["job"].workers == 3 and made["job"].lease == bundle + ".jsonl.lease"
    context = main.commands["run"].make_context(
        "run", [bundle, *made["args"]], parent=click.Context(main)
    )
    params = context.params
    assert params["source"] == tmp_path / "in.jsonl" and params["ray"] is None
    assert params["output"] == Path(bundle + ".jsonl") and params["max_concurrency"] == 2
    assert params["leave_last"] == 3 and params["lease_timeout_s"] == 60 and params["no_canary"]
    assert params["allowed_signers"] == tmp_path / "keys"  # a node has another working folder
    assert params["weights"] == (ROOT / "examples/demo/model").resolve()


def test_without_ray_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    bundle = str(BUNDLE)
    done = CliRunner().invoke(
        main, ["run", bundle, "--input", "i.jsonl", "--output", "o.jsonl", "--ray", "auto"]
    )
    assert done.exit_code == 2 and "tokenspeed-plan[cluster]" in done.output


def test_a_cluster_has_time_to_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RAY_agent_register_timeout_ms": "7"}
    monkeypatch.setattr("os.environ", variables)
    be_patient()
    assert variables["RAY_agent_register_timeout_ms"] == "7"  # its user knows better
    assert int(variables["RAY_raylet_start_wait_time_s"]) > 60


def job_in(folder: Path, workers: int | None = None, shards: int = 4) -> RayJob:
    return RayJob("auto", workers, str(folder), (), shards, quiet=True, plans=())


def drive(folder: Path, patch: pytest.MonkeyPatch, ray: ScriptedRay, workers: int = 2) -> int:
    ray.enter(patch)
    crew = Crew(1.0, {"CPU": 1}, workers, ("--input", "x"), 0)
    return ray_driver._Driver(job_in(folder), [crew], (), ["sent"]).run()


def test_a_worker_that_is_killed_or_lost_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ScriptedRay([(-9, ""), RayError("its node is gone"), (1, "rows have failed")])
    # The exit code is the job's; the other worker waits for a node that never comes.
    assert drive(tmp_path, monkeypatch, ray) == 1
    assert ray.tasks == [(["--input", "x"], 0, [], "sent")] * 4
    assert ray.placed == [([{"CPU": 1}], "STRICT_PACK")] * 2
    assert all(each["max_restarts"] == -1 and each["num_gpus"] == 0 for each in ray.options)


def test_a_refused_job_ends_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = ScriptedRay([(2, "error: no such rows\n")])
    with pytest.raises(RequestError, match="ended with code 2"):
        drive(tmp_path, monkeypatch, ray)
    assert "no such rows" in capsys.readouterr().err


def test_workers_that_get_nothing_done_end_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ScriptedRay([(-9, "")] * 99)
    with pytest.raises(RequestError, match="ended with code -9"):
        drive(tmp_path, monkeypatch, ray, workers=1)
    assert len(ray.tasks) == 21


def on_gpus(frozen: Plan, count: int, gpu: str = "H200", speed: float = 1.0) -> Plan:
    target = frozen.target.model_copy(update={"gpu": gpu, "count": count, "sm": 90})
    values = frozen.predicted.values | {"tokens_per_s_gpu": speed / count}
    predicted = frozen.predicted.model_copy(update={"values": values})
    return frozen.model_copy(update={"target": target, "predicted": predicted})


def crews(
    plans: dict[Any, Plan], job: RayJob, patch: pytest.MonkeyPatch, *nodes: dict[str, float]
) -> list[tuple[int, int]]:
    """The number of each plan's workers, and the shards that each leaves to others."""
    ScriptedRay([], *nodes).enter(patch)
    patch.setattr(ray_driver, "words_given", lambda but: [])
    bundles = dict.fromkeys(plans, BUNDLE)
    found = crews_of(bundles, plans, EngineOptions(), job)
    return [(crew.count, int(crew.args[-1])) for crew in found]


@pytest.mark.parametrize(
    ("cpus", "workers", "count"), [(9.0, None, 4), (9.0, 2, 2), (3.0, None, 3)]
)
def test_as_many_workers_as_are_of_use(
    frozen: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: float,
    workers: int | None,
    count: int,
) -> None:
    job = job_in(tmp_path, workers)
    assert crews({None: frozen}, job, monkeypatch, {"CPU": cpus}) == [(count, 0)]
    with pytest.raises(RequestError, match="room for 0 engines"):
        crews({None: frozen}, job, monkeypatch, {"CPU": 0.0})


def test_an_engine_is_on_one_node(
    frozen: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of six GPUs have room for two plans of four ranks, not for three."""
    node = {"CPU": 64.0, "GPU": 6.0, "accelerator_type:H200": 1.0}
    found = crews({None: on_gpus(frozen, 4)}, job_in(tmp_path), monkeypatch, node, node)
    assert found == [(2, 0)]


def test_each_kind_of_node_takes_its_own_plan(
    frozen: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster plan comes first; the slower workers leave the last shards to it.

    They take 3 s a shard. Two that take 1 s have then done those that they are at, and four more.
    """
    fast = {"CPU": 64.0, "GPU": 2.0, "accelerator_type:B200": 1.0}
    slow = {"CPU": 64.0, "GPU": 3.0, "accelerator_type:H200": 1.0}
    plans = {"H200": on_gpus(frozen, 1), "B200": on_gpus(frozen, 1, "B200", speed=3.0)}
    many = job_in(tmp_path, shards=99)
    assert crews(plans, many, monkeypatch, slow, fast) == [(2, 0), (3, 4)]
    assert crews(plans, job_in(tmp_path, workers=3), monkeypatch, slow, fast) == [(2, 0), (1, 4)]
    assert resources_of(plans["H200"]) == {"CPU": 1, "GPU": 1, "accelerator_type:H200": 0.001}
    with pytest.raises(RequestError, match="no node of the cluster is of the kind `A100`"):
        crews({"A100": frozen}, many, monkeypatch, slow)


def test_a_kind_may_be_any_resource(frozen: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedRay([], {"CPU": 2.0, "old": 1.0}).enter(monkeypatch)
    assert resources_of(frozen, "old") == {"CPU": 1, "old": 0.001}
    assert resources_of(frozen) == {"CPU": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([str(BUNDLE), "--ray", "auto", "--plan", "a=b"], "give BUNDLE or a --plan"),
        (["--lease", "job", "--plan", "a=b"], "Missing argument 'BUNDLE'"),
        ([str(BUNDLE), "--plan", "a=b"], "--plan needs --lease or --ray"),
        ([str(BUNDLE), "--lease", "job", "--plan", "a"], "`a` is not KIND=DIR"),
    ],
)
def test_plans_that_are_not_named_well(words: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["run", *words, "--input", "i.jsonl", "--output", "o.jsonl"])
    assert done.exit_code == 2 and said in done.output


def test_plans_of_one_job_take_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("", encoding="utf-8")
    other = ROOT / "plans" / "frozen" / "qwen3.5-35b-h200"
    words = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    words += ["--lease", tmp_path / "job", "--plan", f"H200={other}"]
    done = CliRunner().invoke(main, ["run", str(BUNDLE), *map(str, words)])
    assert done.exit_code == 2 and "the plans for cpu and H200 take other rows" in done.output
