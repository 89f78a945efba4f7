"""The spec: what a user asks for, in YAML. It may say `auto`; a plan may not."""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from tokenspeed_plan.planner.foreign_yaml import NotYaml, parse_yaml, read_file, read_yaml
from tokenspeed_plan.planner.token_lengths import Lengths
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.lengths_file import LENGTHS_FILE_HINT, read_lengths
from tokenspeed_plan.plans.routing_file import MAX_SKEW, ROUTING_FILE_HINT, read_skew
from tokenspeed_plan.plans.text import complaint, printable_line
from tokenspeed_plan.plans.types import GIB, DType, RollbackWord

Auto = Literal["auto"]
AutoOrOff = Literal["auto", "off"]
MAX_GPUS = 1024
MAX_CONCURRENCY = 65_536
MAX_TOKENS = 100_000_000
MAX_TURNS = 100_000
# Turns that arrive in a second: of fewer, a clock in seconds would not tell two steps apart.
MIN_ARRIVALS, MAX_ARRIVALS = 1e-6, 1e6
MAX_DRAFTS = 16
MAX_VOCAB = 1 << 24
MAX_NAME_CHARS = 1024
# Service levels with means of their own, and the percentiles of them that may have one, rising.
SLO_TIMES = ("ttft", "tpot")
SLO_PERCENTILES = (50, 90, 95, 99)
_TTFT, _TPOT = "The longest time to the first token", "The longest time of a token after the first"
# What a row of a file of lengths calls each length of a workload.
LENGTH_KEYS = {"first_turn_tokens": "prompt_tokens", "output_tokens": "output_tokens"}


def _about(meaning: str, example: Any, unit: str = "") -> FieldInfo:
    """What the reference says of a key; `planner/spec_reference.py` prints it."""
    info: FieldInfo = Field(
        description=meaning, examples=[example], json_schema_extra={"unit": unit} if unit else None
    )
    return info


def _printed(text: str) -> str:
    """A name that a path can be made of and a terminal can show."""
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(_printed)]
Gpus = Annotated[int, Field(ge=1, le=MAX_GPUS)]
Library = Literal["cublas", "fa3", "flashinfer"]  # whose functions are in `LIBRARY_FUNCTIONS`
Libraries = Annotated[tuple[Library, ...], Field(min_length=1, max_length=3, strict=False)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TokensOrNone = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Milliseconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# Not strict: YAML has lists and no tuples.
Shares = Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_DRAFTS, strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(_Section):
    """A folder in Hugging Face's layout, or the name of a published size: one of the two."""

    path: Annotated[
        Name | None,
        _about(
            "The folder of a model in Hugging Face's layout. It is looked up from the current "
            "folder, then from the folders above the spec.",
            "examples/demo/model",
        ),
    ] = None
    preset: Annotated[
        Name | None,
        _about("The name of a published size, whose plan has no weights of its own.", "qwen3.5-9b"),
    ] = None
    weights: Annotated[
        Literal["auto", "bf16", "fp32", "fp8", "nvfp4", "nvfp4-mixed"],
        _about(
            "The format of weights; `auto` is that of the checkpoint. fp8 has blocks of 128 x 128, "
            "as Qwen publishes them. nvfp4 are the routed experts (of a dense model its MLPs), all "
            "else is bf16; with nvfp4-mixed the other projections are fp8. A CPU's plan may be "
            "fp32.",
            "fp8",
        ),
    ] = "auto"
    head: Annotated[
        Literal["auto", "fp8"],
        _about(
            "The format of the LM head; `auto` is that of the checkpoint. fp8 rounds it to nearest "
            "in blocks of 128 x 128 when it is loaded, where the checkpoint has it unquantised.",
            "fp8",
        ),
    ] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.path is None) == (self.preset is None):
            raise ValueError("give either `path` or `preset`")
        return self


