"""Prefill on one GPU: attention by each candidate, whole steps by kernel, and the first token.

    python benchmarks/prefill.py DIR [--only attention,products,steps,host,turns]

DIR is a plan with library steps; weights are random. `attention` compares functions of libraries
with the plan's own kernel on the same tensors: microseconds in a graph, TFLOP/s, and how far the
results lie apart; `products` does so for products. `steps` replays prefill programs and lists their
kernels, `host` times what a new prompt length costs the host, `turns` asks the engine for first
tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.libraries import CUBLAS, LIBRARY_FUNCTIONS, computes_kernel
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import Call, KernelSpec, LibraryCall, Plan, Program
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.bench.clock import captured, time_us
from tokenspeed_plan.runtime.bench.machine import measure_machine
from tokenspeed_plan.runtime.bench.prepare import prepare
from tokenspeed_plan.runtime.bench.replay import Replay
from tokenspeed_plan.runtime.bench.table import _kernel
from tokenspeed_plan.runtime.compare import difference
from tokenspeed_plan.runtime.execution.backend import KernelBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.graphs import GraphLaunch
from tokenspeed_plan.runtime.execution.kernels import prepare_batch
from tokenspeed_plan.runtime.libraries import cublas
from tokenspeed_plan.runtime.libraries.loader import ADAPTERS
from tokenspeed_plan.runtime.libraries.sample_batch import sample_batch

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # new tokens, and all, by sequence
    "256": ((256,), (256,)),
    "1,024": ((1024,), (1024,)),
    "8,192": ((8192,), (8192,)),
    "8,192 after 40,960": ((8192,), (49152,)),
    "800 after 49,200": ((800,), (50000,)),
    "64 after 49,936": ((64,), (50000,)),
    "16 x 512": ((512,) * 16, (512,) * 16),
    "ragged": ((1, 63, 700, 64, 1000, 65), (1, 63, 900, 640, 33000, 129)),
}
STEPS = ((1, 8192, 8192), (1, 8192, 49152), (1, 800, 50000), (1, 1024, 1024))
COUNT = 4  # calls in a graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", default="attention,products,steps,host,turns")
    options = parser.parse_args()
    plan = load_plan(options.bundle)
    begun = time.perf_counter()
    executor = prepare(plan, options.bundle, None, GraphLaunch())
    print(f"prepared in {time.perf_counter() - begun:.1f} s", flush=True)
    parts = {
        "attention": attention,
        "products": products,
        "steps": steps,
        "host": host,
        "turns": turns,
    }
    for name in options.only.split(","):
        parts[name](plan, executor)


def backend_of(executor: Executor) -> KernelBackend:
    assert isinstance(executor.backend, KernelBackend)
    return executor.backend


@torch.inference_mode()
def attention(plan: Plan, executor: Executor) -> None:
    """The plan's kernel and each function of a library that computes it, on the same tensors."""
    program, (call, *_) = library_calls(plan, "attention")
    kernel, device = executor.kernels[call.kernel], plan.target.device
    functions = {
        name: adapter(kernel)
        for name, adapter in ADAPTERS.items()
        if computes_kernel(LIBRARY_FUNCTIONS[name], kernel) and is_installed(name)
    }
    print(f"{call.kernel} of {program.name}", flush=True)
    print("shape | function | us | TFLOP/s | apart", flush=True)
    for shape, (new, contexts) in SHAPES.items():
        tensors = sample_batch(kernel, torch.device(device), new, contexts)
        index = plan.pool.index_of(program)
        own = backend_of(executor).launcher(kernel, sum(new), len(new), index)
        results: list[torch.Tensor] = []
        for name, run in ({"own": own} | functions).items():
            prepare_batch(run, tensors)
            taken, result = measured(run, tensors, device)
            results.append(result)
            rate = flops_of(kernel, new, contexts) / taken / 1e6
            apart = difference(result, results[0])
            print(shape, name, f"{taken:.1f} | {rate:.0f} | {apart:.1e}", sep=" | ", flush=True)
        del tensors


def is_installed(function: str) -> bool:
    """Whether the package of a function is there."""
    package = LIBRARY_FUNCTIONS[function].package
    return any(found.name == package for found in distributions())


def library_calls(plan: Plan, kind: str) -> tuple[Program, list[LibraryCall]]:
    """The largest prefill program, and its library steps of a kind, one for each kernel."""
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    prefill = [program for program in plan.pool.programs if program.phase == "prefill"]
    program = max(prefill, key=lambda each: each.max_tokens)
    found = {
        step.kernel: step
        for step in program.steps
        if isinstance(step, LibraryCall) and kernels[step.kernel].parts[0].kind == kind
    }
    assert found, f"the plan calls no library for {kind}"
    return program, list(found.values())


