"""A machine as the cost model and the memory model see it, read from a profile.

A profile is YAML in which every number names its source. `planner/machines/profiles/` has one file
for each machine; `tokenspeed calibrate` writes another one, which a spec names by its path.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenspeed_plan.planner.foreign_yaml import parse_yaml, read_file
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS, library_of
from tokenspeed_plan.plans.text import first_complaint, printable_line
from tokenspeed_plan.plans.types import DType

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
# Classes whose products of FP8 may have prices of their own: weights that are converted first, and
# elements that are multiplied as they are.
FP8_CLASSES = (
    "stream_fp8",
    "experts_fp8",
    "few_rows_fp8",
    "product_fp8",
    "grouped_fp8",
    "product_quantised",
    "grouped_quantised",
)
# Classes whose products of NVFP4 may have prices of their own.
FP4_CLASSES = ("stream_fp4", "experts_fp4", "few_rows_fp4", "product_fp4", "grouped_fp4")
FORMAT_CLASSES = (*FP8_CLASSES, *FP4_CLASSES)
TIME_KINDS = ("memory", "matrix", "launch", "collective", "host")
MATRIX_DTYPES = (*get_args(DType), "tf32")  # that a profile may have a rate for

# The share of a large product's rate at which experts multiply full tiles, since they gather rows,
# where nobody measured it (122B-A10B on an H200, chunks of 4,096 tokens, 2026-11-30).
GROUPED_SHARE = 0.62
GROUPED_SHARE_OF_64 = 0.56  # the same with tiles of 64 rows, as prices of other engines have it

# Bounds far from any machine, within which no time and no size leaves the numbers of a float.
SMALLEST, LARGEST = 1e-9, 1e20
Value = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Microseconds = Annotated[float, Field(ge=SMALLEST, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 50)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Table = Mapping[int, Mapping[int, float]]  # GPUs -> bytes -> microseconds


@dataclass(frozen=True, slots=True)
class LibraryPrice:
    """What a call loses besides its launch, and its busy time over the roofline's.

    With `memory_residual` its bytes and its products take their times one after the other, and
    `residual` is of the products alone.
    A function that is `asked` for is called whatever it costs.
    """

    wait_us: float
    residual: float
    asked: bool = False
    memory_residual: float | None = None

    def is_below(self, other: LibraryPrice) -> bool:
        """Whether the other function is dearer for every load."""
        return self.wait_us < other.wait_us and self.residual < other.residual


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """One kind of GPU (or the CPU).

    Attributes:
        sm: compute capability without its dot, 0 on a CPU.
        memory_bytes: what a rank can use.
        reserved_bytes: the stated margin for what we do not allocate.
        peak_bytes_per_s: of its memory, by the data sheet.
        read_bytes_per_s: what a large read reaches.
        max_shared_bytes: shared memory of one program.
        num_sms: multiprocessors; 0 where programs run one after the other.
        matrix_share: the share of the peak rate that a large product reaches.
        launch_us: from one tiny kernel to the next inside a graph.
        host_us: host work of a step that no GPU work hides.
        host_step_us, host_seq_us, host_prompt_us: host work for a step, for each sequence of it,
            and for each prompt that it begins, which GPU work hides where that is longer.
        host_prefill_us: the same for a step that begins prompts, however many.
        host_launch_us: for a kernel of a prefill step, which are launched one after the other.
        link_bytes_per_s: to the other GPUs of a node, one direction, all links.
        host_bytes_per_s: between pinned memory of the host and the GPU, one direction.
        nic_bytes_per_s, nic_us: to another node, for each GPU.
        prefill_chunk, page_size: defaults, in tokens.
        matrix_flops_per_s: dense peak by dtype.
        one_shot_us, two_shot_us: time of an all-reduce inside a graph, others' kernels.
        push_us: time of our kernel that adds up ranks, with residual and norm in it.
        library_us: time of NCCL's all-reduce inside a graph.
        gather_us: time of its all-gather, by bytes of the result.
        delta_token_us: what a further token of a sequence adds to a kernel of the delta rule: it
            waits for the one before it.
        waits_us: what a kernel loses besides its launch, from its first load to full speed and
            back, by class of operator.
        residuals: busy time over the roofline's, by class of operator, where its bytes bound it.
        matrix_residuals: the same where its products do, of the classes that were measured so. Of
            attention of prompts both times are added up then.
        errors: relative error of a prediction, by kind of time.
        sources: where each number comes from.
        libraries: what functions of libraries cost, by their keys in `LIBRARY_FUNCTIONS`.
        is_calibrated: whether its kernels were measured on such a machine.
        whole_tiles: whether products have 128 columns a tile, whatever that leaves idle: kernels of
            other engines, whose prices were fitted so.
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
    host_seq_us: float
    link_bytes_per_s: float
    host_bytes_per_s: float
    nic_bytes_per_s: float
    nic_us: float
    delta_token_us: float
    gpus_per_node: int
    usd_per_hour_on_demand: float
    usd_per_hour_reserved: float
    prefill_chunk: int
    page_size: int
    matrix_flops_per_s: Mapping[str, float]
    one_shot_us: Table
    two_shot_us: Table
    push_us: Table
    library_us: Table
    gather_us: Table
    waits_us: Mapping[str, float]
    residuals: Mapping[str, float]
    errors: Mapping[str, float]
    sources: Mapping[str, str]
    libraries: Mapping[str, LibraryPrice] = field(default_factory=dict)
    host_step_us: float = 0.0
    host_prompt_us: float = 0.0
    host_prefill_us: float = 0.0
    host_launch_us: float = 0.0
    is_calibrated: bool = False
    matrix_residuals: Mapping[str, float] = field(default_factory=dict)
    whole_tiles: bool = False

    def matrix_residual(self, name: str) -> float:
        """Busy time over that of the tensor cores, of a kernel of a class that they bound."""
        if name in self.matrix_residuals:
            return self.matrix_residuals[name]
        share = 1.0
        if name.startswith("grouped"):
            share = GROUPED_SHARE_OF_64 if self.whole_tiles else GROUPED_SHARE
        return self.residuals[name] / share

    @property
    def borrows_prices(self) -> bool:
        """Whether it is a GPU on which nobody measured our kernels."""
        return self.sm > 0 and not self.is_calibrated

    def priced(self, name: str, variant: str) -> str:
        """The class whose prices a kernel has: that of its variant where the profile has one."""
        own = name + variant
        return own if own in self.residuals else name


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Number(_Section):
    value: Value
    source: str


