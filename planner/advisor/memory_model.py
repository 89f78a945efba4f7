"""What fits: the memory of a deployment on each rank.

What the plan allocates is counted to the byte. The profile's margin stands for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from tokenspeed_plan.codegen.attention.attention_tiling import MAX_SPLITS
from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.numbers import ceil_div
from tokenspeed_plan.planner.advisor.step_model import StepModel, stored_formats
from tokenspeed_plan.planner.graph import OpGraph, Stage, Tensor
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.cost import library_functions
from tokenspeed_plan.planner.passes.limits import ALL_ALIKE, Holding, state_slots_per_seq
from tokenspeed_plan.planner.passes.pipeline import PassContext, PassOptions, run
from tokenspeed_plan.planner.passes.reduction import largest_reduction, peer_bytes
from tokenspeed_plan.plans.fp8_format import FP8
from tokenspeed_plan.plans.libraries import LIBRARY_FUNCTIONS
from tokenspeed_plan.plans.schema import ArenaName
from tokenspeed_plan.plans.types import DTYPE_BITS, DType, Phase, TensorSpec, aligned

SHARED_STATE_SLOTS = 2  # of padding, beside those of the sequences
# A prefill chunk with this many times the tokens of a decode step needs more activations than it.
LONG_CHUNK = 8
_ONE_STREAM = PassOptions(num_streams=1, checks=False)


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes on a rank.

    `checkpoints` are recurrent states that are kept for later turns. `scratch` is an upper bound:
    its size is known once kernels are tiled. `reserved` is the profile's margin, and what a call of
    a library may take.
    """

    weights: int = 0
    kv_cache: int = 0
    state: int = 0
    checkpoints: int = 0
    activations: int = 0
    symmetric: int = 0
    io: int = 0
    scratch: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        parts = [getattr(self, each.name) for each in fields(self)]
        return sum(parts)