@torch.inference_mode()
def products(plan: Plan, executor: Executor) -> None:
    """cuBLAS and each prefill program's own kernels, at the program's size, on the same tensors."""
    backend = backend_of(executor)
    print("weight | rows | own us | library us | own TFLOP/s | library TFLOP/s | apart", flush=True)
    for program in plan.pool.programs:
        calls = {step.kernel: step for step in program.steps if isinstance(step, Call)}
        for name in calls:
            kernel, rows = executor.kernels[name], program.max_tokens
            if program.phase != "prefill" or not computes_kernel(CUBLAS, kernel):
                continue
            tensors = sample_batch(kernel, torch.device(plan.target.device), (rows,), (rows,))
            own = backend.launcher(kernel, rows, 1, plan.pool.index_of(program))
            runs = (own, cublas.linear(kernel))
            found = [measured(run, tensors, plan.target.device) for run in runs]
            shape = next(p.tensor.bind(0, 0) for p in kernel.params if p.role == "weight")
            rates = [f"{2.0 * rows * shape[0] * shape[1] / us / 1e6:.0f}" for us, _ in found]
            apart = difference(found[-1][1], found[0][1])
            times = [f"{us:.1f}" for us, _ in found]
            print(shape, rows, *times, *rates, f"{apart:.1e}", sep=" | ", flush=True)


def measured(
    run: Any, tensors: tuple[torch.Tensor, ...], device: str
) -> tuple[float, torch.Tensor]:
    """Microseconds of a call inside a graph, and its result."""

    def calls() -> None:
        for _ in range(COUNT):
            run({}, *tensors)

    taken = time_us(captured(calls, device), device, 3) / COUNT
    return taken, tensors[-1].clone()


def flops_of(kernel: KernelSpec, new: tuple[int, ...], contexts: tuple[int, ...]) -> float:
    """4 D for each head and each pair of a query and a key that it sees."""
    attrs = kernel.parts[0].attrs
    pairs = sum(n * c - n * (n - 1) / 2 for n, c in zip(new, contexts, strict=True))
    return 4.0 * integer(attrs, "num_heads") * integer(attrs, "head_dim") * pairs


def steps(plan: Plan, executor: Executor) -> None:
    """Whole steps by kernel, against the memory and the matrix rate."""
    machine = measure_machine(plan.target.device)
    for seqs, count, context in STEPS:
        replay = Replay(plan, executor, "prefill", seqs, count, context)
        found = replay.measure(machine)
        print(
            f"\n{count} tokens of {seqs} at {context}: {found['measured_us']:.0f} us (predicted "
            f"{found['predicted_us']:.0f}), {found['share_of_matrix_rate']:.1%} of the matrix rate"
        )
        for row in found["kernels"]:
            print(_kernel(row))
        print(end="", flush=True)


def host(plan: Plan, executor: Executor) -> None:
    """Milliseconds of the host for a prompt of a new length, and for the same one again."""
    replay = Replay(plan, executor, "prefill", 1, 700, 700)
    program = replay.program
    new, again, launch = [], [], []
    for count in range(600, 640):
        begun = time.perf_counter()
        executor.programs.instructions(program, count, 1)
        known = time.perf_counter()
        executor.programs.instructions(program, count, 1)
        new.append(known - begun)
        again.append(time.perf_counter() - known)
        begun = time.perf_counter()
        executor.run(program, 700, 1)
        launch.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
    middle = [statistics.median(each) * 1e3 for each in (new, again, launch)]
    print(
        f"\n{program.name}, {program.launches} launches: a new length {middle[0]:.3f} ms, again "
        f"{middle[1]:.4f} ms; to launch them {middle[2]:.2f} ms of the host",
        flush=True,
    )


def turns(plan: Plan, executor: Executor) -> None:
    """Milliseconds to the first token of the engine: a long prompt, then a turn behind it."""
    engine = Engine(plan, executor)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    random = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(0, plan.model.vocab_size - 500, (count,), generator=random).tolist()

    for _ in range(3):
        prompt = ids(50000)
        (first,) = engine.generate([prompt], params)
        history = [*prompt, *first.token_ids, *ids(800)]
        (second,) = engine.generate([history], params)
        (alone,) = engine.generate([ids(800)], params)
        print(
            f"50,000 tokens {first.ttft_s * 1e3:.1f} ms; 800 after them "
            f"{second.ttft_s * 1e3:.1f} ms ({second.num_cached_tokens} cached); 800 alone "
            f"{alone.ttft_s * 1e3:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
