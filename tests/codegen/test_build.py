"""Kernels for GPUs that are not here compile to the right instructions, and to the same bytes.

Tests that only read results use the user's cache, which planning the examples fills too; the others
compile into empty caches.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compiling import COMPILED_PLANS, CompiledKernels, job, plan_of, sample, sorts_of_kernels
from conftest import ROOT
from frozen_plans import frozen_plan

from tokenspeed_plan.codegen import build
from tokenspeed_plan.codegen.build import Compiled, Job, compile_all, default_cache
from tokenspeed_plan.codegen.kernel_builder import Built, build_kernel
from tokenspeed_plan.codegen.render import source_digest
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.compile import (
    build_bundle,
    compile_candidates,
    compile_plan,
    find_model,
)
from tokenspeed_plan.planner.graph import Stage
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec, find_hardware, known_profiles
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.config import load_preset
from tokenspeed_plan.planner.models.decoder import build as build_graph
from tokenspeed_plan.planner.models.quantization_config import Quantization
from tokenspeed_plan.planner.passes.cost import Load
from tokenspeed_plan.planner.passes.limits import CapacityOptions, plan_capacity
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.planner.passes.select import select
from tokenspeed_plan.planner.spec import SpeculationSpec, WorkloadSpec, load_spec
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import OPS
from tokenspeed_plan.plans.schema import (
    Call,
    GridDim,
    KernelCall,
    KernelSpec,
    Launch,
    Param,
    Plan,
    Program,
)
from tokenspeed_plan.plans.types import Phase, TensorSpec

H200_PLAN, B200_PLAN = "qwen3.5-35b-h200", "qwen3.5-397b-b200x8"
GPUS = {90: find_hardware("H200"), 100: find_hardware("B200")}

# The product instruction of each architecture. `mma.sync` is that of the one before Hopper.
PRODUCT = {90: "wgmma.mma", 100: "tcgen05.mma"}
ANY_PRODUCT = re.compile(r"\b(?:wgmma\.mma|tcgen05\.mma|mma\.sync)")
# Operators with products of many rows, however they are fused; those after `last_token` have a row
# a sequence.
MATRIX = {"attention", "delta_chunk", "delta_scan", "grouped_down", "grouped_up", "linear"}
WIDEST = 64  # these instructions need tiles of at least so many rows


def job_of(kind: str, sm: int = 90) -> Job:
    """The first kernel of a kind in the H200 plan."""
    return job(
        H200_PLAN,
        next(kernel for kernel in plan_of(H200_PLAN).kernels if kind_of(kernel) == kind),
        sm,
    )


def used(programs: Iterable[Program]) -> set[str]:
    """Names of the kernels that the programs call."""
    return {step.kernel for program in programs for step in program.steps if isinstance(step, Call)}


def phase_of(plan: Plan, phase: Phase) -> list[Program]:
    """Programs of a phase, the one with the most rows last."""
    return sorted(
        (program for program in plan.pool.programs if program.phase == phase),
        key=lambda program: program.bucket,
    )


def tilings_of(plan: Plan, kernel: KernelSpec, hardware: HardwareSpec) -> list[Built]:
    """The ways to build a kernel of a plan, for a GPU that need not be the plan's."""
    program = max(
        (one for one in plan.pool.programs if kernel.name in used([one])),
        key=lambda one: one.bucket,
    )
    # A tiling brings its own scratch.
    params = tuple(param for param in kernel.params if param.role != "scratch")
    plain = kernel.model_copy(update={"launch": None, "name": "", "params": params})
    rows = (program.max_tokens, program.max_seqs)
    return build_kernel(kind_of(kernel), plain, rows, hardware, program.phase != "prefill")


def settle(
    candidates: Mapping[str, Sequence[Built]], hardware: HardwareSpec, cache: Path
) -> dict[str, tuple[Built, Compiled]]:
    """The chosen tiling of each kernel, and the compiler's result for it."""
    reports = compile_candidates(candidates, hardware, cache)
    chosen = select(candidates, reports, hardware)
    return {key: (built, reports[built.kernel.name]) for key, built in chosen.items()}


Made = CompiledKernels


@pytest.fixture(scope="session")
def made() -> Made:
    """Kernels of the frozen plans, for both architectures."""
    return CompiledKernels()


