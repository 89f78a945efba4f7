"""An experiment on a GPU: the mixture of experts at batch 1 as one persistent launch, not three.

    python benchmarks/persistent.py DIR [--context 1024]

DIR is a bundle of Qwen3.5-35B-A3B for one GPU, planned with `speculation: off`. In the decode
program of one sequence, one kernel replaces the router, the up projection and the down projection
of every layer. All its programs are resident at once, and wait for each other twice at a counter in
memory. Weights that are known before a barrier are loaded into registers before it. Both programs
are captured and replayed in turns; the results of one layer are compared first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import KernelCall
from tokenspeed_plan.runtime.bench import prepare
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.execution.plan_memory import operands_of

ROUNDS = 9
SHAPES = (
    (528, 4, 2, 4),
    (528, 4, 4, 4),
    (264, 8, 4, 8),
    (264, 8, 2, 8),
)  # programs, warps, tiles up and down
BLOCK = ("norm_linear", "moe_up", "moe_down_add")


@triton.jit
def _barrier(counter, count: tl.constexpr):
    """Wait for all programs. The counter only grows, so that no launch has to clear it."""
    tl.debug_barrier()
    mine = tl.atomic_add(counter, 1, sem="acq_rel")
    target = (mine // count + 1) * count
    while tl.load(counter, volatile=True) < target:
        pass
    tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _best(logits_E, EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """The top-k experts and their logits.

    A key is a logit in integer order with the inverted index in its low bits, so that the lower
    index wins a tie. Each round takes the best key and removes it.
    """
    e = tl.arange(0, EXPERTS)
    bits = tl.load(logits_E + e, cache_modifier=".cg").to(tl.float32).to(tl.int32, bitcast=True)
    key = (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) & -65536) | (65535 - e)
    experts, scores = (), ()
    for _ in tl.static_range(TOP_K):
        best = tl.max(key, 0)
        experts = experts + (65535 - (best & 65535),)  # noqa: RUF005 - Triton
        high = best & -65536
        score = tl.where(high < 0, (high | 65535) ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
        scores = scores + (score,)  # noqa: RUF005 - Triton
        key = tl.where(key == best, -2147483648, key)
    return experts, scores


@triton.jit
def moe_block(
    x_H,
    norm_H,
    router_EH,
    up_EIH,
    shared_up_IH,
    down_EHI,
    shared_down_HI,
    y_H,
    logits_E,
    gate_1,
    h_KI,
    shared_I,
    out_H,
    counter,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    EPS: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One token: router, top-k, gate and up of the routed and the shared expert, down, residual."""
    tl.extra.cuda.gdc_launch_dependents()
    p = tl.program_id(0)
    k = tl.arange(0, H)
    router = tl.load(router_EH + p * H + k, mask=p <= EXPERTS, other=0.0).to(tl.float32)
    norm = 1.0 + tl.load(norm_H + k).to(tl.float32)
    tl.extra.cuda.gdc_wait()
    x = tl.load(x_H + k).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + EPS)
    x *= norm
    if p <= EXPERTS:
        logit = tl.sum(x * router, 0) * scale
        if p < EXPERTS:
            tl.store(logits_E + p, logit)
        else:
            tl.store(gate_1, logit)
    x = (x * scale).to(tl.bfloat16).to(tl.float32)
    _barrier(counter, PROGRAMS)

    experts, scores = _best(logits_E, EXPERTS, TOP_K)
    blocks: tl.constexpr = INNER // UP
    n = tl.arange(0, UP)
    for item in range(p, (TOP_K + 1) * blocks, PROGRAMS):
        slot, first = item // blocks, item % blocks * UP
        expert = 0
        for j in tl.static_range(TOP_K):
            expert = tl.where(slot == j, experts[j], expert)
        routed = up_EIH + expert.to(tl.int64) * (2 * INNER * H)
        weight = tl.where(slot < TOP_K, routed.to(tl.int64), shared_up_IH.to(tl.int64)).to(
            tl.pointer_type(tl.bfloat16)
        )
        weight += (first + n)[:, None] * H + k[None, :]
        gate = tl.sum(tl.load(weight).to(tl.float32) * x[None, :], 1)
        up = tl.sum(tl.load(weight + INNER * H).to(tl.float32) * x[None, :], 1)
        h = gate * tl.sigmoid(gate) * up
        target = tl.where(slot < TOP_K, (h_KI + slot * INNER).to(tl.int64), shared_I.to(tl.int64))
        tl.store(target.to(tl.pointer_type(tl.bfloat16)) + first + n, h)
    i = tl.arange(0, INNER)
    m = p * DOWN + tl.arange(0, DOWN)
    ok = (m < H)[:, None]
    offsets = m[:, None] * INNER + i[None, :]
    shared_w = tl.load(shared_down_HI + offsets, mask=ok, other=0.0)
    prefetched = ()
    for j in tl.static_range(TOP_K):
        weight = tl.load(
            down_EHI + experts[j].to(tl.int64) * (H * INNER) + offsets, mask=ok, other=0.0
        )
        prefetched = prefetched + (weight,)  # noqa: RUF005 - Triton
    _barrier(counter, PROGRAMS)

    total = 0.0
    for j in tl.static_range(TOP_K):
        total += tl.exp(scores[j] - scores[0])
    acc = tl.zeros([DOWN, INNER], tl.float32)
    for j in tl.static_range(TOP_K):
        h = tl.load(h_KI + j * INNER + i, cache_modifier=".cg").to(tl.float32) * (
            tl.exp(scores[j] - scores[0]) / total
        )
        acc += prefetched[j].to(tl.float32) * h[None, :]
    gate = tl.sigmoid(tl.load(gate_1, cache_modifier=".cg").to(tl.float32))
    acc += (
        shared_w.to(tl.float32)
        * (tl.load(shared_I + i, cache_modifier=".cg").to(tl.float32) * gate)[None, :]
    )
    out = tl.sum(acc, 1) + tl.load(x_H + m, mask=m < H, other=0.0).to(tl.float32)
    tl.store(out_H + m, out, mask=m < H)


