"""One spelling for every JSON value, and the digests that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenspeed_plan.plans.schema import KernelSpec, Plan


def canonical(value: Any) -> str:
    """The one compact spelling of a JSON value: sorted keys, ASCII, no blanks."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def sha256(data: str | bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def plan_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical form of a plan's fields without its digest."""
    return sha256(canonical({name: fields[name] for name in fields if name != "digest"}))


_COSTS = {"predicted_us", "cost", "workspace_bytes", "prepare", "capturable"}
_OFFSETS = {"__all__": {"offset_bytes"}}
_NO_PART_OF_PROGRAMS: dict[str, Any] = {
    "predicted_us": True,
    "pushes": True,
    "buffers": _OFFSETS,
    "steps": {"__all__": _COSTS},
}
_NO_PART_OF_POOLS: dict[str, Any] = {
    "memory_bytes_per_rank": True,
    "host_cache": True,
    "answer_returns": True,
    "arenas": True,
    "buffers": _OFFSETS,
    "weights": _OFFSETS,
    "programs": {"__all__": _NO_PART_OF_PROGRAMS},
}
_NO_PART_OF_ANSWERS: dict[str, Any] = {
    "model": {"location"},
    "target": {"gpu", "count"},
    "pools": {"__all__": _NO_PART_OF_POOLS},
}


def answer_digest(plan: Plan) -> str:
    """SHA-256 of all that decides an answer, and of nothing that explains, times or compiles it.

    In it are the model with the digests of its files, the compute capability, what each pool holds
    and runs, and the kernels with the digests of their texts. Not in it are the spec, decisions,
    predictions, costs, where memory lies, canary prompts, and the binaries with their compiler: the
    same text can be compiled to other bytes that compute the same.
    """
    fields = plan.model_dump(
        mode="json",
        include={"model", "target", "pools", "kernels"},
        exclude=_NO_PART_OF_ANSWERS,
    )
    return sha256(canonical(fields))


def kernel_name(kind: str, kernel: KernelSpec) -> str:
    """`<kind>_<digest>`: a kernel whose content was altered no longer has its own name."""
    return f"{kind}_{sha256(canonical(kernel.model_dump(mode='json', exclude={'name'})))[:12]}"
