"""The machine of a spec, as far as the spec lets it be used."""

from __future__ import annotations

from dataclasses import replace

from tokenspeed_plan.planner.machines.hardware import (
    HardwareSpec,
    find_hardware,
    with_libraries,
    without_libraries,
)
from tokenspeed_plan.planner.spec import Spec

# Of GPU memory, in each direction between the prefix cache and its second tier on the host. To copy
# so much takes as long as hundreds of launches.
HOST_STAGING_BYTES = 64 << 20


def target_hardware(spec: Spec) -> HardwareSpec:
    """The spec's machine, with the libraries that the spec allows, and room for what it asks for.

    Raises:
        SpecError: there is no such machine, its profile is not one, or it has no price of a library
            that the spec names.
    """
    hardware = find_hardware(spec.target.gpu, spec.folder)
    libraries = spec.target.libraries
    if libraries == "none":
        hardware = without_libraries(hardware)
    elif isinstance(libraries, tuple):
        hardware = with_libraries(hardware, libraries)
    if spec.host_cache_bytes:
        reserved_bytes = hardware.reserved_bytes + 2 * HOST_STAGING_BYTES
        hardware = replace(hardware, reserved_bytes=reserved_bytes)
    return hardware
