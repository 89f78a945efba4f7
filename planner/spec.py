"""The spec: what a user asks for, in YAML. It may say `auto`; a plan may not."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenspeed_plan.plans.errors import SpecError

Auto = Literal["auto"]
AutoOrOff = Literal["auto", "off"]
MAX_GPUS = 1024
MAX_CONCURRENCY = 65_536
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(_Section):
    """A folder in Hugging Face's layout, or the name of a published size."""

    path: str | None = Field(default=None, min_length=1)
    preset: str | None = Field(default=None, min_length=1)
    weights: Literal["bf16", "fp32", "fp8", "nvfp4"] = "bf16"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.path is None) == (self.preset is None):
            raise ValueError("give either `path` or `preset`")
        return self


class TargetSpec(_Section):
    """Which GPU, and how many."""

    gpu: str
    count: Annotated[int, Field(ge=1, le=MAX_GPUS)] = 1


class AttentionSpec(_Section):
    """Tensor parallelism of the mixers, groups of it with sequences of their own, ranks that split a context."""

    tp: Count
    dp: Count | None = None
    context_split: Count | None = None


class MoeSpec(_Section):
    """Tensor and expert parallelism of the expert blocks."""

    tp: Count = 1
    ep: Count = 1


class ParallelismSpec(_Section):
    """A layout given by hand."""

    attention: AttentionSpec | None = None
    moe: MoeSpec | None = None


class WorkloadSpec(_Section):
    """What will be served. The longest conversation and the concurrency become the limits of the plan.

    `arrivals_per_s`: turns that come in a second; without it every user sends the next turn at
    once. `skew`: how uneven the router is, as the exponent of a Zipf law over experts.
    """

    kind: Literal["agentic", "batch"] = "batch"
    first_turn_tokens: Count = 2048
    turn_tokens: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    turns: Count = 1
    output_tokens: Count = 512
    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = 1
    arrivals_per_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    skew: Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)] = 0.0

    @property
    def max_conversation_tokens(self) -> int:
        """Tokens of a whole conversation, prompts and answers."""
        return (
            self.first_turn_tokens
            + (self.turns - 1) * self.turn_tokens
            + self.turns * self.output_tokens
        )


class SloSpec(_Section):
    """Service levels in milliseconds."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class ObjectiveSpec(_Section):
    """What the planner minimises."""

    minimize: Literal["turn_time", "tpot", "cost_per_token"] = "turn_time"
    slo: SloSpec | None = None


MAX_DRAFTS = 16
RollbackWord = Literal["snapshot", "recompute"]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class SpeculationSpec(_Section):
    """Draft tokens a step, and the share of drafts that are accepted after those before them: of all, or by place.

    `rollback`: what a step goes back to where drafts were wrong: a row of state after each token
    (`snapshot`), or the state before them all, from where the inputs that came true are computed
    again (`recompute`: less memory). `draft_vocab`: drafts are chosen from so many tokens, the
    first of the vocabulary, whose part of the head is quicker to read.
    """

    depth: Annotated[int, Field(ge=1, le=MAX_DRAFTS)] | Literal["auto"] = "auto"
    acceptance: (
        Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_DRAFTS)] | None
    ) = None
    rollback: Literal["auto", "snapshot", "recompute"] = "auto"
    draft_vocab: Count | None = None


class DisaggregationSpec(_Section):
    """GPUs of the prefill pool and of the decode pool."""

    prefill: Count
    decode: Count


class ServingSpec(_Section):
    """What is otherwise searched for.

    `checkpoint_tokens`: a checkpoint of recurrent state each so many tokens (0: nothing is kept for
    the next turn).
    """

    prefill_chunk: Count | None = None
    kv_dtype: Literal["bf16", "fp8"] | None = None
    checkpoint_tokens: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None


class Spec(_Section):
    """The whole spec."""

    version: Literal[1]
    model: ModelSpec
    target: TargetSpec
    parallelism: Auto | ParallelismSpec = "auto"
    workload: WorkloadSpec = WorkloadSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    slo: SloSpec | None = None
    speculation: AutoOrOff | SpeculationSpec = "auto"
    disaggregation: AutoOrOff | DisaggregationSpec = "auto"
    serving: ServingSpec | None = None

    @property
    def stated_depth(self) -> int | None:
        """Drafts a step that the spec fixes; None where the planner chooses."""
        if self.speculation == "off":
            return 0
        depth = self.speculation.depth if isinstance(self.speculation, SpeculationSpec) else "auto"
        return None if depth == "auto" else depth

    @property
    def draft_vocab(self) -> int | None:
        """Tokens that drafts are chosen from; None for all."""
        return (
            self.speculation.draft_vocab if isinstance(self.speculation, SpeculationSpec) else None
        )

    @property
    def stated_rollback(self) -> Literal["snapshot", "recompute"] | None:
        """How wrong drafts are taken back, where the spec says so."""
        rollback = (
            self.speculation.rollback if isinstance(self.speculation, SpeculationSpec) else "auto"
        )
        return None if rollback == "auto" else rollback

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, data: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        if not isinstance(data, dict):
            return data
        return {
            key: "off" if key in ("speculation", "disaggregation") and value is False else value
            for key, value in data.items()
        }


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"`{repeated[0]}` is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


# The loader's own, and what it lets through: a tag that its text does not fit, endless nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError)


def load_spec(path: Path, changes: Sequence[str] = ()) -> Spec:
    """Read a spec; `changes` are `key.key=value`, the value in YAML, and come after the file.

    Raises:
        SpecError: unreadable, not YAML, or not a spec; says which key and what was meant.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SpecError(
            f"cannot read `{path}`: {reason}", "name a YAML spec, such as examples/demo/spec.yaml"
        ) from error
    return parse_spec(text, str(path), changes)


