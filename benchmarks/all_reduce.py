"""The all-reduce inside a kernel on several GPUs: how long it takes, and that it never goes wrong.

    torchrun --nproc-per-node 2 benchmarks/all_reduce.py [--replays 100000] [--seconds 30]

It renders and compiles the kernel `reduce_add_norm` as a plan has it, for decode (a row a program)
and for prefill (rows in turns), and launches it as the runtime does. Each part is a line of JSON:
microseconds of a launch in a CUDA graph beside NCCL's; replays of programs in random order, each
rank held up at random, with every result compared; and what a rank does that waits in vain.

Letters: R ranks, T rows, H hidden size, K calls of a program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm
from torch import Tensor

from tokenspeed_plan.codegen.build import Job, compile_kernel
from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.codegen.render import source_digest
from tokenspeed_plan.planner.advisor.sum_probe import EPS, push_kernels
from tokenspeed_plan.planner.machines.hardware import find_hardware
from tokenspeed_plan.plans.kernel_abi import bind_launch
from tokenspeed_plan.plans.peer_memory import (
    ERROR,
    PEER_COUNTS,
    PEER_SIGNALS,
    PEER_SLOTS,
    STOP,
    explain,
)
from tokenspeed_plan.plans.schema import Binary, GridDim, KernelSpec
from tokenspeed_plan.plans.types import aligned
from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels, _Arguments, call

MOST_ROWS = 256  # with a program each
CHUNK = 8192  # rows of prefill
POOL = 11  # inputs that differ; no multiple of the generations
PROGRAMS = ((1, 7), (4, 5), (16, 4), (700, 2))  # rows, and calls
IN_TURNS = (132, 256, 512)  # programs
CYCLES_PER_US = 1_700
SHORT_WAIT = ("POLLS: tl.constexpr = 134217728", "POLLS: tl.constexpr = 8000000")  # seconds


@dataclass
class Peers:
    """The symmetric arena of this rank, and where those of all ranks are."""

    arena: Tensor
    table: Tensor
    views: dict[str, Tensor]

    @classmethod
    def join(cls, kernel: KernelSpec) -> Peers:
        """Allocate it on all ranks."""
        specs = {p.name: p.tensor for p in kernel.tensors if p.role == "symmetric"}
        sizes = {name: aligned(spec.size_bytes(CHUNK, 1)) for name, spec in specs.items()}
        device = torch.device("cuda", torch.cuda.current_device())
        arena = symm.empty(sum(sizes.values()), dtype=torch.uint8, device=device)
        group = dist.group.WORLD
        assert group is not None
        handle = symm.rendezvous(arena, group)
        table = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device="cuda")
        views, offset = {}, 0
        for name, spec in specs.items():
            shape = spec.bind(CHUNK, 1)
            size = spec.size_bytes(CHUNK, 1)
            views[name] = arena[offset : offset + size].view(torch.int32).view(shape)
            offset += sizes[name]
        peers = cls(arena, table, views)
        peers.clear()
        return peers

    def clear(self) -> None:
        """Empty all slots of all ranks."""
        torch.cuda.synchronize()
        dist.barrier()
        self.arena.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()

    @property
    def signals(self) -> list[int]:
        """The words STOP and ERROR."""
        words = self.views[PEER_SIGNALS].tolist()
        return [words[STOP], words[ERROR]]


class Kernel:
    """One tiling of the kernel, launched through the driver as the runtime does."""

    def __init__(self, built: Built, sm: int, peers: Peers | None, overlap: bool) -> None:
        compiled = compile_kernel(Job(built.kernel, built.source or "", sm))
        assert not compiled.error, compiled.error
        name = built.kernel.name
        binary = Binary(
            kernel=name,
            sm=sm,
            cubin_sha256="",
            registers=compiled.registers,
            spill_bytes=compiled.spill_bytes,
            shared_bytes=compiled.shared_bytes,
        )
        self.spec, self.peers = built.kernel, peers
        self._cubins = CudaKernels({name: binary}, {name: compiled.cubin}, overlap)
        self._kept: list[Any] = []

    def launcher(self, tensors: list[Tensor], program: int) -> Callable[[], None]:
        """A launch with these tensors, by the number of its program."""
        peers = self.peers
        assert peers is not None
        rows = tensors[0].shape[0]
        memory = [peers.views[name] for name in (PEER_SLOTS, PEER_COUNTS, PEER_SIGNALS)]
        tables: dict[str, int | Tensor] = {"peer_table": peers.table, "program": program}
        values = bind_launch(self.spec, dist.get_rank(), rows, rows, tables)
        addresses = [x.data_ptr() for x in (*tensors, *memory)]
        arguments = _Arguments(self.spec, (*addresses, *values))
        config = self._cubins._config(self.spec, rows, rows)
        function = self._cubins._function(self.spec)
        self._kept.append((arguments, tensors))

        def launch() -> None:
            config.hStream = torch.cuda.current_stream().cuda_stream
            call(self._cubins._driver.cuLaunchKernelEx, config, function, arguments.address, 0)

        return launch


class ByRows:
    """The kernel with a program for each row, and with more rows than that the one with turns."""

    def __init__(self, few: Kernel, many: Kernel) -> None:
        self.few, self.many, self.peers = few, many, few.peers

    def launcher(self, tensors: list[Tensor], program: int) -> Callable[[], None]:
        """A launch of the one for so many rows."""
        kernel = self.many if tensors[0].shape[0] > MOST_ROWS else self.few
        return kernel.launcher(tensors, program)


def make_tensors(rows: int, hidden: int, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The tensors of a call on this rank, and what it should give: the sum and its norm."""
    random_ = torch.Generator("cuda").manual_seed(1000 * seed + rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_, device="cuda").bfloat16()

    parts_RTH = normal(dist.get_world_size(), rows, hidden)
    parts_RTH[:, :, seed::13] = 0.0
    residual_TH, norm_H = normal(rows, hidden), normal(hidden)
    total_TH = torch.zeros(rows, hidden, device="cuda")
    for part_TH in parts_RTH:
        total_TH += part_TH.float()
    total_TH += residual_TH.float()
    scale = torch.rsqrt(total_TH.square().mean(-1, keepdim=True) + EPS)
    outputs = [torch.empty_like(residual_TH) for _ in range(2)]
    tensors = [parts_RTH[dist.get_rank()].clone(), residual_TH, norm_H, *outputs]
    return tensors, total_TH.bfloat16(), total_TH * scale * (1 + norm_H.float())


