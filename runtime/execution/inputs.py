"""A batch -> the input buffers of its program."""

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
# The device counts accepted drafts itself; only a benchmark writes the other one.
DEVICE_ONLY = ("accept_counts", "forced_accept")
Values = dict[str, list[int] | list[float]]


def write_inputs(batch: Batch, buffer: Buffer, limits: Limits) -> None:
    """Fill the buffers that the batch's program reads.

    Args:
        batch: its sequences; padding fills the rest of a captured program.
        buffer: from a name to a view at the size that the batch runs at.
        limits: those of the plan.
    """
    fill_inputs(batch, input_values(batch, limits), buffer, limits)


def input_values(batch: Batch, limits: Limits) -> Values:
    """What the batch's program reads, by name; all but the page table."""
    return (
        _token_values(batch, limits)
        | _length_values(batch, limits)
        | _state_slot_values(batch, limits)
        | _sampling_values(batch)
    )


def fill_inputs(batch: Batch, values: Values, buffer: Buffer, limits: Limits) -> None:
    """The second half of `write_inputs`: waits for a device that still reads them for the step before."""
    for name in batch.program.inputs:
        view = buffer(name)
        if name == "page_table":
            _write_page_table(batch, view, limits)
        elif name not in DEVICE_ONLY:
            view.copy_(torch.tensor(values[name], dtype=view.dtype).view(view.shape))


def _token_values(batch: Batch, limits: Limits) -> Values:
    """Token ids, positions and slots; a missing draft is token 0, which counts only where it is right."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        end = start + count
        known = (sequence.token_ids[start:end] + sequence.drafts)[:count]
        token_ids += known
        token_ids += [0] * (count - len(known))
        positions += range(start, end)
        slots += _slots(sequence, start, end, limits)
    padding = batch.run_tokens - batch.num_tokens
    return {
        "token_ids": token_ids + [0] * padding,
        "positions": positions + [0] * padding,
        "slot_mapping": slots + [limits.pad_page * limits.page_size] * padding,
    }


def _slots(sequence: Sequence, start: int, end: int, limits: Limits) -> list[int]:
    """Where the keys of its tokens from `start` to `end` go, page by page: a prompt has thousands of them."""
    slots: list[int] = []
    size = limits.page_size
    for index in range(start // size, -(-end // size)):
        page = sequence.pages[index] if index < len(sequence.pages) else limits.pad_page
        shift = (page - index) * size  # from a token's position to its slot
        first = max(start, index * size)
        last = min(end, (index + 1) * size)
        slots += range(first + shift, last + shift)
    return slots


def _num_padding(batch: Batch) -> int:
    """Sequences of padding."""
    return batch.run_seqs - len(batch.sequences)


def _length_values(batch: Batch, limits: Limits) -> Values:
    """Bounds and lengths; a sequence of padding has as few tokens as the program takes."""
    sequences, counts, padding = batch.sequences, batch.counts, _num_padding(batch)
    pairs = list(zip(sequences, counts, strict=True))
    pad_counts = [batch.program.query_len] * padding
    return {
        "cu_seqlens": [0, *accumulate([*counts, *pad_counts])],
        "context_lens": [s.num_computed + count for s, count in pairs] + pad_counts,
        "state_lens": [s.state_len for s in sequences] + [0] * padding,
        "following": [_following(s, count) for s, count in pairs] + [-1] * padding,
        "max_lens": [_max_state_len(s, limits) for s in sequences] + [0] * padding,
    }


def _state_slot_values(batch: Batch, limits: Limits) -> Values:
    """A sequence of padding reads the zero state, and writes where nobody reads."""
    padding = _num_padding(batch)
    num_written = limits.state_slots_per_seq - 1
    pad_slots = [limits.pad_state_slot] * num_written * padding
    return {
        "src_state_slots": [*batch.src_state_slots, *[0] * padding],
        "dst_state_slots": _joined(batch.dst_state_slots) + pad_slots,
    }


def _sampling_values(batch: Batch) -> Values:
    """Parameters of sampling, and the tokens that end a sequence."""
    sequences, padding = batch.sequences, _num_padding(batch)
    params = [sequence.request.params for sequence in sequences]
    stop_ids = _joined(_stop_ids(sequence) for sequence in sequences)
    return {
        "temperature": [p.temperature for p in params] + [0.0] * padding,
        "top_p": [p.top_p for p in params] + [1.0] * padding,
        "top_k": [p.top_k for p in params] + [0] * padding,
        "seed": [_signed(p.seed) for p in params] + [0] * padding,
        "stop_ids": stop_ids + [-1] * STOP_IDS * padding,
        "rng_offset": [s.num_generated for s in sequences] + [0] * padding,
    }


def _joined(lists: Iterable[Iterable[int]]) -> list[int]:
    joined: list[int] = []
    for values in lists:
        joined += values
    return joined


def _following(sequence: Sequence, count: int) -> int:
    """The token after those of this step, where it is known; else -1."""
    end = sequence.num_computed + count
    return sequence.token_ids[end] if end < len(sequence.token_ids) else -1


def _max_state_len(sequence: Sequence, limits: Limits) -> int:
    """Tokens that it may have computed at most: its last one never is, and what has no page cannot be."""
    return min(sequence.max_len - 1, len(sequence.pages) * limits.page_size)


def _stop_ids(sequence: Sequence) -> list[int]:
    """As many of the tokens that end it as a kernel looks at; the others are found on the host."""
    first = sorted(sequence.stop_ids)[:STOP_IDS]
    return first + [-1] * (STOP_IDS - len(first))


def _signed(seed: int) -> int:
    """The low 64 bits, as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _write_page_table(batch: Batch, view: Tensor, limits: Limits) -> None:
    """Only as many columns as a sequence has pages, and as its drafts may reach on a device that is a step ahead.

    Sequences of fewer pages, and those of padding, end with the page that takes padding.
    """
    used = max((len(s.pages) for s in batch.sequences), default=1)
    used = min(used + _pages_of_drafts(limits), limits.table_pages)
    table = [s.pages + [limits.pad_page] * (used - len(s.pages)) for s in batch.sequences]
    table += [[limits.pad_page] * used] * (batch.run_seqs - len(table))
    view[:, :used] = torch.tensor(table, dtype=view.dtype)


def _pages_of_drafts(limits: Limits) -> int:
    """Pages that the tokens and drafts of three steps may reach into; none without drafts."""
    if not limits.max_depth:
        return 0
    num_tokens = 3 * (limits.max_depth + 1)
    return -(-num_tokens // limits.page_size) + 1