class Exchange:
    """The calls of a program, and the same with one call in place of each layer's three."""

    def __init__(self, replay: Replay, programs: int, warps: int, up: int, down: int) -> None:
        executor = replay.executor
        self.counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.options = {"PROGRAMS": programs, "UP": up, "DOWN": down, "num_warps": warps}
        program = replay.program
        tensor_of = executor.memory.tensors_of(program, program.max_tokens, program.max_seqs)
        steps = executor.steps(program, replay.run_tokens, replay.run_seqs)
        self.calls = [
            (kind_of(executor.kernels[step.kernel]), operands_of(step, tensor_of), step, *work)
            for step, work in steps
            if isinstance(step, KernelCall)
        ]
        self.names = {
            name: [p.name for p in kernel.tensors] for name, kernel in executor.kernels.items()
        }

    def merged(self) -> Iterator[Any]:
        """All instructions, with one in place of each three."""
        index = 0
        while index < len(self.calls):
            run = self.calls[index : index + 3]
            if tuple(kind for kind, *_ in run) == BLOCK:
                yield self._one(*(self._tensors(step, own) for _, own, step, _ in run))
                index += 3
            else:
                yield run[0][3]
                index += 1

    def _tensors(self, step: KernelCall, tensors: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names[step.kernel], tensors, strict=True))

    def _one(self, router: Any, up: Any, down: Any) -> Any:
        tensors = (
            router["rms_norm_x"],
            router["rms_norm_w"],
            router["linear_w"],
            up["experts_up_w"],
            up["linear_w"],
            down["experts_down_w"],
            down["linear_w"],
            router["rms_norm_y"],
            router["linear_y0"],
            router["linear_y1"],
            up["experts_up_y"],
            up["silu_mul_y"],
            down["add_y"],
            self.counter,
        )
        experts, twice, hidden = up["experts_up_w"].shape
        sizes = {
            "EXPERTS": experts,
            "TOP_K": up["experts_up_y"].shape[1] * 2 // twice,
            "H": hidden,
            "INNER": twice // 2,
        }
        options = self.options | sizes | {"EPS": 1e-6, "launch_pdl": True}

        def body(attrs: Any, *args: Any) -> tuple[()]:
            moe_block[(self.options["PROGRAMS"],)](*args, **options)
            return ()

        return (body, {"arguments": (tensors, options)}, tensors, ())

    def fits(self) -> bool:
        """Whether all programs are resident at once; otherwise they would wait for ever."""
        tensors, options = next(
            call[1]["arguments"] for call in self.merged() if "arguments" in call[1]
        )
        made = moe_block.warmup(*tensors, grid=(1,), **options)
        made._init_handles()
        device = torch.cuda.get_device_properties(0)
        threads = 32 * self.options["num_warps"]
        resident = min(
            device.regs_per_multiprocessor // (-(-made.n_regs // 8) * 8 * threads), 2048 // threads
        )
        return resident * device.multi_processor_count >= self.options["PROGRAMS"]


def error(replay: Replay, exchange: Exchange) -> float:
    """The relative difference of the first layer's results."""
    last = next(i for i, (kind, *_) in enumerate(exchange.calls) if kind == BLOCK[2])
    three, one = (
        [work for *_, work in exchange.calls[: last + 1]],
        list(exchange.merged())[: last - 1],
    )
    found = []
    for calls in (three, one):
        replay.reset()
        three[-1][2][-1].fill_(torch.nan)
        replay.executor.execute(calls)
        found.append(three[-1][2][-1][:1].float().clone())
    return float((found[0] - found[1]).norm() / found[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    replay = Replay(plan, prepare(plan, options.bundle, None), "decode", 1, 1, options.context)
    execute = replay.executor.execute
    for programs, warps, up, down in SHAPES:
        exchange = Exchange(replay, programs, warps, up, down)
        if not exchange.fits():
            print(f"{programs} programs of {warps} warps do not fit at once: left out")
            continue
        plain, merged = [work for *_, work in exchange.calls], list(exchange.merged())
        graphs = [captured(lambda calls=calls: execute(calls), "cuda") for calls in (plain, merged)]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for graph, taken in zip(graphs, times, strict=True):
                taken.append(time_us(graph, "cuda", reset=replay.reset))
        three, one = map(statistics.median, times)
        print(
            f"{programs} programs of {warps} warps, tiles of {up} and {down}: "
            f"{len(plain)} launches {three:.1f} us, {len(merged)} launches {one:.1f} us, "
            f"{one / three:.3f} x; "
            f"relative difference {error(replay, exchange):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
