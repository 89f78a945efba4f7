"""Experts of prefill: ways to multiply sorted (token, expert) pairs, beside the plan's kernels.

    python benchmarks/experts.py [--only NAME,...] [--tokens 8192,2048]   on a GPU
    python benchmarks/experts.py --compile [--only NAME,...]              anywhere: registers, spills

Qwen3.5-35B-A3B: 256 experts of 512, hidden size 2,048, 8 experts a token. Weights, tokens and their
experts are random; with `skewed` some experts have many tokens and some none. Microseconds of a
call, four in a CUDA graph; `apart` is ||y - y_plan|| / ||y_plan||.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import experts_flat  # noqa: E402
import experts_pf  # noqa: E402
import experts_ws  # noqa: E402
import triton  # noqa: E402

E, TOP_K, H, I, SMS = 256, 8, 2048, 512, 132
SHAPES = {"up": (I, H), "down": (H, I)}  # columns of the result, depth
FROZEN = HERE.parent / "plans/frozen/qwen3.5-35b-h200/kernels"


def ws(copy_engine=False, dynamic=True, skew=True, stages=4, r=208, p=88):
    return {
        "fn": experts_ws.grouped,
        "meta": {
            "STAGES": stages,
            "COPY_ENGINE": copy_engine,
            "DYNAMIC": dynamic,
            "SKEW": skew,
            "AHEAD": 0,
            "DIAG": 0,
            "CACHE": "",
            "R": r,
            "P": p,
        },
        "warps": 4,
        "stages": 1,
    }


def flat(m, width, k, warps, stages, flatten):
    meta = {"BLOCK_M": m, "BLOCK_W": width, "BLOCK_K": k, "FLATTEN": flatten}
    return {"fn": experts_flat.flat, "meta": meta, "warps": warps, "stages": stages}


def pf(ahead, whole):
    meta = {"BLOCK_M": 128, "BLOCK_W": 256, "BLOCK_K": 64, "AHEAD": ahead, "WHOLE": whole, "DELTA": 0}
    return {"fn": experts_pf.ahead, "meta": meta, "warps": 8, "stages": 4}


CANDIDATES = {
    "pf": pf(0, 0),
    "flat": flat(128, 256, 64, 8, 4, True),
    "loop": flat(128, 256, 64, 8, 4, False),
    "ws": ws(),
    "ws-static": ws(dynamic=False),
    "ws-level": ws(skew=False),
    "ws3": ws(stages=3),
}


def candidate_of(name):
    """`ce:r=200:p=104` is `ce` with other registers."""
    base, *changes = name.split(":")
    made = dict(CANDIDATES[base])
    made["meta"] = dict(made["meta"])
    for change in changes:
        key, value = change.split("=")
        if key != "cache":
            value = int(value)
        made["meta"][key.upper()] = value
    return made


def constants(kind, candidate):
    n, k = SHAPES[kind]
    return {"UP": kind == "up", "EXPERTS": E, "TOP_K": TOP_K, "N": n, "K": k} | candidate["meta"]


def compile_one(name, kind):
    """Compile a candidate for sm_90 without a GPU, and say what it takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    candidate = candidate_of(name)
    fn, meta = candidate["fn"], constants(kind, candidate)
    pointers = {"x": "*bf16", "order": "*i32", "bounds": "*i32", "w": "*bf16", "y": "*bf16"}
    signature = pointers | {"counter": "*i32", "num_tokens": "i32"}
    if meta.get("COPY_ENGINE"):
        from triton.experimental.gluon.language import NVMMASharedLayout

        signature["w"] = f"tensordesc<bf16[128, 64],{NVMMASharedLayout(128, 16)!r}>"
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(6) if list(signature.values())[i][0] == "*"}
    signature |= dict.fromkeys(meta, "constexpr")
    source_type = GluonASTSource if fn.is_gluon() else ASTSource
    source = source_type(fn=fn, signature=signature, constexprs=meta, attrs=aligned)
    options = {"num_warps": candidate["warps"], "num_stages": candidate["stages"]}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(built.asm["ptx"])
        ptxas = triton.knobs.nvidia.ptxas.path
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(cubin)], capture_output=True, text=True
        ).stderr
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True).stdout
    out = Path("/tmp/h6-asm")
    out.mkdir(exist_ok=True)
    (out / f"{name}-{kind}.ptx").write_text(built.asm["ptx"])
    (out / f"{name}-{kind}.sass").write_text(sass)
    (out / f"{name}-{kind}.ttgir").write_text(str(built.asm.get("ttgir", "")))
    counts = {word: len(re.findall(rf"\b{word}", sass)) for word in ("HGMMA", "LDGSTS", "UTMALDG", "BAR.SYNC", "LDL", "STL", "WARPGROUP.DEPBAR", "STG", "SYNCS")}
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    warnings = [line for line in said.splitlines() if "warning" in line.lower() or "serializ" in line.lower()]
    print(name, kind, registers and registers[0], "shared", built.metadata.shared, "warps", built.metadata.num_warps, counts, *warnings, flush=True)


