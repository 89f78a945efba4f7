"""A measured profile: what a machine did on probes, turned into the numbers that the cost model asks for.

The probes are not the models that predictions are judged by: a few layers of two other published
shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from tokenspeed_plan.planner.advisor.hardware import (
    OP_CLASSES,
    Profile,
    hardware_names,
    known_profiles,
    read_profile,
)
from tokenspeed_plan.planner.models.config import ModelConfig, load_preset
from tokenspeed_plan.planner.passes.cost import op_class
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError

NO_WAIT_US = 1e-6
MIN_SAMPLES = 3  # samples from which a line is drawn
LEAST_ERROR = 0.03
MIN_RESIDUAL, MAX_RESIDUAL = 0.2, 20.0  # beyond, a probe was too small to say anything
MATRIX_CLASSES = ("product", "grouped", "attention_prefill", "delta_chunk")
PROBES = ("qwen3.5-122b-a10b", "qwen3.5-27b")
SMALL_PROBE = "qwen3.5-0.8b"
MAX_SEQS = 32
LAYERS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One kernel of a probe: microseconds a call as measured, and its busy time by the roofline."""

    op_class: str
    measured_us: float
    busy_us: float


@dataclass(frozen=True, slots=True)
class Fit:
    """By class: the waiting and the residual factor that explain the samples, and the relative error that is left."""

    waits_us: Mapping[str, float]
    residuals: Mapping[str, float]
    errors: Mapping[str, float]


def probe(name: str, layers: int = LAYERS) -> ModelConfig:
    """The first layers of a published model."""
    config, _ = load_preset(name)
    return replace(config, name=f"{name}-{layers}-layers", layer_types=config.layer_types[:layers])


def probe_spec(gpu: str, is_gpu: bool, tokens: int, chunk: int) -> Spec:
    """Up to `MAX_SEQS` sequences of so many tokens; a plan is priced in the middle of them."""
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": PROBES[0], "weights": "bf16" if is_gpu else "fp32"},
            "target": {"gpu": gpu},
            "speculation": "off",
            "disaggregation": "off",
            "serving": {"prefill_chunk": chunk},
            "workload": {
                "first_turn_tokens": tokens - 16,
                "output_tokens": 16,
                "concurrency": MAX_SEQS,
            },
        }
    )


def samples(program: Mapping[str, Any], kinds: Mapping[str, Sequence[str]]) -> list[Sample]:
    """The kernels of a program as `bench` measured it, each of the members `kinds`.

    A kernel is timed by itself, where it waits for the one before it; in the program that is partly
    hidden, of every kernel alike. Where the program takes longer than its kernels, they had found
    something in the cache.
    """
    rows = {
        name: program["batch"] if "last_token" in parts else program["tokens"]
        for name, parts in kinds.items()
    }
    alone_us, calls = (
        sum(kernel[key] for kernel in program["kernels"]) for key in ("total_us", "calls")
    )
    hidden_us = max((alone_us - program["measured_us"]) / calls, 0.0)
    slower = max(program["measured_us"] / alone_us, 1.0)
    return [
        Sample(
            op_class(kinds[kernel["kernel"]], rows[kernel["kernel"]], program["batch"]),
            max(kernel["us"] - hidden_us, 0.0) * slower,
            kernel["predicted_us"],
        )
        for kernel in program["kernels"]
    ]


def fit(samples: Sequence[Sample], launch_us: float) -> Fit:
    """measured = wait + residual x busy, each class its own; of a class with few samples the residual alone."""
    waits_us: dict[str, float] = {}
    residuals: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in OP_CLASSES:
        those = [s for s in samples if s.op_class == name]
        if sum(s.busy_us for s in those):
            wait_us, residual = (
                _line(those, launch_us) if len(those) >= MIN_SAMPLES else _slope(those, launch_us)
            )
            waits_us[name], residuals[name] = (
                wait_us,
                min(max(residual, MIN_RESIDUAL), MAX_RESIDUAL),
            )
            errors[name] = _error(those, wait_us, residuals[name])
    return Fit(waits_us, residuals, errors)


def _slope(samples: Sequence[Sample], wait_us: float) -> tuple[float, float]:
    """The wait as given, and what explains all time together: those too small to say anything have no voice."""
    above_us = sum(max(s.measured_us - wait_us, 0.0) for s in samples)
    return wait_us, above_us / sum(s.busy_us for s in samples)