@pytest.mark.slow
@pytest.mark.parametrize("sm", GPUS)
def test_each_sort_of_kernel_compiles_and_fits(sm: int, made: Made) -> None:
    """Those of the other GPU too that this one's plans do not have."""
    made.compile_all(sorts_of_kernels(sm), sm)
    for name, kernel in sorts_of_kernels(sm):
        result = made[name, kernel.name, sm]
        assert not result.error, (kernel.name, result.error)
        assert result.cubin.startswith(b"\x7fELF"), kernel.name
        assert f".target sm_{sm}a" in result.ptx, kernel.name
        assert result.shared_bytes <= GPUS[sm].max_shared_bytes, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_PLANS)
def test_the_compiler_still_makes_the_binaries_of_a_plan(name: str, made: Made) -> None:
    """A sample of those that the plan has digests of; `make check-plans` compiles all of them."""
    plan = plan_of(name)
    assert plan.kernel_compiler == build.compiler_name()
    binaries = {binary.kernel: binary for binary in plan.binaries}
    sampled = sample(plan)
    made.compile_all([(name, kernel) for kernel in sampled], plan.target.sm)
    for kernel in sampled:
        result, binary = made[name, kernel.name, plan.target.sm], binaries[kernel.name]
        assert sha256(result.cubin) == binary.cubin_sha256, kernel.name
        assert result.registers == binary.registers
        assert result.spill_bytes == binary.spill_bytes
        assert result.shared_bytes == binary.shared_bytes


@pytest.mark.slow
@pytest.mark.parametrize("sm", GPUS)
def test_latency_kernels_keep_their_values_in_registers(sm: int, made: Made) -> None:
    """Decode kernels do not spill. For the other GPU, one of its own tilings does not."""
    made.compile_all(sorts_of_kernels(sm), sm)
    for name, kernel in sorts_of_kernels(sm):
        plan = plan_of(name)
        programs = (program for program in plan.pool.programs if program.phase != "prefill")
        if kernel.name not in used(programs) or not made[name, kernel.name, sm].spill_bytes:
            continue
        assert plan.target.sm != sm, kernel.name
        tilings = tilings_of(plan, kernel, GPUS[sm])
        chosen = settle({kernel.name: tilings}, GPUS[sm], default_cache())
        assert chosen[kernel.name][1].spill_bytes == 0


def with_rows(kernel: KernelSpec, count: int) -> KernelSpec:
    """The kernel as in a plan whose decode steps have `count` queries of each sequence."""
    sizes = {
        "causal_conv_dst_state_slots": {1: count},
        "recompute_state_kept_inputs": {1: count},
        "recompute_state_kept_gates": {2: count},
    }
    params = []
    for param in (param for param in kernel.params if param.role != "scratch"):
        shape = list(param.tensor.shape)
        for dim, size in sizes.get(param.name, {}).items() if len(shape) > 1 else ():
            shape[dim] = size
        params.append(param.model_copy(update={"tensor": param.tensor.reshaped(tuple(shape))}))
    parts = [
        part.model_copy(update={"attrs": {**part.attrs, "query_len": count}})
        if "query_len" in OPS[part.kind].optional
        else part
        for part in kernel.parts
    ]
    return kernel.model_copy(
        update={"launch": None, "name": "", "params": tuple(params), "parts": tuple(parts)}
    )


