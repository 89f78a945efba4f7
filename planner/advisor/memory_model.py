"""What fits: the memory of a deployment on each rank.

What the plan allocates is counted to the byte; the profile's margin stands for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property

from tokenspeed_plan.codegen.attention.attention_tiling import MAX_SPLITS
from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.numbers import ceil_div
from tokenspeed_plan.planner.advisor.step_model import StepModel, stored_formats
from tokenspeed_plan.planner.graph import OpGraph, Stage, Tensor
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.cost import stored_scale
from tokenspeed_plan.planner.passes.limits import COPIED_PAGES, num_checkpoints, state_slots_per_seq
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.plans.schema import ArenaName
from tokenspeed_plan.plans.types import DTYPE_BITS, Phase, TensorSpec, aligned

SHARED_STATE_SLOTS = 2  # of padding, beside those of the sequences
LONG_CHUNK = 8  # a chunk of so many times a decode step's tokens needs more activations than it


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes on a rank.

    `checkpoints` are recurrent states that are kept for later turns. `scratch` is an upper bound:
    its size is known once kernels are tiled. `reserved` is the profile's margin.
    """

    weights: int = 0
    kv_cache: int = 0
    state: int = 0
    checkpoints: int = 0
    activations: int = 0
    io: int = 0
    scratch: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass
