"""Measure the tiles of each kernel of a plan's program on this GPU.

In decode a tile is timed in the whole program, whose kernels overlap; with `--alone`, in all calls
of its kernel, one after the other, on the activations that they have in the program. In prefill,
where kernels are long, it is timed so in one call.

    python tools/tune.py plans/frozen/DIR [--phase prefill] [--bucket N] [--kinds a,b] [--alone]
        [--samples] [--max-kernels N] [--max-tiles N | --tile 64,128,64,4,4 --tile ...]

Of a plan of several ranks it is rank 0, on one GPU: collectives copy, and kernels that wait for
peers are told to stop, so that their calls take the time of their own work.

With `--samples` no model is loaded: products are timed alone on random operands, in several sets so
that no cache holds a weight, beside the functions of libraries that compute them too. Then the plan
needs no binaries.

Prints the lines for `codegen/tuned.yaml`, with the microseconds of the program beside the best
tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed_plan.codegen.build import Compiled, Job, compile_all
from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.codegen.tiling import GEMV_ROWS, Work
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, find_hardware
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.fp8_format import FP8, FP8_ROWS
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS, computes_kernel
from tokenspeed_plan.plans.peer_memory import PEER_SIGNALS, STOP
from tokenspeed_plan.plans.schema import Binary, Call, KernelSpec, Param, Plan, Program
from tokenspeed_plan.runtime.bench import prepare
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.backend import Instruction, execute
from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.fp8_blocks import parts_of, quantise_rows
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.rank_links import Links
from tokenspeed_plan.runtime.libraries.loader import ADAPTERS

NamedCall = tuple[str, Instruction]  # a kernel, and a call of it

REPLAYS = 3  # a round
SETS, SET_BYTES = 24, 200_000_000  # of operands, so that together they are larger than any cache
FULL_GROUPS = 1024  # rows from which on experts get whole tiles
MANY = 256  # rows from which on tiles have spaces of their own
GEMV = {
    "n": (1, 2, 4, 8, 16),
    "k": (256, 512, 1024, 2048, 4096),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
FLASH = {"n": (32, 64), "k": (1, 2), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
MATRIX = {
    "m": (64, 128),
    "n": (64, 128, 256),
    "k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
}
FLASH_MANY = {
    "m": (64, 128),
    "n": (32, 64),
    "k": (0,),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
DOWN = {"n": (1, 2, 4, 8), "k": (64, 128, 256, 512), "num_warps": (2, 4, 8), "num_stages": (1,)}
UP = {
    "n": (1, 2, 4, 8, 16),
    "k": (256, 512, 1024, 2048),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2),
}
DELTA = {
    "n": (8, 16, 32, 64, 128),
    "k": (0, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1,),
}
SOME = {
    "m": (16, 32, 64, 128),
    "n": (16, 32, 64, 128, 256),
    "k": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5),
    "splits": (1, 2, 4),
}
# Of FP8 in plain arithmetic: (depth, warps) in which each thread has one run of a row.
FP8_RUNS = {
    "n": (1, 2, 4, 8, 16),
    "runs": ((512, 1), (1024, 2), (2048, 4)),
    "num_stages": (1,),
}
FP8_DOWN = {"n": (1, 2, 4, 8, 16), "runs": ((512, 8), (512, 4), (512, 2)), "num_stages": (1,)}
FP8_DOT = {
    "m": (16, 32, 64, 128),
    "n": (32, 64, 128),
    "k": (128, 256),
    "num_warps": (4,),
    "num_stages": (3, 4, 6),
    "splits": (1, 2, 4),
}
FP8_GROUPED = {
    "m": (16, 64, 128),
    "n": (32, 64, 128),
    "k": (128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
# Of FP8 times FP8: products of few rows, and of experts whose rows stay in shared memory.
FP8_BOTH = {
    "m": (64, 128),
    "n": (32, 64, 128),
    "k": (128,),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 6),
    "splits": (1, 2, 4),
}
FP8_STAYING = {
    "m": (64, 128),
    "n": (64, 128),
    "k": (512,),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
    "splits": (1, 2, 4),
}
GROUPED = {  # of few rows for each expert, which wait for its weights
    "m": (16, 32, 64),
    "n": (32, 64, 128),
    "k": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
CONV = {
    "m": (2, 4, 8, 16),
    "n": (1,),
    "k": (4, 8, 16),
    "num_warps": (2, 4, 8),
    "num_stages": (1,),
}
SAMPLE = {
    "n": (1024, 2048, 4096, 8192),
    "k": (4096, 8192, 16384),
    "num_warps": (4, 8, 16),
    "num_stages": (1,),
}
DOT = {
    "n": (16, 32, 64, 128),
    "k": (64, 128, 256),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5),
}


def candidates(kind: str, rows: int, few: bool) -> list[Tile]:
    """Tiles worth a try."""
    if kind == "delta_step":  # in pieces only a whole head
        tiles = [Tile(rows, *values) for values in itertools.product(*DELTA.values())]
        return [t for t in tiles if not t.k or t.k < t.n == DELTA["n"][-1]]
    if kind.startswith("grouped") and rows < FULL_GROUPS:
        tiles = [Tile(*values) for values in itertools.product(*GROUPED.values())]
        return [t for t in tiles if 2 * (t.m + 2 * t.n) * t.k * t.num_stages <= 220_000]
    if kind == "conv_qk_norm":
        return list(itertools.starmap(Tile, itertools.product(*CONV.values())))
    if rows >= MANY:
        return [Tile(*values) for values in itertools.product(*MATRIX.values())]
    special = {
        "delta_recompute": DELTA,
        "sample": SAMPLE,
        "moe_up": UP,
        "moe_down": DOWN,
        "moe_down_add": DOWN,
    }
    space = special.get(kind, GEMV if few else DOT)
    tiles = [
        Tile(rows if few or kind in special else max(rows, 16), *values)
        for values in itertools.product(*space.values())
    ]
    if space is GEMV and rows > 1:
        padded = [Tile(max(rows, 16), *values) for values in itertools.product(*DOT.values())]
        return plain_tiles(rows) + padded
    if space is GEMV:
        return plain_tiles(rows)
    if space is DOT and rows < 16:
        return plain_tiles(rows) + tiles
    return tiles


def attention_tiles(rows: int, decodes: bool) -> list[Tile]:
    """Tiles worth a try; those of decode take all queries of a sequence, whatever their rows."""
    if decodes:
        return [Tile(rows, *values) for values in itertools.product(*FLASH.values())]
    return list(itertools.starmap(Tile, itertools.product(*FLASH_MANY.values())))


def fp8_tiles(kind: str, rows: int, quantised: bool) -> list[Tile]:
    """Tiles worth a try of a kernel that reads a weight in FP8, in a program of `rows` tokens.

    Args:
        kind: the kernel's.
        rows: of the program, as a power of two.
        quantised: whether it multiplies FP8 by FP8.
    """
    grouped = kind.startswith("grouped_")
    if quantised and not grouped and rows < FULL_GROUPS:
        tiles = itertools.starmap(Tile, itertools.product(*FP8_BOTH.values()))
        return [t for t in tiles if t.m < 2 * rows]
    if quantised and kind == "grouped_down":
        staying = list(itertools.starmap(Tile, itertools.product(*FP8_STAYING.values())))
        return staying + fp8_tiles(kind, rows, False)
    if kind.startswith("moe_") or (rows <= GEMV_ROWS and not grouped):
        space = FP8_DOWN if kind.startswith("moe_down") else FP8_RUNS
        plain = [
            Tile(rows, n, k, num_warps, num_stages)
            for n, (k, num_warps), num_stages in itertools.product(*space.values())
        ]
        return [t for t in plain if 512 <= t.n * t.k <= 32768]
    if grouped or rows >= MANY:
        least = 64 if rows >= 2048 else 16
        tiles = itertools.starmap(Tile, itertools.product(*FP8_GROUPED.values()))
        return [t for t in tiles if t.m >= least and (grouped or t.m > 16)]
    tiles = itertools.starmap(Tile, itertools.product(*FP8_DOT.values()))
    return [t for t in tiles if t.m == min(max(rows, 16), 64)]


def fills(tile: Tile, rows: int, columns: int) -> bool:
    """Whether tiles of a product are enough for the machine, and fit its shared memory."""
    programs = -(-rows // tile.m) * -(-columns // tile.n) * tile.splits
    return (
        48 <= programs <= 8192
        and 2 * (tile.m + tile.n) * tile.k * tile.num_stages <= 200_000
        and tile.m < 2 * rows
    )


def plain_tiles(rows: int) -> list[Tile]:
    """Tiles for few rows in plain arithmetic, with a sensible number of elements a thread."""
    tiles = (Tile(rows, *values) for values in itertools.product(*GEMV.values()))
    return [
        t
        for t in tiles
        if 512 <= t.n * t.k // t.num_warps <= 4096
        and 2048 <= t.n * t.k <= 16384
        and t.m * t.n * t.k <= 32768
    ]


def variants(
    kernel: KernelSpec, rows: tuple[int, int], hardware: HardwareSpec, tiles: Sequence[Tile]
) -> Iterator[tuple[Tile, Built]]:
    """The kernel in each tile; those that give the same kernel come once."""
    made = set()
    for tile in tiles:
        built = built_in(kernel, rows, hardware, tile)
        if built.kernel.name not in made:
            made.add(built.kernel.name)
            yield tile, built


def built_in(
    kernel: KernelSpec, rows: tuple[int, int], hardware: HardwareSpec, tile: Tile | None = None
) -> Built:
    """The kernel in a tile, or in the first one of its rule."""
    params = tuple(p for p in kernel.params if p.role != "scratch")
    plain = kernel.model_copy(update={"name": "", "launch": None, "params": params})
    pdl = kernel.launch is not None and kernel.launch.pdl
    return build_kernel(kind_of(kernel), plain, rows, hardware, pdl, tile)[0]


def stated(text: str) -> Tile:
    """A tile of numbers with commas between."""
    return Tile(*map(int, text.split(",")))


def some_of(tiles: Sequence[Tile], most: int) -> list[Tile]:
    """At most so many of the tiles, the same ones each time."""
    return random.Random(0).sample(tiles, min(most, len(tiles)))


def tiles_of(kernel: KernelSpec, rows: int) -> list[Tile]:
    """Tiles to try for a kernel in a program of `rows` tokens."""
    padded = 1 << (rows - 1).bit_length()
    if kind_of(kernel) == "attention_gate":
        return attention_tiles(padded, kernel.parts[0].attrs["mode"] == "decode")
    if any(param.tensor.format == FP8 for param in kernel.params):
        quantised = any(param.tensor.format == FP8_ROWS for param in kernel.params)
        return fp8_tiles(kind_of(kernel), padded, quantised)
    products = [p for p in kernel.parts if p.kind == "linear"]
    if not products or not 32 < padded < 2048:
        few = kernel.launch is not None and "PRECISION" not in kernel.launch.constants
        return candidates(kind_of(kernel), padded, few)
    columns = next(
        p.tensor.shape[0]
        for p in kernel.params
        if p.name in products[0].operands and p.role == "weight"
    )
    tiles = itertools.starmap(Tile, itertools.product(*SOME.values()))
    return [tile for tile in tiles if fills(tile, rows, int(columns))]


class Chain:
    """The instructions of the program, of which one kernel at a time is exchanged.

    A kernel that is timed alone has copies of its activations as they are when the program comes to
    it. Their buffers share memory with later ones: afterwards other activations lie there, and an
    order of tokens that is none leads anywhere.
    """

    def __init__(self, executor: Executor, replay: Replay, sm: int, alone: bool) -> None:
        program, self.reset = replay.program, replay.reset
        self.only_first = not program.captured
        self.alone = alone or self.only_first
        self.rows = (replay.run_tokens, replay.run_seqs)
        steps = executor.steps(program, *self.rows)
        self.calls: list[NamedCall] = [
            (step.kernel, work[0]) for step, work in steps if isinstance(step, Call)
        ]
        self.executor, self.sm = executor, sm
        self.kernels: Mapping[str, KernelSpec] = executor.kernels

    def calls_with(self, name: str) -> list[NamedCall]:
        """What is timed to judge builds of a kernel.

        It is the whole program. With `alone` it is the kernel's calls, and in a program that is not
        captured the first of them.
        """
        if not self.alone:
            return self.calls
        kept = self.kept_calls(name)
        return [next(kept)] if self.only_first else list(kept)

    def kept_calls(self, name: str) -> Iterator[NamedCall]:
        """The calls of a kernel, with copies of their activations; the program runs up to them."""
        roles = [param.role for param in self.kernels[name].tensors]
        self.reset()
        for own, call in self.calls:
            if own == name:
                operands = tuple(
                    x.clone() if isinstance(x, Tensor) and role in ("input", "output") else x
                    for role, x in zip(roles, call.operands, strict=True)
                )
                yield own, call._replace(operands=operands)
            self.execute([call])

    def execute(self, instructions: Sequence[Instruction]) -> None:
        """Run them in order."""
        self.executor.execute(instructions)

    def time(self, calls: Sequence[NamedCall]) -> float:
        """Microseconds of calls, one after the other."""
        instructions = [call for _, call in calls]
        replay = captured(lambda: self.execute(instructions), "cuda")
        return time_us(replay, "cuda", REPLAYS, reset=self.reset)

    def exchanged(
        self, calls: Sequence[NamedCall], name: str, built: Built, compiled: Compiled
    ) -> list[NamedCall]:
        """The calls, those of one kernel with another build of it."""
        kernel = built.kernel
        binary = Binary(
            kernel=kernel.name,
            sm=self.sm,
            cubin_sha256=hashlib.sha256(compiled.cubin).hexdigest(),
            registers=0,
            spill_bytes=0,
            shared_bytes=compiled.shared_bytes,
        )
        run = CudaKernels({kernel.name: binary}, {kernel.name: compiled.cubin}).launcher(
            kernel, 0, *self.rows
        )
        scratch = tuple(
            torch.zeros(
                p.tensor.bind(*self.rows), dtype=TORCH_DTYPES[p.tensor.dtype], device="cuda"
            )
            for p in kernel.params
            if p.role == "scratch"
        )
        before = len(kernel.tensors) - len(scratch)

        def exchange(call: Instruction) -> Instruction:
            return Instruction(run, {}, (*call.operands[:before], *scratch), ())

        return [(own, exchange(call) if own == name else call) for own, call in calls]


class Samples(Chain):
    """Products by themselves, on random operands."""

    def __init__(self, kernels: Mapping[str, KernelSpec], rows: tuple[int, int], sm: int) -> None:
        self.kernels, self.rows, self.sm = kernels, rows, sm
        self.calls: list[NamedCall] = []  # no program
        self.random = torch.Generator("cuda").manual_seed(0)
        self.planned: dict[str, tuple[Built, Compiled]] = {}

    def execute(self, instructions: Sequence[Instruction]) -> None:
        """Run them in order."""
        execute(instructions, 0)

    def reset(self) -> None:
        """Operands stay what they are."""

    def time(self, calls: Sequence[NamedCall]) -> float:
        """Microseconds of a call, one after the other."""
        return super().time(calls) / len(calls)

    def calls_with(self, name: str) -> list[NamedCall]:
        """Calls of a kernel, each with operands of its own."""
        kernel = self.kernels[name]
        tensors = [p for p in kernel.tensors if p.role != "scratch"]
        set_bytes = sum(p.tensor.size_bytes(*self.rows) for p in tensors)
        count = max(2, min(SETS, -(-SET_BYTES // set_bytes)))
        calls = [(name, self._call(tensors)) for _ in range(count)]
        return self.exchanged(calls, name, *self.planned[name])

    def _call(self, tensors: Sequence[Param]) -> Instruction:
        order = self._routing(tensors)
        operands = tuple(order.get(p.name, self._operand(p)) for p in tensors)
        return Instruction(nothing, {}, operands, ())

    def _operand(self, param: Param) -> Tensor:
        spec = param.tensor
        shape = spec.bind(*self.rows)
        if param.name.endswith("cu_seqlens"):  # rows of the first sequences, one each
            return torch.arange(shape[0], dtype=torch.int32, device="cuda")
        if spec.dtype in ("i32", "i64"):
            return torch.zeros(shape, dtype=TORCH_DTYPES[spec.dtype], device="cuda")
        if spec.format == FP8:
            stored = torch.zeros(spec.size_bytes(), dtype=torch.uint8, device="cuda")
            parts = parts_of(stored.view(torch.float8_e4m3fn), spec)
            for matrix in parts.elements.view(-1, *shape[-2:]):
                matrix.copy_(torch.randn(matrix.shape, device="cuda", generator=self.random) * 40)
            parts.scales.fill_(shape[-1] ** -0.5 / 40)
            return stored.view(torch.float8_e4m3fn)
        values = torch.randn(shape, device="cuda", generator=self.random)
        if spec.format == FP8_ROWS:
            return quantise_rows(values)
        if param.role == "weight" and len(shape) > 1:
            values *= shape[-1] ** -0.5
        return values.to(TORCH_DTYPES[spec.dtype])

    def _routing(self, tensors: Sequence[Param]) -> dict[str, Tensor]:
        """Which experts tokens chose, evenly at random: ids, or their order and bounds."""
        specs = {param.name: param.tensor.bind(*self.rows) for param in tensors}
        if "experts_down_ids" in specs:
            ids = self._ids(specs["experts_down_ids"], specs["experts_down_w"][0])
            return {"experts_down_ids": ids.to(torch.int32)}
        if "order" not in specs:
            return {}
        num_tokens, top_k = specs["order"]
        experts = specs["w"][0]
        ids = self._ids((num_tokens, top_k), experts).flatten()
        order = ids.argsort(stable=True).to(torch.int32)
        counts = torch.bincount(ids, minlength=experts).cumsum(0)
        bounds = torch.zeros(specs["bounds"], dtype=torch.int32, device="cuda")
        bounds[1 : experts + 1] = counts
        return {"order": order.view(num_tokens, top_k), "bounds": bounds}

    def _ids(self, shape: tuple[int, ...], experts: int) -> Tensor:
        """Different experts of each token."""
        drawn = torch.rand(shape[0], experts, device="cuda", generator=self.random)
        return drawn.topk(shape[1]).indices

    def report_libraries(self, name: str) -> None:
        """Print what functions of libraries take, on the same kind of operands."""
        kernel = self.kernels[name]
        for key, function in LIBRARY_FUNCTIONS.items():
            if not computes_kernel(function, kernel):
                continue
            run = ADAPTERS[key](kernel)
            calls = [(own, call._replace(body=run)) for own, call in self.calls_with(name)]
            print(f"# {name}: {key} {self.time(calls):.2f}", flush=True)


def nothing(*_: object) -> tuple[()]:
    """A call that is yet to get its kernel."""
    return ()


class Copies:
    """Collectives of a rank without others: what they would send stays what it is."""

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """The part of this rank."""
        target.copy_(source)

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """Its columns, in the place of the first."""
        target[..., : source.shape[-1]].copy_(source)


@dataclass(frozen=True, slots=True)
class LoneLinks(Links):
    """Rank 0 without the others, `count` ranks in all: the memory of each of them is its own."""

    count: int = 1

    def peer_memory(self, size_bytes: int, device: str) -> PeerMemory:
        """The symmetric arena, in the place of each rank's."""
        own = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        return PeerMemory(own, [own.data_ptr()] * self.count)


