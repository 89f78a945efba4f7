"""What is shipped: every module and data file of the four folders, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("codegen", "planner", "plans", "runtime")
DATA = (
    "planner/models/presets/*.json",
    "planner/machines/profiles/*.yaml",
    "codegen/*.yaml",
    "codegen/**/*.j2",
    "codegen/*.j2",
)


def is_ours(path: Path) -> bool:
    """Whether a file of the four folders belongs in the wheel. Frozen plans do not."""
    data = any(map(path.match, DATA))
    source = path.suffix == ".py" or data
    return source and "frozen" not in path.parts


def ours(root: Path) -> set[str]:
    found = (path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*"))
    return {path.as_posix() for path in found if is_ours(path)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are built from."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*FOLDERS, "tests", "tokenspeed_plan"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def python(*args: object, cwd: Path) -> str:
    """What Python prints."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, folder: Path) -> zipfile.ZipFile:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    python("-m", "pip", "wheel", *options, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def shipped(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def expected(source: Path) -> set[str]:
    own = ("__init__.py", "__main__.py", "py.typed")
    return {f"tokenspeed_plan/{name}" for name in (*ours(source), *own)}


def test_the_wheel_holds_the_product_and_nothing_else(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source, tmp_path)
    assert shipped(wheel) == expected(source)
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "tokenspeed = tokenspeed_plan.planner.cli:main" in wheel.read(entry).decode()


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_is_the_same(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    python("-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "tests").exists()
    assert shipped(build_wheel(unpacked, tmp_path)) == expected(source)


def test_the_package_is_four_links() -> None:
    """A folder that is missing here would be found in no checkout."""
    links = {
        path.name: os.readlink(path)
        for path in (ROOT / "tokenspeed_plan").iterdir()
        if path.is_symlink()
    }
    assert links == {name: f"../{name}" for name in FOLDERS}


def test_a_checkout_on_the_path_is_enough(tmp_path: Path) -> None:
    code = "import tokenspeed_plan.planner as p; print(p.__file__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "tokenspeed_plan/planner/__init__.py"), done.stderr
