"""A plan runs with the weights that it was planned with, found beside it, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import write_bundle
from conftest import make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenspeed_plan.planner.commands.engines import EngineOptions, load_engine
from tokenspeed_plan.planner.compile import find_model
from tokenspeed_plan.plans import weight_digests
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.canon import answer_digest
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan, Shard
from tokenspeed_plan.plans.validate import validate
from tokenspeed_plan.plans.weight_digests import check_weight_files
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.loading.preflight import check_files, find_weights

pytestmark = pytest.mark.slow  # whole processes, or many examples

WEIGHTS = "model-0.safetensors"  # the other file is model-1


@pytest.fixture(scope="module")
def planned(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its plan, which has a canary."""
    folder = tmp_path_factory.mktemp("planned")
    shutil.copytree(checkpoint("dense"), folder / "model")
    write_bundle(folder / "plan", folder / "model", canary=True)
    return folder


@pytest.fixture
def copy(planned: Path, tmp_path: Path) -> Path:
    """A model of the plan's own, to change."""
    shutil.copytree(planned / "model", tmp_path / "model")
    return tmp_path / "model"


def test_the_digests_are_those_of_the_files(planned: Path) -> None:
    shards = load_plan(planned / "plan").model.shards
    assert {name: shard.file_sha256 for name, shard in shards.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (planned / "model").glob("*.safetensors")
    }
    check_weight_files(load_plan(planned / "plan"), planned / "model", "all")