class _Library(_Section):
    wait: _Number
    residual: _Number
    memory_residual: _Number | None = None


class _Collective(_Section):
    source: str
    us: Annotated[
        dict[Count, Annotated[dict[Count, Microseconds], Field(min_length=1)]], Field(min_length=1)
    ]


class Profile(_Section):
    """A profile as its file has it."""

    name: Name
    sm: Annotated[int, Field(ge=0, le=1000)]
    sources: dict[str, str]
    numbers: dict[str, _Number]
    matrix_flops_per_s: dict[str, _Number]
    all_reduce: dict[str, _Collective]
    waits: dict[str, _Number]
    residuals: dict[str, _Number]
    matrix_residuals: dict[str, _Number] = {}
    errors: dict[str, _Number]
    libraries: dict[str, _Library] = {}
    measured: dict[str, str] = {}

    @property
    def number_groups(self) -> tuple[Mapping[str, _Number], ...]:
        """Everything that has a value and a source."""
        libraries = {
            f"{key}.{name}": number
            for key, library in self.libraries.items()
            for name, number in library
            if number is not None
        }
        return (
            self.numbers,
            self.matrix_flops_per_s,
            self.waits,
            self.residuals,
            self.matrix_residuals,
            self.errors,
            libraries,
        )

    @property
    def used_sources(self) -> set[str]:
        """The sources that a number names."""
        used = {table.source for table in self.all_reduce.values()}
        for group in self.number_groups:
            used.update(number.source for number in group.values())
        return used