def captured(functions: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    """Calls as one graph; nothing ran before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for function in functions:
            function()
    return graph


def graph_us(functions: Sequence[Callable[[], None]], replays: int = 20) -> float:
    """Microseconds of one of them, captured and replayed on all ranks at once."""
    functions[0]()
    torch.cuda.synchronize()
    graph = captured(functions)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms * 1e3 / len(functions) / replays


def say(what: str, **values: Any) -> None:
    """One line of JSON from rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps({"part": what, **values}, allow_nan=False), flush=True)


def check(kernel: ByRows, hidden: int) -> None:
    """Right, and the same bits on all ranks, also where calls have other rows."""
    worst, same, sums = 0.0, True, True
    for seed, rows in enumerate((1, 4, 700, 16, 64, 3, 256, 1, 2048, 2, 128, 256) * 3):
        tensors, total_TH, norm_TH = make_tensors(rows, hidden, seed)
        kernel.launcher(tensors, 0)()
        found = tensors[-1].float()
        worst = max(worst, ((found - norm_TH).abs().max() / norm_TH.abs().max()).item())
        sums = sums and torch.equal(tensors[-2], total_TH)
        everyone = [torch.empty_like(tensors[-1]) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, tensors[-1])
        same = same and all(torch.equal(x, everyone[0]) for x in everyone)
    assert kernel.peers is not None
    say("right", error=worst, sums=sums, same_bits=same, signals=kernel.peers.signals)


