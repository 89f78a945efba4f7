"""How another engine runs a step, read from a file, so that it can be modelled beside ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.foreign_yaml import parse_yaml, read_file
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import printable_line

Amount = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Engine:
    """Another engine: launches and collectives of a layer, microseconds of host work of a step."""

    name: str
    kernels_per_layer: float
    collectives_per_layer: float
    host_us: float

    def run(self, step: StepTime, hardware: HardwareSpec, num_layers: int) -> StepTime:
        """The time of the same work, launched and summed up as this engine does it.

        Args:
            step: the time as our runtime replays it.
            hardware: whose launches and waits are counted.
            num_layers: layers of the model, those that draft included.
        """
        launches = num_layers * self.kernels_per_layer
        collectives = collective_us = 0.0
        if step.collectives:
            collectives = num_layers * self.collectives_per_layer
            collective_us = step.collective / step.collectives
        launch_us = hardware.launch_us + hardware.waits_us["stream"]
        return replace(
            step,
            launch=(launches - collectives) * launch_us,
            collective=collectives * collective_us,
            host=self.host_us,
            launches=launches,
            collectives=collectives,
        )


class _EngineFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    kernels_per_layer: Amount
    collectives_per_layer: Amount
    host_us_per_step: Amount
    sources: dict[str, str] = {}


def load_engine(path: Path) -> Engine:
    """Read the profile of an engine.

    Raises:
        SpecError: the file cannot be read, is not YAML, or is not the profile of an engine.
    """
    hint = "it has name, kernels_per_layer, collectives_per_layer and host_us_per_step"
    data = parse_yaml(read_file(path, hint), str(path), hint)
    try:
        read = _EngineFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = printable_line(".".join(map(str, first["loc"]))) or "the file"
        raise SpecError(f"`{path}` at `{where}`: {first['msg'].lower()}", hint) from error
    return Engine(
        read.name, read.kernels_per_layer, read.collectives_per_layer, read.host_us_per_step
    )
