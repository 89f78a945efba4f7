"""A batch -> the input buffers of its program."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from tokenspeed_plan.plans.schema import Limits
from tokenspeed_plan.runtime.scheduler import Batch
from torch import Tensor

Buffer = Callable[[str], Tensor]
Values = dict[str, list[int] | list[float]]


def write_inputs(batch: Batch, buffer: Buffer, limits: Limits) -> None:
    """Fill the buffers that the batch's program reads; `buffer` gives a view at the size that the batch runs at."""
    values = _per_token(batch, limits) | _per_sequence(batch, limits)
    for name in batch.program.inputs:
        view = buffer(name)
        if name == "page_table":
            _write_pages(batch, view, limits)
        else:
            view.copy_(torch.tensor(values[name], dtype=view.dtype))


def _per_token(batch: Batch, limits: Limits) -> Values:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    size, padding = limits.page_size, batch.run_tokens - batch.num_tokens
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        ids += sequence.token_ids[start : start + count]
        positions += range(start, start + count)
        slots += [sequence.pages[p // size] * size + p % size for p in range(start, start + count)]
    return {
        "token_ids": ids + [0] * padding,
        "positions": positions + [0] * padding,
        "slot_mapping": slots + [limits.spare_page * size] * padding,
    }


def _per_sequence(batch: Batch, limits: Limits) -> Values:
    """Padding is a sequence of one token that reads the zero row and writes where nobody reads."""
    params = [sequence.request.params for sequence in batch.sequences]
    padding = batch.run_seqs - len(batch.sequences)
    contexts = [s.num_computed + count for s, count in zip(batch.sequences, batch.counts, strict=True)]
    return {
        "cu_seqlens": [0, *accumulate([*batch.counts, *[1] * padding])],
        "context_lens": contexts + [1] * padding,
        "read_rows": [*batch.read_rows, *[0] * padding],
        "write_rows": [*batch.write_rows, *[limits.spare_row] * padding],
        "temperature": [p.temperature for p in params] + [0.0] * padding,
        "top_p": [p.top_p for p in params] + [1.0] * padding,
        "top_k": [p.top_k for p in params] + [0] * padding,
        "seed": [_signed(p.seed) for p in params] + [0] * padding,
        "draw": [len(s.token_ids) - s.num_prompt_tokens for s in batch.sequences] + [0] * padding,
    }


def _signed(seed: int) -> int:
    """The low 64 bits, as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _write_pages(batch: Batch, view: Tensor, limits: Limits) -> None:
    """Only as many columns as a sequence has pages; shorter rows, and padding, end with the spare page."""
    used = max((len(s.pages) for s in batch.sequences), default=1)
    rows = [s.pages + [limits.spare_page] * (used - len(s.pages)) for s in batch.sequences]
    rows += [[limits.spare_page] * used] * (batch.run_seqs - len(rows))
    view[:, :used] = torch.tensor(rows, dtype=view.dtype)
