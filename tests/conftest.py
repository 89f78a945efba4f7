"""Checkpoints and plans that many tests share; checkpoints are made once a run, plans a process."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Tests run side by side on all cores, so each process computes with one thread, and OpenMP's idle
# threads sleep: by default they spin, which slows the other processes down. Commands that tests
# start inherit this. It is read when torch is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
# What tests run is no history of this machine.
os.environ["TOKENSPEED_HISTORY"] = "off"

import torch
from checkpoints import KINDS, write_checkpoint
from specs import merged

from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan

torch.set_num_threads(1)
# What is imported outlives every test, and looking through it again and again took a tenth of a
# run. What commands freeze would be kept for good, as many of them run in this process.
FREEZE = gc.freeze
gc.freeze = lambda: None
gc.set_threshold(20_000, 20, 20)
# CI runs the same examples each time.
hypothesis.settings.register_profile("fixed", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("fixed")
ROOT = Path(__file__).parent.parent
Once = Callable[[str, Callable[[Path], object]], Path]


def make_spec(path: Path | str, **changes: Any) -> Spec:
    """A CPU spec with fp32 weights; `changes` are sections, merged."""
    data: dict[str, Any] = {
        "version": 1,
        "model": {"path": str(path), "weights": "fp32"},
        "target": {"gpu": "cpu"},
        "workload": {
            "kind": "batch",
            "first_turn_tokens": 300,
            "output_tokens": 64,
            "concurrency": 8,
        },
        "speculation": "off",
    }
    return Spec.model_validate(merged(data, changes))


def pytest_collection_finish() -> None:
    """Spare the collector what is loaded."""
    gc.collect()
    FREEZE()


@pytest.fixture(scope="module", autouse=True)
def spared() -> Iterator[None]:
    """Spare it what a module leaves to others, too: plans that are kept, and what it imported."""
    yield
    gc.collect()
    FREEZE()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once("name", write) -> a folder that the first process of this run to ask has written.

    It is read by all of them: a test that changes something copies it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder in that of the run
        base = base.parent
    return partial(written_once, base / "once")


def written_once(base: Path, name: str, write: Callable[[Path], object]) -> Path:
    """The folder of a name below `base`, complete; others wait for the process that writes it."""
    base.mkdir(exist_ok=True)
    folder, mark = base / name, base / f"{name}.complete"
    with (base / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not mark.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write(folder)
            mark.touch()
    return folder


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Any:
    """checkpoint("moe") -> its folder."""
    return cache(lambda kind: once(kind, lambda to: write_checkpoint(to, KINDS[kind])))


@pytest.fixture(scope="session")
def trained(once: Once) -> Any:
    """trained("moe") -> the folder of a checkpoint some of whose drafts are right."""
    from trained import write_trained

    return cache(lambda kind: once(f"trained-{kind}", lambda to: write_trained(to, kind)))


@pytest.fixture(scope="session")
def trained_moe(trained: Any) -> Path:
    """The one with experts."""
    return Path(trained("moe"))


@pytest.fixture(scope="session")
def tiny_plan(checkpoint: Any) -> Plan:
    """A plan of the smallest MoE."""
    from drafting import plan_of

    return plan_of(checkpoint("moe"), 0)