class MemoryModel:
    """The memory of one layout, for any number of sequences and tokens.

    Attributes:
        steps: has the graphs. layout: of the pool.
        buffers: persistent buffers by arena and drafts, with their number of layers; a cache.
    """

    steps: StepModel
    layout: ParallelLayout
    buffers: dict[tuple[ArenaName, int], list[tuple[Tensor, int]]] = field(default_factory=dict)

    def map(self, knobs: Knobs, num_seqs: int, seq_tokens: int) -> MemoryMap:
        """The memory that `num_seqs` sequences of up to `seq_tokens` tokens need on a rank.

        Data-parallel groups share the sequences out.
        """
        local_seqs = ceil_div(num_seqs, self.layout.attention_dp)
        seq_pages = ceil_div(seq_tokens, knobs.page_size)
        slots = local_seqs * state_slots_per_seq(knobs.depth, self.steps.recomputes)
        slots += SHARED_STATE_SLOTS
        kept = local_seqs * num_checkpoints(seq_pages * knobs.page_size, knobs.spacing)
        slot_bytes = self._slot_bytes(knobs.depth)
        state = sum(aligned((slots + kept) * size) - kept * size for size in slot_bytes)
        return MemoryMap(
            weights=self._weights(knobs.depth > 0),
            kv_cache=self._kv_cache(knobs, local_seqs * (seq_pages + COPIED_PAGES)),
            state=state,
            checkpoints=kept * sum(slot_bytes),
            activations=self._activations(knobs, local_seqs),
            io=self._io(knobs, local_seqs, seq_tokens),
            scratch=local_seqs * (knobs.depth + 1) * self._scratch_per_query,
            reserved=self.steps.hardware.reserved_bytes,
        )

    def max_seqs_that_fit(self, knobs: Knobs, seq_tokens: int, limit: int = 1 << 20) -> int:
        """The largest number of sequences of that length that fit."""
        return self._largest(limit, lambda count: self.map(knobs, count, seq_tokens).total)

    def max_tokens_that_fit(self, knobs: Knobs, num_seqs: int) -> int:
        """The longest sequence of which so many fit, within the model's positions."""
        positions = self.steps.config.max_positions
        return self._largest(positions, lambda tokens: self.map(knobs, num_seqs, tokens).total)

    def layer_bytes(self, knobs: Knobs) -> tuple[int, int]:
        """Bytes of one layer on a rank: keys and values of a token, and a state slot."""
        kv = [size // knobs.page_size for size in self._page_bytes(knobs, draft=False)]
        num_linear = self.steps.config.layer_types.count("linear_attention")
        return max(kv, default=0), sum(self._slot_bytes(0)) // max(num_linear, 1)

    def _largest(self, limit: int, total: Callable[[int], int]) -> int:
        """The largest number, up to a limit, whose memory fits."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if total(middle) <= self.steps.hardware.memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _graph(self, phase: Phase, tokens: int = 1, seqs: int = 1, depth: int = 0) -> OpGraph:
        return self.steps.graph(self.layout, phase, tokens, seqs, depth)

    def _weights(self, draft: bool) -> int:
        if draft:
            return self._target_weights + self._draft_weights
        return self._target_weights

    @cached_property
    def _scratch_per_query(self) -> int:
        """Bytes of attention's partial results for one query.

        The smallest bucket splits a context among all multiprocessors, the next one among half as
        many, and so on.
        """
        attention = self.steps.config.attention
        heads = attention.num_qo_heads // self.layout.attention_tp
        splits = min(self.steps.hardware.num_sms, MAX_SPLITS)
        return 2 * splits * heads * (attention.head_dim + 2) * 4

    @cached_property
    def _target_weights(self) -> int:
        graph = self._graph("decode")
        layers = _layers_of(graph)
        return sum(
            aligned(size) * self.steps.count_of(layers[name]) for name, size in self._stored(graph)
        )

    @cached_property
    def _draft_weights(self) -> int:
        """Bytes of the weights that only drafting uses."""
        known = self._graph("decode").weights
        drafting = self._graph("decode", depth=1)
        return sum(aligned(size) for name, size in self._stored(drafting) if name not in known)

    def _stored(self, graph: OpGraph) -> Iterator[tuple[str, int]]:
        """Bytes of each weight as the checkpoint stores it."""
        formats = stored_formats(self.steps.weights)
        members = [member for op in graph.ops for member in op.members]
        users = {name: member for member in members for name in member.weights}
        for name, weight in graph.weights.items():
            scale = stored_scale(users[name], weight.spec, formats)
            yield name, int(weight.spec.size_bytes() * scale)

    def _kv_cache(self, knobs: Knobs, num_pages: int) -> int:
        """Bytes of so many pages of the pool, with one page of padding and the alignment."""
        local_pages = ceil_div(num_pages, self.layout.context_split)
        page_bytes = self._page_bytes(knobs, knobs.depth > 0)
        return sum(aligned((local_pages + 1) * size) for size in page_bytes)

    def _page_bytes(self, knobs: Knobs, draft: bool) -> list[int]:
        """Bytes of a page in the cache of each layer."""
        element_bytes = DTYPE_BITS[self.steps.dtype] // 8
        if knobs.kv_dtype == "fp8":
            element_bytes = 1
        sizes = []
        for tensor, count in self._buffers("kv_cache", int(draft)):
            _, two, _, heads, width = tensor.spec.bind(0, 0)
            size = two * heads * width * knobs.page_size * element_bytes
            sizes += [size] * count
        return sizes

    def _slot_bytes(self, depth: int) -> list[int]:
        """Bytes of each layer's state slot, and of the inputs that are kept to recompute it."""
        sizes: list[int] = []
        for tensor, count in self._buffers("state", depth):
            slots = tensor.spec.bind(0, 0)[0]
            sizes += [tensor.spec.size_bytes() // slots] * count
        return sizes

    def _buffers(self, arena: ArenaName, depth: int) -> list[tuple[Tensor, int]]:
        """The decode graph's buffers in an arena, and how many layers each stands for."""
        if (arena, depth) not in self.buffers:
            graph = self._graph("decode", depth=depth)
            layers = _layers_of(graph)
            self.buffers[arena, depth] = [
                (tensor, self.steps.count_of(layers[name]))
                for name, tensor in graph.tensors.items()
                if tensor.arena == arena
            ]
        return self.buffers[arena, depth]

    def _activations(self, knobs: Knobs, seqs: int) -> int:
        """Bytes of the phase that needs more."""
        chunk, tokens = knobs.prefill_chunk, seqs * (knobs.depth + 1)
        prefill = self._arena("prefill", chunk, min(seqs, chunk), knobs.depth)
        if chunk >= LONG_CHUNK * tokens:
            return prefill
        return max(prefill, self._arena("decode", tokens, seqs, knobs.depth))

    def _arena(self, phase: Phase, tokens: int, seqs: int, depth: int) -> int:
        key = (self.layout, phase, tokens, seqs, depth)
        if key not in self.steps.arenas:
            graph = self._graph(phase, tokens, seqs, depth)
            hardware, options = self.steps.hardware, PassOptions(num_streams=1, checks=False)
            context = PassContext(self.layout, hardware, tokens, seqs, options=options)
            placed = run(graph, context, until=Stage.PLACED)
            self.steps.arenas[key] = sum(placed.arena_bytes.values())
        return self.steps.arenas[key]

    def _io(self, knobs: Knobs, seqs: int, seq_tokens: int) -> int:
        """Bytes of inputs and outputs, each as large as the phase that needs more of it."""
        sizes: dict[str, int] = {}
        num_tokens: dict[Phase, int] = {
            "prefill": knobs.prefill_chunk,
            "decode": seqs * (knobs.depth + 1),
        }
        page_table = _page_table(knobs, seq_tokens)
        for phase, tokens in num_tokens.items():
            for name, tensor in self._graph(phase, depth=knobs.depth).tensors.items():
                if tensor.arena != "io":
                    continue
                spec = page_table if name == "page_table" else tensor.spec
                sizes[name] = max(sizes.get(name, 0), spec.size_bytes(tokens, seqs))
        return sum(map(aligned, sizes.values()))


def _layers_of(graph: OpGraph) -> dict[str, int | None]:
    """The layer of each weight and state: that of the operator that uses it."""
    layers: dict[str, int | None] = {}
    for op in graph.ops:
        for member in op.members:
            layers |= dict.fromkeys(member.weights, member.layer)
            layers |= {name: member.layer for name, _ in member.states}
    return layers


def _page_table(knobs: Knobs, seq_tokens: int) -> TensorSpec:
    """The page table; a step that drafts may write past the end of a sequence."""
    overrun = 2 * (knobs.depth + 1) if knobs.depth else 0
    pages = ceil_div(seq_tokens + overrun, knobs.page_size)
    return TensorSpec.of(shape=("num_seqs", pages), dtype="i32")
