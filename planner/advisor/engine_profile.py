"""How another engine runs a step, read from a file, so that it can be modelled beside ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.plans.errors import SpecError

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

    name: str
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
    try:
        read = _EngineFile.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise SpecError(f"cannot read `{path}`: {error.strerror}", hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"`{path}` is not YAML: {' '.join(str(error).split())}", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"`{path}` at `{where}`: {first['msg'].lower()}", hint) from error
    return Engine(
        read.name, read.kernels_per_layer, read.collectives_per_layer, read.host_us_per_step
    )
