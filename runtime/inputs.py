"""A batch -> the input buffers of its program."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain

import torch
from torch import Tensor

from tokenspeed_plan.plans.ops import STOP_IDS
from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.scheduler import Batch
from tokenspeed_plan.runtime.sequence import Sequence

Buffer = Callable[[str], Tensor]
KEPT = ("accept_counts", "forced_accept")  # the device's own; what only a benchmark writes
Values = dict[str, list[int] | list[float]]


def write_inputs(batch: Batch, buffer: Buffer, limits: Limits) -> None:
    """Fill the buffers that the batch's program reads; `buffer` gives a view at the size that the batch runs at."""
    fill_inputs(batch, input_values(batch, limits), buffer, limits)


def input_values(batch: Batch, limits: Limits) -> Values:
    """What the batch's program reads, by name; all but the pages."""
    return _per_token(batch, limits) | _per_sequence(batch, limits)


def fill_inputs(batch: Batch, values: Values, buffer: Buffer, limits: Limits) -> None:
    """The second half of `write_inputs`: waits for a device that still reads them for the step before."""
    for name in batch.program.inputs:
        view = buffer(name)
        if name == "page_table":
            _write_pages(batch, view, limits)
        elif name not in KEPT:
            view.copy_(torch.tensor(values[name], dtype=view.dtype).view(view.shape))


def _per_token(batch: Batch, limits: Limits) -> Values:
    """A row that has no token gets any: a draft that is missing is one that is not accepted."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    size, padding = limits.page_size, batch.run_tokens - batch.num_tokens
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        known = (sequence.token_ids[start : start + count] + sequence.drafts)[:count]
        ids += known + [0] * (count - len(known))
        positions += range(start, start + count)
        slots += _slots(sequence, start, start + count, limits)
    return {
        "token_ids": ids + [0] * padding,
        "positions": positions + [0] * padding,
        "slot_mapping": slots + [limits.pad_page * size] * padding,
    }


def _slots(sequence: Sequence, start: int, end: int, limits: Limits) -> list[int]:
    """Where the keys of its tokens from `start` to `end` go, page by page: a prompt has thousands of them."""
    slots: list[int] = []
    size = limits.page_size
    for index in range(start // size, -(-end // size)):
        shift = (
            _page(sequence, index, limits) - index
        ) * size  # from a token's position to its slot
        slots += range(max(start, index * size) + shift, min(end, (index + 1) * size) + shift)
    return slots


def _page(sequence: Sequence, index: int, limits: Limits) -> int:
    """Drafts may be where a sequence has no page."""
    return sequence.pages[index] if index < len(sequence.pages) else limits.pad_page


def _per_sequence(batch: Batch, limits: Limits) -> Values:
    """Padding is a sequence of fewest tokens that reads the zero row and writes where nobody reads."""
    rows, columns = batch.program.query_len, limits.state_slots_per_seq - 1
    params = [sequence.request.params for sequence in batch.sequences]
    padding = batch.run_seqs - len(batch.sequences)
    contexts = [
        s.num_computed + count for s, count in zip(batch.sequences, batch.counts, strict=True)
    ]
    return {
        "cu_seqlens": [0, *accumulate([*batch.counts, *[rows] * padding])],
        "context_lens": contexts + [rows] * padding,
        "state_lens": [s.state_len for s in batch.sequences] + [0] * padding,
        "src_state_slots": [*batch.src_state_slots, *[0] * padding],
        "dst_state_slots": [
            *chain(*batch.dst_state_slots),
            *[limits.pad_state_slot] * columns * padding,
        ],
        "temperature": [p.temperature for p in params] + [0.0] * padding,
        "top_p": [p.top_p for p in params] + [1.0] * padding,
        "top_k": [p.top_k for p in params] + [0] * padding,
        "seed": [_signed(p.seed) for p in params] + [0] * padding,
        "following": [
            _following(s, count) for s, count in zip(batch.sequences, batch.counts, strict=True)
        ]
        + [-1] * padding,
        "max_lens": [min(s.max_len - 1, len(s.pages) * limits.page_size) for s in batch.sequences]
        + [0] * padding,
        "stop_ids": [*chain(*map(_stop_ids, batch.sequences)), *[-1] * STOP_IDS * padding],
        "rng_offset": [len(s.token_ids) - s.num_prompt_tokens for s in batch.sequences]
        + [0] * padding,
    }


def _following(sequence: Sequence, count: int) -> int:
    """The token after those of this step, where it is known."""
    end = sequence.num_computed + count
    return sequence.token_ids[end] if end < len(sequence.token_ids) else -1


def _stop_ids(sequence: Sequence) -> list[int]:
    """As many of the tokens that end it as a kernel looks at; the others are found on the host."""
    few = sorted(sequence.stop_ids)[:STOP_IDS]
    return few + [-1] * (STOP_IDS - len(few))


def _signed(seed: int) -> int:
    """The low 64 bits, as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _write_pages(batch: Batch, view: Tensor, limits: Limits) -> None:
    """Only as many columns as a sequence has pages, and as its drafts may reach on a device that is a step ahead.

    Shorter rows, and padding, end with the spare page.
    """
    beyond = -(-3 * (limits.max_depth + 1) // limits.page_size) + 1 if limits.max_depth else 0
    used = min(max((len(s.pages) for s in batch.sequences), default=1) + beyond, limits.table_pages)
    rows = [s.pages + [limits.pad_page] * (used - len(s.pages)) for s in batch.sequences]
    rows += [[limits.pad_page] * used] * (batch.run_seqs - len(rows))
    view[:, :used] = torch.tensor(rows, dtype=view.dtype)