def _line(samples: Sequence[Sample], launch_us: float) -> tuple[float, float]:
    """Least squares, measured = wait + slope x busy, each sample by the inverse of what it should take.

    The wait is at least 0. Never by the inverse of what was measured: one that seems to take
    nothing would decide all.
    """
    rows = [(1.0, s.busy_us, s.measured_us, (s.busy_us + launch_us) ** -2) for s in samples]
    aa, ab, bb = (sum(x[i] * x[j] * x[3] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] * x[2] * x[3] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    wait = (a * bb - b * ab) / determinant if determinant > 1e-12 else 0.0
    slope = (b * aa - a * ab) / determinant if determinant > 1e-12 else b / bb
    return (wait, slope) if wait > 0 and slope > 0 else _slope(samples, 0.0)


def _error(samples: Iterable[Sample], wait_us: float, residual: float) -> float:
    """The time that the fit has wrong, as a share of all time of the class."""
    pairs = [(abs(wait_us + residual * s.busy_us - s.measured_us), s.measured_us) for s in samples]
    total_us = sum(measured for _, measured in pairs)
    return sum(wrong for wrong, _ in pairs) / total_us if total_us else 0.0


def base_profile(name: str) -> Profile:
    """The data sheet's profile of the machine that calls itself `name`.

    Raises:
        SpecError: we ship none.
    """
    plain = name.lower().replace(" ", "").replace("-", "")
    keys = sorted((key for key in known_profiles() if key in plain), key=len)
    if not keys:
        raise SpecError(
            f"there is no profile of `{name}` to start from",
            f"name one with --base: {', '.join(hardware_names())}",
        )
    return read_profile(known_profiles()[keys[-1]], keys[-1])


def with_numbers(
    profile: Profile,
    source: str,
    numbers: Mapping[str, float],
    said: str,
    **groups: Mapping[str, float],
) -> Profile:
    """The profile with measured numbers, in `numbers` and in other groups; sources that nothing needs any more go."""
    data = profile.model_dump()
    for group, values in (("numbers", numbers), *groups.items()):
        data[group] |= {
            key: {"value": _rounded(value), "source": source} for key, value in values.items()
        }
    data["sources"][source] = said
    used = {
        number["source"]
        for group in ("numbers", "matrix_flops_per_s", "waits", "residuals", "errors")
        for number in data[group].values()
    }
    used |= {table["source"] for table in data["all_reduce"].values()}
    data["sources"] = {key: text for key, text in data["sources"].items() if key in used}
    return Profile.model_validate(data)


def _rounded(value: float) -> float:
    """Bytes and counts as they are, rates to four digits."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def bare(profile: Profile) -> Profile:
    """Without waiting and residuals, so that predicted times are busy times alone."""
    ones, zeros = dict.fromkeys(OP_CLASSES, 1.0), dict.fromkeys(OP_CLASSES, 0.0)
    said = "nothing but the roofline"
    return with_numbers(
        profile, "bare", {"launch_us": NO_WAIT_US}, said, waits=zeros, residuals=ones
    )


def calibrated(
    profile: Profile, found: Fit, launch_us: float, said: str, measured: Mapping[str, str]
) -> Profile:
    """The profile with what the probes said."""
    launch = max(min(launch_us, found.waits_us["stream"]), NO_WAIT_US)
    waits = {name: max(wait_us - launch, 0.0) for name, wait_us in found.waits_us.items()}
    many = [found.errors[name] for name in MATRIX_CLASSES if name in found.errors]
    stream = found.errors["stream"]
    errors = {"memory": max(stream, LEAST_ERROR), "launch": max(stream, 2 * LEAST_ERROR)}
    if many:
        errors["matrix"] = max(sum(many) / len(many), LEAST_ERROR)
    made = with_numbers(
        profile,
        "probes",
        {"launch_us": launch},
        said,
        waits=waits,
        residuals=found.residuals,
        errors=errors,
    )
    return made.model_copy(update={"measured": dict(measured)})


def dump(profile: Profile, head: str) -> str:
    """The profile as YAML."""
    data: dict[str, Any] = profile.model_dump(exclude_defaults=True)
    text: str = yaml.safe_dump(
        data, sort_keys=False, width=118, allow_unicode=True, default_flow_style=None
    )
    return f"# {head}\n{text}"
