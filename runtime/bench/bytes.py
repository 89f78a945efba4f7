"""The bytes that a step cannot avoid: weights that it needs, and the state of the sequences it serves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenspeed_plan.plans.schema import KernelSpec, Param


@dataclass(frozen=True, slots=True)
class Load:
    """What one replay carries, and how many experts of this rank it hits in the layer at hand."""

    num_tokens: int
    num_seqs: int
    context_tokens: int
    experts_hit: int = 0


def floor_bytes(kernel: KernelSpec, load: Load) -> int:
    """Weights and state, each once; of a stack of experts only those that are hit."""
    return sum(_param_bytes(kernel, param, load) for param in kernel.params)


def activation_bytes(kernel: KernelSpec, load: Load) -> int:
    """What comes from other kernels and goes to them."""
    sizes = (
        p.tensor.size_bytes(load.num_tokens, load.num_seqs)
        for p in kernel.params
        if p.role in ("input", "output")
    )
    return sum(sizes)


def _param_bytes(kernel: KernelSpec, param: Param, load: Load) -> int:
    if param.role == "weight":
        return _weight_bytes(kernel, param, load)
    return _state_bytes(param, load) if param.role == "state" else 0


def _weight_bytes(kernel: KernelSpec, param: Param, load: Load) -> int:
    size, rows = param.tensor.size_bytes(), param.tensor.bind(0, 0)[0]
    if any(part.kind == "embed" for part in kernel.parts):
        return load.num_tokens * size // rows
    return (
        load.experts_hit * size // rows
        if len(param.tensor.shape) == 3 and _has_experts(kernel)
        else size
    )


def _has_experts(kernel: KernelSpec) -> bool:
    return any("num_experts" in part.attrs for part in kernel.parts)


def _state_bytes(param: Param, load: Load) -> int:
    shape = param.tensor.bind(0, 0)
    if shape[0] == 0:  # a few numbers a sequence
        return 0
    row = param.tensor.size_bytes() // shape[0]
    if len(shape) == 5:  # pages of keys and values: [page, 2, place, head, dim]
        tokens = load.num_tokens if param.access == "write" else load.num_seqs * load.context_tokens
        return tokens * row // shape[2]
    return load.num_seqs * row * (2 if param.access == "update" else 1)


def bound_flops(kernel: KernelSpec, load: Load, top_k: int) -> float:
    """FLOPs of the kernel's products."""
    total = 0.0
    for param in kernel.params:
        shape = param.tensor.bind(0, 0)
        if (
            param.role != "weight"
            or len(shape) < 2
            or any(part.kind in ("embed", "causal_conv") for part in kernel.parts)
        ):
            continue
        rows = load.num_tokens * (top_k if len(shape) == 3 else 1)
        rows = load.num_seqs if any(part.kind == "last_token" for part in kernel.parts) else rows
        total += 2.0 * rows * math.prod(shape[-2:])
    return total