def parse_spec(text: str, name: str, changes: Sequence[str] = ()) -> Spec:
    """A spec from YAML text; raises as `load_spec` does."""
    try:
        data = yaml.load(text, _Loader)  # a subclass of SafeLoader
    except _NOT_YAML as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecError(
            f"`{name}` is not YAML: {reason}", "check indentation and quotes at that line"
        ) from error
    if not isinstance(data, dict):
        raise SpecError(f"`{name}` is not a mapping of keys", "start from examples/demo/spec.yaml")
    for change in changes:
        data = _changed(data, change)
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise _explain(error, name) from error


def _changed(data: dict[Any, Any], change: str) -> dict[Any, Any]:
    """The mapping with one value set; sections on the way are made, words such as `auto` are replaced by them."""
    path, equals, text = change.partition("=")
    if not equals or not all(path.split(".")):
        raise SpecError(
            f"`--set {change}` is not key=value", "such as `--set parallelism.attention.tp=4`"
        )
    try:
        value = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        raise SpecError(
            f"`--set {change}`: `{text}` is not YAML", "quote it as YAML does"
        ) from error
    *folders, last = path.split(".")
    made = dict(data)
    inner = made
    for folder in folders:
        section = inner.get(folder)
        inner[folder] = dict(section) if isinstance(section, dict) else {}
        inner = inner[folder]
    inner[last] = value
    return made


_RENAMED = {
    ("speculation.rollback", "rows"): "snapshot",
    ("speculation.rollback", "inputs"): "recompute",
}


def _explain(error: ValidationError, name: str) -> SpecError:
    first = min(error.errors(), key=_rank)
    ends = (int,) if len(first["loc"]) > 1 and first["type"] != "extra_forbidden" else (int, str)
    last = first["loc"][-1]
    path = [
        str(part)
        for part in first["loc"]
        if str(part) in _KEYS or (part is last and isinstance(last, ends))
    ]
    where = ".".join(dict.fromkeys(path)).encode("unicode_escape").decode() or "spec"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(first["loc"][-1]), _KEYS_OF.get(_section(first["loc"]), _KEYS), 1
        )
        hint = f"did you mean `{near[0]}`?" if near else "the README lists the keys of a spec"
        return SpecError(f"`{name}` has an unknown key `{where}`", hint)
    if (where, first["input"]) in _RENAMED:
        new = _RENAMED[where, first["input"]]
        return SpecError(
            f"`{name}` at `{where}`: `{first['input']}` has a new name", f"write `{new}`"
        )
    got = _short(first["input"])
    message = first["msg"].removeprefix("Value error, ")
    return SpecError(
        f"`{name}` at `{where}`: {message[0].lower()}{message[1:]}, got {got}", _type_hint(where)
    )


def _rank(item: Any) -> tuple[bool, bool]:
    """An unknown key first; of `auto` or a section, a mapping was meant to be a section."""
    return item["type"] != "extra_forbidden", item["type"] == "literal_error" and isinstance(
        item["input"], dict
    )


def _section(location: tuple[int | str, ...]) -> str:
    return next((str(part) for part in reversed(location[:-1]) if str(part) in _KEYS_OF), "")


def _short(value: Any) -> str:
    try:
        text = " ".join(
            reprlib.repr(value).split()
        )  # never all of it: aliases make a page of YAML endless
    except ValueError:  # Python prints no integer of over 4,300 digits
        return f"a large {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_hint(where: str) -> str:
    return (
        f"see `{where.split('.')[0]}` in the README's spec"
        if where != "spec"
        else "see the README's spec"
    )


def _sections() -> Mapping[str, type[_Section]]:
    return {
        "": Spec,
        "model": ModelSpec,
        "target": TargetSpec,
        "parallelism": ParallelismSpec,
        "attention": AttentionSpec,
        "moe": MoeSpec,
        "workload": WorkloadSpec,
        "objective": ObjectiveSpec,
        "slo": SloSpec,
        "speculation": SpeculationSpec,
        "disaggregation": DisaggregationSpec,
        "serving": ServingSpec,
    }


_KEYS_OF = {name: tuple(section.model_fields) for name, section in _sections().items()}
_KEYS = tuple(dict.fromkeys(key for keys in _KEYS_OF.values() for key in keys))
