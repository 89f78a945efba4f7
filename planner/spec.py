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
from tokenspeed_plan.plans.types import RollbackWord

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
    """The layout of attention.

    Attributes:
        tp: tensor parallelism of the mixers.
        dp: groups of `tp` ranks, each with sequences of its own.
        context_split: ranks that share the tokens of a context.
    """

    tp: Count
    dp: Count | None = None
    context_split: Count | None = None


class MoeSpec(_Section):
    """The layout of the experts: tensor and expert parallelism."""

    tp: Count = 1
    ep: Count = 1


class ParallelismSpec(_Section):
    """A layout given by hand."""

    attention: AttentionSpec | None = None
    moe: MoeSpec | None = None


class WorkloadSpec(_Section):
    """What will be served; the longest conversation and the concurrency limit the plan.

    Attributes:
        kind: `agentic` for conversations, `batch` for rows of a file.
        first_turn_tokens: tokens of a conversation's first prompt.
        turn_tokens: tokens that each later turn adds before its answer.
        turns: of a conversation.
        output_tokens: of each answer.
        concurrency: sequences at the same time.
        arrivals_per_s: turns that arrive in a second; without it every user sends the next turn at
            once.
        skew: how uneven the router is: the exponent of a Zipf law of experts, 0 for uniform.
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
        prompts = self.first_turn_tokens + (self.turns - 1) * self.turn_tokens
        return prompts + self.turns * self.output_tokens


class SloSpec(_Section):
    """Service levels in milliseconds."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class ObjectiveSpec(_Section):
    """What the planner minimises."""

    minimize: Literal["turn_time", "tpot", "cost_per_token"] = "turn_time"
    slo: SloSpec | None = None


MAX_DRAFTS = 16
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class SpeculationSpec(_Section):
    """How drafts are made, verified and taken back.

    Attributes:
        depth: drafts that a step verifies.
        acceptance: the share of drafts that are accepted if those before were: one for all places,
            or one for each.
        rollback: how rejected drafts are taken back. With `snapshot`, a step leaves a recurrent
            state after each of its queries; with `recompute`, it keeps their inputs, and the next
            step recomputes the state after the accepted ones, which needs less memory.
        draft_vocab: drafts are chosen from this many tokens, the first of the vocabulary. Their
            part of the head is faster to read.
    """

    depth: Annotated[int, Field(ge=1, le=MAX_DRAFTS)] | Literal["auto"] = "auto"
    acceptance: (
        Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_DRAFTS)] | None
    ) = None
    rollback: Auto | RollbackWord = "auto"
    draft_vocab: Count | None = None


class DisaggregationSpec(_Section):
    """GPUs of the prefill pool and of the decode pool."""

    prefill: Count
    decode: Count


class ServingSpec(_Section):
    """Knobs that are searched for where the spec leaves them out.

    Attributes:
        prefill_chunk: tokens of a prompt that are computed at once.
        kv_dtype: how keys and values are stored.
        checkpoint_tokens: tokens between two checkpoints of recurrent state in a prompt; 0 keeps
            nothing for the next turn.
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
        """Drafts of a step that the spec fixes; None where the planner chooses."""
        if self.speculation == "off":
            return 0
        if self.speculation == "auto" or self.speculation.depth == "auto":
            return None
        return self.speculation.depth

    @property
    def draft_vocab(self) -> int | None:
        """Tokens that drafts are chosen from; None for all."""
        if isinstance(self.speculation, str):
            return None
        return self.speculation.draft_vocab

    @property
    def stated_rollback(self) -> RollbackWord | None:
        """How rejected drafts are taken back, where the spec states it."""
        if isinstance(self.speculation, str) or self.speculation.rollback == "auto":
            return None
        return self.speculation.rollback

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, data: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        if not isinstance(data, dict):
            return data
        fixed = dict(data)
        for key in ("speculation", "disaggregation"):
            if fixed.get(key) is False:
                fixed[key] = "off"
        return fixed


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


# The loader raises errors other than its own for a tag that does not fit its text, and for endless
# nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError)


def load_spec(path: Path, changes: Sequence[str] = ()) -> Spec:
    """Read a spec.

    Args:
        path: of the file.
        changes: `key.key=value` with the value in YAML; they are applied after the file is read.

    Raises:
        SpecError: it cannot be read, is not YAML, or is not a spec; says which key and what was
            meant.
    """
    hint = "name a YAML spec, such as examples/demo/spec.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        raise SpecError(f"cannot read `{path}`: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"cannot read `{path}`: not UTF-8", hint) from error
    return parse_spec(text, str(path), changes)


def parse_spec(text: str, name: str, changes: Sequence[str] = ()) -> Spec:
    """Read a spec from YAML text; raises as `load_spec` does."""
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
    """The mapping with one value set; sections are made, also in place of words like `auto`."""
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
    changed = dict(data)
    inner = changed
    for folder in folders:
        section = inner.get(folder)
        inner[folder] = dict(section) if isinstance(section, dict) else {}
        inner = inner[folder]
    inner[last] = value
    return changed


_RENAMED = {
    ("speculation.rollback", "rows"): "snapshot",
    ("speculation.rollback", "inputs"): "recompute",
}


def _explain(error: ValidationError, name: str) -> SpecError:
    """The first error in plain words, with a hint."""
    first = min(error.errors(), key=_rank)
    where = _where(first["loc"], unknown=first["type"] == "extra_forbidden")
    if first["type"] == "extra_forbidden":
        return SpecError(f"`{name}` has an unknown key `{where}`", _nearest_key(first["loc"]))
    value = first["input"]
    if isinstance(value, str) and (where, value) in _RENAMED:
        return SpecError(
            f"`{name}` at `{where}`: `{value}` has a new name", f"write `{_RENAMED[where, value]}`"
        )
    got = _short(value)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return SpecError(f"`{name}` at `{where}`: {message}, got {got}", _type_hint(where))


def _where(location: tuple[int | str, ...], unknown: bool) -> str:
    """The path of a key, without the names of types that pydantic puts into it."""
    last = location[-1]
    keeps_last = isinstance(last, int) or len(location) == 1 or (unknown and isinstance(last, str))
    path = []
    for part in location:
        if str(part) in _KEYS or (part is last and keeps_last):
            path.append(str(part))
    return ".".join(dict.fromkeys(path)).encode("unicode_escape").decode() or "spec"


def _nearest_key(location: tuple[int | str, ...]) -> str:
    known = _KEYS_OF.get(_section(location), _KEYS)
    near = difflib.get_close_matches(str(location[-1]), known, 1)
    if near:
        return f"did you mean `{near[0]}`?"
    return "the README lists the keys of a spec"


def _rank(item: Any) -> tuple[bool, bool]:
    """The order of errors: unknown keys first, then words last where a mapping was given."""
    is_word = item["type"] == "literal_error" and isinstance(item["input"], dict)
    return item["type"] != "extra_forbidden", is_word


def _section(location: tuple[int | str, ...]) -> str:
    for part in reversed(location[:-1]):
        if str(part) in _KEYS_OF:
            return str(part)
    return ""


def _short(value: Any) -> str:
    """The value in at most 60 characters."""
    try:
        # `reprlib` stops early: with aliases, a page of YAML can be endless.
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python prints no integer of over 4,300 digits
        return f"a large {type(value).__name__}"
    if len(text) > 60:
        return f"{text[:57]}..."
    return text


def _type_hint(where: str) -> str:
    if where == "spec":
        return "see the README's spec"
    return f"see `{where.split('.')[0]}` in the README's spec"


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
