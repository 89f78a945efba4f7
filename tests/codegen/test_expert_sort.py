"""Choices of many tokens, sorted by expert in two launches: counted in parts, then placed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.schema import KernelSpec, Param, Part
from tokenspeed_plan.plans.types import RankShift, TensorSpec
from tokenspeed_plan.runtime.execution.interpreter import interpret
from tokenspeed_plan.runtime.execution.triton_kernels import TritonKernels
from tokenspeed_plan.runtime.reference import REFERENCE_BODIES

CPU = find_hardware("cpu")
# Experts of a rank, of a token, parts, tokens of the program and of the batch, first of rank 1.
CASES = [
    (8, 2, 5, 300, 300, None),
    (8, 2, 5, 300, 137, None),
    (4, 2, 3, 100, 99, 4),
    (5, 3, 7, 64, 1, None),
]


def kernels_of(experts: int, top_k: int, parts: int, most: int, start: int | None) -> list[Built]:
    """The two kernels of a program of at most so many tokens."""
    ids = TensorSpec.of(shape=("num_tokens", top_k), dtype="i32")
    counts = TensorSpec.of(shape=(parts, experts + 1), dtype="i32")
    bounds = TensorSpec.of(shape=(experts + 1,), dtype="i32")
    attrs = {"num_experts": experts, "num_parts": parts}
    shift = {} if start is None else {"expert_start": RankShift(div=1, mod=2, step=start)}
    made = []
    for kind, inputs, outputs in (
        ("expert_count", {"ids": ids}, {"counts": counts}),
        ("expert_place", {"ids": ids, "counts": counts}, {"order": ids, "bounds": bounds}),
    ):
        params = [Param(name=name, role="input", tensor=spec) for name, spec in inputs.items()]
        params += [
            Param(name=name, role="output", tensor=spec, access="write")
            for name, spec in outputs.items()
        ]
        part = Part(
            kind=kind,
            operands=tuple(inputs),
            outputs=tuple(outputs),
            attrs=dict(attrs),
            rank_attrs=shift,
        )
        kernel = KernelSpec(name="", params=tuple(params), parts=(part,))
        made += build_kernel(kind, kernel, (most, 1), CPU, False)
    return made


def wanted(ids: Tensor, experts: int, parts: int, start: int | None) -> list[Tensor]:
    """Counts, order and bounds by the references, and the order by plain Python."""
    attrs = {"num_experts": experts, "num_parts": parts, "expert_start": start or 0}
    if start is None:
        del attrs["expert_start"]
    (counts,) = REFERENCE_BODIES["expert_count"](attrs, ids)
    order, bounds = REFERENCE_BODIES["expert_place"](attrs, ids, counts)
    groups = [int(x) - (start or 0) for x in ids.flatten()]
    key = [group if 0 <= group < experts else experts for group in groups]
    assert order.flatten().tolist() == sorted(range(len(key)), key=key.__getitem__)
    assert counts.sum() == len(key)
    assert counts.sum(0).tolist() == [key.count(expert) for expert in range(experts + 1)]
    return [counts, order, bounds]


def with_text(built: Built, text: str) -> Built:
    """The kernel with another text, and the digest that fits."""
    assert built.kernel.launch is not None
    launch = built.kernel.launch.model_copy(update={"source_sha256": sha256(text)})
    return Built(built.kernel.model_copy(update={"launch": launch}), text)


def found(built: list[Built], ids: Tensor, experts: int, parts: int, rank: int) -> list[Tensor]:
    """The same by the kernels; the second gets the right counts, whatever the first one made."""
    count, place = (each.kernel for each in built)
    kernels = TritonKernels({each.kernel.name: each.source or "" for each in built})
    counts = torch.full((parts, experts + 1), -1, dtype=torch.int32)
    order, bounds = torch.full_like(ids, -1), torch.full((experts + 1,), -1, dtype=torch.int32)
    size = (rank, len(ids), 1)
    kernels.launcher(count, *size)({}, ids, counts)
    attrs = {**count.parts[0].attrs}
    attrs |= {name: shift.at(rank) for name, shift in count.parts[0].rank_attrs.items()}
    kernels.launcher(place, *size)(
        {}, ids, *REFERENCE_BODIES["expert_count"](attrs, ids), order, bounds
    )
    return [counts, order, bounds]


def choices(experts: int, top_k: int, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    lines = [torch.randperm(experts, generator=random)[:top_k] for _ in range(tokens)]
    return torch.stack(lines).int()


@pytest.mark.parametrize(("experts", "top_k", "parts", "most", "tokens", "start"), CASES)
def test_choices_are_counted_and_placed(
    experts: int, top_k: int, parts: int, most: int, tokens: int, start: int | None
) -> None:
    interpret()
    built = kernels_of(experts, top_k, parts, most, start)
    ids = choices(2 * experts if start else experts, top_k, tokens)
    got = found(built, ids, experts, parts, int(start is not None))
    for mine, theirs in zip(got, wanted(ids, experts, parts, start), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("which", "old", "new"),
    [
        (0, "tl.where(ok, group, EXPERTS + 1)", "group"),
        (1, "(p < part)", "(p + 1 < part)"),
        (1, "tl.sort(group * BLOCK + i)", "i"),
        (1, "BLOCK, 0) + i", "BLOCK, 0) + i // 2"),
        (1, "first + before - ", "before - "),
    ],
)
def test_a_broken_text_shows(which: int, old: str, new: str) -> None:
    interpret()
    experts, top_k, parts, most, tokens, start = CASES[1]
    built = kernels_of(experts, top_k, parts, most, start)
    ids = choices(experts, top_k, tokens)
    text = built[which].source or ""
    assert old in text
    built[which] = with_text(built[which], text.replace(old, new))
    got = found(built, ids, experts, parts, 0)
    right = wanted(ids, experts, parts, start)
    assert not all(torch.equal(*pair) for pair in zip(got, right, strict=True))
