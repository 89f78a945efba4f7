"""A measured profile: kernel times on probes, turned into the numbers that the cost model reads.

The probes are not the models by which predictions are judged: they are a few layers of two other
published shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from tokenspeed_plan.planner.machines.hardware import (
    FORMAT_CLASSES,
    OP_CLASSES,
    HardwareSpec,
    Profile,
    hardware_names,
    known_profiles,
    load_profile,
    read_profile,
)
from tokenspeed_plan.planner.models.config import ModelConfig, load_preset
from tokenspeed_plan.planner.passes.cost import ADDED, op_class, variant_of, waiting_tokens
from tokenspeed_plan.planner.spec import Spec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.schema import KernelSpec

NO_WAIT_US = 1e-6
MIN_SAMPLES = 3  # samples of a class for which a line is fitted
MIN_ERROR = 0.03
MIN_RESIDUAL, MAX_RESIDUAL = 0.2, 20.0  # outside of these, the probe was too small
_CLEAR = 0.5  # of its bytes' time, below which a sample's products do not bound it
_ROUNDS = 4  # in which samples find what bounds them
MATRIX_CLASSES = ("product", "grouped", "attention_prefill", "delta_chunk")
PROBES = ("qwen3.5-122b-a10b", "qwen3.5-27b")
SMALL_PROBE = "qwen3.5-0.8b"
ANSWER_TOKENS = 16
LAYERS = 8
CHEAP = 0.5  # the price of a library's function in a probe, as a share of the kernel's


@dataclass(frozen=True, slots=True)
class Sample:
    """One kernel of a probe: its measured microseconds, and those of its roofline.

    Its class is that of the operator, or the function of a library that was called in its place.
    `waiting_tokens` of a sequence wait for another one in it.
    """

    op_class: str
    measured_us: float
    memory_us: float
    matrix_us: float = 0.0
    waiting_tokens: int = 0

    @property
    def busy_us(self) -> float:
        """By the roofline."""
        return max(self.memory_us, self.matrix_us)


@dataclass(frozen=True, slots=True)
class Fit:
    """By class: the wait and the factors that explain the samples, and the error left.

    `matrix_residuals` are of classes of which some samples were bound by their products, and some
    by their bytes. `delta_token_us`: of a token that waits for another one, None where none was
    measured.
    """

    waits_us: Mapping[str, float]
    residuals: Mapping[str, float]
    errors: Mapping[str, float]
    delta_token_us: float | None = None
    matrix_residuals: Mapping[str, float] = field(default_factory=dict)
    prices: Mapping[str, _Price] = field(default_factory=dict)


def probe(name: str, layers: int = LAYERS) -> ModelConfig:
    """The first layers of a published model."""
    config, _ = load_preset(name)
    return replace(config, name=f"{name}-{layers}-layers", layer_types=config.layer_types[:layers])


def probe_spec(
    gpu: str,
    weights: str,
    tokens: int,
    chunk: int,
    max_seqs: int,
    prompts: bool = False,
    depth: int = 0,
) -> Spec:
    """Up to `max_seqs` sequences of so many tokens; a plan is priced in the middle of them.

    Agents have a program for each power of two. No checkpoint is kept, since nothing comes back.

    Args:
        gpu: the path of a profile.
        weights: their format.
        tokens: of a sequence.
        chunk: tokens of a prefill step.
        max_seqs: sequences at once.
        prompts: whether a prefill step is priced for as many prompts of this length as it holds.
        depth: drafts of a decode step.
    """
    workload = {
        "kind": "batch" if prompts else "agentic",
        "first_turn_tokens": tokens if prompts else tokens - ANSWER_TOKENS,
        "output_tokens": ANSWER_TOKENS,
        "concurrency": max_seqs,
    }
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"preset": PROBES[0], "weights": weights},
            "target": {"gpu": gpu},
            "speculation": {"depth": depth} if depth else "off",
            "disaggregation": "off",
            "serving": {"prefill_chunk": chunk, "checkpoint_tokens": 0},
            "workload": workload,
        }
    )


Roofs = Mapping[str, tuple[float, float]]  # microseconds of the memory and of the tensor cores


def samples(
    program: Mapping[str, Any], kernels: Mapping[str, KernelSpec], roofs: Roofs
) -> list[Sample]:
    """The kernels of a program as `bench` measured it.

    A kernel is timed alone, where it waits for the one before it. In the program a part of that
    wait is hidden, the same for every kernel. Where the program takes longer than its kernels, they
    had found something in the cache when they were timed alone.

    Args:
        program: measurements of the program and of each kernel.
        kernels: of the plan, by name.
        roofs: of each kernel and library function of the program, for what was measured.
    """
    times = program["kernels"]
    alone_us = sum(each["total_us"] for each in times)
    calls = sum(each["calls"] for each in times)
    hidden_us = max((alone_us - program["measured_us"]) / calls, 0.0)
    slower = max(program["measured_us"] / alone_us, 1.0)
    measured = []
    for each in times:
        taken_us = max(each["us"] - hidden_us, 0.0) * slower
        measured.append(_sample(program, each["kernel"], kernels, taken_us, roofs))
    return measured


def _sample(
    program: Mapping[str, Any],
    name: str,
    kernels: Mapping[str, KernelSpec],
    taken_us: float,
    roofs: Roofs,
) -> Sample:
    """One kernel of a program, or one function of a library that is called in its place."""
    memory_us, matrix_us = roofs[name]
    if name in LIBRARY_FUNCTIONS:
        return Sample(name, taken_us, memory_us, matrix_us)
    kernel = kernels[name]
    members = [part.kind for part in kernel.parts]
    rows = program["batch"] if "last_token" in members else program["tokens"]
    name = op_class(members, rows, program["batch"], variant_of(kernel))
    return Sample(name, taken_us, memory_us, matrix_us, waiting_tokens(kernel.parts))


def at_rates(samples: Iterable[Sample], before: HardwareSpec, after: HardwareSpec) -> list[Sample]:
    """The samples with the rooflines of other rates.

    Args:
        samples: priced at the rates of `before`.
        before: the machine by whose rates plans were made.
        after: the machine as it was measured.
    """
    memory = before.read_bytes_per_s / after.read_bytes_per_s
    matrix = _matrix_rate(before) / _matrix_rate(after)
    return [
        replace(each, memory_us=memory * each.memory_us, matrix_us=matrix * each.matrix_us)
        for each in samples
    ]


def _matrix_rate(hardware: HardwareSpec) -> float:
    return hardware.matrix_flops_per_s["bf16"] * hardware.matrix_share


def fit(samples: Sequence[Sample], launch_us: float) -> Fit:
    """Fit measured = wait + max(residual x memory, matrix residual x matrix) for each class.

    Where a class has few samples, the wait is a launch and only the residual is fitted. What
    kernels whose tokens wait for each other take beyond their class is the time of these tokens.
    """
    in_turn = [sample for sample in samples if sample.waiting_tokens]
    samples = [sample for sample in samples if not sample.waiting_tokens]
    waits_us: dict[str, float] = {}
    residuals: dict[str, float] = {}
    matrix: dict[str, float] = {}
    prices: dict[str, _Price] = {}
    errors: dict[str, float] = {}
    for name in (*OP_CLASSES, *FORMAT_CLASSES, *LIBRARY_FUNCTIONS):
        own = [sample for sample in samples if sample.op_class == name]
        if not sum(sample.busy_us for sample in own):
            continue
        line = _price(name, own, launch_us)
        prices[name] = line
        waits_us[name], residuals[name] = line.wait_us, line.memory
        is_bound = not all(_waits_for_memory(sample, line) for sample in own)
        if line.matrix != line.memory or (name.startswith("grouped") and is_bound):
            matrix[name] = line.matrix
        errors[name] = _error(own, line)
    token_us = None
    if in_turn:
        token_us = _token_us(in_turn, waits_us, residuals)
    return Fit(waits_us, residuals, errors, token_us, matrix, prices)


def _price(name: str, samples: Sequence[Sample], launch_us: float) -> _Price:
    """What explains the samples of a class."""
    if name.endswith(ADDED):
        return _added(samples, launch_us)
    if name in LIBRARY_FUNCTIONS:
        return _one_line(samples, launch_us)
    tiny = [one.measured_us for one in samples if one.busy_us < launch_us]
    if name == "rows" and len(tiny) >= MIN_SAMPLES:
        # Its kernels differ too much for one line: the tiny ones say what they wait, and all
        # together what a byte takes.
        wait_us, slope = _slope(samples, median(tiny))
        return _Price(wait_us, _within(slope), _within(slope))
    return _two_lines(samples, launch_us)


class _Price(NamedTuple):
    """What a kernel waits, and its factors over the roofline's two times."""

    wait_us: float
    memory: float
    matrix: float
    is_added: bool = False

    def at(self, sample: Sample) -> float:
        """The microseconds of a sample."""
        return self.wait_us + sum(self.busy(sample))

    def busy(self, sample: Sample) -> tuple[float, float]:
        """Of these for its bytes and for its products: the longer, or both."""
        memory_us, matrix_us = self.memory * sample.memory_us, self.matrix * sample.matrix_us
        if self.is_added:
            return memory_us, matrix_us
        if memory_us >= matrix_us:
            return memory_us, 0.0
        return 0.0, matrix_us


