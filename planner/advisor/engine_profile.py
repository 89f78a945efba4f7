"""How another engine runs a step, read from a file, so that it can be modelled beside ours.

The work of a step is the model's: the same products, experts, attention and state. An engine runs
it by kernels of its own, whose classes have prices where they were measured by themselves; and it
launches small kernels beside them, which each wait for the one before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tokenspeed_plan.planner.advisor.engine_kernels import EngineKernels, load_kernels, validated
from tokenspeed_plan.planner.advisor.step_time import StepTime
from tokenspeed_plan.planner.foreign_yaml import parse_yaml, read_file
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.types import DType

HINT = "compare it with benchmarks/engines/sglang.yaml"
Amount = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class SmallKernels(BaseModel):
    """Launches beside products, experts, attention, state and collectives: norms, splits, gates.

    Attributes:
        delta, attention: of a layer's mixer, by its kind.
        experts, dense: of a layer's feed-forward block, by its kind.
        quantised: of each product whose activations are quantised.
        step: of a step, outside of its layers.
    """

    model_config = _FROZEN

    delta: Amount
    attention: Amount
    experts: Amount
    dense: Amount
    quantised: Amount
    step: Amount

    def of_step(self, config: ModelConfig, drafts: int, quantised: float) -> float:
        """Launches of a step.

        Args:
            config: of the model.
            drafts: layers that draft, which have attention.
            quantised: products whose activations are quantised.
        """
        delta = config.layer_types.count("linear_attention")
        layers = config.num_layers + drafts
        block = self.experts if config.moe else self.dense
        mixers = delta * self.delta + (layers - delta) * self.attention
        return mixers + layers * block + quantised * self.quantised + self.step


class Prefill(BaseModel):
    """How prompts are launched: in pieces from graphs, or by the host, kernel after kernel.

    Attributes:
        captured_tokens: the largest prefill step whose pieces come from graphs; 0 where all are
            eager.
        captured_us_per_layer, eager_us_per_layer: the host's time for a layer of such a step.
        host_us_per_step: what no kernel hides.
    """

    model_config = _FROZEN

    captured_tokens: Annotated[int, Field(ge=0, le=1 << 20)]
    captured_us_per_layer: Amount
    eager_us_per_layer: Amount
    host_us_per_step: Amount

    def launching_us(self, tokens: int, layers: int) -> float:
        """The host's time to launch a prefill step of so many tokens."""
        if tokens <= self.captured_tokens:
            return layers * self.captured_us_per_layer
        return layers * self.eager_us_per_layer


class Engine(BaseModel):
    """Another engine, in one version, with the source of each line.

    Attributes:
        format: of the weights that it was looked at with, in words.
        state_dtype: of recurrent state.
        collectives_per_layer: sums over ranks, each with what is fused into it.
        host_us_per_step: of a decode step, in the open.
        polling_ms: between two looks of the scheduler for new requests.
        hides_shared_expert: a decode step runs it beside the routed ones, which take longer.
        front_end_ms: from a request's arrival to the scheduler, and from the token to the user.
        front_end_us_per_token: more of it for each token of the prompt.
        prices: file of the prices of its kernels, beside this one.
        kernels: what that file has.
    """

    model_config = _FROZEN

    name: Text
    version: Text
    format: Text
    state_dtype: DType
    small_kernels: SmallKernels
    collectives_per_layer: Amount
    prefill: Prefill
    host_us_per_step: Amount
    polling_ms: Amount
    front_end_ms: Amount
    front_end_us_per_token: Amount
    hides_shared_expert: bool
    prices: Text | None = None
    sources: dict[str, str]
    kernels: Annotated[EngineKernels | None, Field(exclude=True)] = None

    @property
    def title(self) -> str:
        """Its name and version."""
        return f"{self.name} {self.version}"

    def first_token_us(self, prompt_tokens: float) -> float:
        """What a first token waits besides its prompt: the front end, and half a look for it."""
        fixed_us = (self.front_end_ms + self.polling_ms / 2.0) * 1e3
        return fixed_us + prompt_tokens * self.front_end_us_per_token

    def machine(self, hardware: HardwareSpec) -> HardwareSpec:
        """The machine with the prices of this engine's kernels, where they are known there."""
        if self.kernels is None:
            return hardware
        return self.kernels.on(hardware)

    def run(
        self, step: StepTime, hardware: HardwareSpec, config: ModelConfig, drafts: int, tokens: int
    ) -> StepTime:
        """The time of the same work, launched and summed up as this engine does it.

        Args:
            step: the time of the graph's kernels.
            hardware: whose launches and waits are counted.
            config: of the model.
            drafts: layers that draft.
            tokens: of a prefill step; 0 of a decode step, which comes from a graph.
        """
        small = self.small_kernels.of_step(config, drafts, step.quantised)
        small_us = small * (hardware.launch_us + hardware.waits_us["rows"])
        collectives = collective_us = 0.0
        if step.collectives:
            collectives = (config.num_layers + drafts) * self.collectives_per_layer
            collective_us = step.collective / step.collectives
        changed = replace(
            step,
            launch=step.launch - step.small_us + small_us,
            collective=collectives * collective_us,
            host=0.0,
            launches=step.launches - step.small - step.collectives + small + collectives,
            collectives=collectives,
            small=small,
            small_us=small_us,
        )
        if not tokens:
            return replace(changed, host=self.host_us_per_step)
        # The host runs ahead of the GPU, or the GPU waits for it.
        launching_us = self.prefill.launching_us(tokens, config.num_layers + drafts)
        waits_us = max(launching_us - changed.total_us, 0.0)
        return replace(changed, host=self.prefill.host_us_per_step + waits_us)


# What `sources` describes.
_SOURCED = (
    "state_dtype",
    "small_kernels",
    "collectives_per_layer",
    "prefill",
    "host_us_per_step",
    "polling_ms",
    "front_end_ms",
    "front_end_us_per_token",
    "hides_shared_expert",
)


def terms_us(step: StepTime) -> dict[str, float]:
    """What a step's time is spent on."""
    return {
        "memory": step.memory,
        "matrix": step.matrix,
        "kernels": step.launch - step.small_us,
        "small kernels": step.small_us,
        "collectives": step.collective,
        "host": step.host,
    }


def load_engine(path: Path) -> Engine:
    """Read the profile of an engine, and the prices of its kernels.

    Raises:
        SpecError: a file cannot be read, is not YAML, is not such a profile, or a line of it has no
            source.
    """
    data = parse_yaml(read_file(path, HINT), str(path), HINT)
    if isinstance(data, dict) and "kernels" in data:
        raise SpecError(f"`{path}` at `kernels`: unknown key", "`prices` names a file")
    engine = validated(Engine, data, path, HINT)
    for line in _SOURCED:
        if not engine.sources.get(line):
            raise SpecError(f"`{path}` at `sources.{line}`: nothing says where it comes from", HINT)
    if engine.prices is None:
        return engine
    return engine.model_copy(update={"kernels": load_kernels(path.parent / engine.prices)})
