"""What the cost model and the memory map need to know of a machine, read from a profile: YAML, a source a number.

`planner/advisor/profiles/` holds one file each; `tokenspeed calibrate` writes another, which a spec
names by its path.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.plans.errors import SpecError

OP_CLASSES = (
    "stream",
    "experts",
    "few_rows",
    "product",
    "grouped",
    "attention_decode",
    "attention_prefill",
    "delta_step",
    "delta_chunk",
    "rows",
)
TIME_KINDS = ("memory", "matrix", "launch", "collective", "host")

Value = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Table = Mapping[int, Mapping[int, float]]  # GPUs -> bytes -> microseconds


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """One kind of GPU (or the CPU).

    Attributes:
        sm: compute capability without its dot, 0 on a CPU.
        memory_bytes: what a rank can use. reserved_bytes: the stated margin for what we do not
            allocate.
        peak_bytes_per_s: of its memory, by the data sheet. read_bytes_per_s: what a large read
            reaches.
        matrix_flops_per_s: dense peak by dtype. matrix_share: what a large product reaches of it.
        launch_us: from one tiny kernel to the next inside a graph.
        host_us: host work of a replay that no GPU work hides.
        link_bytes_per_s: to the other GPUs of a node, one direction, all links. nic_*: to another
            node, for each GPU.
        one_shot_us, two_shot_us: an all-reduce inside a graph.
        waits_us: what a kernel loses besides, from its first load to full speed and back, by class
            of operator.
        residuals: busy time over the roofline's, by class. errors: relative, by kind of time.
        num_sms: multiprocessors (0: a program after the other). max_shared_bytes: shared memory of
            one program.
        prefill_chunk, page_size: where nothing else is asked for.
        sources: where each number comes from.
    """

    name: str
    sm: int
    memory_bytes: int
    reserved_bytes: int
    peak_bytes_per_s: float
    read_bytes_per_s: float
    max_shared_bytes: int
    num_sms: int
    matrix_share: float
    launch_us: float
    host_us: float
    link_bytes_per_s: float
    nic_bytes_per_s: float
    nic_us: float
    gpus_per_node: int
    usd_per_hour_on_demand: float
    usd_per_hour_reserved: float
    prefill_chunk: int
    page_size: int
    matrix_flops_per_s: Mapping[str, float]
    one_shot_us: Table
    two_shot_us: Table
    waits_us: Mapping[str, float]
    residuals: Mapping[str, float]
    errors: Mapping[str, float]
    sources: Mapping[str, str]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Number(_Section):
    value: Value
    source: str


class _Collective(_Section):
    source: str
    us: dict[int, dict[int, Annotated[float, Field(gt=0, allow_inf_nan=False)]]]


class Profile(_Section):
    """A profile as its file has it."""

    name: str
    sm: Annotated[int, Field(ge=0)]
    sources: dict[str, str]
    numbers: dict[str, _Number]
    matrix_flops_per_s: dict[str, _Number]
    all_reduce: dict[str, _Collective]
    waits: dict[str, _Number]
    residuals: dict[str, _Number]
    errors: dict[str, _Number]
    measured: dict[str, str] = {}


_NOT_NUMBERS = {
    "name",
    "sm",
    "matrix_flops_per_s",
    "one_shot_us",
    "two_shot_us",
    "waits_us",
    "residuals",
    "errors",
    "sources",
}
_INTEGERS = {field.name for field in fields(HardwareSpec) if field.type == "int"}
NUMBERS = tuple(field.name for field in fields(HardwareSpec) if field.name not in _NOT_NUMBERS)
_MAY_BE_ZERO = {"num_sms", "max_shared_bytes", "reserved_bytes"}


def read_profile(text: str, name: str) -> Profile:
    """A profile from its text.

    Raises:
        SpecError: not YAML, a number missing, unknown, impossible or without a source.
    """
    try:
        profile = Profile.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise _bad(name, f"it is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _bad(name, f"`{'.'.join(map(str, first['loc']))}`: {first['msg'].lower()}") from error
    for what, expected, found in (
        ("numbers", NUMBERS, profile.numbers),
        ("waits", OP_CLASSES, profile.waits),
        ("residuals", OP_CLASSES, profile.residuals),
        ("errors", TIME_KINDS, profile.errors),
    ):
        _same_names(name, what, expected, found)
    _check_values(name, profile)
    return profile


def _same_names(name: str, what: str, expected: tuple[str, ...], found: Mapping[str, Any]) -> None:
    wrong = sorted(set(expected) ^ set(found))
    if wrong:
        raise _bad(
            name, f"`{what}.{wrong[0]}` is {'missing' if wrong[0] in expected else 'unknown'}"
        )


def _check_values(name: str, profile: Profile) -> None:
    for key, number in profile.numbers.items():
        if not number.value and key not in _MAY_BE_ZERO:
            raise _bad(name, f"`numbers.{key}` is 0")
    if profile.numbers["read_bytes_per_s"].value > profile.numbers["peak_bytes_per_s"].value:
        raise _bad(name, "`read_bytes_per_s` is more than `peak_bytes_per_s`")
    if not profile.matrix_flops_per_s or any(
        not number.value for number in profile.matrix_flops_per_s.values()
    ):
        raise _bad(name, "`matrix_flops_per_s` has no positive rate")
    if not profile.all_reduce.get("one_shot") or set(profile.all_reduce) - {"one_shot", "two_shot"}:
        raise _bad(name, "`all_reduce` has not `one_shot`, and perhaps `two_shot`")
    used = {number.source for group in _numbers(profile) for number in group.values()}
    used |= {table.source for table in profile.all_reduce.values()}
    unknown, unused = sorted(used - set(profile.sources)), sorted(set(profile.sources) - used)
    if unknown or unused:
        raise _bad(
            name,
            f"source `{unknown[0]}` is not said"
            if unknown
            else f"source `{unused[0]}` has no number",
        )


def _numbers(profile: Profile) -> tuple[Mapping[str, _Number], ...]:
    return (
        profile.numbers,
        profile.matrix_flops_per_s,
        profile.waits,
        profile.residuals,
        profile.errors,
    )


def _bad(name: str, what: str) -> SpecError:
    return SpecError(
        f"profile `{name}`: {what}", "compare it with planner/advisor/profiles/h200.yaml"
    )


def to_hardware(profile: Profile) -> HardwareSpec:
    """The machine of a profile."""
    numbers = {key: number.value for key, number in profile.numbers.items()}
    sources = {
        key: profile.sources[number.source]
        for group in _numbers(profile)
        for key, number in group.items()
    }
    tables = {f"{kind}_us": _rising(table.us) for kind, table in profile.all_reduce.items()}
    return HardwareSpec(
        name=profile.name,
        sm=profile.sm,
        **{key: int(value) if key in _INTEGERS else value for key, value in numbers.items()},  # type: ignore[arg-type]
        matrix_flops_per_s={
            key: number.value for key, number in profile.matrix_flops_per_s.items()
        },
        one_shot_us=tables["one_shot_us"],
        two_shot_us=tables.get("two_shot_us", {}),
        waits_us={key: number.value for key, number in profile.waits.items()},
        residuals={key: number.value for key, number in profile.residuals.items()},
        errors={key: number.value for key, number in profile.errors.items()},
        sources=sources | {"all_reduce": profile.sources[profile.all_reduce["one_shot"].source]},
    )


def _rising(table: Table) -> Table:
    """Sorted; a larger message never takes less time than a smaller one, whatever the noise of a measurement."""
    made: dict[int, dict[int, float]] = {}
    for count, row in sorted(table.items()):
        most = 0.0
        made[count] = {size: (most := max(most, row[size])) for size in sorted(row)}
    return made


@cache
def known_profiles() -> Mapping[str, str]:
    """The text of each profile that we ship, by its name in lower case."""
    folder = resources.files("tokenspeed_plan.planner.advisor.profiles")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text() for file in files}


@cache
def _known(key: str) -> HardwareSpec:
    return to_hardware(read_profile(known_profiles()[key], f"{key}.yaml"))


def hardware_names() -> list[str]:
    """The machines that we ship a profile of."""
    return [_known(key).name for key in known_profiles()]


def find_hardware(name: str) -> HardwareSpec:
    """The machine called `name`, in any case; or that of the profile at the path `name`, which ends in `.yaml`.

    Raises:
        SpecError: there is no such machine, or the profile is not one.
    """
    if name.endswith(".yaml"):
        return to_hardware(load_profile(Path(name)))
    key = name.lower().replace(" ", "").removesuffix("-80g")
    if key in known_profiles():
        return _known(key)
    near = difflib.get_close_matches(key, known_profiles(), 1)
    known = ", ".join(hardware_names())
    raise SpecError(
        f"there is no GPU called `{name}`",
        f"did you mean `{_known(near[0]).name}`?"
        if near
        else f"known: {known}; or the path of a profile",
    )


def load_profile(path: Path) -> Profile:
    """A profile from a file.

    Raises:
        SpecError: unreadable, or as `read_profile`.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SpecError(
            f"cannot read `{path}`: {reason}", "`tokenspeed calibrate` writes a profile"
        ) from error
    return read_profile(text, str(path))


