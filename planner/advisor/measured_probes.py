"""What `tokenspeed calibrate` has measured: JSON lines, one a step, written as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.advisor.calibration import Sample, at_rates
from tokenspeed_plan.planner.advisor.held_out import HeldStep
from tokenspeed_plan.planner.foreign_yaml import read_file
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import first_complaint

HINT = "`tokenspeed calibrate --samples FILE` writes such a file"
MOST = 0.7  # of a step's time, of which its kernels are known
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MachineLine(_Line):
    """The machine, its rates and sizes, and the versions that measured it."""

    what: Literal["machine"] = "machine"
    name: str
    read_bytes_per_s: Positive
    launch_us: Positive
    matrix_flops_per_s: Positive
    host_bytes_per_s: Positive
    sizes: dict[str, int]
    versions: dict[str, str]


class KernelLine(_Line):
    """A kernel of a step: its class, its share of the step and its roofline, in microseconds."""

    kernel: str
    calls: int
    op_class: str
    measured_us: NotNegative
    memory_us: NotNegative
    matrix_us: NotNegative
    waiting_tokens: int


class StepLine(_Line):
    """A step of a probe's plan: its sequences, the new tokens of each, and their context."""

    what: Literal["step"] = "step"
    probe: str
    plan: str
    phase: str
    num_seqs: int
    new_tokens: int
    context: int
    measured_us: Positive
    kernels: list[KernelLine]


class HostLine(_Line):
    """The host's microseconds of a step, for each sequence, each new prompt and each launch."""

    what: Literal["host"] = "host"
    probe: str
    step_us: NotNegative
    seq_us: NotNegative
    prompt_us: NotNegative
    prefill_us: NotNegative = 0.0
    launch_us: NotNegative = 0.0


class _AnyLine(BaseModel):
    line: Annotated[MachineLine | StepLine | HostLine, Field(discriminator="what")]


@dataclass(frozen=True, slots=True)
class Measured:
    """All lines of a file; `host` is None where it was not measured."""

    machine: MachineLine
    steps: Sequence[StepLine]
    host: HostLine | None

    @property
    def probes(self) -> list[str]:
        """Their names."""
        return sorted({step.probe for step in self.steps})

    def at_rates(self, before: HardwareSpec, after: HardwareSpec) -> list[HeldStep]:
        """The steps with the rooflines of other rates; see `calibration.at_rates`."""
        found = []
        for step in self.steps:
            samples = at_rates(map(_sample, step.kernels), before, after)
            calls = [kernel.calls for kernel in step.kernels]
            taken_us = sum(kernel.calls * kernel.measured_us for kernel in step.kernels)
            kernels = list(zip(calls, samples, strict=True))
            found.append(HeldStep(step.probe, kernels, taken_us > MOST * step.measured_us))
        return found


def _sample(kernel: KernelLine) -> Sample:
    taken = kernel.measured_us, kernel.memory_us, kernel.matrix_us
    return Sample(kernel.op_class, *taken, kernel.waiting_tokens)


def kernel_lines(rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> list[KernelLine]:
    """Lines of kernels from the rows of a measured program, and their samples in the same order."""
    return [
        KernelLine(kernel=row["kernel"], calls=row["calls"], **asdict(sample))
        for row, sample in zip(rows, samples, strict=True)
    ]


def append(path: Path, line: MachineLine | StepLine | HostLine) -> None:
    """Add a line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line.model_dump_json() + "\n")


def read_measured(path: Path) -> Measured:
    """Read such a file.

    Raises:
        SpecError: it cannot be read, a line is no such line, or none says which machine it was.
    """
    machine: MachineLine | None = None
    host: HostLine | None = None
    steps: list[StepLine] = []
    for number, text in enumerate(read_file(path, HINT).splitlines(), 1):
        line = _read(text, f"`{path}`, line {number}")
        if isinstance(line, MachineLine):
            machine = line
        elif isinstance(line, HostLine):
            host = line
        else:
            steps.append(line)
    if machine is None or not steps:
        raise SpecError(f"`{path}` has no machine, or no step of it", HINT)
    return Measured(machine, steps, host)


def _read(text: str, where: str) -> MachineLine | StepLine | HostLine:
    try:
        return _AnyLine.model_validate({"line": json.loads(text)}).line
    except json.JSONDecodeError as error:
        raise SpecError(f"{where} is no JSON", HINT) from error
    except ValidationError as error:
        raise SpecError(f"{where}: {first_complaint(error)}", HINT) from error