@settings(
    max_examples=int(30 * float(os.environ.get("TOKENSPEED_FUZZ", "1"))),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_each_changed_byte_of_the_weights_is_refused(data: st.DataObject, planned: Path) -> None:
    plan, path = load_plan(planned / "plan"), planned / "model" / WEIGHTS
    was = path.read_bytes()
    changed = bytearray(was)
    changed[data.draw(st.integers(0, len(was) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        for depth in ("all", "small"):
            with pytest.raises(PlanError) as caught:
                check_weight_files(plan, planned / "model", depth)  # type: ignore[arg-type]
            assert caught.value.hint
    finally:
        path.write_bytes(was)


def relabel(path: Path, change: Any) -> None:
    """Change the header of a safetensors file and leave its bytes alone."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def as_f16(header: Any) -> None:
    for entry in header.values():
        if entry.get("dtype") == "BF16":
            entry["dtype"] = "F16"


def swap_two(header: Any) -> None:
    """Two tensors of one shape take each other's bytes."""
    by_shape: dict[str, str] = {}
    for name in sorted(header):
        twin = by_shape.setdefault(str(header[name].get("shape")), name)
        if twin != name:
            header[name], header[twin] = header[twin], header[name]
            return
    raise AssertionError("no two tensors have the same shape")


@pytest.mark.parametrize("change", [as_f16, swap_two])
def test_other_headers_are_refused_without_reading_the_bytes(
    change: Any, copy: Path, tmp_path: Path
) -> None:
    """BF16 relabelled F16 fits in names and shapes, and answers otherwise."""
    tensors = {name: value.bfloat16() for name, value in load_file(copy / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    plan = write_bundle(tmp_path / "plan", copy)
    before = {name: value.clone() for name, value in load_file(copy / WEIGHTS).items()}
    relabel(copy / WEIGHTS, change)
    after = load_file(copy / WEIGHTS)
    assert any(not torch.equal(after[name].float(), before[name].float()) for name in before)
    with pytest.raises(PlanError, match="not what was planned") as caught:
        check_files(plan, copy)
    assert "--weights" in caught.value.hint
    with pytest.raises(PlanError, match="not what was planned"):
        Engine.load(tmp_path / "plan", copy)


def test_what_an_engine_compares(
    planned: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers always; the bytes on request, and of small weights before a canary."""
    bundle = planned / "plan"
    tensors = load_file(copy / WEIGHTS)
    name = min(tensors)
    tensors[name] = tensors[name] + 1
    with safe_open(copy / WEIGHTS, "pt") as file:
        save_file(tensors, copy / WEIGHTS, file.metadata())
    load_engine(bundle, EngineOptions(copy, canary=False))
    for options in (EngineOptions(copy), EngineOptions(copy, canary=False, verify_weights=True)):
        with pytest.raises(PlanError, match="was changed after planning"):
            load_engine(bundle, options)
    monkeypatch.setattr(weight_digests, "SMALL_BYTES", 100)
    load_engine(bundle, EngineOptions(copy))
    with pytest.raises(PlanError, match="was changed after planning"):
        load_engine(bundle, EngineOptions(copy, verify_weights=True))


def test_other_files_of_weights_are_refused(planned: Path, copy: Path) -> None:
    plan = load_plan(planned / "plan")
    (copy / WEIGHTS).rename(copy / "part.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(WEIGHTS, "part.safetensors"))
    says = r"weights model-1\.safetensors, part\.safetensors, planned were model-0\.safetensors, m"
    with pytest.raises(PlanError, match=says):
        check_files(plan, copy)


def test_a_plan_without_digests_says_so(checkpoint: Any, tiny_plan: Plan) -> None:
    folder = checkpoint("moe")
    assert WEIGHTS in tiny_plan.model.shards
    check_weight_files(tiny_plan, folder, "small")
    with pytest.raises(PlanError, match="has no digests of its weights"):
        check_weight_files(tiny_plan, folder, "all")
    bare = tiny_plan.model.model_copy(update={"shards": {}})
    assert "shards" not in bare.model_dump(mode="json")
    check_files(tiny_plan.model_copy(update={"model": bare}), folder)


@pytest.mark.parametrize(
    ("name", "header", "says"),
    [
        ("../x.safetensors", "0" * 64, "no file of weights"),
        ("a/x.safetensors", "0" * 64, "no file of weights"),
        ("x.bin", "0" * 64, "no file of weights"),
        ("x.safetensors", "", "no digest of its header"),
    ],
)
def test_digests_of_weights_have_a_form(name: str, header: str, says: str, tiny_plan: Plan) -> None:
    shards = {name: Shard(header_sha256=header)}
    model = tiny_plan.model.model_copy(update={"shards": shards})
    with pytest.raises(PlanError, match=says):
        validate(tiny_plan.model_copy(update={"model": model}))


def test_other_weights_are_other_answers(planned: Path) -> None:
    plan = load_plan(planned / "plan")
    shards = dict(plan.model.shards)
    shards[WEIGHTS] = shards[WEIGHTS].model_copy(update={"file_sha256": "0" * 64})
    model = plan.model.model_copy(update={"shards": shards})
    assert answer_digest(plan.model_copy(update={"model": model})) != answer_digest(plan)


def test_a_model_is_looked_for_beside_its_bundle_first(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the same name under the current folder has other weights, maybe somebody's."""
    home, here = tmp_path / "home", tmp_path / "here"
    for place in (home, here):
        shutil.copytree(checkpoint("dense"), place / "models/own")
    (home / "spec.yaml").write_text("")
    plan = write_bundle(home / "plans/one", home / "models/own")
    model = plan.model.model_copy(update={"location": "models/own"})
    plan = plan.model_copy(update={"model": model})
    spec = make_spec("models/own")
    monkeypatch.chdir(here)
    assert find_weights(plan, home / "plans/one", None) == home / "models/own"
    assert find_model(spec, home / "spec.yaml").folder == home / "models/own"
    (home / "models").rename(home / "gone")
    assert find_weights(plan, home / "plans/one", None).resolve() == here / "models/own"
    found = find_model(spec, home / "spec.yaml").folder
    assert found is not None and found.resolve() == here / "models/own"


def test_files_that_are_links_out_of_the_model_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    """Before they are read; not where the user names the folder, nor in the hub's cache."""
    plan = write_bundle(tmp_path / "plan", checkpoint("dense"))
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots/0123"
    snapshot.mkdir(parents=True)
    for path in checkpoint("dense").iterdir():
        shutil.copy(path, hub / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")

    def at(folder: Path) -> Plan:
        model = plan.model.model_copy(update={"location": str(folder)})
        return plan.model_copy(update={"model": model})

    assert find_weights(at(snapshot), tmp_path / "plan", None) == snapshot
    plain = tmp_path / "plain"
    snapshot.rename(plain)
    for path in plain.iterdir():
        path.unlink()
        path.symlink_to(hub / "blobs" / path.name)
    with pytest.raises(PlanError, match="outside the model's folder") as caught:
        find_weights(at(plain), tmp_path / "plan", None)
    assert "--weights" in caught.value.hint
    check_files(plan, find_weights(at(plain), tmp_path / "plan", plain))