_NOT_NUMBERS = {
    "name",
    "sm",
    "matrix_flops_per_s",
    "one_shot_us",
    "two_shot_us",
    "push_us",
    "library_us",
    "gather_us",
    "waits_us",
    "residuals",
    "matrix_residuals",
    "errors",
    "sources",
    "libraries",
    "is_calibrated",
    "whole_tiles",
}
_TABLES = {"one_shot", "two_shot", "push", "library", "gather"}
_INTEGERS = {field.name for field in fields(HardwareSpec) if field.type == "int"}
NUMBERS = tuple(field.name for field in fields(HardwareSpec) if field.name not in _NOT_NUMBERS)
# Profiles that older versions of `tokenspeed calibrate` wrote have these.
_UNUSED = {"host_memory_bytes", "l2_bytes"}
_MOST = {"gpus_per_node": 1024, "num_sms": 4096, "page_size": 4096, "prefill_chunk": 1 << 20}
# Profiles that older versions wrote lack these, which are 0 then.
_MAY_BE_MISSING = {"host_step_us", "host_prompt_us", "host_prefill_us", "host_launch_us"}
_MAY_BE_ZERO = _MAY_BE_MISSING | {
    "delta_token_us",
    "host_seq_us",
    "num_sms",
    "max_shared_bytes",
    "reserved_bytes",
}


def read_profile(text: str, name: str) -> Profile:
    """Read a profile from its text.

    Raises:
        SpecError: it is not YAML, or a number is missing, unknown, impossible or without a source.
    """
    data = parse_yaml(text, name)
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        raise _bad(name, first_complaint(error)) from error
    missing = _MAY_BE_MISSING.difference(profile.numbers)
    _check_names(name, "numbers", set(NUMBERS) - missing, profile.numbers)
    own = [key for key in FORMAT_CLASSES if key in profile.waits or key in profile.residuals]
    _check_names(name, "waits", (*OP_CLASSES, *own), profile.waits)
    _check_names(name, "residuals", (*OP_CLASSES, *own), profile.residuals)
    for key in sorted(set(profile.matrix_residuals).difference(profile.residuals)):
        raise _bad(name, f"`matrix_residuals.{key}` is unknown")
    _check_names(name, "errors", TIME_KINDS, profile.errors)
    _check_libraries(name, profile)
    _check_values(name, profile)
    _check_sources(name, profile)
    return profile


def _check_names(name: str, group: str, expected: Iterable[str], actual: Mapping[str, Any]) -> None:
    for key in sorted(_UNUSED.intersection(actual)):
        raise SpecError(f"profile `{name}`: nothing reads `{group}.{key}` any more", "delete it")
    different = set(expected).symmetric_difference(actual)
    for key in sorted(different):
        problem = "missing"
        if key in actual:
            problem = "unknown"
        raise _bad(name, f"`{group}.{key}` is {problem}")


def _check_libraries(name: str, profile: Profile) -> None:
    for key in sorted(profile.libraries):
        function = LIBRARY_FUNCTIONS.get(key)
        if function is None:
            raise _bad(name, f"`libraries.{key}` is unknown")
        if profile.sm not in function.sms:
            raise _bad(name, f"`libraries.{key}` has no code for sm_{profile.sm}")