def load_plan_kernel(kind):
    for path in sorted(FROZEN.glob(f"grouped_{kind}_*.py")):
        if "BLOCK_M: tl.constexpr = 128" in path.read_text():
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            width = int(re.search(r"BLOCK_N: tl.constexpr = (\d+)", path.read_text())[1])
            return getattr(module, f"grouped_{kind}"), width
    raise SystemExit(f"no kernel of 128 rows for {kind} in {FROZEN}")


class Case:
    """Tensors of one batch."""

    def __init__(self, torch, tokens, skewed, weights):
        random = torch.Generator("cuda").manual_seed(tokens)
        logits = torch.randn(tokens, E, generator=random, device="cuda")
        if skewed:
            logits += 1.5 * torch.randn(E, generator=random, device="cuda")
        ids = logits.topk(TOP_K).indices.flatten()
        self.order = ids.argsort(stable=True).int()
        counts = ids.bincount(minlength=E)
        self.bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        self.counts, self.tokens = counts, tokens
        pairs = tokens * TOP_K
        self.x = torch.randn(tokens, H, generator=random, device="cuda").bfloat16()
        self.h = torch.randn(pairs, I, generator=random, device="cuda").bfloat16()
        self.w = weights
        self.y = {
            "up": torch.empty(pairs, I, device="cuda", dtype=torch.bfloat16),
            "down": torch.empty(pairs, H, device="cuda", dtype=torch.bfloat16),
        }
        self.counter = torch.zeros(1, device="cuda", dtype=torch.int32)


def cubin_launcher(case, kind, x, y):
    """The template's kernel, as the engine compiles and launches it."""
    import hashlib

    from tokenspeed_plan.codegen.build import Job, compile_all
    from tokenspeed_plan.codegen.kernel_builder import build_kernel
    from tokenspeed_plan.codegen.tuned import Tile
    from tokenspeed_plan.planner.machines.hardware import find_hardware
    from tokenspeed_plan.plans.bundle import load_plan
    from tokenspeed_plan.plans.kernel_file import kind_of
    from tokenspeed_plan.plans.schema import Binary
    from tokenspeed_plan.runtime.execution.cuda_kernels import CudaKernels

    of_kind = [k for k in load_plan(FROZEN.parent).kernels if kind_of(k) == f"grouped_{kind}"]
    plain = of_kind[0].model_copy(update={"launch": None, "name": "", "params": tuple(p for p in of_kind[0].params if p.role != "scratch")})
    built = build_kernel(f"grouped_{kind}", plain, (8192, 8), find_hardware("H200"), False, Tile(128, 128, 64, 12, 4))[0]
    job = Job(built.kernel, built.source, 90)
    compiled = compile_all([job], Path(tempfile.gettempdir()) / "experts-cubins")[job.key]
    digest = hashlib.sha256(compiled.cubin).hexdigest()
    name = built.kernel.name
    binary = Binary(kernel=name, sm=90, cubin_sha256=digest, registers=0, spill_bytes=0, shared_bytes=compiled.shared_bytes)
    print(name, compiled.error, compiled.registers, compiled.spill_bytes, flush=True)
    run = CudaKernels({name: binary}, {name: compiled.cubin}).launcher(built.kernel, 0, case.tokens, 1)
    top = (case.tokens, TOP_K)
    tensors = (x, case.order.view(top), case.bounds, case.w[kind], y, case.counter)[: len(built.kernel.tensors)]
    return lambda warmup=False: None if warmup else run({}, *tensors)


