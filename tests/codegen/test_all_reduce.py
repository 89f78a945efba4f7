"""Ranks as processes with shared memory: the kernel that pushes, in Triton's interpreter.

Each process runs the kernel's own text on memory that all of them share, as on GPUs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.multiprocessing  # shares tensors between processes
from forks import FORKS
from kernel_lab import DEVICE, TOLERANCE, broken
from torch import Tensor

from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.plans.kernel_abi import bind_launch
from tokenspeed_plan.plans.kernel_file import load_function
from tokenspeed_plan.plans.peer_memory import (
    ERROR,
    PEER_COUNTS,
    PEER_SIGNALS,
    PEER_SLOTS,
    STOP,
    explain,
)
from tokenspeed_plan.plans.schema import KernelSpec, Param, Part
from tokenspeed_plan.plans.types import Attr, DType, TensorSpec
from tokenspeed_plan.runtime.compare import difference
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="Triton compiles where there is a GPU")
ROWS = (1, 4, 2, 4, 3, 1, 4)  # of each call, so that rows count differently
HIDDEN = 40  # no power of two
SECONDS = 60


def reducing(num_ranks: int, dtype: DType, gpu: str = "cpu", num_sms: int | None = None) -> Built:
    """Sum over ranks, residual and norm as one kernel, without overlap with others.

    On a machine of one multiprocessor two programs share the rows, as they do in prefill.
    """
    rows = TensorSpec.of(shape=("num_tokens", HIDDEN), dtype=dtype)
    params = (
        Param(name="all_reduce_x", role="input", tensor=rows),
        Param(name="add_r", role="input", tensor=rows),
        Param(name="rms_norm_w", role="weight", tensor=TensorSpec.of((HIDDEN,), dtype)),
        Param(name="add_y", role="output", tensor=rows, access="write"),
        Param(name="rms_norm_y", role="output", tensor=rows, access="write"),
    )
    ranks: dict[str, Attr] = {"num_ranks": num_ranks}
    parts = (
        Part(kind="all_reduce", operands=("all_reduce_x",), outputs=("sum",), attrs=ranks),
        Part(kind="add", operands=("sum", "add_r"), outputs=("add_y",), attrs={}),
        Part(
            kind="rms_norm",
            operands=("add_y", "rms_norm_w"),
            outputs=("rms_norm_y",),
            attrs={"eps": 1e-6},
        ),
    )
    plain = KernelSpec(name="", params=params, parts=parts)
    hardware = find_hardware(gpu)
    if num_sms is not None:
        hardware = replace(hardware, num_sms=num_sms)
    return build_kernel("reduce_add_norm", plain, (4, 4), hardware, False)[0]


@dataclass
class Arena:
    """The peer memory of all ranks, shared by their processes."""

    kernel: KernelSpec
    words: list[Tensor]

    @classmethod
    def of(cls, kernel: KernelSpec, num_ranks: int) -> Arena:
        size = sum(spec.size_bytes(4, 4) for spec in cls.specs(kernel).values())
        memory = [torch.zeros(size // 4, dtype=torch.int32) for _ in range(num_ranks)]
        return cls(kernel, [words.share_memory_() for words in memory])

    @staticmethod
    def specs(kernel: KernelSpec) -> dict[str, TensorSpec]:
        return {p.name: p.tensor for p in kernel.tensors if p.role == "symmetric"}

    def views(self, rank: int) -> dict[str, Tensor]:
        sizes = [spec.size_bytes(4, 4) // 4 for spec in self.specs(self.kernel).values()]
        return dict(zip(self.specs(self.kernel), self.words[rank].split(sizes), strict=True))

    def signals(self, rank: int) -> list[int]:
        words = self.views(rank)[PEER_SIGNALS].tolist()
        return [words[STOP], words[ERROR]]


def call(built: Built, arena: Arena, rank: int, tensors: list[Tensor], program: int) -> None:
    """One launch on one rank."""
    kernel, rows = built.kernel, tensors[0].shape[0]
    views = arena.views(rank)
    memory = [views[name] for name in (PEER_SLOTS, PEER_COUNTS, PEER_SIGNALS)]
    addresses = [words.data_ptr() for words in arena.words]
    table = torch.tensor(addresses, device=arena.words[0].device)
    values = bind_launch(kernel, rank, rows, rows, {"peer_table": table, "program": program})
    assert kernel.launch is not None
    grid = (kernel.launch.grid[0].at(rows, rows),)
    load_function(kernel, built.source or "")[grid](*tensors, *memory, *values, num_warps=4)


def make_tensors(number: int, num_ranks: int, dtype: DType) -> tuple[Tensor, list[Tensor]]:
    """The parts of all ranks, and the other tensors of a call; some values are 0, -0 and NaN."""
    made = torch.Generator().manual_seed(number)
    rows = ROWS[number % len(ROWS)]
    shapes = ((num_ranks, rows, HIDDEN), (rows, HIDDEN), (HIDDEN,))
    parts, *rest = [torch.randn(*shape, generator=made).to(TORCH_DTYPES[dtype]) for shape in shapes]
    parts[:, :, ::5], parts[0, :, 1] = 0.0, -0.0
    if number == 5:
        parts[0, 0, 7] = float("nan")
    return parts, [*rest, torch.empty_like(rest[0]), torch.empty_like(rest[0])]


def wanted(parts: Tensor, residual: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in fp32 in the order of the ranks, and its norm."""
    total = torch.zeros(parts.shape[1:])
    for part in parts:
        total += part.float()
    total += residual.float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)
    return total, total * scale * (1 + norm.float())


