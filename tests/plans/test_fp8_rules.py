"""The validator proves that FP8 weights are whole blocks, and that products alone read them."""

from __future__ import annotations

from typing import Any

import pytest
from plan_edits import with_kernel

from tokenspeed_plan.planner import compile_plan, find_model
from tokenspeed_plan.planner.passes.pipeline import PassOptions
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.fp8_format import FP8_ROWS
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.types import FORMATS, TensorSpec
from tokenspeed_plan.plans.validate import validate


@pytest.fixture(scope="module")
def fp8_plan() -> Plan:
    """Of a published size, on a CPU."""
    model = {"preset": "qwen3-0.6b", "weights": "fp8"}
    spec = Spec.model_validate({"version": 1, "model": model, "target": {"gpu": "cpu"}})
    return compile_plan(spec, find_model(spec))


def with_weight(plan: Plan, name: str, **changes: Any) -> Plan:
    weights = [
        weight.model_copy(update=changes) if weight.name == name else weight
        for weight in plan.pool.weights
    ]
    pool = plan.pool.model_copy(update={"weights": tuple(weights)})
    return plan.model_copy(update={"pools": (pool,)})


QKV, NORM, TABLE = "L0.qkv.weight", "L0.mixer_norm.weight", "embed.table"


def test_pieces_of_fp8_weights_are_whole_blocks(fp8_plan: Plan) -> None:
    validate(fp8_plan)
    (weight,) = (weight for weight in fp8_plan.pool.weights if weight.name == QKV)
    q, k, v = weight.pieces
    for start in ((64, 0), (0, 64)):
        pieces = (q.model_copy(update={"start": start}), k, v)
        with pytest.raises(PlanError, match=r"cuts a block of fp8\[128x128\]:fp32"):
            validate(with_weight(fp8_plan, QKV, pieces=pieces))


@pytest.mark.parametrize("name", [NORM, TABLE])
def test_only_products_read_fp8(name: str, fp8_plan: Plan) -> None:
    """A vector has no blocks; a table is read by no product, even where kernels agree."""
    (weight,) = (weight for weight in fp8_plan.pool.weights if weight.name == name)
    tensor = TensorSpec(shape=weight.tensor.shape, format=FORMATS["fp8"])
    with pytest.raises(PlanError):
        validate(with_weight(fp8_plan, name, tensor=tensor))
    for index, kernel in enumerate(fp8_plan.kernels):
        params = [
            param.model_copy(update={"tensor": tensor}) if param.tensor == weight.tensor else param
            for param in kernel.params
        ]
        if tuple(params) != kernel.params:
            changed = kernel.model_copy(update={"params": tuple(params)})
            with pytest.raises(PlanError):
                validate(with_kernel(fp8_plan, index, changed))


def test_only_a_matrix_is_rounded_when_it_is_loaded(fp8_plan: Plan) -> None:
    validate(with_weight(fp8_plan, QKV, rounds=True))
    for name in (NORM, TABLE):
        with pytest.raises(PlanError, match="is rounded, and is no matrix in fp8"):
            validate(with_weight(fp8_plan, name, rounds=True))


@pytest.fixture(scope="module")
def quantised_plan() -> Plan:
    """On a GPU, where products multiply FP8 by FP8."""
    model = {"preset": "qwen3-0.6b", "weights": "fp8"}
    spec = Spec.model_validate({"version": 1, "model": model, "target": {"gpu": "H200"}})
    return compile_plan(spec, find_model(spec), options=PassOptions(quantises=True))


def test_only_products_read_quantised_activations(quantised_plan: Plan) -> None:
    """And what reads them says the dtype of its result; one kernel of each sort is tried."""
    validate(quantised_plan)
    checked, seen = 0, set()
    for index, kernel in enumerate(quantised_plan.kernels):
        sort = tuple(part.kind for part in kernel.parts)
        is_quantised = any(param.tensor.format == FP8_ROWS for param in kernel.params)
        if not is_quantised or sort in seen:
            continue
        seen.add(sort)
        plain = [
            param.model_copy(update={"tensor": TensorSpec.of(param.tensor.shape, "bf16")})
            if param.tensor.format == FP8_ROWS
            else param
            for param in kernel.params
        ]
        parts = [
            part.model_copy(update={"attrs": {k: v for k, v in part.attrs.items() if k != "dtype"}})
            for part in kernel.parts
        ]
        changes: list[dict[str, Any]] = [{"params": tuple(plain)}]
        if tuple(parts) != kernel.parts:
            changes.append({"parts": tuple(parts)})
        for change in changes:
            with pytest.raises(PlanError):
                validate(with_kernel(quantised_plan, index, kernel.model_copy(update=change)))
            checked += 1
    assert checked > 4
