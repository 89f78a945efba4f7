"""Measure the tiles of each kernel of a plan's program on this GPU.

In decode a tile is timed in the whole program, whose kernels overlap; with `--alone`, in all calls
of its kernel, one after the other, on the activations that they have in the program. In prefill,
where kernels are long, it is timed so in one call.

    python tools/tune.py plans/frozen/DIR [--phase prefill] [--bucket N] [--kinds a,b] [--alone]
        [--max-kernels N] [--max-tiles N | --tile 64,128,64,4,4 --tile ...]

Of a plan of several ranks it is rank 0, on one GPU: collectives copy, and kernels that wait for
peers are told to stop, so that their calls take the time of their own work.

Prints the lines for `codegen/tuned.yaml`, with the microseconds of the program beside the best
tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from tokenspeed_plan.plans.fp8_format import FP8
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.peer_memory import PEER_SIGNALS, STOP
from tokenspeed_plan.plans.schema import Binary, Call, KernelSpec, Plan
from tokenspeed_plan.runtime.bench import prepare
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.execution.arenas import TORCH_DTYPES
from tokenspeed_plan.runtime.execution.backend import Instruction
from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.peer_arenas import PeerMemory
from tokenspeed_plan.runtime.execution.rank_links import Links

NamedCall = tuple[str, Instruction]  # a kernel, and a call of it

REPLAYS = 3  # a round
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


def fp8_tiles(kind: str, rows: int) -> list[Tile]:
    """Tiles worth a try of a kernel that reads a weight in FP8, in a program of `rows` tokens."""
    grouped = kind.startswith("grouped_")
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
    kind = kind_of(kernel)
    params = tuple(p for p in kernel.params if p.role != "scratch")
    plain = kernel.model_copy(update={"name": "", "launch": None, "params": params})
    pdl = kernel.launch is not None and kernel.launch.pdl
    made = set()
    for tile in tiles:
        built = build_kernel(kind, plain, rows, hardware, pdl, tile)[0]
        if built.kernel.name not in made:
            made.add(built.kernel.name)
            yield tile, built


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
        return fp8_tiles(kind_of(kernel), padded)
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
        roles = [param.role for param in self.executor.kernels[name].tensors]
        self.reset()
        for own, call in self.calls:
            if own == name:
                operands = tuple(
                    x.clone() if isinstance(x, Tensor) and role in ("input", "output") else x
                    for role, x in zip(roles, call.operands, strict=True)
                )
                yield own, call._replace(operands=operands)
            self.executor.execute([call])

    def time(self, calls: Sequence[NamedCall]) -> float:
        """Microseconds of calls, one after the other."""
        instructions = [call for _, call in calls]
        replay = captured(lambda: self.executor.execute(instructions), "cuda")
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
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    hardware = find_hardware(plan.target.gpu)
    executor = prepare_alone(plan, options.bundle)
    shape = (options.bucket, 1) if options.phase == "decode" else (1, options.bucket)
    replay = Replay(plan, executor, options.phase, *shape, options.context)
    replay.run()
    program = replay.program
    rows = (replay.run_tokens, replay.run_seqs)
    names = dict.fromkeys(step.kernel for step in program.steps if isinstance(step, Call))
    taken: defaultdict[str, float] = defaultdict(float)
    for step in program.steps:
        if isinstance(step, Call):
            taken[step.kernel] += step.predicted_us
    wanted = set(filter(None, options.kinds.split(",")))
    kernels = [
        executor.kernels[name]
        for name in names
        if (not wanted or kind_of(executor.kernels[name]) in wanted)
        and executor.kernels[name].reduced_operand is None  # its tiles are no matter of one rank
    ]
    kernels = sorted(kernels, key=lambda kernel: -taken[kernel.name])[: options.max_kernels]
    tried = {}
    for kernel in kernels:
        tiles = options.tile or some_of(tiles_of(kernel, rows[0]), options.max_tiles)
        tried[kernel.name] = list(variants(kernel, rows, hardware, tiles))
    jobs = {
        b.kernel.name: Job(b.kernel, b.source or "", hardware.sm)
        for found in tried.values()
        for _, b in found
    }
    results = compile_all(jobs.values(), Path("/tmp/tune-cache"))
    chain = Chain(executor, replay, hardware.sm, options.alone)
    for name, found in tried.items():
        report(chain, name, found, {n: results[job.key] for n, job in jobs.items()}, hardware)


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
    kernel = chain.executor.kernels[name]
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
