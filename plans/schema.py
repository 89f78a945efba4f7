"""The plan: what the planner decided, and all that the runtime obeys.

A plan is one JSON file. It is the same for every rank; what differs by rank is written as a
`RankShift`. Memory is a handful of arenas with planned offsets, work is a list of steps a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.types import (
    Attr,
    Constant,
    Count,
    Dim,
    DType,
    Frozen,
    KernelName,
    Phase,
    Positive,
    RankShift,
    Sha256,
    TensorSpec,
)

SCHEMA_VERSION = 6

ArenaName = Literal["weights", "kv_cache", "state", "io", "activations", "scratch", "symmetric"]
TensorRole = Literal["input", "weight", "state", "output", "scratch"]
LaunchRole = Literal[
    "rank_constant", "peer_table", "signal_table", "rank", "num_tokens", "num_seqs"
]
TENSOR_ROLES: frozenset[str] = frozenset(get_args(TensorRole))
SIGNALS = "signals"  # the buffer of flags at which ranks wait for each other, i32


class ModelFacts(Frozen):
    """The model that the plan is for, and the files that it was planned from.

    `files` maps a file name to its SHA-256; the runtime refuses other content. `location` is the
    folder as the spec wrote it, None for a preset.
    """

    name: str
    location: str | None
    dtype: DType
    num_layers: int
    hidden_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    files: dict[str, str]


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


class Limits(Frozen):
    """What a plan can serve.

    A running sequence holds `state_slots_per_seq` rows of recurrent state; row 0 of every state
    buffer stays zero and is what a new sequence reads. With `kept_inputs`, a decode step leaves no
    state after its rows but so many of their inputs, and the next step begins with those that came
    true. `max_tokens` is the largest prefill chunk, `interleaved_tokens` the largest between two
    decode steps. One more page and one more row, the last ones, belong to nobody: padding writes
    there.

    The prefix cache has what running sequences leave of the pages, and `num_checkpoints` rows of
    its own. Prompts leave a checkpoint every `checkpoint_interval` tokens, a multiple of the page,
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
    interleaved_tokens: int
    checkpoint_interval: int
    min_checkpoint_tokens: int
    num_checkpoints: int
    kept_inputs: int = 0

    @property
    def max_depth(self) -> int:
        """The most drafts that a decode step verifies: a slot has a row to read, and one for each token to write.

        Or the inputs of each token, and one row to write.
        """
        return self.kept_inputs - 1 if self.kept_inputs else self.state_slots_per_seq - 2

    @property
    def table_pages(self) -> int:
        """Columns of the page table. Drafts may run on after the last token: that far there are columns too."""
        overrun = 2 * (self.max_depth + 1) if self.max_depth else 0
        return -(-(self.max_seq_len + overrun) // self.page_size)

    @property
    def pad_page(self) -> int:
        """Where padding writes its keys and values."""
        return self.num_pages

    @property
    def pad_state_slot(self) -> int:
        """Where padding writes its recurrent state."""
        return self.num_state_slots - 1


class Option(Frozen):
    """Something else that could have been chosen: its numbers, or the reason why it could not."""

    what: str
    numbers: dict[str, float] = Field(default_factory=dict)
    reason: str = ""


class Decision(Frozen):
    """One choice, with its reason, what came second, and the others that were looked at."""

    name: str
    value: str
    reason: str
    runner_up: str | None = None
    options: tuple[Option, ...] = ()


class LayerMove(Frozen):
    """One layer's cache on its way to a decode pool, counted from the start of the prompt's last chunk."""

    layer: int
    size_bytes: int
    start_us: float
    end_us: float


class Transfers(Frozen):
    """How prefill and decode pools would hand a prompt over: bytes from each sender, and when each layer's leave.

    `exposed_us` is what no computing hides.
    """

    transport: Literal["nvlink", "rdma", "tcp"]
    bytes_per_s: float
    size_bytes: int
    exposed_us: float
    ttft_ms_with: float
    ttft_ms_without: float
    layers: tuple[LayerMove, ...]


class Predicted(Frozen):
    """What the spec's workload will see, with intervals. TPOT is the time of a token after the first.

    `decode_step_us` are the kinds of time of a step at `decode_batch`, `limited_by` is the largest;
    `slo_missed` says which service level is not met, and by how much. `front` and `rejected` are of
    all deployments, replayed or not.
    """

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    largest_concurrency: int
    largest_context_tokens: int
    decode_batch: float
    decode_step_us: dict[str, float]
    decode_floor_us: float
    limited_by: str
    slo_missed: str | None = None
    front: tuple[Option, ...] = ()
    rejected: tuple[Option, ...] = ()
    transfers: Transfers | None = None


class ArenaSpec(Frozen):
    """One allocation."""

    name: ArenaName
    size_bytes: Annotated[int, Field(ge=0, lt=1 << 50)]


class BufferSpec(Frozen):
    """A tensor at a planned place."""

    name: str
    arena: ArenaName
    offset_bytes: int
    tensor: TensorSpec


class Shift(Frozen):
    """A rank-dependent start along one dimension of a checkpoint tensor."""

    dim: int
    by: RankShift


class Piece(Frozen):
    """A box of one checkpoint tensor and where it goes in the weight.

    The box starts at `start` (plus the shifts) and has `size`; it lands at `at`. A `source` with
    `{expert}` in it names one tensor per expert, stacked as a new first dimension.
    """

    source: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    at: tuple[int, ...]
    shifts: tuple[Shift, ...] = ()


class WeightSpec(Frozen):
    """One parameter as a rank holds it, assembled from pieces of the checkpoint."""

    name: str
    offset_bytes: int
    tensor: TensorSpec
    pieces: tuple[Piece, ...]


class Param(Frozen):
    """One argument of a kernel's launch.

    A tensor has the role `input`, `weight`, `state`, `output` or `scratch`. Scratch is memory that the
    programs of one launch share: it is zero before the first launch, and no result of the kernel.

    The other roles are what the launcher fills in:

        rank_constant  i32     a constant that depends on the rank, such as its first expert
        peer_table     i64[R]  for each of R ranks the address of the tensor that this kernel reduces
        signal_table   i64[R]  for each of R ranks the address of its flags (the buffer `signals`)
        rank           i32     the rank that runs the kernel
        num_tokens     i32     of the batch
        num_seqs       i32     of the batch

    Scalars have the shape `()` and are passed by value, all else is passed by address.
    """

    name: str
    role: TensorRole | LaunchRole
    tensor: TensorSpec
    access: Access = "read"

    @property
    def is_tensor(self) -> bool:
        """Whether a call names a buffer or a weight for it."""
        return self.role in TENSOR_ROLES


class Part(Frozen):
    """One operator inside a kernel; names are parameters of the kernel or values that never leave it."""

    kind: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Attr]
    rank_attrs: dict[str, RankShift] = Field(default_factory=dict)