class TargetSpec(_Section):
    """Which GPU, and how many."""

    gpu: Annotated[
        Name,
        _about(
            "The name of a GPU, `cpu`, or the path of a profile that ends in `.yaml`, looked up "
            "from the current folder and then beside the spec.",
            "H200",
        ),
    ]
    count: Annotated[Gpus, _about("How many of them.", 8, "GPUs")] = 1
    libraries: Annotated[
        Literal["auto", "required", "none"] | Libraries | None,
        _about(
            "Whether functions of libraries, such as FlashAttention-3, are called in the place of "
            "kernels where they are faster. With `auto` (the default) the plan's own kernels run "
            "where a library is missing or wrong, with `required` that is an error. A list of "
            "libraries calls these and no others, wherever they can, whatever they cost.",
            ["flashinfer"],
        ),
    ] = None


class AttentionSpec(_Section):
    """The layout of attention."""

    tp: Annotated[Gpus, _about("Tensor parallelism of the mixers.", 8, "GPUs")]
    dp: Annotated[
        Gpus | None, _about("Groups of `tp` GPUs, each with sequences of its own.", 2, "groups")
    ] = None
    context_split: Annotated[
        Gpus | None, _about("GPUs that share the tokens of a context.", 2, "GPUs")
    ] = None


class MoeSpec(_Section):
    """The layout of the experts, in a model that has them."""

    tp: Annotated[Gpus, _about("Tensor parallelism of each expert.", 1, "GPUs")] = 1
    ep: Annotated[Gpus, _about("Parts into which the experts are dealt out.", 8, "GPUs")] = 1


class ParallelismSpec(_Section):
    """A layout given by hand."""

    attention: Annotated[AttentionSpec | None, _about("The layout of attention.", {"tp": 8})] = None
    moe: Annotated[MoeSpec | None, _about("The layout of the experts.", {"ep": 8})] = None


