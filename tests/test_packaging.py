"""What is shipped: every module and data file of the four folders, under one name, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import ROOT

FOLDERS = ("codegen", "planner", "plans", "runtime")
DATA = (
    "planner/models/presets/*.json",
    "planner/advisor/profiles/*.yaml",
    "codegen/*.yaml",
    "codegen/**/*.j2",
    "codegen/*.j2",
)


def is_ours(path: Path) -> bool:
    """Whether a file of the four folders belongs in the wheel; a frozen plan, with its kernels, does not."""
    data = any(map(path.match, DATA))
    source = path.suffix == ".py" or data
    return source and "frozen" not in path.parts


def ours(root: Path) -> set[str]:
    found = (path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*"))
    return {path.as_posix() for path in found if is_ours(path)}


def test_the_wheel_holds_the_product_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    shutil.copytree(
        ROOT / "tokenspeed_plan", source / "tokenspeed_plan", ignore=ignore, symlinks=True
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run([*pip, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in files if ".dist-info/" not in name}
    assert shipped == {
        f"tokenspeed_plan/{name}" for name in (*ours(source), "__init__.py", "py.typed")
    }
    entry = next(name for name in files if name.endswith("entry_points.txt"))
    assert (
        "tokenspeed = tokenspeed_plan.planner.cli:main"
        in zipfile.ZipFile(wheel).read(entry).decode()
    )