class GridDim(Frozen):
    """Programs along one dimension: `fixed + ceil(num_tokens * scale / block) + num_seqs * per_seq` (block 0: none)."""

    fixed: Count = 0
    scale: Positive = 1
    block: Count = 0
    per_seq: Count = 0

    def at(self, num_tokens: int, num_seqs: int) -> int:
        """The number at the sizes of a batch."""
        blocks = -(-num_tokens * self.scale // self.block) if self.block else 0
        return self.fixed + blocks + num_seqs * self.per_seq


class Launch(Frozen):
    """How a kernel is built and started: its template, the constants baked into it, its grid.

    `source_sha256` is that of `kernels/<name>.py`. With `pdl` it starts while its predecessor ends,
    and waits for its results inside (programmatic dependent launch). The inputs `early` it reads
    before that: they must be older than its predecessor, which has `trigger_after_wait` (its
    successor starts only when all before it is done).
    """

    template: str
    constants: dict[str, Constant]
    grid: Annotated[tuple[GridDim, ...], Field(min_length=1, max_length=3)]
    num_warps: Annotated[int, Field(ge=1, le=32)]
    num_stages: Annotated[int, Field(ge=1, le=32)]
    pdl: bool
    prefetch: tuple[str, ...] = ()
    trigger_after_wait: bool = False
    source_sha256: Sha256


class KernelSpec(Frozen):
    """One specialised kernel, shared by all steps that need it; the name ends with a digest of the rest.

    `params` are all arguments of a launch, in the order of the ABI: the tensors first, then what the
    launcher fills in. A kernel without `launch` has no Triton body and only tensors: fp64, which only
    the reference computes in.
    """

    name: KernelName
    params: tuple[Param, ...]
    parts: tuple[Part, ...]
    launch: Launch | None = None

    @property
    def tensors(self) -> tuple[Param, ...]:
        """The parameters that a call names buffers and weights for."""
        return tuple(param for param in self.params if param.is_tensor)

    @property
    def launch_params(self) -> tuple[Param, ...]:
        """The parameters that the launcher fills in."""
        return tuple(param for param in self.params if not param.is_tensor)

    @property
    def reduced_operand(self) -> str | None:
        """The parameter that the kernel adds up over all ranks, which peers read; None of most kernels."""
        for part in self.parts:
            if part.kind == "all_reduce":
                return part.operands[0]
        return None


class Binary(Frozen):
    """What the compiler made of a kernel for one architecture; the file is `cubin/<kernel>.sm<sm>.cubin`."""

    kernel: KernelName
    sm: Positive
    cubin_sha256: Sha256
    registers: Count
    spill_bytes: Count
    shared_bytes: Count


class KernelCall(Frozen):
    """Run a kernel. `args` are names of buffers and weights, in the order of the kernel's tensors.

    `flops` and `moved_bytes` are those of one call at the batch that `predicted_us` is for.
    """

    kind: Literal["kernel"] = "kernel"
    kernel: str
    args: tuple[str, ...]
    stream: int = 0
    predicted_us: float
    flops: float = 0.0
    moved_bytes: float = 0.0

    def places(self, kernel: KernelSpec) -> dict[str, str]:
        """What the call gives to each parameter of its kernel, by the parameter's name."""
        return {param.name: name for param, name in zip(kernel.tensors, self.args, strict=True)}


class CollectiveCall(Frozen):
    """Combine a buffer over all ranks: the sum, or the columns of all ranks side by side."""

    kind: Literal["collective"] = "collective"
    op: Literal["all_reduce", "all_gather"]
    source: str
    target: str
    stream: int = 0
    predicted_us: float


class LibraryCall(Frozen):
    """Call a function of a library, such as a GEMM of cuBLAS.

    `reads` and `writes` are names of buffers and weights in the order of the function's arguments.
    """

    kind: Literal["library"] = "library"
    package: str
    version: str
    function: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    workspace_bytes: Count = 0
    stream: int = 0
    predicted_us: float
    flops: float = 0.0
    moved_bytes: float = 0.0


class RecordEvent(Frozen):
    """Mark this point of a stream."""

    kind: Literal["record"] = "record"
    event: int
    stream: int


class WaitEvent(Frozen):
    """Hold a stream until the event is reached."""

    kind: Literal["wait"] = "wait"
    event: int
    stream: int


Step = Annotated[
    KernelCall | CollectiveCall | LibraryCall | RecordEvent | WaitEvent,
    Field(discriminator="kind"),
]


def named_by(step: Step) -> tuple[str, ...]:
    """The buffers and weights that a step names."""
    if isinstance(step, KernelCall):
        return step.args
    if isinstance(step, CollectiveCall):
        return (step.source, step.target)
    if isinstance(step, LibraryCall):
        return (*step.reads, *step.writes)
    return ()


class Program(Frozen):
    """One phase at one bucket: serves up to `max_tokens` tokens of up to `max_seqs` sequences in one replay.

    With a `depth` it drafts so many tokens after the one that it says; a decode step also verifies
    as many, so that it has `depth + 1` rows of each sequence.

    One that is `captured` always runs at its full size, padded, so that a CUDA graph can hold it;
    it is launched before the tokens of the replay before it are known on the host.
    """

    phase: Phase
    bucket: int
    max_tokens: int
    max_seqs: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    buffers: tuple[BufferSpec, ...]
    steps: tuple[Step, ...]
    num_streams: Annotated[int, Field(ge=1, le=64)]
    captured: bool
    predicted_us: float
    depth: Count = 0

    @property
    def name(self) -> str:
        """Such as `decode/32`."""
        return f"{self.phase}/{self.bucket}"

    @property
    def query_len(self) -> int:
        """Queries of each sequence in a decode step."""
        return self.depth + 1 if self.phase == "decode" else 1

    @property
    def logits(self) -> str:
        """The output with the logits that tokens were sampled from."""
        return "verify_logits" if self.query_len > 1 else "logits"

    @property
    def tokens(self) -> str:
        """The output with the sampled tokens."""
        return "verify_tokens" if self.query_len > 1 else "next_tokens"

    @property
    def drafts(self) -> str:
        """The output with each sequence's last token and the drafts after it."""
        return f"drafts_{self.depth}"

    @property
    def touched(self) -> frozenset[str]:
        """Everything that it reads or writes."""
        names = {*self.inputs, *self.outputs}
        for step in self.steps:
            names.update(named_by(step))
        return frozenset(names)

    @property
    def launches(self) -> int:
        """Kernels, collectives and library calls in one replay."""
        return sum(step.kind not in ("record", "wait") for step in self.steps)


def shared_bytes(tensors: Mapping[str, TensorSpec], programs: Iterable[Program]) -> dict[str, int]:
    """Bytes of each buffer that programs share: what the largest of those that touch it needs.

    No step names the flags `signals`, since a launcher finds them by itself: they are as large as the
    largest program needs.
    """
    sizes = dict.fromkeys(tensors, 0)
    for program in programs:
        for name in (program.touched | {SIGNALS}) & tensors.keys():
            size = tensors[name].size_bytes(program.max_tokens, program.max_seqs)
            sizes[name] = max(sizes[name], size)
    return sizes


class CanaryPrompt(Frozen):
    """A prompt, its greedy continuation in fp64, and for each token its logprob and its lead over the runner-up."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


class Memory(Frozen):
    """Bytes on each rank."""

    weights: int
    kv_cache: int
    state: int
    activations: int
    io: int
    scratch: int
    symmetric: int = 0
    reserved: int
    total: int
    capacity: int


PoolRole = Literal["both", "prefill", "decode"]


class Pool(Frozen):
    """A group of ranks with one role: how the model is cut over them, what they serve, and what each of them holds."""

    role: PoolRole
    layout: Layout
    limits: Limits
    memory_bytes_per_rank: Memory
    arenas: tuple[ArenaSpec, ...]
    weights: tuple[WeightSpec, ...]
    buffers: tuple[BufferSpec, ...]
    programs: tuple[Program, ...]


class Plan(Frozen):
    """Everything that was decided. `digest` is the SHA-256 of the canonical form of all the other fields.

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

    @property
    def pool(self) -> Pool:
        """The pool of a plan that has one; `plans.validate` refuses more until the runtime has them."""
        return self.pools[0]

    def with_pool(self, **changes: Any) -> Plan:
        """The plan with some fields of its pool replaced; not sealed."""
        return self.model_copy(update={"pools": (self.pool.model_copy(update=changes),)})

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.num_layers


__all__ = [
    name
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, Frozen)
]
__all__ += ["SCHEMA_VERSION", "SIGNALS", "TENSOR_ROLES", "ArenaName", "Dim", "LaunchRole"]
__all__ += ["PoolRole", "Step", "TensorRole"]