def replay(built: Built, arena: Arena, rank: int, dtype: DType, out: Any) -> None:
    """All calls on one rank, held up at random; the worst error goes out."""
    pauses, worst, same = random.Random(rank), 0.0, True
    for number in range(2 * len(ROWS)):
        if pauses.random() < 0.3:
            time.sleep(pauses.random() / 50)
        parts, tensors = make_tensors(number, len(arena.words), dtype)
        call(built, arena, rank, [parts[rank].clone(), *tensors], number % 3)
        total, normed = wanted(parts, *tensors[:2])
        summed, found = tensors[2:]
        rows = normed.isfinite().all(-1)
        same = same and torch.equal(summed[rows], total.to(summed.dtype)[rows])
        worst = max(worst, difference(found[rows], normed.to(found.dtype)[rows]))
    out.put((rank, worst, same, arena.signals(rank)))


def run_ranks(num_ranks: int, target: Callable[..., None], *args: Any) -> list[Any]:
    """What each rank's process puts out, in the order of the ranks."""
    out = FORKS.Queue()
    ranks = [
        FORKS.Process(target=target, args=(*args[:2], rank, *args[2:], out), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until and any(process.is_alive() for process in ranks):
            time.sleep(0.02)
        assert [process.exitcode for process in ranks] == [0] * num_ranks
        return sorted(out.get(timeout=1) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "dtype", "num_sms"),
    [(2, "bf16", None), (4, "fp32", None), (8, "bf16", None), (2, "bf16", 1)],
)
def test_ranks_get_the_sum_without_a_meeting(
    num_ranks: int, dtype: DType, num_sms: int | None
) -> None:
    built = reducing(num_ranks, dtype, num_sms=num_sms)
    assert ("num_programs" in (built.source or "")) == (num_sms == 1)
    arena = Arena.of(built.kernel, num_ranks)
    found = run_ranks(num_ranks, replay, built, arena, dtype)
    for _, worst, same, signals in found:
        assert same, "the sum has the bits of a sum in the order of the ranks"
        assert worst <= TOLERANCE[dtype]
        assert signals == [0, 0]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "num_sms"),
    [
        ("tl.where((sent & MAGNITUDE) == 0, SIGN, sent)", "sent", None),  # a real 0 is never there
        ("(count + GENERATIONS - 1) % GENERATIONS", "generation", None),  # empties what it awaits
        ("generation = count % GENERATIONS", "generation = 0", None),
        ("x += part.to(tl.float32)", "x = part.to(tl.float32)", None),
        ("range(first, num_tokens,", "range(first, num_tokens - 1,", 1),  # one is left out
    ],
)
def test_a_broken_push_is_caught(old: str, new: str, num_sms: int | None) -> None:
    built = broken(reducing(2, "bf16", num_sms=num_sms), old, new)
    built = broken(built, "POLLS: tl.constexpr = 134217728", "POLLS: tl.constexpr = 300")
    found = run_ranks(2, replay, built, Arena.of(built.kernel, 2), "bf16")
    assert any(
        not (worst <= TOLERANCE["bf16"] and same and signals == [0, 0])
        for _, worst, same, signals in found
    )