def prepare_alone(plan: Plan, bundle: Path) -> Executor:
    """An executor of rank 0 that waits for nobody."""
    if plan.target.count == 1:
        return prepare(plan, bundle, None)
    links = LoneLinks(collectives=Copies(), count=plan.target.count)
    executor = prepare(plan, bundle, None, links=links)
    if any(buffer.name == PEER_SIGNALS for buffer in plan.pool.buffers):
        executor.buffer(PEER_SIGNALS, 1, 1)[STOP] = 1
    return executor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--phase", choices=["prefill", "decode"], default="decode")
    parser.add_argument(
        "--bucket", type=int, default=1, help="sequences that decode, or tokens of a prompt"
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--kinds", default="", help="names with commas between; all by default")
    parser.add_argument(
        "--alone", action="store_true", help="in decode, time the calls of a kernel by themselves"
    )
    parser.add_argument(
        "--max-kernels", type=int, default=99, help="only the kernels predicted to take most time"
    )
    parser.add_argument("--max-tiles", type=int, default=64, help="tiles a kernel")
    parser.add_argument(
        "--tile", type=stated, action="append", default=[], help="only these, as in tuned.yaml"
    )
    parser.add_argument(
        "--samples", action="store_true", help="products alone on random operands, without a model"
    )
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    hardware = find_hardware(plan.target.gpu)
    chain, program = chain_of(plan, hardware.sm, options)
    kernels = chosen(program, chain.kernels, options)
    tried = {}
    for kernel in kernels:
        tiles = options.tile or some_of(tiles_of(kernel, chain.rows[0]), options.max_tiles)
        tried[kernel.name] = list(variants(kernel, chain.rows, hardware, tiles))
    planned = {kernel.name: built_in(kernel, chain.rows, hardware) for kernel in kernels}
    jobs = {
        b.kernel.name: Job(b.kernel, b.source or "", hardware.sm)
        for b in [*planned.values(), *(b for found in tried.values() for _, b in found)]
    }
    made = compile_all(jobs.values(), Path("/tmp/tune-cache"))
    results = {name: made[job.key] for name, job in jobs.items()}
    for name, found in tried.items():
        if isinstance(chain, Samples):
            chain.planned[name] = planned[name], results[planned[name].kernel.name]
            chain.report_libraries(name)
        report(chain, name, found, results, hardware)


def chain_of(plan: Plan, sm: int, options: argparse.Namespace) -> tuple[Chain, Program]:
    """What times builds, and the program whose kernels they are."""
    if options.samples:
        fitting = [
            each
            for each in plan.pool.programs
            if each.phase == options.phase and each.bucket >= options.bucket
        ]
        program = min(fitting, key=lambda each: each.bucket)
        rows = (program.max_tokens, program.max_seqs)
        kernels = {kernel.name: kernel for kernel in plan.kernels}
        return Samples(kernels, rows, sm), program
    executor = prepare_alone(plan, options.bundle)
    shape = (options.bucket, 1) if options.phase == "decode" else (1, options.bucket)
    replay = Replay(plan, executor, options.phase, *shape, options.context)
    replay.run()
    return Chain(executor, replay, sm, options.alone), replay.program


def chosen(
    program: Program, kernels: Mapping[str, KernelSpec], options: argparse.Namespace
) -> list[KernelSpec]:
    """The kernels to tune, those first that are predicted to take most time."""
    taken: defaultdict[str, float] = defaultdict(float)
    for step in program.steps:
        if isinstance(step, Call):
            taken[step.kernel] += step.predicted_us
    wanted = set(filter(None, options.kinds.split(",")))
    found = [
        kernels[name]
        for name in taken
        if (not wanted or kind_of(kernels[name]) in wanted)
        and kernels[name].reduced_operand is None  # its tiles are no matter of one rank
    ]
    return sorted(found, key=lambda kernel: -taken[kernel.name])[: options.max_kernels]


def report(
    chain: Chain,
    name: str,
    found: list[tuple[Tile, Built]],
    compiled: dict[str, Compiled],
    hardware: HardwareSpec,
) -> None:
    """Print the best tile of one kernel as a line of YAML, and keep it in the chain."""
    calls = chain.calls_with(name)
    times = []
    for tile, built in found:
        result = compiled[built.kernel.name]
        if result.error or result.spill_bytes or result.shared_bytes > hardware.max_shared_bytes:
            continue
        try:
            taken_us = chain.time(chain.exchanged(calls, name, built, result))
            times.append((taken_us, tile, built, result))
        except Exception as error:
            print(f"# {name} {tile}: {error}")
    times.sort(key=lambda item: item[0])
    kernel = chain.kernels[name]
    key = Work(kind_of(kernel), kernel, *chain.rows, hardware).key
    if times:
        now_us = chain.time(calls)
        _, best, built, result = times[0]
        chain.calls = chain.exchanged(chain.calls, name, built, result)
        ranking = "; ".join(f"{us:.1f} {numbers(tile)}" for us, tile, _, _ in times[:5])
        print(f"  {key}: {numbers(best)}  # now {now_us:.1f}; {ranking}", flush=True)


def numbers(tile: Tile) -> list[int]:
    """A tile as `tuned.yaml` has it."""
    found = [tile.m, tile.n, tile.k, tile.num_warps, tile.num_stages]
    return found if tile.splits == 1 else [*found, tile.splits]


if __name__ == "__main__":
    main()
