"""The inputs of a program as one block of memory, on the host and on the device.

The io arena has the input buffers at planned offsets, outputs among them. A block holds the words
(of 32 bits) of all inputs, in the order of the arena, and has a view of each input. The device gets
either a whole block, one copy for each run of neighbouring inputs, or a patch: numbered words of
the arena with their values, and words that take over what the device has elsewhere. A patch is one
copy and one or two launches, whatever it changes.

Whoever sends inputs on to other ranks sends an `InputChange`: `InputBlocks.send` and
`InputBlocks.patch` are all that writes inputs, and `InputBlocks.receive` does the same elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import BATCH_INPUTS, LATE_INPUTS
from tokenspeed_plan.plans.schema import BufferSpec, Plan

Words = np.ndarray[tuple[int], np.dtype[np.int64]]  # numbers of words
Views = dict[str, np.ndarray]

# The device counts accepted drafts itself; only a benchmark writes `forced_accept`. Masks and
# adjustments are large and change with each step: their own writers send those that are read.
DEVICE_ONLY = ("accept_counts", "forced_accept", *LATE_INPUTS)
WORD_BYTES = 4
NUMBER_BYTES = 8  # of the number of a word
WHOLE = -1  # in place of a number of moves: all words of a block
# Blocks that may be on their way at once: the host writes one while the others are read.
NUM_BLOCKS = 3
NUMPY_DTYPES: dict[str, type[np.generic]] = {"fp32": np.float32, "i64": np.int64, "i32": np.int32}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an input lies in a block, in words."""

    first: int
    num_words: int
    shape: tuple[int, ...]
    dtype: type[np.generic]


