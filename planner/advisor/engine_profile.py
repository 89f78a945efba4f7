"""How another engine replays a step, read from a file: stated inputs, so that it can be modelled beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.advisor.step_model import Engine
from tokenspeed_plan.plans.errors import SpecError

Amount = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Engine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kernels_per_layer: Amount
    collectives_per_layer: Amount
    host_us_per_step: Amount
    sources: dict[str, str] = {}


def load_engine(path: Path) -> Engine:
    """An engine's profile.

    Raises:
        SpecError: unreadable, not YAML, or not a profile of an engine.
    """
    hint = "it has name, kernels_per_layer, collectives_per_layer and host_us_per_step"
    try:
        read = _Engine.model_validate(yaml.safe_load(path.read_text()))
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
