"""Memory of a rank: arenas, the buffers and weights in them, and their bytes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.types import Count, Frozen, Positive, RankShift, TensorSpec

ArenaName = Literal["weights", "kv_cache", "state", "io", "activations", "scratch", "symmetric"]


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
    `{expert}` in it names one tensor per expert, stacked as a new first dimension. `encoding` says
    how the checkpoint stores a quantised one, where its format does not.
    """

    source: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    at: tuple[int, ...]
    shifts: tuple[Shift, ...] = ()
    encoding: Encoding | None = None

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Pieces of plain elements and of FP8 blocks have no word for it."""
        fields: dict[str, Any] = dump(self)
        if self.encoding is None:
            del fields["encoding"]
        return fields


class WeightSpec(Frozen):
    """One parameter as a rank holds it, assembled from pieces of the checkpoint.

    `rounds`: these have plain elements, which are rounded to its blocks of FP8 when loaded.
    """

    name: str
    offset_bytes: int
    tensor: TensorSpec
    pieces: tuple[Piece, ...]
    rounds: bool = False

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Weights that are not rounded do not say so: a plan has thousands of them."""
        fields: dict[str, Any] = dump(self)
        if not self.rounds:
            del fields["rounds"]
        return fields


class HostCache(Frozen):
    """The second tier of the prefix cache: memory of the host, for each rank.

    It holds checkpoints: the pages up to one, and the recurrent state there. First come `num_pages`
    pages of `page_bytes`, those of all layers side by side, then `num_states` states of
    `state_bytes`. On a GPU, pages go through `staging_pages` pages of its memory in each direction.

    A checkpoint is copied back where it saves at least `least_tokens` tokens of computing; copies
    are priced at `bytes_per_s`.
    """

    num_pages: Positive
    num_states: Count
    page_bytes: Positive
    state_bytes: Count
    staging_pages: Positive
    least_tokens: Positive
    bytes_per_s: Annotated[float, Field(gt=0)]

    @property
    def size_bytes(self) -> int:
        """All of it."""
        return self.num_pages * self.page_bytes + self.num_states * self.state_bytes

    @property
    def staging_bytes(self) -> int:
        """Memory of a GPU for both directions."""
        return 2 * self.staging_pages * self.page_bytes


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


class AnswerReturns(Frozen):
    """Answers that go back to a prefill pool, so that the next turn finds them in its cache.

    At most `slots` of them are on their way to it at once. One goes back where that saves at least
    `least_tokens` tokens of computing; its next turn waits for it as long as computing them would
    take, at `token_us` each.
    """

    slots: Positive
    least_tokens: Positive
    token_us: Annotated[float, Field(gt=0)]