def _check_values(name: str, profile: Profile) -> None:
    for key, number in profile.numbers.items():
        _check_number(name, key, number.value)
    read = profile.numbers["read_bytes_per_s"]
    peak = profile.numbers["peak_bytes_per_s"]
    if read.value > peak.value:
        raise _bad(name, "`read_bytes_per_s` is more than `peak_bytes_per_s`")
    rates = profile.matrix_flops_per_s
    if not rates or not all(number.value for number in rates.values()):
        raise _bad(name, "`matrix_flops_per_s` has no positive rate")
    if "nvfp4" in rates:
        raise SpecError(
            f"profile `{name}`: `matrix_flops_per_s.nvfp4` has a new name", "write `fp4`"
        )
    unknown = set(rates).difference(MATRIX_DTYPES)
    for key in sorted(unknown):
        raise _bad(name, f"`matrix_flops_per_s.{key}` is not a dtype such as `bf16` or `fp4`")
    tables = set(profile.all_reduce)
    if "one_shot" not in tables or tables - _TABLES:
        others = ", ".join(f"`{table}`" for table in sorted(_TABLES - {"one_shot"}))
        raise _bad(name, f"`all_reduce` needs `one_shot`; may have {others}")


def _check_number(name: str, key: str, value: float) -> None:
    if not value and key not in _MAY_BE_ZERO:
        raise _bad(name, f"`numbers.{key}` is 0")
    if value and value < SMALLEST:
        raise _bad(name, f"`numbers.{key}` is {value:g}, the least is {SMALLEST:g}")
    if key not in _INTEGERS:
        return
    most = _MOST.get(key, 1 << 50)
    if value != int(value) or value > most:
        raise _bad(name, f"`numbers.{key}` is {value:g}, not a whole number up to {most}")


def _check_sources(name: str, profile: Profile) -> None:
    stated, used = set(profile.sources), profile.used_sources
    for source in sorted(used - stated):
        raise _bad(name, f"source `{source}` is not described")
    for source in sorted(stated - used):
        raise _bad(name, f"source `{source}` has no number")


def _bad(name: str, what: str) -> SpecError:
    return SpecError(
        f"profile `{name}`: {printable_line(what)}",
        "compare it with planner/machines/profiles/h200.yaml",
    )


def to_hardware(profile: Profile) -> HardwareSpec:
    """The machine of a profile."""
    tables = {key: _rising(table.us) for key, table in profile.all_reduce.items()}
    numbers: dict[str, Any] = {
        key: int(value) if key in _INTEGERS else value
        for key, value in _values(profile.numbers).items()
    }
    return HardwareSpec(
        name=profile.name,
        sm=profile.sm,
        **numbers,
        matrix_flops_per_s=_values(profile.matrix_flops_per_s),
        one_shot_us=tables["one_shot"],
        two_shot_us=tables.get("two_shot", {}),
        push_us=tables.get("push", {}),
        library_us=tables.get("library", {}),
        gather_us=tables.get("gather", {}),
        waits_us=_values(profile.waits),
        residuals=_values(profile.residuals),
        matrix_residuals=_values(profile.matrix_residuals),
        errors=_values(profile.errors),
        sources=_sources(profile),
        libraries={key: _library_price(found) for key, found in sorted(profile.libraries.items())},
        is_calibrated=bool(profile.measured),
    )


def _library_price(found: _Library) -> LibraryPrice:
    memory = found.memory_residual
    return LibraryPrice(
        found.wait.value,
        found.residual.value,
        memory_residual=None if memory is None else memory.value,
    )


def _values(group: Mapping[str, _Number]) -> dict[str, float]:
    return {key: number.value for key, number in group.items()}


def _sources(profile: Profile) -> dict[str, str]:
    """The text of the source of each number."""
    sources = {
        key: profile.sources[number.source]
        for group in profile.number_groups
        for key, number in group.items()
    }
    return sources | {"all_reduce": profile.sources[profile.all_reduce["one_shot"].source]}


def _rising(table: Table) -> Table:
    """The sorted table, without noise that makes a larger message faster than a smaller one."""
    rising: dict[int, dict[int, float]] = {}
    for count, measured in sorted(table.items()):
        sizes = sorted(measured)
        times_us = [measured[size] for size in sizes]
        largest_us = accumulate(times_us, max)
        rising[count] = dict(zip(sizes, largest_us, strict=True))
    return rising


