"""The plan: what the planner decided, and all that the runtime obeys.

A plan is one JSON file. It is the same for every rank; what differs by rank is written as a
`RankShift`. Memory is a handful of arenas with planned offsets, work is a list of steps a program.

`Plan` and what it serves are here; its parts are in the files beside this one, by subject.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from tokenspeed_plan.plans.canon import canonical
from tokenspeed_plan.plans.ops import ADJUSTMENTS, TOKEN_MASK
from tokenspeed_plan.plans.schema.cost_specs import (
    Amounts,
    BatchSize,
    CallAmounts,
    CallCost,
    Terms,
    Work,
)
from tokenspeed_plan.plans.schema.kernel_specs import (
    TENSOR_ROLES,
    Binary,
    GridDim,
    KernelSpec,
    Launch,
    LaunchRole,
    Param,
    Part,
    TensorRole,
)
from tokenspeed_plan.plans.schema.memory_specs import (
    AnswerReturns,
    ArenaName,
    ArenaSpec,
    BufferSpec,
    HostCache,
    Memory,
    Piece,
    Shift,
    WeightSpec,
)
from tokenspeed_plan.plans.schema.prediction_specs import (
    CanaryPrompt,
    Decision,
    LayerMove,
    Option,
    Predicted,
    Transfers,
)
from tokenspeed_plan.plans.schema.program_specs import (
    Call,
    CollectiveCall,
    KernelCall,
    LibraryCall,
    Program,
    Push,
    RecordEvent,
    Step,
    WaitEvent,
    shared_bytes,
)
from tokenspeed_plan.plans.types import DType, Frozen, RollbackWord, Sha256

__all__ = [
    "SCHEMA_VERSION",
    "TENSOR_ROLES",
    "Amounts",
    "AnswerReturns",
    "ArenaName",
    "ArenaSpec",
    "AttentionLayout",
    "BatchSize",
    "Binary",
    "BufferSpec",
    "Call",
    "CallAmounts",
    "CallCost",
    "CanaryPrompt",
    "Capacity",
    "CollectiveCall",
    "Decision",
    "GridDim",
    "HostCache",
    "KernelCall",
    "KernelSpec",
    "Launch",
    "LaunchRole",
    "LayerMove",
    "Layout",
    "LibraryCall",
    "Limits",
    "Memory",
    "ModelFacts",
    "MoeLayout",
    "Option",
    "Param",
    "Part",
    "Piece",
    "Plan",
    "Pool",
    "PoolRole",
    "Predicted",
    "Program",
    "Push",
    "RecordEvent",
    "Shard",
    "Shift",
    "Step",
    "Target",
    "TensorRole",
    "Terms",
    "Transfers",
    "WaitEvent",
    "WeightSpec",
    "Work",
    "shared_bytes",
]

SCHEMA_VERSION = 8


class Shard(Frozen):
    """A file of weights: the digests of what its header says, and of its bytes.

    The second is empty where the plan was not made with these weights, but only for them.
    """

    header_sha256: Sha256
    file_sha256: Sha256 = ""


class ModelFacts(Frozen):
    """The model that the plan is for, and the files that it was planned from.

    `files` maps a file name to its SHA-256, `shards` those of the weights to theirs; the runtime
    refuses other content. JSON has `shards` only where there are weights. `location` is the folder
    as the spec wrote it, None for a preset.
    """

    name: str
    location: str | None
    dtype: DType
    num_layers: int
    hidden_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    files: dict[str, Sha256]
    shards: dict[str, Shard] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _spell(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = spell(self)
        if not self.shards:
            fields.pop("shards", None)
        return fields


class Target(Frozen):
    """The machine: `sm` is the compute capability (90 for H200), 0 on a CPU."""

    gpu: str
    count: int
    sm: int

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where its tensors live, as PyTorch says it."""
        return "cuda" if self.sm else "cpu"


class AttentionLayout(Frozen):
    """Tensor-parallel size of the mixers."""

    tp: int


class MoeLayout(Frozen):
    """Tensor and expert parallel sizes of the expert blocks (of the dense MLP: tp)."""

    tp: int
    ep: int


class Layout(Frozen):
    """How the model is cut over the ranks."""

    attention: AttentionLayout
    moe: MoeLayout

    @property
    def num_ranks(self) -> int:
        """Processes that share the model."""
        return self.attention.tp


