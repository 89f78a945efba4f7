"""The machine of a spec, as far as the spec lets it be used."""

from __future__ import annotations

from tokenspeed_plan.planner.machines.hardware import (
    HardwareSpec,
    find_hardware,
    with_libraries,
    without_libraries,
)
from tokenspeed_plan.planner.spec import Spec


def target_hardware(spec: Spec) -> HardwareSpec:
    """The spec's machine, with the libraries that the spec allows.

    Raises:
        SpecError: there is no such machine, its profile is not one, or it has no price of a library
            that the spec names.
    """
    hardware = find_hardware(spec.target.gpu, spec.folder)
    libraries = spec.target.libraries
    if libraries == "none":
        return without_libraries(hardware)
    if isinstance(libraries, tuple):
        return with_libraries(hardware, libraries)
    return hardware