@cache
def known_profiles() -> Mapping[str, str]:
    """The text of each profile that we ship, by its name in lower case."""
    folder = resources.files("tokenspeed_plan.planner.machines.profiles")
    texts = {}
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            texts[name] = file.read_text(encoding="utf-8")
    return dict(sorted(texts.items()))


@cache
def _known(key: str) -> HardwareSpec:
    return to_hardware(read_profile(known_profiles()[key], f"{key}.yaml"))


def hardware_names() -> list[str]:
    """The machines that we ship a profile of."""
    return [_known(key).name for key in known_profiles()]


def find_hardware(name: str, near: Path | None = None) -> HardwareSpec:
    """The machine called `name` in any case, or that of the profile at a path ending in `.yaml`.

    A relative path is looked up from the current folder, then from `near`.

    Raises:
        SpecError: there is no such machine, or the profile is not one.
    """
    if name.endswith(".yaml"):
        path = Path(name)
        if near is not None and not path.is_file() and (near / path).is_file():
            path = near / path
        return to_hardware(load_profile(path))
    key = name.lower().replace(" ", "").removesuffix("-80g")
    if key in known_profiles():
        return _known(key)
    hint = f"known: {', '.join(hardware_names())}; or the path of a profile"
    # A close match is a slip of the finger; `MI300X` is no slip for `B300`.
    similar = difflib.get_close_matches(key, known_profiles(), 1, cutoff=0.7)
    if similar:
        hint = f"did you mean `{_known(similar[0]).name}`? {hint}"
    raise SpecError(f"there is no GPU called `{name}`", hint)


def prices_digest(hardware: HardwareSpec) -> str:
    """A short digest of a machine's numbers, wherever they come from."""
    numbers = repr(replace(hardware, sources={}))
    return sha256(numbers.encode()).hexdigest()[:16]


def with_libraries(hardware: HardwareSpec, names: Sequence[str]) -> HardwareSpec:
    """The machine where the functions of these libraries, and no others, are called where they can.

    Raises:
        SpecError: one of them has no price on this machine.
    """
    asked = {
        key: replace(price, asked=True)
        for key, price in hardware.libraries.items()
        if library_of(key) in names
    }
    missing = sorted(set(names).difference(map(library_of, asked)))
    if missing:
        raise SpecError(
            f"`{missing[0]}` has no price on {hardware.name}",
            "install it there and measure it: `tokenspeed calibrate`; or leave it out",
        )
    return replace(hardware, libraries=asked)


def without_libraries(hardware: HardwareSpec) -> HardwareSpec:
    """The machine where no library is called."""
    return replace(hardware, libraries={})


def load_profile(path: Path) -> Profile:
    """Read a profile from a file.

    Raises:
        SpecError: it cannot be read, or as `read_profile`.
    """
    text = read_file(path, "`tokenspeed calibrate` writes a profile")
    return read_profile(text, str(path))


