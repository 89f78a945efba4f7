"""The CUDA path, as far as it can be tested without a GPU."""

from __future__ import annotations

import sys

import pytest

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels


def test_without_the_bindings_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(PlanError, match=r"not installed\n\nhint: install the extra `gpu`"):
        CudaKernels({}, {})
