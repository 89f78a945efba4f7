"""Writes a batch into the input buffers of its program.

A prefill step gets all of its inputs. Those of decode steps are kept as arrays on the host, with a
row for each sequence, and only what differs from the step before is sent: the device itself has
made the rows of sequences that go on.

Shapes: S sequences, T tokens, R tokens of each sequence in a decode step, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import BATCH_STATE, IS_ADJUSTED, IS_MASKED, MIN_P, STOP_IDS
from tokenspeed_plan.plans.schema import Limits, Plan
from tokenspeed_plan.runtime.execution.input_block import (
    DEVICE_ONLY,
    WORD_BYTES,
    InputBlocks,
    InputChange,
    InputLayout,
    Views,
    Words,
)
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

Buffer = Callable[[str], Tensor]
TOKEN_INPUTS = ("token_ids", "positions", "slot_mapping")
# The device writes these after each decode step.
ADVANCED = (*BATCH_STATE, "state_lens")
NO_WORDS: Words = np.zeros(0, dtype=np.int64)


def write_inputs(batch: Batch, buffer: Buffer, limits: Limits) -> None:
    """Fill the buffers that the batch's program reads; waits until they are written.

    Args:
        batch: its sequences; a captured program is filled up with padding.
        buffer: from a name to the buffer, at the size that the batch runs at.
        limits: those of the plan.
    """
    buffers = {name: buffer(name) for name in batch.program.inputs if name not in DEVICE_ONLY}
    host = {name: torch.empty_like(view, device="cpu") for name, view in buffers.items()}
    fill({name: value.numpy() for name, value in host.items()}, batch, limits)
    for name, view in buffers.items():
        view.copy_(host[name])


def fill(views: Views, batch: Batch, limits: Limits) -> None:
    """Write a batch and its padding into arrays of the size that it runs at."""
    sequences = batch.sequences
    pads = pad_values(limits, batch.program.query_len)
    table_SP = views["page_table"]
    table_SP[...] = limits.pad_page
    for row, sequence in enumerate(sequences):
        table_SP[row, : len(sequence.pages)] = sequence.pages
    num_padding = batch.run_seqs - len(sequences)
    lengths = [*batch.counts, *[batch.program.query_len] * num_padding]
    if "cu_seqlens" in views:
        views["cu_seqlens"][:] = np.cumsum([0, *lengths])
    values = state_values(sequences, batch.counts, table_SP, limits)
    values |= fixed_values(sequences, limits)
    values["following"] = _array(map(_following, sequences, batch.counts))
    for name, value in values.items():
        view = views.get(name)
        if view is not None:
            count = len(value)
            view[:count] = value.reshape(view[:count].shape)
            if name in TOKEN_INPUTS:
                view[count:].reshape(-1, batch.program.query_len)[...] = pads[name]
            else:
                view[count:] = pads[name]


def pad_values(limits: Limits, query_len: int) -> dict[str, float | np.ndarray]:
    """The inputs of a sequence that is padding, with as few tokens as the program takes.

    It reads state slot 0, which is zero, and writes the padding slot and the padding page. Its
    tokens have places of their own there: what a step leaves is the same each time.
    """
    place_R = np.arange(query_len)
    return {
        "token_ids": 0,
        "positions": place_R,
        "slot_mapping": limits.pad_page * limits.page_size + place_R,
        "context_lens": query_len,
        "state_lens": 0,
        "following": -1,
        "max_lens": 0,
        "src_state_slots": 0,
        "dst_state_slots": limits.pad_state_slot,
        "page_table": limits.pad_page,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "stop_ids": -1,
        "rng_offset": 0,
        IS_MASKED: 0,
        IS_ADJUSTED: 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        MIN_P: 0.0,
    }


def state_values(
    sequences: Seq[Sequence], counts: Seq[int], table_SP: np.ndarray, limits: Limits
) -> Views:
    """What changes from step to step.

    Args:
        sequences: all of what is known of them is committed.
        counts: tokens of each to compute; a missing draft is replaced by token 0, which is verified
            like any other draft.
        table_SP: their page table.
        limits: those of the plan.
    """
    token_ids: list[int] = []
    for sequence, count in zip(sequences, counts, strict=True):
        start = sequence.num_computed
        known = sequence.token_ids[start : start + count]
        if len(known) < count:
            known = (known + sequence.drafts + [0] * count)[:count]
        token_ids += known
    count_S = _array(counts)
    start_S = _array(sequence.num_computed for sequence in sequences)
    before_S = np.cumsum(count_S) - count_S  # tokens of the sequences before it
    positions_T = np.arange(len(token_ids)) + np.repeat(start_S - before_S, count_S)
    row_T = np.repeat(np.arange(len(sequences)), count_S)
    page_T = _pages_of(table_SP, row_T, positions_T // limits.page_size, limits)
    return {
        "token_ids": np.array(token_ids, dtype=np.int32),
        "positions": positions_T,
        "slot_mapping": page_T * limits.page_size + positions_T % limits.page_size,
        "context_lens": start_S + count_S,
        "state_lens": _array(sequence.state_len for sequence in sequences),
        "src_state_slots": _array(sequence.state_slot for sequence in sequences),
        "dst_state_slots": np.array([sequence.own_slots for sequence in sequences], dtype=np.int32),
        "rng_offset": _array(sequence.num_generated for sequence in sequences),
    }


def _pages_of(
    table_SP: np.ndarray, row_T: np.ndarray, column_T: np.ndarray, limits: Limits
) -> np.ndarray:
    """The page of each token; beyond the table it is the padding page."""
    last_column = table_SP.shape[1] - 1
    page_T = table_SP[row_T, np.minimum(column_T, last_column)]
    return np.where(column_T <= last_column, page_T, limits.pad_page).astype(np.int64)


def fixed_values(sequences: Seq[Sequence], limits: Limits) -> Views:
    """Parameters of sampling, the tokens that end a sequence, and where its memory ends."""
    params = [sequence.request.params for sequence in sequences]
    return {
        "max_lens": _array(_max_state_len(sequence, limits) for sequence in sequences),
        "temperature": np.array([p.temperature for p in params], dtype=np.float32),
        "top_p": np.array([p.top_p for p in params], dtype=np.float32),
        "top_k": _array(p.top_k for p in params),
        "seed": _array(_signed(p.seed) for p in params),
        IS_MASKED: _array(sequence.matcher is not None for sequence in sequences),
        IS_ADJUSTED: _array(sequence.counts is not None for sequence in sequences),
        "presence_penalty": np.array([p.presence_penalty for p in params], dtype=np.float32),
        "frequency_penalty": np.array([p.frequency_penalty for p in params], dtype=np.float32),
        "repetition_penalty": np.array([p.repetition_penalty for p in params], dtype=np.float32),
        MIN_P: np.array([p.min_p for p in params], dtype=np.float32),
        "stop_ids": np.array([_stop_ids(sequence) for sequence in sequences], dtype=np.int32),
    }


def _array(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def _following(sequence: Sequence, count: int) -> int:
    """The token after those of this step, where it is known; else -1."""
    end = sequence.num_computed + count
    if end < len(sequence.token_ids):
        return sequence.token_ids[end]
    return -1


def _max_state_len(sequence: Sequence, limits: Limits) -> int:
    """Tokens that may be computed at most.

    The last token of a sequence is never computed, nor is a token without a page.
    """
    num_slots = len(sequence.pages) * limits.page_size
    return min(sequence.max_len - 1, num_slots)


def _stop_ids(sequence: Sequence) -> list[int]:
    """The `STOP_IDS` smallest of the tokens that end it, then -1; the host finds the others."""
    first = sorted(sequence.stop_ids)[:STOP_IDS]
    num_missing = STOP_IDS - len(first)
    return first + [-1] * num_missing


def _signed(seed: int) -> int:
    """The low 64 bits, as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


