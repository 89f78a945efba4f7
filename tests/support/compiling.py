"""Compiled kernels that all tests of a run share: the first process that needs one compiles it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from conftest import ROOT

from tokenspeed_plan.codegen.build import Compiled, Job, compile_all, default_cache, open_cache
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.kernel_file import read_source
from tokenspeed_plan.plans.schema import KernelSpec, Plan

FROZEN = ROOT / "plans/frozen"
Key = tuple[str, str, int]  # plan, kernel, sm


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


class CompiledKernels(dict[Key, Compiled]):
    """(plan, kernel, sm) -> the compiler's result; a kernel is compiled at its first look-up."""

    def __missing__(self, key: Key) -> Compiled:
        name, wanted, sm = key
        self._compile(name, sm, [one for one in plan_of(name).kernels if one.name == wanted])
        return self[key]

    def compile_plan(self, name: str, sm: int) -> None:
        """Compile every kernel of a plan in one go, which is faster than one by one."""
        self._compile(name, sm, plan_of(name).kernels)

    def _compile(self, name: str, sm: int, kernels: Iterable[KernelSpec]) -> None:
        jobs = {
            (name, kernel.name, sm): job(name, kernel, sm)
            for kernel in kernels
            if (name, kernel.name, sm) not in self
        }
        with compiling_alone():
            results = compile_all(jobs.values(), default_cache())
        self |= {key: results[one.key] for key, one in jobs.items()}