def times(maker: Maker, hidden: int, warps: list[int]) -> None:
    """Microseconds of a launch by rows, of each tiling, and of NCCL."""
    for num_warps in warps:
        for overlap in (True, False):
            kernel, found = maker.few(num_warps, overlap), {}
            for rows in (1, 4, 16, 64, 128, 256):
                calls = [
                    kernel.launcher(make_tensors(rows, hidden, seed)[0], 0) for seed in range(POOL)
                ]
                found[rows] = round(graph_us(calls * 5), 2)
            say("us", warps=num_warps, overlap=overlap, by_rows=found)
        for programs in IN_TURNS:
            kernel, found = maker.many(num_warps, programs), {}
            for rows in (256, 512, 1024, 2048, 8192):
                calls = [
                    kernel.launcher(make_tensors(rows, hidden, seed)[0], 0) for seed in range(4)
                ]
                found[rows] = round(graph_us(calls * 2), 2)
            say("us in turns", warps=num_warps, programs=programs, by_rows=found)
    found = {}
    for rows in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        x = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
        calls = [partial(_all_reduce, x)] * 10
        found[rows] = round(graph_us(calls), 2)
    say("nccl all_reduce us", by_rows=found)


def _all_reduce(x: Tensor) -> None:
    dist.all_reduce(x)


def _all_gather(target: Tensor, source: Tensor) -> None:
    dist.all_gather_into_tensor(target, source)