@dataclass
class MemoryModel:
    """The memory of one layout, for any number of sequences and tokens.

    Attributes:
        steps: has the graphs.
        layout: of the pool.
        holding: what a sequence holds beside what the longest one does.
        buffers: persistent buffers by arena and depth, each with its number of layers; a cache.
        workspaces: of libraries, by the prefill chunk and the format of keys; a cache.
    """

    steps: StepModel
    layout: ParallelLayout
    holding: Holding = ALL_ALIKE
    buffers: dict[tuple[ArenaName, int], list[tuple[Tensor, int]]] = field(default_factory=dict)
    workspaces: dict[tuple[int, DType], int] = field(default_factory=dict)

    def map(self, knobs: Knobs, num_seqs: int, seq_tokens: int) -> MemoryMap:
        """The memory that `num_seqs` sequences of up to `seq_tokens` tokens need on a rank.

        Data-parallel groups share the sequences out.
        """
        local_seqs = ceil_div(num_seqs, self.layout.attention_dp)
        rest = self._without_activations(knobs, local_seqs, seq_tokens)
        return replace(rest, activations=self._activations(knobs, local_seqs))

    def fits(self, knobs: Knobs, num_seqs: int, seq_tokens: int, capacity: int) -> bool:
        """Whether the total of `map` is at most `capacity`.

        Mostly it is with all activations side by side, so that they need not be placed.
        """
        local_seqs = ceil_div(num_seqs, self.layout.attention_dp)
        rest = self._without_activations(knobs, local_seqs, seq_tokens).total
        if rest + self._activations(knobs, local_seqs, placed=False) <= capacity:
            return True
        return rest + self._activations(knobs, local_seqs) <= capacity

    def _without_activations(self, knobs: Knobs, local_seqs: int, seq_tokens: int) -> MemoryMap:
        """The memory of so many sequences of a group, but for activations."""
        depth = knobs.depth
        queries = local_seqs * (depth + 1)
        seq_pages = ceil_div(seq_tokens, knobs.page_size)
        num_pages = self.holding.pages(local_seqs, seq_pages, knobs.page_size)
        slots = local_seqs * state_slots_per_seq(depth, self.steps.rollback)
        slots += SHARED_STATE_SLOTS
        seq_len = seq_pages * knobs.page_size
        kept = self.holding.checkpoints(local_seqs, seq_len, knobs.spacing)
        slot_bytes = self._slot_bytes(depth)
        checkpoints = kept * sum(slot_bytes)
        all_slots = sum(aligned((slots + kept) * size) for size in slot_bytes)
        return MemoryMap(
            weights=self._weights(depth > 0),
            kv_cache=self._kv_cache(knobs, num_pages),
            state=all_slots - checkpoints,
            checkpoints=checkpoints,
            symmetric=self._peers(knobs, local_seqs),
            io=self._io(knobs, local_seqs, seq_tokens),
            scratch=queries * _scratch_per_query(self.steps, self.layout),
            reserved=self.steps.hardware.reserved_bytes + self._workspace(knobs),
        )

    def max_seqs_that_fit(self, knobs: Knobs, seq_tokens: int, limit: int = 1 << 20) -> int:
        """The largest number of sequences of that length that fit."""

        def total(num_seqs: int) -> int:
            return self.map(knobs, num_seqs, seq_tokens).total

        return self._largest(limit, total)

    def max_tokens_that_fit(self, knobs: Knobs, num_seqs: int) -> int:
        """The longest sequence of which so many fit, within the model's positions."""

        def total(seq_tokens: int) -> int:
            return self.map(knobs, num_seqs, seq_tokens).total

        return self._largest(self.steps.config.max_positions, total)

    def layer_bytes(self, knobs: Knobs) -> tuple[int, int]:
        """Bytes of one layer on a rank: keys and values of a token, and a state slot."""
        page_bytes = max(self._page_bytes(knobs, draft=False), default=0)
        token_bytes = page_bytes // knobs.page_size
        state_bytes = sum(self._slot_bytes(0))
        num_linear = self.steps.config.layer_types.count("linear_attention")
        slot_bytes = state_bytes // max(num_linear, 1)
        return token_bytes, slot_bytes

    def slot_sizes(self, knobs: Knobs) -> tuple[int, int]:
        """Bytes of a page of keys and values and of a state slot on a rank, in all layers."""
        page_bytes = self._page_bytes(knobs, knobs.depth > 0)
        return sum(page_bytes), sum(self._slot_bytes(knobs.depth))

    def _workspace(self, knobs: Knobs) -> int:
        key = (knobs.prefill_chunk, knobs.kv_dtype)
        if key not in self.workspaces:
            self.workspaces[key] = _workspace(self._sharded("prefill"), self.steps, knobs)
        return self.workspaces[key]

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

    def _sharded(self, phase: Phase, depth: int = 0) -> OpGraph:
        """The graph of a rank: what is fused in it changes neither weights nor buffers."""
        return self.steps.sharded_graph(self.layout, phase, depth)

    def _weights(self, draft: bool) -> int:
        if draft:
            return self._target_weights + self._draft_weights
        return self._target_weights

    @cached_property
    def _target_weights(self) -> int:
        graph = self._sharded("decode")
        layers = _layers_of(graph)
        total = 0
        for name, weight in graph.weights.items():
            count = self.steps.count_of(layers[name])
            total += aligned(weight.spec.size_bytes()) * count
        return total

    @cached_property
    def _draft_weights(self) -> int:
        """Bytes of the weights that only drafting uses."""
        known = self._sharded("decode").weights
        drafting = self._sharded("decode", depth=1)
        total = 0
        for name, weight in drafting.weights.items():
            if name not in known:
                total += aligned(weight.spec.size_bytes())
        return total

    def _kv_cache(self, knobs: Knobs, num_pages: int) -> int:
        """Bytes of so many pages of the pool, with one page of padding and the alignment."""
        local_pages = ceil_div(num_pages, self.layout.context_split)
        total = 0
        for size in self._page_bytes(knobs, knobs.depth > 0):
            total += aligned((local_pages + 1) * size)
        return total

    def _page_bytes(self, knobs: Knobs, draft: bool) -> list[int]:
        """Bytes of a page in the cache of each layer."""
        element_bytes = DTYPE_BITS[self.steps.dtype] // 8
        if knobs.kv_dtype == "fp8":
            element_bytes = 1
        sizes = []
        for tensor, count in self._buffers("kv_cache", int(draft)):
            _, two, _, heads, width = tensor.spec.bind(0, 0)
            token_bytes = two * heads * width * element_bytes
            page_bytes = token_bytes * knobs.page_size
            sizes += [page_bytes] * count
        return sizes

    def _slot_bytes(self, depth: int) -> list[int]:
        """Bytes of each layer's state slot, and of the inputs that are kept to recompute it."""
        sizes: list[int] = []
        for tensor, count in self._buffers("state", depth):
            spec = tensor.spec
            slots, *_ = spec.bind(0, 0)
            slot_bytes = spec.size_bytes() // slots
            sizes += [slot_bytes] * count
        return sizes

    def _buffers(self, arena: ArenaName, depth: int) -> list[tuple[Tensor, int]]:
        """The decode graph's buffers in an arena, and how many layers each stands for."""
        key = (arena, depth)
        if key not in self.buffers:
            graph = self._sharded("decode", depth)
            layers = _layers_of(graph)
            found = []
            for name, tensor in graph.tensors.items():
                if tensor.arena == arena:
                    count = self.steps.count_of(layers[name])
                    found.append((tensor, count))
            self.buffers[key] = found
        return self.buffers[key]

    def _activations(self, knobs: Knobs, seqs: int, placed: bool = True) -> int:
        """Bytes of the phase that needs more; where they are not placed, an upper bound."""
        arena = self._arena if placed else self._side_by_side
        depth = knobs.depth
        chunk = knobs.prefill_chunk
        prefill = arena("prefill", chunk, min(seqs, chunk), depth)
        tokens = seqs * (depth + 1)
        if chunk >= LONG_CHUNK * tokens:
            return prefill
        decode = arena("decode", tokens, seqs, depth)
        return max(prefill, decode)

    def _peers(self, knobs: Knobs, seqs: int) -> int:
        """Bytes of the slots that peers push into, of the largest program that has them."""
        chunk, queries = knobs.prefill_chunk, seqs * (knobs.depth + 1)
        sizes: tuple[tuple[Phase, int], ...] = (
            ("prefill", chunk),
            ("prefill", max(chunk // 4, 1)),
            ("decode", queries),
        )
        return max(self._peers_of(phase, tokens, seqs, knobs) for phase, tokens in sizes)

    def _peers_of(self, phase: Phase, tokens: int, seqs: int, knobs: Knobs) -> int:
        graph = self._sharded(phase, knobs.depth)
        found = largest_reduction(graph, self.steps.hardware, tokens, min(seqs, tokens))
        return peer_bytes(found, tokens, min(seqs, tokens))

    def _side_by_side(self, phase: Phase, tokens: int, seqs: int, depth: int) -> int:
        """Bytes of all activations, of which none reuses those of another."""
        graph = self.steps.graph(self.layout, phase, tokens, seqs, depth)
        tensors = [each for each in graph.tensors.values() if each.arena == "activations"]
        return sum(aligned(each.spec.size_bytes(tokens, seqs)) for each in tensors)

    def _arena(self, phase: Phase, tokens: int, seqs: int, depth: int) -> int:
        known = self.steps.arenas
        key = (replace(self.layout, context_split=1), phase, tokens, seqs, depth)
        if key not in known:
            graph = self.steps.graph(self.layout, phase, tokens, seqs, depth)
            context = PassContext(
                self.layout,
                self.steps.hardware,
                tokens,
                seqs,
                options=_ONE_STREAM,
            )
            placed = run(graph, context, until=Stage.PLACED)
            known[key] = placed.activation_bytes
        return known[key]

    def _io(self, knobs: Knobs, seqs: int, seq_tokens: int) -> int:
        """Bytes of inputs and outputs, each as large as the phase that needs more of it."""
        sizes: dict[str, int] = {}
        num_tokens: dict[Phase, int] = {
            "prefill": knobs.prefill_chunk,
            "decode": seqs * (knobs.depth + 1),
        }
        for phase, tokens in num_tokens.items():
            graph = self._sharded(phase, knobs.depth)
            for name, tensor in graph.tensors.items():
                if tensor.arena != "io":
                    continue
                spec = tensor.spec
                if name == "page_table":
                    spec = _page_table(knobs, seq_tokens)
                size = spec.size_bytes(tokens, seqs)
                sizes[name] = max(sizes.get(name, 0), size)
        return sum(map(aligned, sizes.values()))


def _scratch_per_query(steps: StepModel, layout: ParallelLayout) -> int:
    """Bytes of attention's partial results for one query.

    The smallest bucket splits a context among all multiprocessors, the next one among half as many,
    and so on. Those of products that split their depth are left out: they are small.
    """
    attention = steps.config.attention
    heads = attention.num_qo_heads // layout.attention_tp
    splits = 2 * min(steps.hardware.num_sms, MAX_SPLITS)
    values = attention.head_dim + 2  # with the maximum and the sum of the softmax
    return splits * heads * values * (DTYPE_BITS["fp32"] // 8)


def _workspace(graph: OpGraph, steps: StepModel, knobs: Knobs) -> int:
    """An upper bound: of the functions of libraries that could compute a prefill chunk."""
    found, prices = [0], steps.hardware.libraries
    for op in graph.ops:
        known = library_functions(graph, op, stored_formats(knobs.kv_dtype))
        priced = [name for name in known if name in prices]
        for name in priced:
            if not any(prices[other].is_below(prices[name]) for other in priced):
                function = LIBRARY_FUNCTIONS[name]
                found.append(function.workspace_bytes(op.attrs, knobs.prefill_chunk))
    return max(*found, _quantised_workspace(graph, steps, knobs.prefill_chunk))


def _quantised_workspace(graph: OpGraph, steps: StepModel, chunk: int) -> int:
    """Of functions of FP8 times FP8: passes decide later which activations are quantised."""
    if not any(weight.spec.format == FP8 for weight in graph.weights.values()):
        return 0
    known = [LIBRARY_FUNCTIONS[name] for name in steps.hardware.libraries]
    sizes = [each.fixed_bytes for each in known if each.needs and chunk >= each.least_tokens]
    return max(sizes, default=0)


def _layers_of(graph: OpGraph) -> dict[str, int | None]:
    """The layer of each weight and state: that of the operator that uses it."""
    layers: dict[str, int | None] = {}
    for op in graph.ops:
        for member in op.members:
            used = (*member.weights, *dict(member.states))
            layers |= dict.fromkeys(used, member.layer)
    return layers


def _page_table(knobs: Knobs, seq_tokens: int) -> TensorSpec:
    """The page table; a step that drafts may write past the end of a sequence."""
    tokens = seq_tokens
    if knobs.depth:
        tokens += 2 * (knobs.depth + 1)
    pages = ceil_div(tokens, knobs.page_size)
    return TensorSpec.of(shape=("num_seqs", pages), dtype="i32")
