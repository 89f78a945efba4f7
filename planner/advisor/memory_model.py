"""What a deployment needs on each rank: to the byte for what we allocate, and the profile's margin for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from tokenspeed_plan.codegen.attention.attention_tiling import MAX_SPLITS
from tokenspeed_plan.planner.advisor.candidate import Knobs
from tokenspeed_plan.planner.advisor.step_model import StepModel, formats_of
from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.cost import stored_scale
from tokenspeed_plan.planner.passes.limits import COPIED_PAGES, num_checkpoints, state_slots_per_seq
from tokenspeed_plan.planner.passes.place import place
from tokenspeed_plan.planner.passes.schedule import schedule
from tokenspeed_plan.plans.types import DTYPE_BITS, Phase, TensorSpec, aligned


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes on a rank. `checkpoints` of recurrent state are kept for the next turns; `reserved` is the margin.

    `scratch` is a bound: what kernels meet in is known once they are tiled.
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
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass
class MemoryModel:
    """The memory of one layout, for any number of sequences and tokens."""

    steps: StepModel
    layout: ParallelLayout

    def map(self, knobs: Knobs, num_seqs: int, seq_tokens: int) -> MemoryMap:
        """What `num_seqs` sequences of up to `seq_tokens` need; data-parallel groups share the sequences out."""
        own = -(-num_seqs // self.layout.attention_dp)
        seq_pages = -(-seq_tokens // knobs.page_size)
        pages = -(-own * (seq_pages + COPIED_PAGES) // self.layout.context_split)
        rows = 2 + own * state_slots_per_seq(knobs.depth, self.steps.recomputes)
        units = self._state_units(knobs.depth)
        kept = own * num_checkpoints(seq_pages * knobs.page_size, knobs.spacing)
        draft = knobs.depth > 0
        return MemoryMap(
            weights=self._weights(draft),
            kv_cache=sum(aligned((pages + 1) * unit) for unit in self._kv_units(knobs, draft)),
            state=sum(aligned((rows + kept) * unit) - kept * unit for unit in units),
            checkpoints=kept * sum(units),
            activations=self._activations(knobs, own),
            io=self._io(knobs, own, seq_tokens),
            scratch=own * (knobs.depth + 1) * self._scratch,
            reserved=self.steps.hardware.reserved_bytes,
        )

    def max_seqs_that_fit(self, knobs: Knobs, seq_tokens: int, limit: int = 1 << 20) -> int:
        """The most sequences of that length that fit."""
        return self._largest(limit, lambda count: self.map(knobs, count, seq_tokens).total)

    def max_tokens_that_fit(self, knobs: Knobs, num_seqs: int) -> int:
        """The longest sequence of which so many fit, within the model's positions."""
        positions = self.steps.config.max_positions
        return self._largest(positions, lambda tokens: self.map(knobs, num_seqs, tokens).total)

    def layer_bytes(self, knobs: Knobs) -> tuple[int, int]:
        """Of one layer on a rank: keys and values of a token, and a row of recurrent state."""
        kv = [units // knobs.page_size for units in self._kv_units(knobs, draft=False)]
        layers = max(self.steps.config.layer_types.count("linear_attention"), 1)
        return max(kv, default=0), sum(self._state_units(0)) // layers

    def _largest(self, limit: int, total: Callable[[int], int]) -> int:
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = total(middle) <= self.steps.hardware.memory_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _graph(self, phase: Phase, tokens: int = 1, seqs: int = 1, depth: int = 0) -> OpGraph:
        return self.steps.graph(self.layout, phase, tokens, seqs, depth)

    def _weights(self, draft: bool) -> int:
        return self._target_weights + (self._draft_weights if draft else 0)

    @cached_property
    def _scratch(self) -> int:
        """Of a row: partial results of attention over parts of its context.

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
        return sum(aligned(size) * self.steps.count_of(name) for name, size in self._stored(graph))

    @cached_property
    def _draft_weights(self) -> int:
        known = self._graph("decode").weights
        drafting = self._graph("decode", depth=1)
        return sum(aligned(size) for name, size in self._stored(drafting) if name not in known)

    def _stored(self, graph: OpGraph) -> Iterator[tuple[str, int]]:
        """Bytes of each weight as it is stored."""
        formats = formats_of(self.steps.weights)
        scales = {
            name: stored_scale(member, graph.weights[name].spec, formats)
            for op in graph.ops
            for member in op.members
            for name in member.weights
        }
        for name, weight in graph.weights.items():
            yield name, int(weight.spec.size_bytes() * scales[name])

    def _kv_units(self, knobs: Knobs, draft: bool) -> list[int]:
        """Bytes of a page in each layer's cache."""
        width = 1 if knobs.kv_dtype == "fp8" else DTYPE_BITS[self.steps.dtype] // 8
        tokens = knobs.page_size * width
        return [elements * tokens for elements in self._kv_elements(int(draft))]

    def _kv_elements(self, depth: int) -> list[int]:
        """Keys and values of a token in each layer."""
        found = []
        for name, tensor in self._graph("decode", depth=depth).tensors.items():
            if tensor.arena == "kv_cache":
                _, two, _, heads, width = tensor.spec.bind(0, 0)
                found += [two * heads * width] * self.steps.count_of(name)
        return found

    def _state_units(self, depth: int) -> list[int]:
        """Bytes of a row in each layer's state, and of the inputs that are kept with it."""
        found: list[int] = []
        for name, tensor in self._graph("decode", depth=depth).tensors.items():
            if tensor.arena == "state":
                rows = tensor.spec.bind(0, 0)[0]
                found += [tensor.spec.size_bytes() // rows] * self.steps.count_of(name)
        return found

    def _activations(self, knobs: Knobs, seqs: int) -> int:
        """The larger phase; a chunk far longer than a step is that without looking."""
        chunk, tokens = knobs.prefill_chunk, seqs * (knobs.depth + 1)
        step = 0 if chunk >= 8 * tokens else self._arena("decode", tokens, seqs, knobs.depth)
        return max(step, self._arena("prefill", chunk, min(seqs, chunk), knobs.depth))

    def _arena(self, phase: Phase, tokens: int, seqs: int, depth: int) -> int:
        key = (self.layout, phase, tokens, seqs, depth)
        if key not in self.steps.arenas:
            graph = self._graph(phase, tokens, seqs, depth)
            self.steps.arenas[key] = place(schedule(graph), tokens, seqs).arena_bytes
        return self.steps.arenas[key]

    def _io(self, knobs: Knobs, seqs: int, seq_tokens: int) -> int:
        """Inputs and outputs, each as large as the phase that needs most of it."""
        overrun = 2 * (knobs.depth + 1) if knobs.depth else 0
        table = TensorSpec.of(
            shape=("num_seqs", -(-(seq_tokens + overrun) // knobs.page_size)), dtype="i32"
        )
        sizes: dict[str, int] = {}
        rows: dict[Phase, int] = {
            "prefill": knobs.prefill_chunk,
            "decode": seqs * (knobs.depth + 1),
        }
        for phase, tokens in rows.items():
            for name, tensor in self._graph(phase, depth=knobs.depth).tensors.items():
                if tensor.arena == "io":
                    spec = table if name == "page_table" else tensor.spec
                    sizes[name] = max(sizes.get(name, 0), spec.size_bytes(tokens, seqs))
        return sum(map(aligned, sizes.values()))