class DecodeRows:
    """The inputs of decode steps on the host: arrays with a row for each sequence.

    Rows behind the last sequence are padding. What the device advances is right only in rows that
    were written since; of the others the device alone knows it.

    Args:
        layout: where inputs lie.
        limits: those of the plan.
        query_len: tokens of each row.
    """

    def __init__(self, layout: InputLayout, limits: Limits, query_len: int) -> None:
        self.query_len = query_len
        self.words = np.zeros(layout.num_words, dtype=np.int32)
        self._layout = layout
        self._limits = limits
        self._owners: tuple[Sequence, ...] = ()
        self._versions: list[int] = []
        self._num_pages: list[int] = []
        views = layout.views(self.words)
        views.pop("cu_seqlens")[:] = np.arange(layout.max_seqs + 1) * query_len
        self._views = {name: self._rows_of(name, view) for name, view in views.items()}
        self._fixed = [name for name in self._views if name not in ADVANCED]
        numbers = {name: self._numbers_of(name) for name in self._views}
        # The words of each row: all of them, what the host alone writes, and what advances.
        self._all_words = np.concatenate([*numbers.values()], 1)
        self._fixed_words = np.concatenate([numbers[name] for name in self._fixed], 1)
        advanced = [numbers[name] for name in self._views if name in ADVANCED]
        self._advanced_words = np.concatenate(advanced, 1)
        self._page_words = numbers["page_table"]
        self._max_len_words = numbers.get("max_lens", numbers["page_table"][:, :0])
        self._pads = pad_values(limits, query_len)
        self._pad(np.arange(layout.max_seqs))

    def _rows_of(self, name: str, view: np.ndarray) -> np.ndarray:
        """An input as a matrix with a row for each sequence."""
        num_rows = self._layout.max_seqs
        if name in TOKEN_INPUTS:
            return view[: num_rows * self.query_len].reshape(num_rows, self.query_len)
        return view[:num_rows].reshape(num_rows, -1)

    def _pad(self, rows: np.ndarray) -> None:
        for name, view in self._views.items():
            view[rows] = self._pads[name]

    def change(self, batch: Batch) -> tuple[Words, tuple[Words, Words]]:
        """Follow the step before; returns the words to send, and those that the device moves.

        A sequence whose last step is not committed must have been in the step before.
        """
        sequences = batch.sequences
        if sequences is self._owners:
            versions = [sequence.pages_version for sequence in sequences]
            if versions == self._versions:
                return self._extend_all(sequences), (NO_WORDS, NO_WORDS)
        shown = self._num_pages  # of each row
        row_of = {
            owner: row
            for row, owner in enumerate(self._owners)
            if self._versions[row] == owner.pages_version
        }
        before = [row_of.get(sequence, -1) for sequence in sequences]
        before_S, row_S = _array(before), np.arange(len(sequences))
        fresh = row_S[before_S < 0]
        moved = row_S[(before_S >= 0) & (before_S != row_S)]
        for name in self._fixed:
            self._views[name][moved] = self._views[name][before_S[moved]]
        freed = np.arange(len(sequences), len(self._owners))
        written = np.concatenate([fresh, freed])
        if len(written):
            self._pad(written)
            self._write(sequences, fresh)
        longer = [
            self._extend(row, sequences[row], shown[old])
            for row, old in enumerate(before)
            if old >= 0 and shown[old] != len(sequences[row].pages)
        ]
        self._note(sequences)
        words = [self._fixed_words[moved].ravel(), self._all_words[written].ravel(), *longer]
        moves = (
            self._advanced_words[moved].ravel(),
            self._advanced_words[before_S[moved]].ravel(),
        )
        return np.concatenate(words), moves

    def rewrite(self, batch: Batch) -> None:
        """Write all rows anew; all that was launched of their sequences must be committed."""
        self.change(batch)
        assert not any(sequence.num_ahead for sequence in batch.sequences)
        self._write_state(batch.sequences, np.arange(len(batch.sequences)))

    def _note(self, sequences: tuple[Sequence, ...]) -> None:
        """Remember whose rows these are, and which of their memory they show."""
        self._owners = sequences
        self._versions = [sequence.pages_version for sequence in sequences]
        self._num_pages = [len(sequence.pages) for sequence in sequences]

    def _numbers_of(self, name: str) -> np.ndarray:
        """The words of each row of an input, numbered as in a block: [rows, words of a row]."""
        num_rows = self._layout.max_seqs
        width = self._views[name].nbytes // WORD_BYTES // num_rows
        first = self._layout.first_word(name)
        return first + np.arange(num_rows * width).reshape(num_rows, width)

    def _write(self, sequences: Seq[Sequence], rows: np.ndarray) -> None:
        """Write whole rows."""
        owners = [sequences[row] for row in rows]
        for row, owner in zip(rows, owners, strict=True):
            assert not owner.num_ahead, "only the device knows how this sequence goes on"
            self._views["page_table"][row, : len(owner.pages)] = owner.pages
        if owners:
            self._put(fixed_values(owners, self._limits), rows)
            self._write_state(owners, rows)

    def _write_state(self, owners: Seq[Sequence], rows: np.ndarray) -> None:
        """Write what the device advances."""
        table_SP = self._views["page_table"][rows]
        counts = [self.query_len] * len(owners)
        self._put(state_values(owners, counts, table_SP, self._limits), rows)

    def _put(self, values: Views, rows: np.ndarray) -> None:
        for name, value in values.items():
            if name in self._views:
                self._views[name][rows] = value.reshape(len(rows), -1)

    def _extend_all(self, sequences: Seq[Sequence]) -> Words:
        """Append new pages, where all rows stay; returns the words."""
        num_pages = [len(sequence.pages) for sequence in sequences]
        if num_pages == self._num_pages:
            return NO_WORDS
        longer = [
            self._extend(row, sequence, self._num_pages[row])
            for row, sequence in enumerate(sequences)
            if num_pages[row] != self._num_pages[row]
        ]
        self._num_pages = num_pages
        return np.concatenate(longer)

    def _extend(self, row: int, sequence: Sequence, count: int) -> Words:
        """Append the pages after the first `count` to a row; returns the words."""
        end = len(sequence.pages)
        self._views["page_table"][row, count:end] = sequence.pages[count:]
        if "max_lens" in self._views:
            self._views["max_lens"][row] = _max_state_len(sequence, self._limits)
        return np.concatenate([self._page_words[row, count:end], self._max_len_words[row]])