def _two_lines(samples: Sequence[Sample], launch_us: float) -> _Price:
    """A line through the samples that wait for memory; the others have its wait, and a slope.

    Those whose products are small begin; where these are few, those that the roofline says wait for
    memory do. What bounds the others follows from the factors, which follow from that: a few rounds
    settle it. Few samples of a kind have no line of their own.
    """
    own = [one for one in samples if one.matrix_us < _CLEAR * one.memory_us]
    if len(own) < len(samples) // 8:
        own = [one for one in samples if one.matrix_us <= one.memory_us]
    if len(own) < MIN_SAMPLES:
        return _one_line(samples, launch_us)
    line = _one_line(own, launch_us)
    for _ in range(_ROUNDS):
        others = [one for one in samples if _is_matrix_bound(one, line)]
        if not others:
            break
        above_us = sum(max(one.measured_us - line.wait_us, 0.0) for one in others)
        matrix = _within(above_us / sum(one.matrix_us for one in others))
        line = line._replace(matrix=matrix)
    return line


def _is_matrix_bound(sample: Sample, line: _Price) -> bool:
    """By the factors so far, or since its bytes alone explain less than nine tenths of it."""
    if sample.matrix_us < _CLEAR * sample.memory_us:
        return False
    if not _waits_for_memory(sample, line):
        return True
    return line.wait_us + line.memory * sample.memory_us < 0.9 * sample.measured_us


