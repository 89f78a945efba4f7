"""What the kernels of an engine cost by themselves, by machine and class of operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.foreign_yaml import parse_yaml, read_file
from tokenspeed_plan.planner.machines.hardware import FORMAT_CLASSES, OP_CLASSES, HardwareSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import first_complaint

HINT = "`benchmarks/kernel_prices.py` writes such a file"
Positive = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]
_Model = TypeVar("_Model", bound=BaseModel)
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class KernelPrice(BaseModel):
    """What a kernel loses besides its launch, its busy time over the roofline's, and the error.

    `error`: of the line that these two draw, as a share of the time of its samples.
    """

    model_config = _FROZEN

    wait: NotNegative
    residual: Positive
    error: NotNegative


class MachineKernels(BaseModel):
    """The prices on one machine."""

    model_config = _FROZEN

    launch_us: Positive
    classes: dict[str, KernelPrice]

    def on(self, hardware: HardwareSpec) -> HardwareSpec:
        """The machine with these prices, its own where a class has none here; no libraries."""
        waits = {name: price.wait for name, price in self.classes.items()}
        residuals = {name: price.residual for name, price in self.classes.items()}
        own = {*OP_CLASSES, *self.classes}
        return replace(
            hardware,
            launch_us=self.launch_us,
            waits_us=_only(own, {**hardware.waits_us, **waits}),
            residuals=_only(own, {**hardware.residuals, **residuals}),
            matrix_residuals={},
            libraries={},
            whole_tiles=True,
        )


class EngineKernels(BaseModel):
    """The prices of an engine's kernels on each machine where they were measured."""

    model_config = _FROZEN

    name: str
    source: Annotated[str, Field(min_length=1)]
    machines: dict[str, MachineKernels]

    def on(self, hardware: HardwareSpec) -> HardwareSpec:
        """The machine with these prices; as it is, where nobody measured them."""
        if hardware.name not in self.machines:
            return hardware
        return self.machines[hardware.name].on(hardware)


def _only(names: set[str], group: Mapping[str, float]) -> dict[str, float]:
    """Without classes of formats that our kernels have and the engine's have not."""
    return {name: value for name, value in group.items() if name in names}


def validated(model: type[_Model], data: object, path: Path, hint: str) -> _Model:
    """What a file holds, as a model.

    Raises:
        SpecError: it is no such thing; it names the first place that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(f"`{path}` at {first_complaint(error)}", hint) from error


def load_kernels(path: Path) -> EngineKernels:
    """Read the prices of an engine's kernels.

    Raises:
        SpecError: the file cannot be read, is not YAML, or has no such prices.
    """
    data = parse_yaml(read_file(path, HINT), str(path), HINT)
    read = validated(EngineKernels, data, path, HINT)
    known = {*OP_CLASSES, *FORMAT_CLASSES}
    for machine, prices in read.machines.items():
        for name in sorted(set(prices.classes) - known):
            raise SpecError(f"`{path}` at `machines.{machine}.classes`: no class `{name}`", HINT)
    return read