class LengthsSpec(_Section):
    """Lengths that vary: their mean, 95th percentile and maximum, or a file of them."""

    mean: Annotated[
        Annotated[float, Field(ge=1, le=MAX_TOKENS, allow_inf_nan=False)] | None,
        _about("The mean over all rows.", 1024, "tokens"),
    ] = None
    p95: Annotated[Tokens | None, _about("What 95 of 100 rows do not exceed.", 3000, "tokens")] = (
        None
    )
    max: Annotated[Tokens | None, _about("The longest row.", 8000, "tokens")] = None
    lengths: Annotated[
        Name | None,
        _about(
            "A file that `tokenspeed lengths` wrote, looked up from the current folder and then "
            "beside the spec. A plan has the mean, p95 and maximum in its place.",
            "lengths.jsonl",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_form(self) -> LengthsSpec:
        numbers = (self.mean, self.p95, self.max)
        if self.lengths is not None and numbers == (None, None, None):
            return self
        if self.lengths is not None or None in numbers:
            raise ValueError("give `mean`, `p95` and `max`, or `lengths`")
        assert self.mean and self.p95 and self.max
        if max(self.mean, self.p95) > self.max:
            raise ValueError("`max` is less than `mean` or `p95`")
        return self

    @property
    def summary(self) -> Lengths:
        """The distribution.

        Raises:
            SpecError: its file was not read; `load_spec` does it.
        """
        if self.mean is None or self.p95 is None or self.max is None:
            raise SpecError(f"`{self.lengths}` was not read", LENGTHS_FILE_HINT)
        return Lengths(self.mean, self.p95, self.max)


class WorkloadSpec(_Section):
    """What will be served; the longest conversation and the concurrency limit the plan."""

    kind: Annotated[
        Literal["agentic", "batch"],
        _about("`agentic` for conversations, `batch` for the rows of a file.", "agentic"),
    ] = "batch"
    first_turn_tokens: Annotated[
        Tokens | LengthsSpec,
        _about("Tokens of a conversation's first prompt, or how they vary.", 50000, "tokens"),
    ] = 2048
    turn_tokens: Annotated[
        TokensOrNone,
        _about("Tokens that each later turn adds before its answer.", 800, "tokens"),
    ] = 0
    turns: Annotated[
        Annotated[int, Field(ge=1, le=MAX_TURNS)], _about("Turns of a conversation.", 12, "turns")
    ] = 1
    shared_prompt_tokens: Annotated[
        Tokens | None,
        _about(
            "Tokens of the first prompt with which all rows of a batch begin; they are computed "
            "and held once.",
            2000,
            "tokens",
        ),
    ] = None
    output_tokens: Annotated[
        Tokens | LengthsSpec, _about("Tokens of each answer, or how they vary.", 500, "tokens")
    ] = 512
    concurrency: Annotated[
        Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] | Auto,
        _about(
            "Sequences at the same time. With `auto`, only for `batch`, as many as make a token "
            "cheapest within memory and service levels; an `agentic` workload has 1 where it "
            "names none.",
            16,
            "sequences",
        ),
    ] = "auto"
    rows: Annotated[
        Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None,
        _about("Rows of the batch; without it there are many.", 2000, "rows"),
    ] = None
    arrivals_per_s: Annotated[
        Annotated[float, Field(ge=MIN_ARRIVALS, le=MAX_ARRIVALS, allow_inf_nan=False)] | None,
        _about(
            "Turns that arrive in a second. Without it every user sends the next turn at once.",
            2.5,
            "turns a second",
        ),
    ] = None
    skew: Annotated[
        Annotated[float, Field(ge=0, le=MAX_SKEW, allow_inf_nan=False)]
        | Annotated[str, Field(min_length=1, max_length=200)],
        _about(
            "How uneven the router is: the exponent of a Zipf law of experts, or the file of "
            "`tokenspeed measure-routing`. 0, even routing, reads the most experts: unmeasured, a "
            "step is not promised to be faster than that.",
            0.5,
        ),
    ] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _agents_are_counted(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") == "agentic":
            return {"concurrency": 1, **data}
        return data

    @model_validator(mode="after")
    def _auto_is_for_batches(self) -> WorkloadSpec:
        if self.concurrency == "auto" and self.kind != "batch":
            raise ValueError("`concurrency: auto` is for `kind: batch`: agents are counted")
        return self

    @model_validator(mode="after")
    def _rows_have_tokens_of_their_own(self) -> WorkloadSpec:
        if self.shared_prompt_tokens is None:
            return self
        if not self.is_batch_of_rows:
            raise ValueError("`shared_prompt_tokens` is for rows of a batch")
        stated = self.first_turn_tokens
        mean = stated if isinstance(stated, int) else stated.mean
        if mean is not None and mean <= self.shared_prompt_tokens:
            raise ValueError("`first_turn_tokens` are not more than `shared_prompt_tokens`")
        return self

    @property
    def routing_skew(self) -> float:
        """The exponent of the Zipf law of experts.

        Raises:
            SpecError: its file was not read.
        """
        if isinstance(self.skew, str):
            raise SpecError(f"`{self.skew}` was not read", ROUTING_FILE_HINT)
        return self.skew

    @property
    def prompts(self) -> Lengths:
        """Tokens of first prompts."""
        return _lengths(self.first_turn_tokens)

    @property
    def shared_tokens(self) -> int:
        """Tokens with which all prompts begin."""
        return self.shared_prompt_tokens or 0

    @property
    def own_prompt_tokens(self) -> float:
        """Tokens of a first prompt that it shares with no other, on average; one at least."""
        return max(self.prompts.mean - self.shared_tokens, 1.0)

    @property
    def outputs(self) -> Lengths:
        """Tokens of answers."""
        return _lengths(self.output_tokens)

    @property
    def num_seqs(self) -> int:
        """Sequences at the same time, where they are stated or chosen already."""
        assert self.concurrency != "auto", "the advisor has not chosen them"
        return self.concurrency

    @property
    def max_conversation_tokens(self) -> int:
        """Tokens of the longest conversation, prompts and answers."""
        prompts = self.prompts.longest + (self.turns - 1) * self.turn_tokens
        return prompts + self.turns * self.outputs.longest

    @property
    def mean_conversation_tokens(self) -> float:
        """Tokens of a conversation at its end, on average."""
        prompts = self.prompts.mean + (self.turns - 1) * self.turn_tokens
        return prompts + self.turns * self.outputs.mean

    @property
    def is_batch_of_rows(self) -> bool:
        """Whether rows come from a file, one after the other, and nothing follows on them."""
        return self.kind == "batch" and self.turns == 1 and self.arrivals_per_s is None


def _lengths(stated: int | LengthsSpec) -> Lengths:
    if isinstance(stated, int):
        return Lengths.all_alike(stated)
    return stated.summary


def _percentile(of: str, percent: int, example: float) -> FieldInfo:
    """What the reference says of a service level on a percentile."""
    meaning = f"{of}, of {percent} in 100 turns under the simulated load."
    return _about(meaning, example, "milliseconds")


class SloSpec(_Section):
    """Service levels: a deployment that meets them is preferred to any that does not.

    Means are those of formulas. Percentiles are those of the users or arrivals of the workload,
    simulated on the engine's own scheduler: formulas rank deployments, the leaders are simulated.
    """

    ttft_ms: Annotated[
        Milliseconds | None,
        _about(
            "The longest time from a request to its first token, on average.", 500, "milliseconds"
        ),
    ] = None
    tpot_ms: Annotated[
        Milliseconds | None,
        _about("The longest time of a token after the first, on average.", 20, "milliseconds"),
    ] = None
    ttft_p50_ms: Annotated[Milliseconds | None, _percentile(_TTFT, 50, 300)] = None
    ttft_p90_ms: Annotated[Milliseconds | None, _percentile(_TTFT, 90, 500)] = None
    ttft_p95_ms: Annotated[Milliseconds | None, _percentile(_TTFT, 95, 600)] = None
    ttft_p99_ms: Annotated[Milliseconds | None, _percentile(_TTFT, 99, 1000)] = None
    tpot_p50_ms: Annotated[Milliseconds | None, _percentile(_TPOT, 50, 15)] = None
    tpot_p90_ms: Annotated[Milliseconds | None, _percentile(_TPOT, 90, 18)] = None
    tpot_p95_ms: Annotated[Milliseconds | None, _percentile(_TPOT, 95, 20)] = None
    tpot_p99_ms: Annotated[Milliseconds | None, _percentile(_TPOT, 99, 30)] = None


class ObjectiveSpec(_Section):
    """What the planner minimises."""

    minimize: Annotated[
        Literal["turn_time", "tpot", "cost_per_token"],
        _about(
            "The time of a turn, the time of a token after the first, or the cost of a token.",
            "tpot",
        ),
    ] = "turn_time"
    slo: Annotated[
        SloSpec | None, _about("Service levels; the same as `slo` of the spec.", {"ttft_ms": 500})
    ] = None


class SpeculationSpec(_Section):
    """How drafts are made, verified and taken back."""

    depth: Annotated[
        Annotated[int, Field(ge=1, le=MAX_DRAFTS)] | Literal["auto"],
        _about("Drafts that a step verifies.", 3, "drafts"),
    ] = "auto"
    acceptance: Annotated[
        Share | Shares | None,
        _about(
            "The share of drafts that are accepted if those before were: one for all places, or "
            "one for each. Without it, what was measured for the model.",
            [0.9, 0.8],
        ),
    ] = None
    rollback: Annotated[
        Auto | RollbackWord,
        _about(
            "How rejected drafts are taken back. With `snapshot`, a step leaves a recurrent state "
            "after each of its queries; with `recompute`, it keeps their inputs, and the next step "
            "recomputes the state after the accepted ones, which needs less memory.",
            "snapshot",
        ),
    ] = "auto"
    draft_vocab: Annotated[
        Annotated[int, Field(ge=1, le=MAX_VOCAB)] | None,
        _about(
            "Drafts are chosen from this many tokens, the first of the vocabulary. Their part of "
            "the head is faster to read.",
            65536,
            "tokens",
        ),
    ] = None


class DisaggregationSpec(_Section):
    """Two pools of GPUs: one that prefills, one that decodes."""

    prefill: Annotated[Gpus, _about("GPUs of the pool that prefills.", 2, "GPUs")]
    decode: Annotated[Gpus, _about("GPUs of the pool that decodes.", 6, "GPUs")]
    answers: Annotated[
        Literal["auto", "return", "stay"],
        _about(
            "Whether an answer goes back to the pool that prefills, so that the next turn computes "
            "only its own tokens; `auto` where that costs less than computing it again.",
            "return",
        ),
    ] = "auto"


class ServingSpec(_Section):
    """Knobs that are searched for where the spec leaves them out, and what requests may ask for."""

    prefill_chunk: Annotated[
        Tokens | None, _about("Tokens of a prompt that are computed at once.", 4096, "tokens")
    ] = None
    kv_dtype: Annotated[
        Literal["auto", "bf16", "fp8"] | None,
        _about(
            "How keys and values are stored: bf16 is in the dtype of the activations, fp8 e4m3 "
            "with the scale of the checkpoint, or 1; `auto` is what the objective prefers. "
            "Left out: bf16.",
            "fp8",
        ),
    ] = None
    checkpoint_tokens: Annotated[
        TokensOrNone | None,
        _about(
            "Tokens between two checkpoints of recurrent state in a prompt; 0 keeps nothing for "
            "the next turn.",
            4096,
            "tokens",
        ),
    ] = None
    grammar: Annotated[
        bool | None,
        _about(
            "Whether requests may force the form of an answer (`response_format`, `tool_choice`): "
            "then the sampler has a mask of tokens before it.",
            True,
        ),
    ] = None
    penalties: Annotated[
        bool | None,
        _about(
            "Whether requests may ask for presence, frequency and repetition penalties, `min_p` "
            "and `logit_bias`: then an operator before the sampler changes logits.",
            True,
        ),
    ] = None
    host_cache_gib: Annotated[
        Annotated[float, Field(ge=0, le=1 << 16, allow_inf_nan=False)] | None,
        _about(
            "A second tier of the prefix cache in the memory of the host: conversations that the "
            "GPU has no room for are copied there when a turn ends, and back when the next one "
            "comes. For each rank; one pool. Left out or 0: none.",
            64,
            "GiB",
        ),
    ] = None
    state: Annotated[
        Literal["fp32", "bf16"] | None,
        _about(
            "How recurrent state is stored between steps; it is computed in fp32. bf16 takes half "
            "of its bytes and rounds it after each step; fp32 where nothing is said.",
            "bf16",
        ),
    ] = None


class Spec(_Section):
    """The whole spec."""

    version: Annotated[Literal[1], _about("The version of this format.", 1)]
    model: Annotated[ModelSpec, _about("The model.", {"preset": "qwen3.5-9b"})]
    target: Annotated[TargetSpec, _about("The machine.", {"gpu": "H200", "count": 2})]
    parallelism: Annotated[
        Auto | ParallelismSpec,
        _about("The layout; `auto` searches for the best.", {"attention": {"tp": 2}}),
    ] = "auto"
    workload: Annotated[
        WorkloadSpec, _about("What will be served.", {"kind": "batch", "concurrency": 16})
    ] = WorkloadSpec()
    objective: Annotated[ObjectiveSpec, _about("What is minimised.", {"minimize": "turn_time"})] = (
        ObjectiveSpec()
    )
    slo: Annotated[SloSpec | None, _about("Service levels.", {"tpot_ms": 20})] = None
    speculation: Annotated[
        AutoOrOff | SpeculationSpec,
        _about("Drafts; `auto` drafts where it pays, `off` never.", {"depth": 3}),
    ] = "auto"
    disaggregation: Annotated[
        AutoOrOff | DisaggregationSpec,
        _about("Two pools of GPUs, one for prompts.", "off"),
    ] = "auto"
    serving: Annotated[
        ServingSpec | None, _about("Knobs of the engine.", {"prefill_chunk": 4096})
    ] = None

    # Where the profile of the target is looked up, too; not a part of what was asked.
    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """The folder of the spec's file, where its target is the path of a profile."""
        return self._folder

    def with_concurrency(self, num_seqs: int) -> Spec:
        """The spec with so many sequences at the same time."""
        return self._with_workload({"concurrency": num_seqs})

    def _with_workload(self, changes: Mapping[str, Any]) -> Spec:
        workload = self.workload.model_copy(update=changes)
        return self.model_copy(update={"workload": workload})

    @property
    def stated_answers(self) -> Literal["auto", "return", "stay"]:
        """Whether answers go back to a pool that prefills."""
        if isinstance(self.disaggregation, DisaggregationSpec):
            return self.disaggregation.answers
        return "auto"

    @property
    def stored_state(self) -> DType | None:
        """How recurrent state is stored, where that is not the dtype that it is computed in."""
        if self.serving is None or self.serving.state != "bf16":
            return None
        return "bf16"

    @property
    def host_cache_bytes(self) -> int:
        """Memory of the host for the prefix cache, on each rank."""
        if self.serving is None:
            return 0
        return int((self.serving.host_cache_gib or 0) * GIB)

    @property
    def service_levels(self) -> dict[str, float]:
        """The largest allowed value of each metric that has a service level, by its name."""
        levels: dict[str, float] = {}
        for section in (self.objective.slo, self.slo):
            if section is not None:
                levels |= section.model_dump(exclude_none=True)
        return levels

    @property
    def percentile_levels(self) -> list[str]:
        """The names of the service levels that only a simulation can judge."""
        return [name for name in self.service_levels if "_p" in name]

    @model_validator(mode="after")
    def _rising_slo(self) -> Spec:
        """A higher percentile of the same times is never less."""
        levels = self.service_levels
        for time in SLO_TIMES:
            names = [f"{time}_p{percent}_ms" for percent in SLO_PERCENTILES]
            stated = [name for name in names if name in levels]
            for lower, higher in itertools.pairwise(stated):
                if levels[lower] > levels[higher]:
                    raise ValueError(
                        f"`{higher}` is {levels[higher]:g}, less than `{lower}`, "
                        f"{levels[lower]:g}: lower that one, or leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _one_slo(self) -> Spec:
        stated = self.objective.slo
        if stated is None or self.slo is None:
            return self
        for name, limit in stated.model_dump(exclude_none=True).items():
            other = getattr(self.slo, name)
            if other is not None and other != limit:
                raise ValueError(
                    f"`slo.{name}` is {other:g}, `objective.slo.{name}` is {limit:g}: give one"
                )
        return self

    @property
    def stated_depth(self) -> int | None:
        """Drafts of a step that the spec fixes; None where the planner chooses."""
        if self.speculation == "off":
            return 0
        if self.speculation == "auto" or self.speculation.depth == "auto":
            return None
        return self.speculation.depth

    @property
    def grammar(self) -> bool:
        """Whether grammars may mask tokens."""
        return self.serving is not None and bool(self.serving.grammar)

    @property
    def penalties(self) -> bool:
        """Whether penalties and biases may change logits."""
        return self.serving is not None and bool(self.serving.penalties)

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


def load_spec(path: Path, changes: Sequence[str] = ()) -> Spec:
    """Read a spec.

    Args:
        path: of the file.
        changes: `key.key=value` with the value in YAML; they are applied after the file is read.

    Raises:
        SpecError: it cannot be read, is not YAML, or is not a spec; says which key and what was
            meant.
    """
    text = read_file(path, "name a YAML spec, such as examples/demo/spec.yaml")
    spec = parse_spec(text, str(path), changes)
    if spec.target.gpu.endswith(".yaml"):
        spec._folder = path.parent
    return _with_routing(_with_lengths(spec, path.parent), path.parent)


def _with_routing(spec: Spec, folder: Path) -> Spec:
    """The spec with the number of a file of routing in its place."""
    stated = spec.workload.skew
    if not isinstance(stated, str):
        return spec
    return spec._with_workload({"skew": read_skew(_found(Path(stated), folder))})


def _found(path: Path, folder: Path) -> Path:
    """A file, looked up from the current folder, then from `folder`."""
    if not path.is_absolute() and not path.is_file() and (folder / path).is_file():
        return folder / path
    return path


def _with_lengths(spec: Spec, folder: Path) -> Spec:
    """The spec with the summary of each file of lengths in its place."""
    changes = {}
    for key in LENGTH_KEYS:
        stated = getattr(spec.workload, key)
        if isinstance(stated, LengthsSpec) and stated.lengths is not None:
            found = _summary(Path(stated.lengths), folder, LENGTH_KEYS[key])
            if key == "first_turn_tokens" and found.mean <= spec.workload.shared_tokens:
                raise SpecError(
                    f"`workload.shared_prompt_tokens` is {spec.workload.shared_tokens}, but "
                    f"prompts of `{stated.lengths}` have {found.mean:g} tokens on average",
                    "say with how many tokens all of them begin",
                )
            changes[key] = LengthsSpec(mean=found.mean, p95=int(found.p95), max=found.longest)
    if not changes:
        return spec
    return spec._with_workload(changes)


def _summary(path: Path, folder: Path, field: str) -> Lengths:
    """One length of the rows of a file, looked up from the current folder, then from `folder`.

    Raises:
        SpecError: as `read_lengths`, or no row knows this length.
    """
    found = [getattr(row, field) for row in read_lengths(_found(path, folder))]
    known = [length for length in found if length is not None]
    if not known:
        raise SpecError(f"no row of `{path}` has `{field}`", LENGTHS_FILE_HINT)
    return Lengths.of(known)


def parse_spec(text: str, name: str, changes: Sequence[str] = ()) -> Spec:
    """Read a spec from YAML text; raises as `load_spec` does."""
    data = parse_yaml(text, name)
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
            f"`--set {printable_line(change)}` is not key=value",
            "such as `--set parallelism.attention.tp=4`",
        )
    try:
        value = read_yaml(text)
    except NotYaml as error:
        raise SpecError(
            f"`--set {printable_line(change)}` is not YAML: {error.problem}",
            "quote the value as YAML does",
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
    message = complaint(first["msg"])
    if first["type"] in ("model_type", "model_attributes_type"):
        message = "it is a section with keys of its own"
    if first["type"] != "value_error" or not isinstance(value, dict):
        message = f"{message}, got {_short(value)}"
    return SpecError(f"`{name}` at `{where}`: {message}", _type_hint(where))


def _where(location: tuple[int | str, ...], unknown: bool) -> str:
    """The path of a key, without the names of types that pydantic puts into it."""
    if not location:
        return "spec"
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
    return "`tokenspeed spec` lists the keys of a spec"


_WORD_ERRORS = ("literal_error", "int_type")


def _rank(item: Any) -> tuple[bool, bool]:
    """The order of errors: unknown keys first, then words last where a mapping was given."""
    is_word = item["type"] in _WORD_ERRORS and isinstance(item["input"], dict)
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
        return "`tokenspeed spec` explains every key"
    key = ".".join(part for part in where.split(".") if not part.isdecimal())
    return f"`tokenspeed spec --explain {key}` says what it means"


def _sections() -> Mapping[str, type[_Section]]:
    return {
        "": Spec,
        "model": ModelSpec,
        "target": TargetSpec,
        "parallelism": ParallelismSpec,
        "attention": AttentionSpec,
        "moe": MoeSpec,
        "workload": WorkloadSpec,
        "first_turn_tokens": LengthsSpec,
        "output_tokens": LengthsSpec,
        "objective": ObjectiveSpec,
        "slo": SloSpec,
        "speculation": SpeculationSpec,
        "disaggregation": DisaggregationSpec,
        "serving": ServingSpec,
    }


_KEYS_OF = {name: tuple(section.model_fields) for name, section in _sections().items()}
_KEYS = tuple(dict.fromkeys(key for keys in _KEYS_OF.values() for key in keys))