def _added(samples: Sequence[Sample], launch_us: float) -> _Price:
    """The wait, and the factors of times that are added up, by weighted least squares."""
    if len(samples) < MIN_SAMPLES:
        return _one_line(samples, launch_us)
    weights = [(each.busy_us + launch_us) ** -2 for each in samples]

    def mean(values: Iterable[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    columns = [(s.memory_us, s.matrix_us, s.measured_us) for s in samples]
    x, y, t = (mean(column) for column in zip(*columns, strict=True))
    xx = mean((own_x - x) ** 2 for own_x, _, _ in columns)
    yy = mean((own_y - y) ** 2 for _, own_y, _ in columns)
    xy = mean((own_x - x) * (own_y - y) for own_x, own_y, _ in columns)
    xt = mean((own_x - x) * (own_t - t) for own_x, _, own_t in columns)
    yt = mean((own_y - y) * (own_t - t) for _, own_y, own_t in columns)
    determinant = xx * yy - xy * xy
    if determinant <= 1e-9 * xx * yy:
        return _one_line(samples, launch_us)
    memory = _within((xt * yy - yt * xy) / determinant)
    matrix = _within((yt * xx - xt * xy) / determinant)
    return _Price(max(t - memory * x - matrix * y, 0.0), memory, matrix, is_added=True)


def _waits_for_memory(sample: Sample, line: _Price) -> bool:
    return line.memory * sample.memory_us >= line.matrix * sample.matrix_us


def _one_line(samples: Sequence[Sample], launch_us: float) -> _Price:
    """The wait and the one factor that explain all samples; few have the wait of a launch."""
    if len(samples) >= MIN_SAMPLES:
        wait_us, slope = _line(samples, launch_us)
    else:
        wait_us, slope = _slope(samples, launch_us)
    return _Price(wait_us, _within(slope), _within(slope))


def _within(slope: float) -> float:
    return min(max(slope, MIN_RESIDUAL), MAX_RESIDUAL)


def _token_us(
    samples: Iterable[Sample], waits_us: Mapping[str, float], residuals: Mapping[str, float]
) -> float:
    """What a token that waits for another one adds to the time that its class explains.

    The median: programs of many sequences come in waves, all of which wait.
    """
    found = []
    for sample in samples:
        known_us = waits_us[sample.op_class] + residuals[sample.op_class] * sample.busy_us
        found.append((sample.measured_us - known_us) / sample.waiting_tokens)
    return max(median(found), 0.0)


def _slope(samples: Sequence[Sample], wait_us: float) -> tuple[float, float]:
    """The given wait, and the factor that explains the time of all samples together.

    Samples of short times have little weight.
    """
    above_us = sum(max(sample.measured_us - wait_us, 0.0) for sample in samples)
    return wait_us, above_us / sum(sample.busy_us for sample in samples)


def _line(samples: Sequence[Sample], launch_us: float) -> tuple[float, float]:
    """Weighted least squares of measured = wait + slope x busy; the wait is at least 0.

    A sample weighs by the inverse square of what it should take. The measured time would be a bad
    weight: a sample that seems to take nothing would decide everything.
    """
    weights = [(sample.busy_us + launch_us) ** -2 for sample in samples]
    pairs = list(zip(weights, samples, strict=True))
    weight = sum(weights)
    busy = sum(w * sample.busy_us for w, sample in pairs)
    busy_busy = sum(w * sample.busy_us * sample.busy_us for w, sample in pairs)
    measured = sum(w * sample.measured_us for w, sample in pairs)
    busy_measured = sum(w * sample.busy_us * sample.measured_us for w, sample in pairs)
    determinant = weight * busy_busy - busy * busy
    wait, slope = 0.0, busy_measured / busy_busy
    if determinant > 1e-12:
        wait = (measured * busy_busy - busy_measured * busy) / determinant
        slope = (busy_measured * weight - measured * busy) / determinant
    if wait > 0 and slope > 0:
        return wait, slope
    return _slope(samples, 0.0)


def _error(samples: Iterable[Sample], line: _Price) -> float:
    """The time by which the fit is wrong, as a share of all time of the class."""
    wrong_us = total_us = 0.0
    for sample in samples:
        wrong_us += abs(line.at(sample) - sample.measured_us)
        total_us += sample.measured_us
    if not total_us:
        return 0.0
    return wrong_us / total_us


def base_profile(name: str) -> Profile:
    """The data sheet's profile of the machine that calls itself `name`, or the one at a `.yaml`.

    Raises:
        SpecError: we ship none, or it cannot be read.
    """
    if name.endswith(".yaml"):
        return load_profile(Path(name))
    plain = name.lower().replace(" ", "").replace("-", "")
    keys = [key for key in known_profiles() if key in plain]
    if not keys:
        raise SpecError(
            f"there is no profile of `{name}` to start from",
            f"name one with --base: {', '.join(hardware_names())}",
        )
    key = sorted(keys, key=len)[-1]
    return read_profile(known_profiles()[key], key)


def with_numbers(
    profile: Profile,
    source: str,
    numbers: Mapping[str, float],
    text: str,
    **groups: Mapping[str, float],
) -> Profile:
    """The profile with measured numbers; sources that no number refers to are dropped.

    Args:
        profile: to start from.
        source: name of the measurement.
        text: its description.
        numbers: new values of `numbers`.
        **groups: new values of other groups.
    """
    data = profile.model_dump()
    for group, values in (("numbers", numbers), *groups.items()):
        for key, value in values.items():
            data[group][key] = {"value": _rounded(value), "source": source}
    return _with_source(data, source, text)


def with_tables(
    profile: Profile,
    source: str,
    tables: Mapping[str, Mapping[int, Mapping[int, float]]],
    text: str,
) -> Profile:
    """The profile with measured times of collectives; sources that nothing refers to are dropped.

    Args:
        profile: to start from.
        source: name of the measurement.
        tables: by name, then by GPUs and bytes, in microseconds.
        text: description of the measurement.
    """
    data = profile.model_dump()
    for name, by_count in tables.items():
        rounded = {
            count: {size: round(us, 1) for size, us in by_bytes.items()}
            for count, by_bytes in by_count.items()
        }
        data["all_reduce"][name] = {"source": source, "us": rounded}
    return _with_source(data, source, text)


def _with_source(data: dict[str, Any], source: str, text: str) -> Profile:
    """The profile with the description of a source, and without those that nothing refers to."""
    data["sources"][source] = text
    changed = Profile.model_validate(data)
    used = changed.used_sources
    sources = {key: text for key, text in changed.sources.items() if key in used}
    return changed.model_copy(update={"sources": sources})


def _rounded(value: float) -> float:
    """Rates to four digits; bytes and counts as they are."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}")


def bare(profile: Profile, libraries: bool = False) -> Profile:
    """The profile without waits and residuals, so that predicted times are busy times alone.

    Args:
        profile: to start from.
        libraries: call every function of a library that this machine could have, by a price of
            which `CHEAP` is the share of a kernel's; else none, for the probes measure our kernels.
    """
    prices: dict[str, Any] = {}
    if libraries:
        wait, residual = ({"value": value, "source": "bare"} for value in (0.0, CHEAP))
        prices = {key: {"wait": wait, "residual": residual} for key in functions_of(profile)}
    changes = {"libraries": prices, "matrix_residuals": {}}
    plain = Profile.model_validate(profile.model_dump() | changes)
    return with_numbers(
        plain,
        "bare",
        {"launch_us": NO_WAIT_US, "delta_token_us": 0.0},
        "nothing but the roofline",
        waits=dict.fromkeys(profile.waits, 0.0),
        residuals=dict.fromkeys(profile.residuals, 1.0),
    )


def slower(
    profile: Profile, factor: float, spread: float, sums: bool, source: str, text: str
) -> Profile:
    """The profile of a machine whose kernels all take so many times as long.

    Args:
        profile: to start from.
        factor: of each kernel's time, whatever it waits for.
        spread: error that is left, as a share; intervals are not narrower.
        sums: whether collectives do, too.
        source: name of the measurement.
        text: its description.
    """
    known = profile.model_dump()
    for table in known["all_reduce"].values() if sums else ():
        table["source"] = source
        for by_bytes in table["us"].values():
            by_bytes |= {size: round(us * factor, 2) for size, us in by_bytes.items()}
    for library in known["libraries"].values():
        for number in filter(None, library.values()):
            number |= {"value": _rounded(number["value"] * factor), "source": source}

    def scaled(numbers: Mapping[str, Any], keys: Iterable[str]) -> dict[str, float]:
        return {key: numbers[key].value * factor for key in keys}

    errors = {kind: profile.errors[kind].value for kind in ("memory", "matrix", "launch")}
    return with_numbers(
        _with_source(known, source, text),
        source,
        scaled(profile.numbers, ("launch_us", "delta_token_us")),
        text,
        waits=scaled(profile.waits, profile.waits),
        residuals=scaled(profile.residuals, profile.residuals),
        matrix_residuals=scaled(profile.matrix_residuals, profile.matrix_residuals),
        errors={kind: spread for kind, error in errors.items() if error < spread},
    )


def functions_of(profile: Profile) -> list[str]:
    """The functions of libraries that have code for the profile's machine."""
    return [key for key, each in LIBRARY_FUNCTIONS.items() if profile.sm in each.sms]


def calibrated(
    profile: Profile,
    result: Fit,
    launch_us: float,
    text: str,
    measured: Mapping[str, str],
    error: float | None = None,
) -> Profile:
    """The profile with what the probes showed.

    Args:
        profile: to start from.
        result: of the fit.
        launch_us: of a chain of tiny kernels.
        text: description of the measurement.
        measured: machine, date and versions.
        error: relative, of each kind of time; None for that of the samples themselves.
    """
    launch = max(min(launch_us, result.waits_us["stream"]), NO_WAIT_US)
    waits = {name: max(wait_us - launch, 0.0) for name, wait_us in result.waits_us.items()}
    residuals, matrix = dict(result.residuals), dict(result.matrix_residuals)
    libraries = {
        key: _library(waits.pop(key), residuals.pop(key), matrix.pop(key, None))
        for key in LIBRARY_FUNCTIONS
        if key in residuals
    }
    known = profile.model_dump()
    known["libraries"] |= libraries
    for name in residuals:  # of a class that was measured
        known["matrix_residuals"].pop(name, None)
    numbers = {"launch_us": launch}
    if result.delta_token_us is not None:
        numbers["delta_token_us"] = result.delta_token_us
    changed = with_numbers(
        Profile.model_validate(known),
        "probes",
        numbers,
        text,
        waits=waits,
        residuals=residuals,
        matrix_residuals=matrix,
        errors=_errors(result, error),
    )
    return changed.model_copy(update={"measured": dict(measured)})


def _library(wait_us: float, residual: float, matrix: float | None) -> dict[str, Any]:
    """The price of a function: one factor, or one of its bytes and one of its products."""
    if matrix is None:
        return {"wait": _number(wait_us), "residual": _number(residual)}
    memory = {"memory_residual": _number(residual)}
    return {"wait": _number(wait_us), "residual": _number(matrix)} | memory


def _number(value: float) -> dict[str, Any]:
    return {"value": _rounded(value), "source": "probes"}


def _errors(result: Fit, error: float | None) -> dict[str, float]:
    """The error of each kind of time: of steps that were held out, or of classes that it limits."""
    if error is not None:
        return dict.fromkeys(("memory", "matrix", "launch"), max(error, MIN_ERROR))
    stream = result.errors["stream"]
    errors = {"memory": max(stream, MIN_ERROR), "launch": max(stream, 2 * MIN_ERROR)}
    matrix = [result.errors[name] for name in MATRIX_CLASSES if name in result.errors]
    if matrix:
        errors["matrix"] = max(sum(matrix) / len(matrix), MIN_ERROR)
    return errors


def dump(profile: Profile, head: str) -> str:
    """The profile as YAML, below a comment."""
    data: dict[str, Any] = profile.model_dump(exclude_defaults=True)
    text: str = yaml.safe_dump(
        data, sort_keys=False, width=118, allow_unicode=True, default_flow_style=None
    )
    return f"# {head}\n{text}"