@cache
def planned(rollback: str) -> Plan:
    """The frozen H200 plan, but with the given rollback of rejected drafts."""
    if plan_of(H200_PLAN).pool.limits.rollback == rollback:
        return plan_of(H200_PLAN)
    path = ROOT / "examples" / H200_PLAN / "spec.yaml"
    spec = load_spec(path)
    spec = spec.model_copy(update={"speculation": SpeculationSpec(rollback=rollback)})  # type: ignore[arg-type]
    return compile_plan(spec, find_model(spec, path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rollback", "step"), [("snapshot", "delta_step"), ("recompute", "delta_recompute")]
)
def test_several_queries_a_sequence_stay_in_registers(rollback: str, step: str) -> None:
    check_registers(rollback, step, 90, (2, 6))
    check_registers(rollback, step, 100, (6,))


def check_registers(rollback: str, step: str, sm: int, counts: tuple[int, ...]) -> None:
    """The first tiling compiles, spills nothing, and has the newer instructions if it is large.

    The delta rule also holds a state in registers: where its first tiling spills, the second does
    not.
    """
    plan = planned(rollback)
    decode = used(phase_of(plan, "decode")[:1])
    kinds = {"attention_gate", step}
    kernels = [
        kernel for kernel in plan.kernels if kernel.name in decode and kind_of(kernel) in kinds
    ]
    assert {kind_of(kernel) for kernel in kernels} == kinds
    candidates = {}
    for kernel, count in itertools.product(kernels, counts):
        tilings = build_kernel(
            kind_of(kernel), with_rows(kernel, count), (count, 1), GPUS[sm], True
        )
        candidates[tilings[0].kernel.name] = tilings
    for key, (built, report) in settle(candidates, GPUS[sm], default_cache()).items():
        launch = built.kernel.launch
        assert launch is not None
        assert built in candidates[key][: 2 if kind_of(built.kernel) == step else 1]
        assert launch.constants["QUERY_LEN"] in counts
        narrow = int(launch.constants.get("BLOCK_G", 0)) < WIDEST
        assert set(ANY_PRODUCT.findall(report.ptx)) <= {"mma.sync" if narrow else PRODUCT[sm]}


@pytest.mark.slow
def test_the_demo_model_is_planned_for_a_gpu() -> None:
    """The CPU tiles of its frozen plan spill in prefill; tiles planned for a GPU do not."""
    path = ROOT / "examples/demo/spec.yaml"
    spec = load_spec(path)
    spec = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"weights": "bf16"}),
            "target": spec.target.model_copy(update={"gpu": "H200"}),
        }
    )
    bundle = build_bundle(spec, find_model(spec, path), default_cache())
    assert {binary.kernel for binary in bundle.plan.binaries} == {
        kernel.name for kernel in bundle.plan.kernels
    }
    assert len(bundle.cubins) == len(bundle.sources) == len(bundle.plan.binaries) > 30
    assert sum(binary.spill_bytes for binary in bundle.plan.binaries) == 0


# Kinds that exist only in programs that draft, or that take other state slots or query lengths
# there.
DRAFTING = {
    "accept",
    "advance_rows",
    "conv_qk_norm",
    "delta_scan",
    "draft",
    "draft_then_place",
    "embed_norm_concat",
    "last_rows",
    "sample",
    "select_rows",
    "shift_tokens",
}


