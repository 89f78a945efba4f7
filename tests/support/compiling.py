"""Compiled kernels that all tests of a run share: the first process that needs one compiles it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from conftest import ROOT

from tokenspeed_plan.codegen.build import Compiled, Job, compile_all, default_cache, open_cache
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.kernel_file import kind_of, read_source
from tokenspeed_plan.plans.schema import Call, KernelSpec, Plan

FROZEN = ROOT / "plans/frozen"
# Plans whose kernels are compiled; those with most sorts of kernels first.
COMPILED_PLANS = (
    "qwen3.5-35b-h200",
    "qwen3.5-397b-b200x8",
    "qwen3.5-35b-fp8-h200",
    "qwen3.5-122b-h200x2",
)
SAMPLE = 10  # kernels of a plan whose binaries are made again
Key = tuple[str, str, int]  # plan, kernel, sm
Named = tuple[str, KernelSpec]  # plan, and one of its kernels


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Keep other tests of this run from compiling meanwhile.

    The compiler uses all cores anyway, and a test that waits finds the kernels in the cache.
    """
    open_cache(default_cache())
    with (default_cache() / ".tests").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def plan_of(name: str) -> Plan:
    """A frozen plan."""
    return load_plan(FROZEN / name)


def job(name: str, kernel: KernelSpec, sm: int) -> Job:
    """A kernel of a frozen plan, for a GPU that need not be the plan's."""
    return Job(kernel, read_source(FROZEN / name, kernel), sm)


def sample(plan: Plan) -> list[KernelSpec]:
    """Some kernels of a plan, chosen by the digests in their names, which change with texts."""
    return sorted(plan.kernels, key=lambda kernel: kernel.name.rpartition("_")[2])[:SAMPLE]


@cache
def sorts_of_kernels(sm: int) -> tuple[Named, ...]:
    """One kernel of each sort that the frozen plans have, the one of most rows.

    A sort is a kind, in prefill or not, with weights in the same formats. Plans for the GPU itself
    come first; of the others are the sorts that only they have, and that are no texts for one GPU
    alone. To compile the rest, which differ in sizes, takes minutes; planning a model proves that
    they fit.
    """
    found: dict[tuple[str, bool, frozenset[str]], Named] = {}
    for name in sorted(COMPILED_PLANS, key=lambda name: plan_of(name).target.sm != sm):
        plan = plan_of(name)
        kernels = {kernel.name: kernel for kernel in plan.kernels}
        for program in sorted(plan.pool.programs, key=lambda program: -program.bucket):
            for step in program.steps:
                if isinstance(step, Call):
                    kernel = kernels[step.kernel]
                    sort = (kind_of(kernel), program.phase == "prefill", weight_formats(kernel))
                    if plan.target.sm == sm or not is_gluon(name, kernel):
                        found.setdefault(sort, (name, kernel))
    return tuple(found.values())


def is_gluon(name: str, kernel: KernelSpec) -> bool:
    """Whether a kernel's text names the instructions of one architecture."""
    return "experimental.gluon" in read_source(FROZEN / name, kernel)


def weight_formats(kernel: KernelSpec) -> frozenset[str]:
    """Number formats of a kernel's weights."""
    return frozenset(param.tensor.dtype for param in kernel.params if param.role == "weight")


class CompiledKernels(dict[Key, Compiled]):
    """(plan, kernel, sm) -> the compiler's result; a kernel is compiled at its first look-up."""

    def __missing__(self, key: Key) -> Compiled:
        name, wanted, sm = key
        kernels = [(name, one) for one in plan_of(name).kernels if one.name == wanted]
        self.compile_all(kernels, sm)
        return self[key]

    def compile_all(self, kernels: Iterable[Named], sm: int) -> None:
        """Compile kernels of plans in one go, which is faster than one by one."""
        jobs = {
            (name, kernel.name, sm): job(name, kernel, sm)
            for name, kernel in kernels
            if (name, kernel.name, sm) not in self
        }
        with compiling_alone():
            results = compile_all(jobs.values(), default_cache())
        self |= {key: results[one.key] for key, one in jobs.items()}