def all_reduce_us(hardware: HardwareSpec, moved_bytes: float, count: int) -> float:
    """Microseconds of an all-reduce: from the tables inside a node, over the network between nodes.

    In one shot, every GPU reads the parts of all others. In two shots, it reads its share of them,
    and then the sums of the other shares.

    Args:
        hardware: of all GPUs.
        moved_bytes: of the reduced tensor.
        count: GPUs that take part.
    """
    if count <= 1:
        return 0.0
    inside = min(count, hardware.gpus_per_node)
    one_shot_reads = inside - 1.0
    two_shot_reads = 2.0 * (inside - 1) / inside
    links = hardware.link_bytes_per_s
    node_us = _at(hardware.one_shot_us, moved_bytes, inside, one_shot_reads / links)
    if hardware.two_shot_us:
        two_shot_us = _at(hardware.two_shot_us, moved_bytes, inside, two_shot_reads / links)
        node_us = min(node_us, two_shot_us)
    if count <= hardware.gpus_per_node:
        return node_us
    nodes = -(-count // hardware.gpus_per_node)
    rounds = 2.0 * (nodes - 1).bit_length()
    gpu_bytes = moved_bytes / hardware.gpus_per_node
    round_us = hardware.nic_us + gpu_bytes / hardware.nic_bytes_per_s * 1e6
    return node_us + rounds * round_us


def push_us(hardware: HardwareSpec, moved_bytes: float, count: int) -> float:
    """Microseconds of our kernel that adds up ranks; in one shot where it was not measured.

    A rank sends all it has to each peer, so that more ranks cost what one shot costs more.
    """
    if count <= 1:
        return 0.0
    inside = min(count, hardware.gpus_per_node)
    one_shot_us = _one_shot_us(hardware, moved_bytes, count, inside)
    if not hardware.push_us or count > hardware.gpus_per_node:
        return one_shot_us
    known = min(max(hardware.push_us), count)
    s_per_byte = (known - 1.0) / hardware.link_bytes_per_s
    measured_us = _at(hardware.push_us, moved_bytes, known, s_per_byte)
    return measured_us + max(0.0, one_shot_us - _one_shot_us(hardware, moved_bytes, known, known))


def _one_shot_us(hardware: HardwareSpec, moved_bytes: float, count: int, inside: int) -> float:
    """In one shot, from the table; past it each of `inside` ranks reads all parts of the others."""
    s_per_byte = (inside - 1.0) / hardware.link_bytes_per_s
    return _at(hardware.one_shot_us, moved_bytes, count, s_per_byte)


def library_us(hardware: HardwareSpec, moved_bytes: float, count: int) -> float:
    """Microseconds of the library's all-reduce; the best known one where it was not measured."""
    if count <= 1 or not hardware.library_us or count > hardware.gpus_per_node:
        return all_reduce_us(hardware, moved_bytes, count)
    known = min(max(hardware.library_us), count)
    s_per_byte = 2.0 * (known - 1) / known / hardware.link_bytes_per_s
    measured_us = _at(hardware.library_us, moved_bytes, known, s_per_byte)
    more_us = all_reduce_us(hardware, moved_bytes, count)
    return measured_us + max(0.0, more_us - all_reduce_us(hardware, moved_bytes, known))


def gather_us(hardware: HardwareSpec, result_bytes: float, count: int) -> float:
    """Microseconds of the library's all-gather, of which each rank has an equal part.

    Where it was not measured it is half an all-reduce: each part is sent once, not there and back.
    """
    if count <= 1 or not hardware.gather_us or count > hardware.gpus_per_node:
        return library_us(hardware, 0.5 * result_bytes, count)
    known = min(max(hardware.gather_us), count)
    s_per_byte = (known - 1.0) / known / hardware.link_bytes_per_s
    more_us = library_us(hardware, 0.5 * result_bytes, count)
    less_us = library_us(hardware, 0.5 * result_bytes, known)
    measured_us = _at(hardware.gather_us, result_bytes, known, s_per_byte)
    return measured_us + max(0.0, more_us - less_us)


def _at(table: Table, moved_bytes: float, count: int, s_per_byte: float) -> float:
    """Linear between the points of the next larger GPU count.

    Past the last point the links' bandwidth is added; before the first, a message takes as long as
    the smallest.
    """
    counts = [known for known in table if known >= count]
    nearest = min(counts, default=max(table))
    times_us = table[nearest]
    sizes = list(times_us)
    last = sizes[-1]
    if moved_bytes >= last:
        more_bytes = moved_bytes - last
        return times_us[last] + more_bytes * s_per_byte * 1e6
    index = bisect_right(sizes, moved_bytes)
    upper = sizes[index]
    upper_us = times_us[upper]
    if index == 0:
        return upper_us
    lower = sizes[index - 1]
    lower_us = times_us[lower]
    share = (moved_bytes - lower) / (upper - lower)
    return lower_us + share * (upper_us - lower_us)
