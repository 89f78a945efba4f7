"""What is installed is what is in the four folders: no more, no less, under our own name."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parent.parent
FOLDERS = ("codegen", "planner", "plans", "runtime")
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE")
SCRIPT = "tokenspeed_plan.planner.cli:main"


def shipped(path: Path) -> bool:
    """Whether a file of the four folders belongs to the wheel."""
    if "frozen" in path.parts or "__pycache__" in path.parts:
        return False
    return path.suffix == ".py" or path.name == "py.typed" or path.match("planner/presets/*.json")


def files_to_ship() -> set[str]:
    found = (path.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*") if path.is_file())
    return {f"tokenspeed_plan/{path.as_posix()}" for path in found if shipped(path)}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy, so that the build leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_INPUTS:
        shutil.copy(REPO / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    options = ["--disable-pip-version-check", "--quiet", "--wheel-dir", str(copy / "out"), str(copy)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = (copy / "out").glob("*.whl")
    return built


def test_packages_are_those_on_disk(project: dict[str, Any]) -> None:
    on_disk = {Path(name).parent.as_posix().replace("/", ".") for name in files_to_ship() if name.endswith(".py")}
    listed = project["tool"]["setuptools"]["packages"]
    assert set(listed) == on_disk
    assert listed == sorted(set(listed)), "packages are sorted and named once"


def test_every_package_opens_with_an_init(project: dict[str, Any]) -> None:
    folders = [REPO.joinpath(*name.split(".")[1:]) for name in project["tool"]["setuptools"]["packages"]]
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert [folder for folder in FOLDERS if not (REPO / folder / "py.typed").is_file()] == []


def test_every_folder_is_mapped_to_our_name(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["package-dir"] == {f"tokenspeed_plan.{name}": name for name in FOLDERS}


def test_wheel_holds_exactly_the_folders(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = files_to_ship()
    assert inside - expected == set(), "in the wheel by mistake"
    assert expected - inside == set(), "missing from the wheel"


def test_wheel_installs_the_command(wheel: Path, project: dict[str, Any]) -> None:
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entry_points.read_string(archive.read(name).decode())
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert dict(entry_points["console_scripts"]) == {"tokenspeed": SCRIPT} == project["project"]["scripts"]
    assert len(licences) == 1


def test_wheel_works_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
        sys.path.insert(0, {str(tmp_path)!r})
        import tokenspeed_plan.planner.cli as cli, tokenspeed_plan.runtime.batch
        from tokenspeed_plan.planner.model_config import load_preset
        assert cli.__file__.startswith({str(tmp_path)!r}), cli.__file__
        assert load_preset("qwen3.5-35b-a3b")
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