class Capacity(Frozen):
    """What a pool has memory and programs for; graphs are built from it.

    Sequences: up to `max_seqs` run at once, each up to `max_seq_len` tokens. A prefill chunk has up
    to `max_tokens` tokens.

    Memory: `num_pages` pages of `page_size` tokens for keys and values, and `num_state_slots` slots
    for recurrent states. Slot 0 stays zero: a new sequence reads it. A running sequence holds
    `state_slots_per_seq` slots: with one, a step writes the slot that it reads, unless others hold
    that too, and then a fresh one. With `kept_inputs`, a decode step keeps the inputs of that many
    queries instead of a state after each, and the next step recomputes the state after the accepted
    ones. One more page and the last slot belong to nobody: padding writes there.

    The prefix cache has the pages that running sequences leave, and `num_checkpoints` slots of its
    own. A prompt leaves a checkpoint every `checkpoint_interval` tokens (a multiple of the page),
    and at other places where it saves later requests at least `min_checkpoint_tokens`.
    """

    max_seqs: int
    max_seq_len: int
    max_tokens: int
    page_size: int
    num_pages: int
    state_slots_per_seq: int
    num_state_slots: int
    default_max_tokens: int
    checkpoint_interval: int
    min_checkpoint_tokens: int
    num_checkpoints: int
    kept_inputs: int = 0

    @property
    def rollback(self) -> RollbackWord:
        """How a decode step takes rejected drafts back."""
        if self.kept_inputs:
            return "recompute"
        return "snapshot"

    @property
    def max_depth(self) -> int:
        """The most drafts that a decode step verifies.

        A sequence has a slot to read and one to write for each query, or room for the inputs of
        each query. One that writes the slot that it reads has no drafts.
        """
        if self.kept_inputs:
            return self.kept_inputs - 1
        return max(self.state_slots_per_seq - 2, 0)

    @property
    def in_place(self) -> bool:
        """Whether a step writes the state slot that it reads."""
        return self.state_slots_per_seq == 1

    @property
    def written_slots_per_seq(self) -> int:
        """State slots that a step of a sequence may write."""
        return max(self.state_slots_per_seq - 1, 1)

    @property
    def table_pages(self) -> int:
        """Columns of the page table, with room for drafts beyond the last token of a sequence."""
        tokens = self.max_seq_len
        if self.max_depth:
            tokens += 2 * (self.max_depth + 1)
        return -(-tokens // self.page_size)

    @property
    def pad_page(self) -> int:
        """Where padding writes its keys and values."""
        return self.num_pages

    @property
    def pad_state_slot(self) -> int:
        """Where padding writes its recurrent state."""
        return self.num_state_slots - 1


class Limits(Capacity):
    """What a plan can serve: its capacity, and the prefill tokens between two decode steps.

    At most `interleaved_tokens`. While every sequence is taken and some decode, prompts wait until
    they have `gathered_tokens` together, so that one step computes them. A step in which a prompt
    ends takes a part of another one only up to `filled_tokens` in all; 0 is no limit. JSON has
    these two only where they are not 0.
    """

    interleaved_tokens: int
    gathered_tokens: int = 0
    filled_tokens: int = 0

    @model_serializer(mode="wrap")
    def _spell(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = spell(self)
        for name in ("gathered_tokens", "filled_tokens"):
            if not fields[name]:
                del fields[name]
        return fields


PoolRole = Literal["both", "prefill", "decode"]


class Pool(Frozen):
    """Ranks with one role: how they share the model, what they serve, and what each rank holds.

    One of role `both` is alone. One of role `prefill` has programs for prompts alone, and hands
    what it computes over to one of role `decode`, which has all programs: it can go on alone.
    JSON has a `host_cache` only where there is one, and `answer_returns` where answers go back to
    it.
    """

    role: PoolRole
    layout: Layout
    limits: Limits
    memory_bytes_per_rank: Memory
    arenas: tuple[ArenaSpec, ...]
    weights: tuple[WeightSpec, ...]
    buffers: tuple[BufferSpec, ...]
    programs: tuple[Program, ...]
    host_cache: HostCache | None = None
    answer_returns: AnswerReturns | None = None

    @model_serializer(mode="wrap")
    def _spell(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = spell(self)
        for name in ("host_cache", "answer_returns"):
            if getattr(self, name) is None:
                fields.pop(name, None)
        return fields

    def slot_bytes(self, arena: ArenaName) -> int:
        """Bytes of one page (`kv_cache`), or of one state slot (`state`), in all layers."""
        tensors = [buffer.tensor for buffer in self.buffers if buffer.arena == arena]
        return sum(tensor.size_bytes() // int(tensor.shape[0]) for tensor in tensors)

    def index_of(self, program: Program) -> int:
        """The place of a program; its phase and bucket tell it from the others."""
        keys = [(each.phase, each.bucket) for each in self.programs]
        return keys.index((program.phase, program.bucket))


class Plan(Frozen):
    """Everything that was decided. `digest` is the SHA-256 of all other fields in canonical form.

    `binaries` are empty where the kernels were not compiled; `kernel_compiler` names what compiled
    them.
    """

    schema_version: int
    compiler_version: str
    digest: str
    spec: dict[str, Any]
    model: ModelFacts
    target: Target
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]
    decisions: tuple[Decision, ...]
    predicted: Predicted
    kernels: tuple[KernelSpec, ...]
    kernel_compiler: str = ""
    binaries: tuple[Binary, ...] = ()
    canary: tuple[CanaryPrompt, ...] = ()

    @field_validator("spec")
    @classmethod
    def _is_finite(cls, spec: dict[str, Any]) -> dict[str, Any]:
        canonical(spec)  # refuses NaN and infinity, which JSON does not have
        return spec

    @property
    def pool(self) -> Pool:
        """The pool that answers. It comes first, and can do all by itself."""
        return self.pools[0]

    @property
    def has_two_pools(self) -> bool:
        """Whether another pool computes prompts for the one that answers."""
        return len(self.pools) > 1

    def view(self, pool: Pool) -> Plan:
        """The plan as the ranks of one of its pools see it: no other pool, and only their GPUs.

        It keeps the digest, so that the pools of a plan know each other by it.
        """
        if not self.has_two_pools:
            return self
        target = self.target.model_copy(update={"count": pool.layout.num_ranks})
        return self.model_copy(update={"pools": (pool,), "target": target})

    def with_pool(self, **changes: Any) -> Plan:
        """The plan with some fields of its first pool replaced; not sealed."""
        first, *others = self.pools
        return self.model_copy(update={"pools": (first.model_copy(update=changes), *others)})

    @property
    def takes_grammars(self) -> bool:
        """Whether its sampler has a mask of tokens before it."""
        return any(buffer.name == TOKEN_MASK for buffer in self.pool.buffers)

    @property
    def takes_penalties(self) -> bool:
        """Whether penalties and biases may change its logits."""
        return any(buffer.name == ADJUSTMENTS for buffer in self.pool.buffers)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.num_layers