class InputWriter:
    """Writes the inputs of the batches of an engine, each before its program is launched.

    Args:
        plan: names the inputs and their places.
        buffer: from a name and the size of a batch to a buffer of the io arena.
    """

    def __init__(self, plan: Plan, buffer: Callable[[str, int, int], Tensor]) -> None:
        self._layout = InputLayout(plan)
        self._limits = plan.pool.limits
        self._blocks = InputBlocks(self._layout, buffer)
        self._rows: DecodeRows | None = None
        self._follows = False  # whether the device has what follows the last decode step

    def write(self, batch: Batch) -> InputChange | None:
        """Write what the device has not made itself; returns what was sent, if anything."""
        if batch.program.phase == "prefill":
            return self._write_prefill(batch)
        query_len = batch.program.query_len
        if self._rows is None or self._rows.query_len != query_len:
            self._rows = DecodeRows(self._layout, self._limits, query_len)
            self._follows = False
        if self._follows:
            words, moves = self._rows.change(batch)
            if not len(words) and not len(moves[0]):
                return None
            return self._blocks.patch(words, self._rows.words[words], moves)
        self._rows.rewrite(batch)
        self._blocks.fresh()[:] = self._rows.words
        self._follows = True
        return self._blocks.send()

    def _write_prefill(self, batch: Batch) -> InputChange:
        views = self._layout.views(self._blocks.fresh())
        cut: Views = {}
        for name in batch.program.inputs:
            if name in TOKEN_INPUTS:
                cut[name] = views[name][: batch.run_tokens]
            elif name in views:
                cut[name] = views[name][: batch.run_seqs + (name == "cu_seqlens")]
        fill(cut, batch, self._limits)
        self._follows = False
        return self._blocks.send()
