"""Checkpoints and plans that many tests share; made once a test process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
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

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.schema import Plan

torch.set_num_threads(1)
# CI runs the same examples each time.
hypothesis.settings.register_profile("fixed", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("fixed")
ROOT = Path(__file__).parent.parent


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


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Undo `gc.freeze`, which commands call, as many of them run in this process."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoint("moe") -> its folder."""

    @cache
    def make(kind: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("models") / kind, KINDS[kind])

    return make


@pytest.fixture(scope="session")
def trained_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint some of whose drafts are right."""
    from trained import write_trained

    return write_trained(tmp_path_factory.mktemp("trained") / "moe", "moe")


@pytest.fixture(scope="session")
def tiny_plan(checkpoint: Any) -> Plan:
    """A plan of the smallest MoE."""
    spec = make_spec(checkpoint("moe"))
    return compile_plan(spec, find_model(spec))