class InputLayout:
    """The places of all inputs, at the size of the largest program.

    Attributes:
        num_words: size of a block.
        arena_words: for each word of a block its number in the arena.
        runs: neighbouring words, as (first in the block, first in the arena, count).
        max_seqs: rows of the inputs that have one for each sequence.
    """

    def __init__(self, plan: Plan) -> None:
        programs = plan.pool.programs
        max_tokens = max(program.max_tokens for program in programs)
        self.max_seqs = max(program.max_seqs for program in programs)
        self.num_words = 0
        self.runs: list[tuple[int, int, int]] = []
        self._places: dict[str, _Place] = {}
        buffers = [buffer for buffer in plan.pool.buffers if buffer.arena == "io"]
        buffers.sort(key=lambda buffer: buffer.offset_bytes)
        self._end = -1  # in the arena, of the run that grows
        for buffer in buffers:
            if buffer.name in BATCH_INPUTS and buffer.name not in DEVICE_ONLY:
                self._add(buffer, max_tokens)
            else:
                self._end = -1
        words = [np.arange(arena, arena + count) for _, arena, count in self.runs]
        self.arena_words: Words = np.concatenate(words)

    def _add(self, buffer: BufferSpec, max_tokens: int) -> None:
        """Append an input to the block; a gap before it in the arena is copied along."""
        tensor = buffer.tensor
        in_arena = buffer.offset_bytes // WORD_BYTES
        num_words = -(-tensor.size_bytes(max_tokens, self.max_seqs) // WORD_BYTES)
        first, start, _ = self.runs[-1] if self._end >= 0 else (self.num_words, in_arena, 0)
        in_block = first + in_arena - start
        if self._end >= 0:
            self.runs.pop()
        self._end = in_arena + num_words
        self.num_words = in_block + num_words
        self.runs.append((first, start, self._end - start))
        shape = tensor.bind(max_tokens, self.max_seqs)
        dtype = NUMPY_DTYPES[tensor.dtype]
        self._places[buffer.name] = _Place(in_block, num_words, shape, dtype)

    def views(self, words: np.ndarray) -> Views:
        """Each input as a view of a block."""
        found: Views = {}
        for name, place in self._places.items():
            part = words[place.first : place.first + place.num_words]
            found[name] = part.view(place.dtype).reshape(place.shape)
        return found

    def first_word(self, name: str) -> int:
        """The first word of an input, numbered as in a block."""
        return self._places[name].first


class InputChange(NamedTuple):
    """What one call has changed on the device.

    Attributes:
        num_moves: words that were moved, or `WHOLE`.
        num_words: words that got new values.
        content: the whole block; or the numbers in the arena of the words that moves write, of
            those that they read, and of those with new values (i64), then these values (i32). It
            stays as it is until `NUM_BLOCKS` further changes.
    """

    num_moves: int
    num_words: int
    content: np.ndarray


class _HostBlock:
    """Memory for a block or a patch, pinned where the device copies from it by itself."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.is_pinned = device.type == "cuda"
        self.bytes = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=self.is_pinned)
        self.array: np.ndarray = self.bytes.numpy()
        self._read: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the device has read it."""
        if self._read is not None:
            self._read.synchronize()

    def note_reads(self) -> None:
        """All reads of it are on the stream."""
        if self.is_pinned:
            self._read = self._read or torch.cuda.Event()
            self._read.record()


class InputBlocks:
    """Brings inputs to the device; blocks take turns, so that none is written while it is read.

    Args:
        layout: where inputs lie.
        buffer: from a name and the size of a batch to a buffer of the io arena.
    """

    def __init__(self, layout: InputLayout, buffer: Callable[[str, int, int], Tensor]) -> None:
        self._layout = layout
        storage = buffer("token_ids", 1, 1).untyped_storage()
        arena = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._arena = arena[: len(arena) // WORD_BYTES * WORD_BYTES].view(torch.int32)
        # A patch has for each word its number, and its value or another number.
        size_bytes = layout.num_words * 2 * NUMBER_BYTES
        self._staged = torch.zeros(size_bytes, dtype=torch.uint8, device=storage.device)
        self._blocks = [_HostBlock(size_bytes, storage.device) for _ in range(NUM_BLOCKS)]
        self._turn = 0

    def _next(self) -> _HostBlock:
        self._turn = (self._turn + 1) % NUM_BLOCKS
        block = self._blocks[self._turn]
        block.wait()
        return block

    def fresh(self) -> np.ndarray:
        """The words of a block to fill and to give to `send`; what it had before is in it."""
        return self._next().array[: self._layout.num_words * WORD_BYTES].view(np.int32)

    def send(self) -> InputChange:
        """Copy the block of `fresh` to the device: all inputs, one copy for each run."""
        block = self._blocks[self._turn]
        num_bytes = self._layout.num_words * WORD_BYTES
        return self._apply(block, InputChange(WHOLE, 0, block.array[:num_bytes]))

    def patch(self, words: Words, values: np.ndarray, moves: tuple[Words, Words]) -> InputChange:
        """Change some words on the device.

        Args:
            words: their numbers, as in a block.
            values: what they become.
            moves: before that, the words of the first become what those of the second are.
        """
        block = self._next()
        arena_words = self._layout.arena_words
        numbers = np.concatenate([arena_words[moves[0]], arena_words[moves[1]], arena_words[words]])
        num_bytes = numbers.nbytes + values.nbytes
        block.array[: numbers.nbytes] = numbers.view(np.uint8)
        block.array[numbers.nbytes : num_bytes] = values.view(np.uint8)
        change = InputChange(len(moves[0]), len(words), block.array[:num_bytes])
        return self._apply(block, change)

    def receive(self, change: InputChange) -> None:
        """Apply what `send` or `patch` has returned on another rank."""
        block = self._next()
        block.array[: len(change.content)] = change.content
        self._apply(block, change)

    def _apply(self, block: _HostBlock, change: InputChange) -> InputChange:
        """Bring a change that is in a block to the device."""
        num_bytes = len(change.content)
        content = block.bytes[:num_bytes]
        if change.num_moves == WHOLE:
            words = content.view(torch.int32)
            for first, arena, count in self._layout.runs:
                source = words[first : first + count]
                self._arena[arena : arena + count].copy_(source, non_blocking=True)
        else:
            self._staged[:num_bytes].copy_(content, non_blocking=True)
        block.note_reads()
        if change.num_moves != WHOLE:
            self._scatter(change.num_moves, change.num_words)
        return change

    def _scatter(self, num_moves: int, num_words: int) -> None:
        """Carry out the patch that is on the device."""
        end = (2 * num_moves + num_words) * NUMBER_BYTES
        numbers = self._staged[:end].view(torch.int64)
        if num_moves:
            moved = self._arena.index_select(0, numbers[num_moves : 2 * num_moves])
            self._arena.index_copy_(0, numbers[:num_moves], moved)
        if num_words:
            values = self._staged[end : end + num_words * WORD_BYTES].view(torch.int32)
            self._arena.index_copy_(0, numbers[2 * num_moves :], values)
