"""The machine of a spec, as far as the spec lets it be used."""

from __future__ import annotations

from tokenspeed_plan.planner.machines.hardware import (
    HardwareSpec,
    find_hardware,
    without_libraries,
)
from tokenspeed_plan.planner.spec import Spec


def target_hardware(spec: Spec) -> HardwareSpec:
    """The spec's machine, with the libraries that the spec allows.

    Raises:
        SpecError: there is no such machine, or its profile is not one.
    """
    hardware = find_hardware(spec.target.gpu, spec.folder)
    if spec.target.libraries == "none":
        return without_libraries(hardware)
    return hardware