def all_reduce_us(hardware: HardwareSpec, moved_bytes: float, count: int) -> float:
    """An all-reduce of so many bytes: from the tables inside a node, and on to the other nodes over the network."""
    if count <= 1:
        return 0.0
    inside = min(count, hardware.gpus_per_node)
    # In one shot every GPU reads all parts of all others; in two a share of each, then the sums of
    # the other shares.
    shots = (
        (hardware.one_shot_us, inside - 1.0),
        (hardware.two_shot_us, 2.0 * (inside - 1) / inside),
    )
    links = hardware.link_bytes_per_s
    near = min(_at(table, moved_bytes, inside, reads / links) for table, reads in shots if table)
    if count <= hardware.gpus_per_node:
        return near
    nodes = -(-count // hardware.gpus_per_node)
    rounds = 2.0 * (nodes - 1).bit_length()
    return near + rounds * (
        hardware.nic_us + moved_bytes / hardware.gpus_per_node / hardware.nic_bytes_per_s * 1e6
    )


def _at(table: Table, moved_bytes: float, count: int, s_per_byte: float) -> float:
    """Linear between the points of the next larger GPU count; past the last point the links' bandwidth is added."""
    counts = [known for known in table if known >= count]
    row = table[min(counts) if counts else max(table)]
    sizes = list(row)
    if moved_bytes >= sizes[-1]:
        return row[sizes[-1]] + (moved_bytes - sizes[-1]) * s_per_byte * 1e6
    upper = next(size for size in sizes if size > moved_bytes)
    lower = max((size for size in sizes if size <= moved_bytes), default=0)
    if not lower:
        return row[upper]  # what is smaller than the smallest takes as long
    share = (moved_bytes - lower) / (upper - lower)
    return row[lower] + share * (row[upper] - row[lower])