def be_another(built: Built, arena: Arena, rank: int, out: Any) -> None:
    """Rank 1 replays another program, of more rows."""
    parts, tensors = make_tensors(rank, 2, "bf16")
    call(built, arena, rank, [parts[rank].clone(), *tensors], 5 + rank)
    out.put((rank, explain(*arena.signals(rank))))


@interpreted
@pytest.mark.slow
def test_another_program_ends_both_ranks() -> None:
    built = reducing(2, "bf16")
    found = run_ranks(2, be_another, built, Arena.of(built.kernel, 2))
    says = [text for _, text in found]
    assert all(says), says
    assert "rank 1 replays program 6 of the plan, this rank another one" in says[0] or (
        "rank 0 replays program 5 of the plan, this rank another one" in says[1]
    )


def wait_in_vain(built: Built, arena: Arena, rank: int, out: Any) -> None:
    """Rank 0 waits; rank 1 never comes, and its runtime tells rank 0 to stop."""
    if rank:
        time.sleep(0.5)
        arena.views(0)[PEER_SIGNALS][STOP] = 1
    else:
        parts, tensors = make_tensors(0, 2, "bf16")
        call(built, arena, rank, [parts[0].clone(), *tensors], 0)
    out.put((rank, explain(*arena.signals(0))))


@interpreted
@pytest.mark.slow
def test_a_rank_that_waits_in_vain_can_be_told_to_stop() -> None:
    built = reducing(2, "bf16")
    found = run_ranks(2, wait_in_vain, built, Arena.of(built.kernel, 2))
    assert [text for _, text in found] == ["another rank gave up, or was told to"] * 2


@interpreted
def test_a_rank_that_nobody_tells_gives_up_by_itself() -> None:
    built = broken(
        reducing(2, "bf16"), "POLLS: tl.constexpr = 134217728", "POLLS: tl.constexpr = 3"
    )
    arena = Arena.of(built.kernel, 2)
    parts, tensors = make_tensors(0, 2, "bf16")
    call(built, arena, 0, [parts[0].clone(), *tensors], 0)
    assert explain(*arena.signals(0)) == "rank 1 sent nothing"
    assert explain(*arena.signals(1)) == "another rank gave up, or was told to"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_two_ranks_on_one_gpu() -> None:
    """Two kernels at once on one GPU, each with an arena of its own; calls without a pause."""
    built = reducing(2, "bf16", "H200")
    size = sum(spec.size_bytes(4, 4) for spec in Arena.specs(built.kernel).values())
    arena = Arena(
        built.kernel, [torch.zeros(size // 4, dtype=torch.int32, device="cuda") for _ in range(2)]
    )
    streams, calls = [torch.cuda.Stream() for _ in range(2)], []
    for number in range(60):
        parts, (residual, norm, *_) = make_tensors(number, 2, "bf16")
        total, _ = wanted(parts, residual, norm)
        outputs = [[torch.empty_like(residual, device="cuda") for _ in range(2)] for _ in range(2)]
        inputs = [[part.cuda(), residual.cuda(), norm.cuda()] for part in parts]
        calls.append((number, total.bfloat16(), inputs, outputs))
    torch.cuda.synchronize()
    for number, _, inputs, outputs in calls:
        for rank in (number % 2, 1 - number % 2):
            with torch.cuda.stream(streams[rank]):
                call(built, arena, rank, [*inputs[rank], *outputs[rank]], number % 3)
    torch.cuda.synchronize()
    assert arena.signals(0) == arena.signals(1) == [0, 0]
    for number, total, _, outputs in calls:
        for (summed, found), (other, _) in (outputs, outputs[::-1]):
            assert torch.equal(summed.nan_to_num(7.0).cpu(), total.nan_to_num(7.0)), number
            assert torch.equal(summed.nan_to_num(7.0), other.nan_to_num(7.0)), number
            assert not found.isnan().all()
