"""Programs: steps on streams, for one phase at one size of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from tokenspeed_plan.plans.schema.cost_specs import CallCost
from tokenspeed_plan.plans.schema.kernel_specs import KernelSpec
from tokenspeed_plan.plans.schema.memory_specs import BufferSpec
from tokenspeed_plan.plans.types import Count, Frozen, KernelName, Phase, TensorSpec


class Call(Frozen):
    """Run a kernel, or what stands in its place.

    `args` name buffers and weights, in the order of the kernel's tensors.
    """

    kernel: KernelName
    args: tuple[str, ...]
    stream: int = 0
    predicted_us: float
    cost: CallCost = CallCost()

    def places(self, kernel: KernelSpec) -> dict[str, str]:
        """What the call gives to each parameter of its kernel, by the parameter's name."""
        return {param.name: name for param, name in zip(kernel.tensors, self.args, strict=True)}


class KernelCall(Call):
    """Run a kernel of the bundle."""

    kind: Literal["kernel"] = "kernel"


class CollectiveCall(Frozen):
    """Combine a buffer over all ranks: the sum, or the columns of all ranks side by side."""

    kind: Literal["collective"] = "collective"
    op: Literal["all_reduce", "all_gather"]
    source: str
    target: str
    stream: int = 0
    predicted_us: float


class LibraryCall(Call):
    """Call a function of a library in the place of a kernel: it computes the kernel's parts.

    Attributes:
        package: the distribution that has the function.
        versions: of it that were proved to fit, such as `>=3.0,<3.1`.
        function: a key of `LIBRARY_FUNCTIONS`, which says what it computes and where.
        workspace_bytes: that a call takes at the program's full size, besides its operands.
        prepare: what the host does before a replay: nothing, or something for each `batch`.
        capturable: whether a CUDA graph may hold the call.
        fallback: whether the kernel itself may run where the library is missing or wrong.
    """

    kind: Literal["library"] = "library"
    package: str
    versions: str
    function: str
    workspace_bytes: Count = 0
    prepare: Literal["none", "batch"] = "none"
    capturable: bool = True
    fallback: bool = True


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
    if isinstance(step, Call):
        return step.args
    if isinstance(step, CollectiveCall):
        return (step.source, step.target)
    return ()


class Push(Frozen):
    """Buffers that a prefill pool hands over once `step` is done: no later step names them."""

    step: Count
    buffers: Annotated[tuple[str, ...], Field(min_length=1)]


class Program(Frozen):
    """One phase at one bucket: up to `max_tokens` tokens of up to `max_seqs` sequences.

    With a `depth` it drafts that many tokens after the one that it samples. A decode step then also
    verifies as many drafts, so that it has `depth + 1` queries of each sequence.

    A `captured` program always runs at its full size, padded, so that a CUDA graph can hold it. It
    is launched before the host knows the tokens of the run before it.

    `pushes`, of a prefill pool alone, say when each layer's caches leave, in the order of steps;
    JSON has them only there.
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
    pushes: tuple[Push, ...] = ()

    @model_serializer(mode="wrap")
    def _spell(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = spell(self)
        if not self.pushes:
            fields.pop("pushes", None)
        return fields

    @property
    def name(self) -> str:
        """Such as `decode/32`."""
        return f"{self.phase}/{self.bucket}"

    @property
    def query_len(self) -> int:
        """Queries of each sequence in a decode step."""
        if self.phase == "prefill":
            return 1
        return self.depth + 1

    @property
    def logits(self) -> str:
        """The output with the logits that tokens were sampled from."""
        if self.query_len > 1:
            return "verify_logits"
        return "logits"

    @property
    def tokens(self) -> str:
        """The output with the sampled tokens."""
        if self.query_len > 1:
            return "verify_tokens"
        return "next_tokens"

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
        """Kernels, collectives and library calls in one run."""
        return sum(step.kind not in ("record", "wait") for step in self.steps)


def shared_bytes(tensors: Mapping[str, TensorSpec], programs: Iterable[Program]) -> dict[str, int]:
    """Bytes of each buffer that programs share: what the largest program that touches it needs."""
    sizes = dict.fromkeys(tensors, 0)
    for program in programs:
        for name in program.touched & tensors.keys():
            size = tensors[name].size_bytes(program.max_tokens, program.max_seqs)
            sizes[name] = max(sizes[name], size)
    return sizes
