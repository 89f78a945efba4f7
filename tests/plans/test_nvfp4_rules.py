"""The validator proves that NVFP4 weights are whole runs, encoded as their format says."""

from __future__ import annotations

from typing import Any

import pytest

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.bundle import dump_plan
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.validate import validate

UP, NORM, QKV = "L0.mlp_gate_up.weight", "L0.mixer_norm.weight", "L0.qkv.weight"


@pytest.fixture(scope="module")
def fp4_plan() -> Plan:
    """Of a published size, on a CPU."""
    model = {"preset": "qwen3-0.6b", "weights": "nvfp4-mixed"}
    spec = Spec.model_validate({"version": 1, "model": model, "target": {"gpu": "cpu"}})
    return compile_plan(spec, find_model(spec))


def with_piece(plan: Plan, name: str, **changes: Any) -> Plan:
    weights = []
    for weight in plan.pool.weights:
        if weight.name == name:
            first, *others = weight.pieces
            pieces = (first.model_copy(update=changes), *others)
            weight = weight.model_copy(update={"pieces": pieces})
        weights.append(weight)
    pool = plan.pool.model_copy(update={"weights": tuple(weights)})
    return plan.model_copy(update={"pools": (pool,)})


def test_pieces_are_whole_runs(fp4_plan: Plan) -> None:
    validate(fp4_plan)
    validate(with_piece(fp4_plan, UP, start=(3, 128)))
    with pytest.raises(PlanError, match=r"cuts a block of fp4\[1x16\]:fp8:fp32"):
        validate(with_piece(fp4_plan, UP, start=(0, 64)))


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        (UP, None),
        (UP, "fp8_tensor"),
        (NORM, "nvfp4"),
        (NORM, "fp8_tensor"),
        (QKV, "nvfp4"),
        (QKV, "fp8_blocks"),
    ],
)
def test_encodings_fit_formats(name: str, encoding: str | None, fp4_plan: Plan) -> None:
    with pytest.raises(PlanError, match=f"is encoded as {encoding}, which makes no"):
        validate(with_piece(fp4_plan, name, encoding=encoding))


def test_only_what_needs_it_has_a_word_for_its_encoding(fp4_plan: Plan) -> None:
    text = dump_plan(fp4_plan)
    assert text.count('"encoding":"nvfp4"') == 3 * 28
    assert text.count('"encoding":"fp8_tensor"') == 4 * 28
    assert text.count('"encoding"') == 7 * 28