def gather_times() -> None:
    """Microseconds of NCCL's all-gather of logits, bytes of the result."""
    found = {}
    for size in (65536, 262144, 496640, 1986560):
        source = torch.zeros(size // 2 // dist.get_world_size(), device="cuda").bfloat16()
        target = torch.zeros(size // 2, device="cuda").bfloat16()
        calls = [partial(_all_gather, target, source)] * 10
        found[size] = round(graph_us(calls), 2)
    say("nccl all_gather us", by_bytes=found)


@dataclass
class Program:
    """K calls in one graph, which adds up the elements that differ from what they should be."""

    graph: torch.cuda.CUDAGraph
    wrong: Tensor
    wanted_KTH: Tensor  # kept, as the graph reads it

    @classmethod
    def make(cls, kernel: ByRows, rows: int, calls: int, hidden: int, number: int) -> Program:
        """Capture them, each with inputs of its own."""
        found, wanted, launches = [], [], []
        for seed in range(calls):
            tensors, total_TH, _ = make_tensors(rows, hidden, number + 3 * seed)
            launches.append(kernel.launcher(tensors, number))
            found.append(tensors[-2])
            wanted.append(total_TH)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        wanted_KTH = torch.stack(wanted)

        def compare() -> None:
            wrong.add_((torch.stack(found) != wanted_KTH).sum())

        return cls(captured([*launches, compare]), wrong, wanted_KTH)


def soak(kernel: ByRows, hidden: int, replays: int, seconds: float) -> None:
    """Programs in random order, the same on all ranks, each of which is held up by itself."""
    programs = [
        Program.make(kernel, rows, calls, hidden, number)
        for number, (rows, calls) in enumerate(PROGRAMS)
    ]
    torch.cuda.synchronize()
    dist.barrier()
    alike, own = random.Random(0), random.Random(dist.get_rank() + 1)
    begin, done = time.monotonic(), 0
    over = torch.zeros((), device="cuda")
    while done < replays:
        for _ in range(1000):
            chance = own.random()
            if chance < 0.001:
                torch.cuda._sleep(500 * CYCLES_PER_US)
            elif chance < 0.3:
                torch.cuda._sleep(own.randrange(20 * CYCLES_PER_US))
            elif chance > 0.999:
                time.sleep(0.001)
            programs[alike.randrange(len(programs))].graph.replay()
        done += 1000
        if done % 10_000 == 0:  # all ranks stop together
            over.fill_(float(time.monotonic() - begin > seconds))
            dist.all_reduce(over)
            if over.item():
                break
    torch.cuda.synchronize()
    assert kernel.peers is not None
    say(
        "soak",
        replays=done,
        calls=round(done * sum(calls for _, calls in PROGRAMS) / len(PROGRAMS)),
        wrong=[int(program.wrong) for program in programs],
        seconds=round(time.monotonic() - begin, 1),
        signals=kernel.peers.signals,
    )


def in_vain(kernel: ByRows, hidden: int) -> None:
    """Another program on one rank, then a rank that does not come and a runtime that says stop."""
    peers = kernel.peers
    assert peers is not None
    rank = dist.get_rank()
    peers.clear()
    begin = time.monotonic()
    tensors, *_ = make_tensors(1 + rank, hidden, 1)
    kernel.launcher(tensors, 10 + rank)()
    torch.cuda.synchronize()
    taken_ms = round((time.monotonic() - begin) * 1e3, 2)
    says: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(says, explain(*peers.signals))
    say("another program", ms=taken_ms, says=says)
    peers.clear()
    begin = time.monotonic()
    if rank == 0:
        tensors, *_ = make_tensors(1, hidden, 1)
        kernel.launcher(tensors, 10)()
        time.sleep(0.2)
        stop = torch.ones(1, dtype=torch.int32).pin_memory()
        with torch.cuda.stream(torch.cuda.Stream()):
            peers.views[PEER_SIGNALS][:1].copy_(stop, non_blocking=True)
        torch.cuda.synchronize()
    taken_ms = round((time.monotonic() - begin) * 1e3, 2)
    dist.all_gather_object(says, explain(*peers.signals))
    say("told to stop after 200 ms", ms=taken_ms, says=says)
    peers.clear()


@dataclass
class Maker:
    """Compiles the kernel of a decode program and of a prefill program, in any tiling."""

    built: dict[int, Built]
    sm: int
    peers: Peers

    @classmethod
    def of(cls, hidden: int, world: int) -> Maker:
        """For rows of so many elements, on this GPU."""
        major, minor = torch.cuda.get_device_capability()
        hardware = replace(find_hardware("H200"), sm=10 * major + minor)
        rows = (MOST_ROWS, CHUNK)
        kernels = push_kernels(hidden, world, rows, hardware)
        built = dict(zip(rows, kernels, strict=True))
        return cls(built, hardware.sm, Peers.join(built[CHUNK].kernel))

    def few(self, num_warps: int, overlap: bool) -> Kernel:
        """A program for each row."""
        return self._make(MOST_ROWS, num_warps, overlap)

    def many(self, num_warps: int, programs: int = MOST_ROWS) -> Kernel:
        """Some rows for each program."""
        return self._make(CHUNK, num_warps, False, programs)

    def _make(self, rows: int, num_warps: int, overlap: bool, programs: int = 0) -> Kernel:
        built = self.built[rows]
        launch, text = built.kernel.launch, (built.source or "").replace(*SHORT_WAIT)
        assert launch is not None
        changes: dict[str, Any] = {"num_warps": num_warps, "source_sha256": source_digest(text)}
        if programs:
            changes["grid"] = (GridDim(fixed=programs),)
        spec = built.kernel.model_copy(update={"launch": launch.model_copy(update=changes)})
        return Kernel(Built(spec, text), self.sm, self.peers, overlap)


def main() -> None:
    """All parts; one that fails does not end the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warps", type=int, nargs="*", default=[4])
    options = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    hidden = options.hidden
    maker = Maker.of(hidden, world)
    peers = maker.peers
    kernel = ByRows(maker.few(options.warps[0], True), maker.many(options.warps[0]))
    parts: list[Callable[[], None]] = [
        lambda: check(kernel, hidden),
        lambda: times(maker, hidden, options.warps),
        lambda: soak(kernel, hidden, options.replays, options.seconds),
        lambda: in_vain(kernel, hidden),
        gather_times,
    ]
    for part in parts:
        peers.clear()
        try:
            part()
        except Exception as error:
            print(f"rank {rank}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