def drafts(kernel: KernelSpec) -> bool:
    """Whether a kernel is one of `DRAFTING`, or has an output row for each sequence."""
    rows = {param.tensor.shape[0] for param in kernel.params if param.role == "output"}
    return kernel.launch is not None and (kind_of(kernel) in DRAFTING or "num_seqs" in rows)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_kernels_of_drafts_fit_and_keep_their_values_in_registers(gpu: str) -> None:
    """Three drafts of three sequences, in decode and after a prefill: no frozen plan has them."""
    hardware = find_hardware(gpu)
    config, _ = load_preset("qwen3.5-35b-a3b")
    limits = plan_capacity(WorkloadSpec(concurrency=1), config, hardware, CapacityOptions(depth=3))
    context = BuildContext(config, "bf16", limits, config.vocab_size, lambda prefix: True)
    phases: dict[Phase, int] = {"decode": 12, "prefill": 2048}
    candidates: dict[str, tuple[Built, ...]] = {}
    for phase, tokens in phases.items():
        passes = PassContext(
            ParallelLayout(1, 1, 1),
            hardware,
            tokens,
            3,
            Load(tokens, 3, 4096),
            options=PassOptions(num_streams=1),
        )
        lowered = run(build_graph(context, phase, 3), passes, Stage.LOWERED)
        candidates |= lowered.candidates
    drafting = {key: tilings for key, tilings in candidates.items() if drafts(tilings[0].kernel)}
    assert {kind_of(tilings[0].kernel) for tilings in drafting.values()} > DRAFTING
    # Refuses what fits in no tiling, or spills.
    chosen = settle(drafting, hardware, default_cache())
    assert chosen.keys() == drafting.keys()
    assert all(report.cubin for _, report in chosen.values())
    assert sum(report.spill_bytes for _, report in chosen.values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sm", GPUS)
def test_products_of_many_rows_use_the_tensor_cores_of_their_gpu(sm: int, made: Made) -> None:
    """All products of such a kernel use them, not only one."""
    made.compile_all(sorts_of_kernels(sm), sm)
    seen: set[str] = set()
    for name, kernel in sorts_of_kernels(sm):
        plan = plan_of(name)
        if kernel.name not in used(phase_of(plan, "prefill")[-1:]):
            continue
        parts = {part.kind for part in kernel.parts}
        of_all_rows = all(
            p.tensor.shape[0] == "num_tokens" for p in kernel.params if p.role == "output"
        )
        if parts & MATRIX and "last_token" not in parts and of_all_rows:
            assert set(ANY_PRODUCT.findall(made[name, kernel.name, sm].ptx)) == {PRODUCT[sm]}, (
                kernel.name
            )
            seen |= parts & MATRIX
    assert seen == MATRIX


@pytest.mark.slow
@pytest.mark.parametrize("sm", GPUS)
def test_older_instructions_are_for_few_rows_only(sm: int, made: Made) -> None:
    """Where `mma.sync` is left, the tile has fewer rows than the newer instructions take."""
    made.compile_all(sorts_of_kernels(sm), sm)
    for name, kernel in sorts_of_kernels(sm):
        if "mma.sync" in ANY_PRODUCT.findall(made[name, kernel.name, sm].ptx):
            assert kernel.launch is not None
            constants = kernel.launch.constants
            assert int(constants.get("BLOCK_M", constants.get("BLOCK_G", WIDEST))) < WIDEST, (
                kernel.name
            )


# With products, with helper functions, with many constants.
PROBED = ("delta_scan", "qk_norm_rope_write", "topk", "linear_silu_mul")
PROBE = """
import json, sys
from pathlib import Path
from tokenspeed_plan.codegen.build import Job, compile_all
from tokenspeed_plan.plans.canon import sha256
from tokenspeed_plan.plans.kernel_file import kind_of, read_source
from tokenspeed_plan.plans.bundle import load_plan

bundle = Path(sys.argv[1])
kernels = {kind_of(kernel): kernel for kernel in reversed(load_plan(bundle).kernels)}
sm = int(sys.argv[3])
jobs = {kind: Job(kernels[kind], read_source(bundle, kernels[kind]), sm) for kind in sys.argv[4:]}
made = compile_all(jobs.values(), Path(sys.argv[2]))
results = {kind: (job.key, made[job.key]) for kind, job in jobs.items()}
print(json.dumps({kind: [key, sha256(r.cubin), r.error] for kind, (key, r) in results.items()}))
"""
Result = dict[str, list[str]]


def probe(
    work: Path,
    kept: Path,
    plan: str = H200_PLAN,
    sm: int = 90,
    kinds: tuple[str, ...] = PROBED,
    **environment: str,
) -> subprocess.Popen[str]:
    """Compile kernels in a process of its own, working in `work`, with results in `kept`."""
    work.mkdir(exist_ok=True)
    bundle = ROOT / "plans/frozen" / plan
    command = [sys.executable, "-c", PROBE, str(bundle), str(kept), str(sm), *kinds]
    return subprocess.Popen(
        command, cwd=work, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> Result:
    """The last line that it printed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    result: Result = json.loads(output.splitlines()[-1])
    return result


def expected(made: Made) -> Result:
    """The digests that this process gets with the user's cache."""
    jobs = {kind: job_of(kind) for kind in PROBED}
    results = {kind: made[H200_PLAN, one.kernel.name, one.sm] for kind, one in jobs.items()}
    return {kind: [one.key, sha256(results[kind].cubin), ""] for kind, one in jobs.items()}


@pytest.mark.slow
def test_same_bytes_in_any_folder_and_hash_order(made: Made, tmp_path: Path) -> None:
    runs = [
        probe(tmp_path / seed, tmp_path / f"cache {seed}", PYTHONHASHSEED=seed)
        for seed in ("1", "4711")
    ]
    assert [answer(run) for run in runs] == [expected(made)] * 2


@pytest.mark.slow
def test_the_length_of_a_path_has_no_say(tmp_path: Path) -> None:
    """The compiler for sm_100 is told no path: its length would move what it allocates by."""
    runs = []
    for length in (1, 33):
        folder = tmp_path / ("x" * length)
        folder.mkdir()
        kinds = ("linear", "grouped_up")
        cache = tmp_path / f"cache {length}"
        runs.append(probe(folder, cache, B200_PLAN, 100, kinds, TMPDIR=str(folder)))
    found = [answer(run) for run in runs]
    assert found == found[:1] * 2


@pytest.mark.slow
def test_the_environment_has_no_say(made: Made, tmp_path: Path) -> None:
    """Each of these variables would change the code of a cache entry that later plans trust."""
    switches = {
        "DISABLE_LLVM_OPT": "1",
        "PTXAS_OPTIONS": "-O1",
        "DISABLE_MMA_V3": "1",
        "TRITON_OVERRIDE_ARCH": "sm80",
        "TRITON_INSTRUMENTATION_MODE": "consan",
        "TRITON_INTERPRET": "1",
    }
    assert answer(probe(tmp_path / "work", tmp_path / "cache", **switches)) == expected(made)


# Where libc's `printf` lies in a new process.
ADDRESS = """
import ctypes
print(ctypes.cast(ctypes.CDLL(None).printf, ctypes.c_void_p).value)
"""
# Whether the system lets a process switch address space randomisation off, as containers may not.
MAY_SWITCH_OFF = f"""
import ctypes
libc = ctypes.CDLL(None)
print(hasattr(libc, "personality") and libc.personality({build.ADDR_NO_RANDOMIZE}) != -1)
"""


def test_programs_of_a_worker_run_without_address_space_randomisation() -> None:
    """As `ptxas` does: two programs that a worker starts have their libraries in the same place."""

    def command(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    allowed = subprocess.run(command(MAY_SWITCH_OFF), capture_output=True, text=True, check=True)
    if allowed.stdout.strip() != "True":
        pytest.skip("personality(2) is refused here")
    with build.compiler_processes(1) as worker:
        programs = [
            worker.submit(subprocess.check_output, command(ADDRESS), text=True) for _ in range(3)
        ]
        addresses = {program.result() for program in programs}
    assert len(addresses) == 1


def no_compiler(missing: list[Job], folder: Path) -> dict[str, Compiled]:
    raise AssertionError(f"not in the cache: {[one.kernel.name for one in missing]}")


@pytest.mark.slow
def test_two_processes_share_a_cache(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    runs = [probe(tmp_path, folder), probe(tmp_path, folder)]
    assert [answer(run) for run in runs] == [expected(made)] * 2
    assert len(list(folder.iterdir())) == 2 * len(PROBED), (
        "a binary and a report each, and no drafts"
    )
    monkeypatch.setattr(build, "_compile_missing", no_compiler)
    jobs = [job_of(kind) for kind in PROBED]
    assert compile_all(jobs, folder) == {
        one.key: made[H200_PLAN, one.kernel.name, one.sm] for one in jobs
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Change a byte in the middle; the length stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def misstate(path: Path) -> None:
    """Change the shared memory in a report, which stays valid JSON."""
    text = path.read_text()
    assert '"shared_bytes": ' in text
    path.write_text(text.replace('"shared_bytes": ', '"shared_bytes": 1'))


def swap(path: Path) -> None:
    """Put a valid entry of another kernel in its place."""
    other = next(one for one in sorted(path.parent.glob("*.json")) if one.stem != path.stem)
    for file in (path, path.with_suffix(".cubin")):
        file.write_bytes(other.with_suffix(file.suffix).read_bytes())


def put(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "binary cut": ("cubin", truncate),
    "binary altered": ("cubin", flip),
    "binary empty": ("cubin", put(b"")),
    "binary gone": ("cubin", Path.unlink),
    "report cut": ("json", truncate),
    "report altered": ("json", flip),
    "report misstates": ("json", misstate),
    "report is a number": ("json", put(b"7")),
    "report is not text": ("json", put(b"\xff\xfe")),
    "report is deep": ("json", put(b"[" * 100_000)),
    "report has a huge number": ("json", put(b'{"digest": 1' + b"0" * 10_000 + b"}")),
    "report gone": ("json", Path.unlink),
    "entry of another": ("json", swap),
}


def made_up(one: Job) -> Compiled:
    """What a compiler could have answered."""
    return Compiled(f"\x7fELF {one.key}".encode() * 20, f"ptx of {one.key}", 32, 0, 2048)


def write_entries(jobs: list[Job], folder: Path) -> dict[str, Compiled]:
    """A cache that holds made-up results of the jobs."""
    build.open_cache(folder)
    for one in jobs:
        build._remember(folder, one.key, made_up(one))
    return {one.key: made_up(one) for one in jobs}


def compiled_again(jobs: list[Job], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that `compile_all` does not take from the cache."""
    asked: list[Job] = []

    def compiler(missing: list[Job], folder: Path) -> dict[str, Compiled]:
        asked.extend(missing)
        return {one.key: made_up(one) for one in missing}

    monkeypatch.setattr(build, "_compile_missing", compiler)
    assert compile_all(jobs, folder) == {one.key: made_up(one) for one in jobs}
    return asked


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the damaged entry is compiled again."""
    jobs, folder = [job_of("topk"), job_of("embed")], tmp_path / "cache"
    write_entries(jobs, folder)
    assert compiled_again(jobs, folder, monkeypatch) == []
    suffix, hurt = DAMAGES[damage]
    hurt(folder / f"{jobs[0].key}.{suffix}")
    assert compiled_again(jobs, folder, monkeypatch) == jobs[:1]


FACTS: dict[str, Any] = {
    "ptx": "",
    "registers": 32,
    "spill_bytes": 0,
    "shared_bytes": 0,
    "error": "",
}


@pytest.mark.parametrize(
    "facts",
    [
        FACTS | {"registers": "32"},
        FACTS | {"registers": True},
        FACTS | {"shared_bytes": 1e9},
        FACTS | {"ptx": None},
        FACTS | {"cubin": "more"},
        {"ptx": ""},
        [],
        7,
    ],
)
def test_facts_of_another_form_are_a_miss(
    facts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the digest of the entry fits them."""
    one = job_of("topk")
    write_entries([one], tmp_path)
    digest = build._digest(one.key, facts, made_up(one).cubin)
    (tmp_path / f"{one.key}.json").write_text(json.dumps({"digest": digest, "facts": facts}))
    assert compiled_again([one], tmp_path, monkeypatch) == [one]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    one, folder = job_of("topk"), tmp_path / "cache"
    wanted = write_entries([one], folder)
    assert compile_all([one], folder) == wanted
    folder.chmod(mode)
    with pytest.raises(SpecError, match=rf"others can write .*\(mode {mode:o}, ") as caught:
        compile_all([one], folder)
    assert "TOKENSPEED_CACHE" in caught.value.hint


@pytest.mark.parametrize("suffix", ["cubin", "json"])
def test_an_entry_that_others_can_have_written_is_a_miss(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = job_of("topk"), tmp_path / "cache"
    write_entries([one], folder)
    path = folder / f"{one.key}.{suffix}"
    assert [file.stat().st_mode & 0o777 for file in (folder, path)] == [0o700, 0o600]
    path.chmod(0o620)
    assert compiled_again([one], folder, monkeypatch) == [one]
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert compiled_again([one], folder, monkeypatch) == [one]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_cache_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = job_of("topk"), tmp_path / "cache"
    write_entries([one], folder)
    os.chown(folder / f"{one.key}.json", 65534, -1)
    assert compiled_again([one], folder, monkeypatch) == [one]
    os.chown(folder, 65534, -1)
    with pytest.raises(SpecError, match="of user 65534"):
        compile_all([one], folder)


# A script of its own: unlike `python -c`, it does not look into the current folder itself.
WORKERS = """
import os, sys
from tokenspeed_plan.codegen.build import compiler_processes

if __name__ == "__main__":
    with compiler_processes(1) as pool:
        assert pool.submit(sum, (1, 2)).result() == 3
"""


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "main.py").write_text(WORKERS)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("multiprocessing", "pickle", "triton", "tokenspeed_plan"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    path = os.pathsep.join(one for one in sys.path if one)
    command = [sys.executable, str(script / "main.py")]
    subprocess.run(command, cwd=here, env=os.environ | {"PYTHONPATH": path}, check=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_damaged_entry_is_replaced(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real compiler makes the right bytes again, and they are kept."""
    jobs = [job_of("topk"), job_of("embed")]
    right = {one.key: made[H200_PLAN, one.kernel.name, 90] for one in jobs}
    folder = tmp_path / "cache"
    build.open_cache(folder)
    for key, result in right.items():
        build._remember(folder, key, result)
    flip(tmp_path / "cache" / f"{jobs[0].key}.cubin")
    truncate(tmp_path / "cache" / f"{jobs[1].key}.json")
    assert compile_all(jobs, tmp_path / "cache") == right
    monkeypatch.setattr(build, "_compile_missing", no_compiler)
    assert compile_all(jobs, tmp_path / "cache") == right


def altered(text: str, name: str = "wide_1", block: int = 128) -> Job:
    """A kernel of our own: y = x - sum(x) over `block` numbers, by one warp."""
    tensor = TensorSpec.of(shape=(block,), dtype="fp32")
    params = (
        Param(name="x", role="input", tensor=tensor),
        Param(name="y", role="output", tensor=tensor),
    )
    launch = Launch(
        template="",
        constants={},
        grid=(GridDim(fixed=1),),
        num_warps=1,
        num_stages=1,
        pdl=False,
        source_sha256=source_digest(text),
    )
    return Job(KernelSpec(name=name, params=params, parts=(), launch=launch), text, 90)


WIDE = """
import triton
import triton.language as tl


@triton.jit
def wide(x, y, num_tokens, num_seqs):
    n = tl.arange(0, {block})
    a = tl.load(x + n)
    tl.store(y + n, a - tl.sum(a, 0))
"""


def wide(block: int) -> Built:
    """A tiling that spills for large blocks, as each number waits in a register for the sum."""
    one = altered(WIDE.format(block=block), f"wide_{block}", block)
    return Built(one.kernel, one.source)


@pytest.mark.slow
def test_a_failure_is_reported_and_not_cached(tmp_path: Path) -> None:
    """The machine may be the cause: a full disk today must not choose tomorrow's tiling."""
    bad = altered(WIDE.format(block=100))
    results = compile_all([bad], tmp_path)
    assert "power of 2" in results[bad.key].error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dead_worker_is_an_error_of_ours(tmp_path: Path) -> None:
    deadly = altered("import os\n\nos._exit(9)\n")
    with pytest.raises(SpecError, match="a worker process died") as caught:
        compile_all([deadly], tmp_path)
    assert "--no-compile" in caught.value.hint


def is_prefill_attention(kernel: KernelSpec) -> bool:
    return kernel.launch is not None and kernel.launch.template == "attention_prefill"


@pytest.mark.parametrize("bucket", [1024, 4176])
def test_products_of_many_rows_fill_the_machine(bucket: int) -> None:
    """Also those with few columns, such as a router's: their tiles are smaller."""
    plan = load_plan(ROOT / "plans/frozen/qwen3.5-122b-h200x2")
    hardware = find_hardware("H200")
    (program,) = (p for p in plan.pool.programs if (p.phase, p.bucket) == ("prefill", bucket))
    names = {step.kernel for step in program.steps if isinstance(step, KernelCall)}
    found = 0
    for kernel in plan.kernels:
        if kernel.name in names and kernel.launch and kernel.launch.template == "linear":
            params = tuple(param for param in kernel.params if param.role != "scratch")
            plain = kernel.model_copy(update={"name": "", "launch": None, "params": params})
            size = (program.max_tokens, program.max_seqs)
            launch = build_kernel(kind_of(kernel), plain, size, hardware, False)[0].kernel.launch
            assert launch is not None
            sizes = launch.constants
            rows = -(-bucket // int(sizes["BLOCK_M"]))
            programs = rows * -(-int(sizes["N"]) // int(sizes["BLOCK_N"]))
            is_per_token = "last_token" not in {part.kind for part in kernel.parts}
            if is_per_token and int(sizes["N"]) > 64:
                assert programs >= 0.7 * hardware.num_sms, kernel.name
                found += 1
    assert found > 5


@pytest.mark.slow
def test_the_next_tiling_is_taken_where_shared_memory_is_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill attention's last tiling is its smallest: with just enough for that, it is the one."""
    plan, hardware = plan_of(H200_PLAN), find_hardware("H200")
    tilings = tilings_of(plan, next(filter(is_prefill_attention, plan.kernels)), hardware)
    jobs = [Job(tiling.kernel, tiling.source or "", 90) for tiling in tilings]
    results = compile_all(jobs, default_cache())
    *others, least = (results[one.key].shared_bytes for one in jobs)
    assert 0 < least < min(others)
    small = replace(hardware, max_shared_bytes=least)
    tried: list[str] = []

    def compiler(asked: Iterable[Job], folder: Path) -> dict[str, Compiled]:
        asked = list(asked)
        tried.extend(one.kernel.name for one in asked)
        return compile_all(asked, folder)

    monkeypatch.setattr("tokenspeed_plan.planner.compile.compile_all", compiler)
    chosen = settle({"attention": tilings}, small, default_cache())
    assert chosen == {"attention": (tilings[-1], results[jobs[-1].key])}
    assert tried == [tiling.kernel.name for tiling in tilings], "each only after the one before it"
    tried.clear()
    assert settle({"attention": tilings}, hardware, default_cache())["attention"][0] is tilings[0]
    assert tried == [tilings[0].kernel.name]


@pytest.mark.slow
def test_the_next_tiling_is_taken_where_one_spills(tmp_path: Path) -> None:
    tilings = [wide(32768), wide(16384), wide(128), wide(64)]
    built, report = settle({"wide": tilings}, find_hardware("H200"), tmp_path)["wide"]
    assert built is tilings[2]
    assert report.spill_bytes == 0


@pytest.mark.slow
def test_a_kernel_that_fits_in_no_tiling_is_refused(tmp_path: Path) -> None:
    tilings = [wide(32768), wide(16384)]
    with pytest.raises(
        SpecError, match=r"^error: no tiling of kernel `wide_16384` fits H200 \(sm_90\)"
    ) as caught:
        compile_candidates({"wide": tilings}, find_hardware("H200"), tmp_path)
    assert re.search(
        r"spills [1-9]\d* bytes, needs \d+ of 232448 bytes of shared memory$", caught.value.message
    )
    assert "--no-compile" in caught.value.hint


@pytest.mark.slow
def test_planning_refuses_what_does_not_fit_unless_told_not_to_look(tmp_path: Path) -> None:
    profile = tmp_path / "small.yaml"
    profile.write_text(known_profiles()["h200"].replace("232_448", "1024"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"version: 1\nmodel: {{preset: qwen3-0.6b}}\ntarget: {{gpu: {profile}}}\n")
    command = ["plan", str(spec), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert refused.output.startswith("error: no tiling of kernel `")
    assert refused.output.count("error:") == 1
    assert not (tmp_path / "out").exists()
    planned = CliRunner().invoke(main, [*command, "--no-compile"])
    assert planned.exit_code == 0, planned.output
    plan = load_plan(tmp_path / "out")
    assert (plan.binaries, plan.kernel_compiler) == ((), "")
    assert not (tmp_path / "out/cubin").exists()


FP8_PRODUCT = {90: r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", 100: r"tcgen05\.mma\S*kind::f8f6f4"}


@pytest.mark.slow
@pytest.mark.parametrize("sm", [90, 100])
def test_quantised_products_use_the_instruction_of_fp8(sm: int) -> None:
    """With a sum of its own for each block: no product adds to the sum of the one before."""
    config, _ = load_preset("qwen3-0.6b")
    config = replace(config, layer_types=config.layer_types[:1])
    capacity = plan_capacity(WorkloadSpec(concurrency=1), config, GPUS[sm], CapacityOptions())
    context = BuildContext(
        config,
        "bf16",
        capacity,
        config.vocab_size,
        lambda prefix: False,
        encoding=Quantization().encoding_of,
    )
    passes = PassContext(
        ParallelLayout(1, 1, 1), GPUS[sm], 1024, 1, options=PassOptions(quantises=True)
    )
    graph = run(build_graph(context, "prefill"), passes, Stage.LOWERED)
    found = {
        key: tilings
        for key, tilings in graph.candidates.items()
        if kind_of(tilings[0].kernel) in ("linear", "linear_silu_mul")
    }
    # Where cuBLAS may take the output product, the norm behind it adds the residual.
    assert len(found) == {90: 3, 100: 2}[sm]
    for _, compiled in settle(found, GPUS[sm], default_cache()).values():
        assert re.search(FP8_PRODUCT[sm], compiled.ptx)
        assert "mma.sync" not in compiled.ptx


def test_more_rows_than_were_measured_have_the_tiles_of_the_most() -> None:
    """A chunk that divides a prompt is no power of two, and may be longer than any measured one."""
    plan = frozen_plan("qwen3.5-35b-h200")
    kinds = ("linear", "linear_add", "linear_silu_mul", "expert_sum_linear_add")
    kernels = [each for each in plan.kernels if kind_of(each) in kinds]
    assert {kind_of(each) for each in kernels} == set(kinds)
    for kernel in kernels:
        tiles = [
            build_kernel(kind_of(kernel), kernel, (rows, 4), GPUS[90], True)[0].kernel.launch
            for rows in (8192, 16704)
        ]
        few, many = [tile.constants for tile in tiles if tile is not None]
        assert few == many
