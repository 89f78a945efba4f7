"""Finds the library functions that a plan names, and looks whether they are what it was made for.

A function must be of a release that the plan allows, and compute a small ragged batch as the
reference operators do. Where it is not, the plan says whether the kernel itself may run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.libraries import in_versions
from tokenspeed_plan.plans.schema import KernelSpec, LibraryCall, Plan
from tokenspeed_plan.runtime.compare import TOLERANCE, difference
from tokenspeed_plan.runtime.execution.backend import (
    LibraryKey,
    ReferenceBackend,
    execute,
    num_outputs,
)
from tokenspeed_plan.runtime.execution.kernels import Launcher, prepare_batch
from tokenspeed_plan.runtime.libraries import cublas, fa3, flashinfer
from tokenspeed_plan.runtime.libraries.sample_batch import sample_batch

Adapter = Callable[[KernelSpec], Launcher]
ADAPTERS: dict[str, Adapter] = {
    "cublas.linear": cublas.linear,
    "cublas.linear_fp8": cublas.linear_fp8,
    "fa3.attention_prefill": fa3.attention_prefill,
    "flashinfer.attention_prefill": flashinfer.PagedPrefill,
}


class _Unfit(Exception):
    """Why a function cannot run here."""


def load_libraries(plan: Plan, reference: ReferenceBackend) -> dict[LibraryKey, Launcher]:
    """The functions that the plan names and that are right here, by kernel and function.

    Where the plan allows its own kernels in their place, one line on standard error says why they
    run.

    Raises:
        PlanError: a function that the plan insists on is missing, of another release, or wrong.
    """
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    found: dict[LibraryKey, Launcher] = {}
    said: set[str] = set()
    for key, step in _distinct_calls(plan).items():
        try:
            found[key] = _load(step, kernels[step.kernel], plan, reference)
        except _Unfit as error:
            hint = f"install it: `pip install '{step.package}{step.versions}'`"
            if not step.fallback:
                raise PlanError(str(error), hint) from error
            if str(error) not in said:
                print(f"note: {error}; the plan's own kernels run instead", file=sys.stderr)
            said.add(str(error))
    return found


def _distinct_calls(plan: Plan) -> Mapping[LibraryKey, LibraryCall]:
    calls: dict[LibraryKey, LibraryCall] = {}
    for program in plan.pool.programs:
        for step in program.steps:
            if isinstance(step, LibraryCall):
                calls.setdefault((step.kernel, step.function), step)
    return calls


def _load(
    step: LibraryCall, kernel: KernelSpec, plan: Plan, reference: ReferenceBackend
) -> Launcher:
    """The function of a step, tried.

    Raises:
        _Unfit: with the reason.
    """
    _check_version(step)
    try:
        launcher = ADAPTERS[step.function](kernel)
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise _Unfit(f"`{step.package}` does not load: {reason}") from error
    _try_out(step, kernel, plan, reference, launcher)
    return launcher


def _check_version(step: LibraryCall) -> None:
    try:
        installed = version(step.package)
    except PackageNotFoundError as error:
        raise _Unfit(f"the plan calls `{step.package}`, which is not installed") from error
    if not in_versions(installed, step.versions):
        raise _Unfit(f"the plan calls `{step.package}` {step.versions}, installed is {installed}")


@torch.inference_mode()
def _try_out(
    step: LibraryCall,
    kernel: KernelSpec,
    plan: Plan,
    reference: ReferenceBackend,
    launcher: Launcher,
) -> None:
    """Both on one small batch: they must agree as a kernel and its reference do."""
    tensors = sample_batch(kernel, torch.device(plan.target.device))
    wanted = tuple(tensor.clone() for tensor in tensors)
    execute(reference.bind_kernel(kernel, wanted), num_outputs(kernel))
    try:
        prepare_batch(launcher, tensors)
        launcher({}, *tensors)
        errors = [difference(*pair) for pair in zip(tensors, wanted, strict=True)]
    except RuntimeError as reason:
        first = str(reason).splitlines()[0]
        raise _Unfit(f"`{step.package}` fails on a small batch: {first}") from reason
    for error in errors:
        if not error <= TOLERANCE[plan.model.dtype]:  # nor NaN
            raise _Unfit(f"`{step.package}` differs from the reference by {error:.2e}")
