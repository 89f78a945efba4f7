"""Writes a batch into the input buffers of its program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import STOP_IDS
from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

Buffer = Callable[[str], Tensor]
# The device counts accepted drafts itself; only a benchmark writes `forced_accept`.
DEVICE_ONLY = ("accept_counts", "forced_accept")
# Steps whose tokens and drafts the pages must cover: the device may be ahead of the host.
MAX_UNKNOWN_STEPS = 3
Values = dict[str, list[int] | list[float]]


def write_inputs(batch: Batch, buffer: Buffer, limits: Limits) -> None:
    """Fill the buffers that the batch's program reads.

    Args:
        batch: its sequences; a captured program is filled up with padding.
        buffer: from a name to the buffer, at the size that the batch runs at.
        limits: those of the plan.
    """
    values = input_values(batch, limits)
    fill_inputs(batch, values, buffer, limits)


def input_values(batch: Batch, limits: Limits) -> Values:
    """The first half of `write_inputs`: all inputs by name, without the page table."""
    return (
        _token_values(batch, limits)
        | _length_values(batch, limits)
        | _state_slot_values(batch, limits)
        | _sampling_values(batch)
    )


def fill_inputs(batch: Batch, values: Values, buffer: Buffer, limits: Limits) -> None:
    """The second half of `write_inputs`: copy the values to the device.

    On a GPU it waits while the step before still reads the buffers.
    """
    for name in batch.program.inputs:
        view = buffer(name)
        if name == "page_table":
            _write_page_table(batch, view, limits)
        elif name not in DEVICE_ONLY:
            flat = torch.tensor(values[name], dtype=view.dtype)
            view.copy_(flat.view(view.shape))


def _token_values(batch: Batch, limits: Limits) -> Values:
    """Token ids, positions and cache slots.

    A missing draft is replaced by token 0, which is verified like any other draft.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        end = start + count
        known = sequence.token_ids[start:end] + sequence.drafts
        known = known[:count]
        num_missing = count - len(known)
        token_ids += known
        token_ids += [0] * num_missing
        positions += range(start, end)
        slots += _slots(sequence, start, end, limits)
    padding = batch.run_tokens - batch.num_tokens
    pad_slot = limits.pad_page * limits.page_size
    return {
        "token_ids": token_ids + [0] * padding,
        "positions": positions + [0] * padding,
        "slot_mapping": slots + [pad_slot] * padding,
    }


def _slots(sequence: Sequence, start: int, end: int, limits: Limits) -> list[int]:
    """The cache slots of its tokens from `start` to `end`.

    They are made page by page, as a chunk of a prompt has thousands of tokens.
    """
    slots: list[int] = []
    size = limits.page_size
    first_page = start // size
    end_page = -(-end // size)
    for index in range(first_page, end_page):
        page = limits.pad_page
        if index < len(sequence.pages):
            page = sequence.pages[index]
        page_start = index * size
        shift = page * size - page_start  # from a token's position to its slot
        first = max(start, page_start)
        last = min(end, page_start + size)
        slots += range(first + shift, last + shift)
    return slots


def _num_padding(batch: Batch) -> int:
    """Padding sequences."""
    return batch.run_seqs - len(batch.sequences)


def _length_values(batch: Batch, limits: Limits) -> Values:
    """Bounds and lengths; a padding sequence has as few tokens as the program takes."""
    contexts: list[int] = []
    state_lens: list[int] = []
    following: list[int] = []
    max_lens: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        contexts.append(sequence.num_computed + count)
        state_lens.append(sequence.state_len)
        following.append(_following(sequence, count))
        max_lens.append(_max_state_len(sequence, limits))
    padding = _num_padding(batch)
    pad_counts = [batch.program.query_len] * padding
    return {
        "cu_seqlens": [0, *accumulate([*batch.counts, *pad_counts])],
        "context_lens": contexts + pad_counts,
        "state_lens": state_lens + [0] * padding,
        "following": following + [-1] * padding,
        "max_lens": max_lens + [0] * padding,
    }


def _state_slot_values(batch: Batch, limits: Limits) -> Values:
    """State slots; a padding sequence reads slot 0, which is zero, and writes the padding slot."""
    padding = _num_padding(batch)
    num_pad_slots = limits.written_slots_per_seq * padding
    pad_slots = [limits.pad_state_slot] * num_pad_slots
    return {
        "src_state_slots": [*batch.src_state_slots, *[0] * padding],
        "dst_state_slots": _joined(batch.dst_state_slots) + pad_slots,
    }


def _sampling_values(batch: Batch) -> Values:
    """Parameters of sampling, and the tokens that end a sequence."""
    padding = _num_padding(batch)
    params = [sequence.request.params for sequence in batch.sequences]
    stop_ids = _joined(map(_stop_ids, batch.sequences))
    pad_stop_ids = [-1] * STOP_IDS * padding
    rng_offsets = [sequence.num_generated for sequence in batch.sequences]
    return {
        "temperature": [p.temperature for p in params] + [0.0] * padding,
        "top_p": [p.top_p for p in params] + [1.0] * padding,
        "top_k": [p.top_k for p in params] + [0] * padding,
        "seed": [_signed(p.seed) for p in params] + [0] * padding,
        "stop_ids": stop_ids + pad_stop_ids,
        "rng_offset": rng_offsets + [0] * padding,
    }


def _joined(lists: Iterable[Iterable[int]]) -> list[int]:
    joined: list[int] = []
    for values in lists:
        joined += values
    return joined


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


def _write_page_table(batch: Batch, view: Tensor, limits: Limits) -> None:
    """Write the columns that the step can reach.

    These are the pages of the longest sequence, and those that drafts may reach where the device is
    ahead of the host. Shorter sequences, and padding, are filled up with the padding page.
    """
    num_pages = [len(sequence.pages) for sequence in batch.sequences]
    max_pages = max(num_pages, default=1)
    used = max_pages + _pages_of_drafts(limits)
    used = min(used, limits.table_pages)
    table: list[list[int]] = []
    for sequence in batch.sequences:
        num_missing = used - len(sequence.pages)
        padding = [limits.pad_page] * num_missing
        table.append(sequence.pages + padding)
    pad_row = [limits.pad_page] * used
    table += [pad_row] * _num_padding(batch)
    view[:, :used] = torch.tensor(table, dtype=view.dtype)


def _pages_of_drafts(limits: Limits) -> int:
    """Pages that the tokens and drafts of the steps in flight may reach; none without drafts."""
    if not limits.max_depth:
        return 0
    num_tokens = MAX_UNKNOWN_STEPS * (limits.max_depth + 1)
    whole_pages = -(-num_tokens // limits.page_size)
    return whole_pages + 1
