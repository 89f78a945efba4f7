"""Staging of weights without a GPU: memory is not pinned, and events complete at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tokenspeed_plan.runtime.loading.staging import Staging


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> Staging:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(
        torch.cuda,
        "Event",
        lambda: SimpleNamespace(synchronize=lambda: None, record=lambda: None),
        raising=True,
    )
    return Staging("cuda", half_bytes=64)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_arrives(count: int, dtype: torch.dtype, staging: Staging) -> None:
    """They arrive in pieces, the last one short, and in the target's dtype."""
    source = torch.randn(count).to(torch.bfloat16)
    target = torch.full((count,), float("nan"), dtype=dtype)
    staging.copy(target, source)
    assert torch.equal(target, source.to(dtype))


def test_matrices_and_what_is_not_contiguous(staging: Staging) -> None:
    source, whole = torch.randn(7, 9), torch.zeros(7, 20)
    staging.copy(whole[:, 3:12], source)
    assert (
        torch.equal(whole[:, 3:12], source) and not whole[:, :3].any() and not whole[:, 12:].any()
    )
    target = torch.empty(7, 9)
    staging.copy(target, source)
    assert torch.equal(target, source)