def launcher(case, kind, name):
    """A function of no arguments that runs a candidate."""
    x, y = (case.x if kind == "up" else case.h), case.y[kind]
    if name == "plan":
        fn, width = load_plan_kernel(kind)
        grid = (SHAPES[kind][0] // width, E + -(-case.tokens * TOP_K // 128))
        args = (x, case.order, case.bounds, case.w[kind], y, case.tokens, 1)
        return lambda **more: fn.run(*args, grid=grid, num_warps=8, num_stages=4, **{"warmup": False, **more})
    if name == "cubin":
        return cubin_launcher(case, kind, x, y)
    candidate = candidate_of(name)
    meta = constants(kind, candidate)
    w = case.w[kind]
    if meta.get("COPY_ENGINE"):
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        w = TensorDescriptor.from_tensor(w.view(-1, w.shape[-1]), [128, 64], NVMMASharedLayout(128, 16))
    fn = candidate["fn"]
    args = (x, case.order, case.bounds, w, y, case.counter, case.tokens)
    grid = (SMS,)
    if fn is experts_pf.ahead:
        width = 128 if kind == "up" else 256
        grid = (SHAPES[kind][0] // width, E + -(-case.tokens * TOP_K // 128))
    options = meta | {"num_warps": candidate["warps"], "num_stages": candidate["stages"]}
    return lambda **more: fn.run(*args, grid=grid, **options, **{"warmup": False, **more})


def time_us(torch, run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            run()
    graph.replay()
    taken = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 8 * 1e3)
    found = statistics.median(taken)
    if CLOCK:
        sustained(torch, graph, found)
    return found


CLOCK = []


def sustained(torch, graph, us):
    """Microseconds of a call in 0.3 s of calls, with the clock and the power after 0.2 s."""
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    count = int(0.3e6 / (4 * us))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    time.sleep(0.2)
    clock = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
    watts = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    end.synchronize()
    long_us = start.elapsed_time(end) / count / 4 * 1e3
    print(f"    sustained {long_us:.1f} us, {clock} MHz, {watts:.0f} W, reasons {reasons:#x}", flush=True)


def apart(y, wanted):
    return float((y.float() - wanted.float()).norm() / wanted.float().norm())


def report(case, kind, name, us, error, note=""):
    n, k = SHAPES[kind]
    rows = n * (2 if kind == "up" else 1)
    flops = 2.0 * case.tokens * TOP_K * rows * k
    bytes_ = 2.0 * (E * rows * k + case.tokens * TOP_K * (n + (k if kind == "down" else 0)))
    print(f"{case.tokens} | {kind} | {name} | {us:.1f} us | {flops / us / 1e6:.0f} TFLOP/s | {bytes_ / us / 1e6:.2f} TB/s | apart {error:.1e} {note}", flush=True)


def check_plan(torch, case, kind):
    """How far the plan's kernel is from fp32 products, for some experts."""
    worst = 0.0
    bounds = case.bounds.tolist()
    for expert in (0, 1, 100, 255):
        pairs = case.order[bounds[expert] : bounds[expert + 1]].long()
        if not len(pairs):
            continue
        w = case.w[kind][expert].float()
        if kind == "up":
            gate, up = (case.x[pairs // TOP_K].float() @ w.t()).chunk(2, -1)
            wanted = torch.nn.functional.silu(gate) * up
        else:
            wanted = case.h[pairs].float() @ w.t()
        worst = max(worst, apart(case.y[kind][pairs], wanted))
    return worst


def prepare(case, names, kinds):
    """Compile."""
    for kind in kinds:
        for name in ("plan", *names):
            if name != "torch":
                begun = time.perf_counter()
                try:
                    launcher(case, kind, name)(warmup=True)
                    taken = time.perf_counter() - begun
                    print(f"{kind} {name}: compiled in {taken:.1f} s", flush=True)
                except Exception as failure:
                    print(f"{kind} {name}: {type(failure).__name__}: {str(failure)[-1500:]}", flush=True)


def measure(torch, case, names, kinds, timed):
    for kind in kinds:
        y = case.y[kind]
        run = launcher(case, kind, "plan")
        y.fill_(float("nan"))
        run()
        wanted = y.clone()
        error = check_plan(torch, case, kind)
        report(case, kind, "plan", time_us(torch, run) if timed else 0.1, error, "(of fp32)")
        for name in names:
            try:
                if name == "torch":
                    grouped_mm(torch, case, kind)
                    continue
                run = launcher(case, kind, name)
                y.fill_(float("nan"))
                run()
                error = apart(y, wanted)
                again = [0.0]
                for _ in range(5 if not timed else 1):
                    y.fill_(float("nan"))
                    run()
                    again.append(apart(y, wanted))
                note = "" if int(case.counter) == 0 else "COUNTER NOT 0"
                report(case, kind, name, time_us(torch, run) if timed else 0.1, max(error, *again), note)
            except Exception as failure:
                print(f"{case.tokens} | {kind} | {name} | {type(failure).__name__}: {str(failure)[:300]}", flush=True)


def grouped_mm(torch, case, kind):
    """PyTorch's grouped product; of up without SwiGLU, behind a gather of the rows of x."""
    ends = case.bounds[1:].contiguous()
    w = case.w[kind].transpose(-2, -1)
    rows = case.order.long()
    if kind == "up":
        rows = rows // TOP_K
    sorted_ = (case.x if kind == "up" else case.h)[rows]
    out = torch._grouped_mm(sorted_, w, offs=ends)
    if kind == "down":
        error = apart(out, case.y["down"][case.order.long()])
    else:
        gate, up = out.float().chunk(2, -1)
        error = apart(torch.nn.functional.silu(gate) * up, case.y["up"][case.order.long()])
    report(case, kind, "torch", time_us(torch, lambda: torch._grouped_mm(sorted_, w, offs=ends)), error)
    if kind == "up":
        source = case.x
        report(case, kind, "torch with gather", time_us(torch, lambda: torch._grouped_mm(source[rows], w, offs=ends)), error)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="torch,flat,loop,ws,ce")
    parser.add_argument("--kinds", default="down,up")
    parser.add_argument("--tokens", default="8192,2048")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--lock", default="/tmp/experts.lock", help="who holds it has the GPU")
    parser.add_argument("--alarm", type=int, default=20, help="seconds after which it is given back")
    options = parser.parse_args()
    names, kinds = options.only.split(","), options.kinds.split(",")
    if options.clock:
        CLOCK.append(True)
    if options.compile:
        for name in names:
            for kind in kinds:
                if name.split(":")[0] in CANDIDATES:
                    compile_one(name, kind)
        return
    import torch

    random = torch.Generator("cuda").manual_seed(0)
    weights = {
        "up": torch.empty(E, 2 * I, H, device="cuda", dtype=torch.bfloat16).normal_(0, H**-0.5, generator=random),
        "down": torch.empty(E, H, I, device="cuda", dtype=torch.bfloat16).normal_(0, I**-0.5, generator=random),
    }
    with torch.inference_mode(), open(options.lock, "w") as lock:
        prepare(Case(torch, 8192, False, weights), names, kinds)
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(options.alarm)  # its default action ends a process that waits for a kernel
        for count in options.tokens.split(","):
            skewed = count.endswith("s")
            case = Case(torch, int(count.rstrip("s")), skewed, weights)
            print(f"{count} tokens: {int(case.counts.min())} to {int(case.counts.max())} of an expert", flush=True)
            measure(torch, case, names, kinds, timed=True)


if __name__ == "__main__":
    main()
