"""Select: choose among the candidate tilings of each kernel by what the compiler reports.

A tiling fits when it compiles, spills no register and needs no more shared memory than a program
may have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tokenspeed_plan.codegen.build import Compiled
from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.errors import SpecError

Candidates = Mapping[str, Sequence[Built]]  # the tilings of each kernel by key, best first
Reports = Mapping[str, Compiled]  # what the compiler made of tilings, by their kernel's name


def select_unproved(candidates: Candidates, kept: Collection[str] = ()) -> dict[str, Built]:
    """The tiling of each kernel that an older bundle keeps, else the best; no proof that it fits.

    Args:
        candidates: of all programs.
        kept: names of the older bundle's kernels. A name stands for its text, so those that the
            compiler refused are not among them.
    """
    chosen = {}
    for key, tilings in candidates.items():
        chosen[key] = next((one for one in tilings if one.kernel.name in kept), tilings[0])
    return chosen


def unreported(candidates: Candidates, reports: Reports, hardware: HardwareSpec) -> list[Built]:
    """The next tiling to compile of each kernel for which none is known to fit.

    Raises:
        SpecError: no tiling of a kernel fits.
    """
    found = []
    for tilings in candidates.values():
        tiling = _first_open(tilings, reports, hardware)
        if tiling.source is not None and tiling.kernel.name not in reports:
            found.append(tiling)
    return found


def select(candidates: Candidates, reports: Reports, hardware: HardwareSpec) -> dict[str, Built]:
    """The first tiling of each kernel that fits; a kernel without a text needs no proof.

    Args:
        candidates: of all programs.
        reports: those that `unreported` asks for, until it asks for none.
        hardware: the target.

    Raises:
        SpecError: no tiling of a kernel fits.
    """
    chosen = {}
    for key, tilings in candidates.items():
        chosen[key] = _first_open(tilings, reports, hardware)
    return chosen


def _first_open(tilings: Sequence[Built], reports: Reports, hardware: HardwareSpec) -> Built:
    """The first tiling that fits, or that nothing is known of yet."""
    for tiling in tilings:
        report = reports.get(tiling.kernel.name)
        if report is None or fits(report, hardware):
            return tiling
    last = tilings[-1]
    raise _refusal(last, reports[last.kernel.name], hardware)


def fits(report: Compiled, hardware: HardwareSpec) -> bool:
    """Whether a compiled tiling can run well on the target."""
    if report.error or report.spill_bytes:
        return False
    return report.shared_bytes <= hardware.max_shared_bytes


def _refusal(built: Built, report: Compiled, hardware: HardwareSpec) -> SpecError:
    shared = f"{report.shared_bytes} of {hardware.max_shared_bytes} bytes of shared memory"
    why = report.error or f"spills {report.spill_bytes} bytes, needs {shared}"
    target = f"{hardware.name} (sm_{hardware.sm})"
    return SpecError(
        f"no tiling of kernel `{built.kernel.name}` fits {target}; the last: {why}",
        "`--no-compile` plans without this proof; please report the kernel",
    )
