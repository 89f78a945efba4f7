"""A batch -> the input buffers of its program."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from tokenspeed_plan.runtime.scheduler import Batch
from torch import Tensor

Buffer = Callable[[str], Tensor]


def write_inputs(batch: Batch, buffer: Buffer, page_size: int) -> None:
    """Fill the buffers that the batch's program reads; `buffer` gives a view at the size of the batch."""
    values = _per_token(batch, page_size) | _per_sequence(batch)
    for name in batch.program.inputs:
        if name == "page_table":
            _write_pages(batch, buffer(name), page_size)
        else:
            view = buffer(name)
            view.copy_(torch.tensor(values[name], dtype=view.dtype))


def _per_token(batch: Batch, page_size: int) -> dict[str, list[int] | list[float]]:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for sequence, count in zip(batch.sequences, batch.counts, strict=True):
        start = sequence.num_computed
        ids += sequence.token_ids[start : start + count]
        positions += range(start, start + count)
        slots += [sequence.pages[p // page_size] * page_size + p % page_size for p in range(start, start + count)]
    return {"token_ids": ids, "positions": positions, "slot_mapping": slots}


def _per_sequence(batch: Batch) -> dict[str, list[int] | list[float]]:
    params = [sequence.request.params for sequence in batch.sequences]
    return {
        "cu_seqlens": [0, *accumulate(batch.counts)],
        "context_lens": [s.num_computed + count for s, count in zip(batch.sequences, batch.counts, strict=True)],
        "read_rows": [s.read_row for s in batch.sequences],
        "write_rows": [s.write_row for s in batch.sequences],
        "temperature": [p.temperature for p in params],
        "top_p": [p.top_p for p in params],
        "top_k": [p.top_k for p in params],
        "seed": [_signed(p.seed) for p in params],
        "draw": [len(s.token_ids) - s.num_prompt_tokens for s in batch.sequences],
    }


def _signed(seed: int) -> int:
    """The low 64 bits, as a signed number."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _write_pages(batch: Batch, view: Tensor, page_size: int) -> None:
    """Only the columns that this step looks at; a shorter row repeats its first page, which is then masked."""
    longest = max(s.num_computed + count for s, count in zip(batch.sequences, batch.counts, strict=True))
    used = -(-longest // page_size)
    rows = [(s.pages + s.pages[:1] * (used - len(s.pages)))[:used] for s in batch.sequences]
    view[:, :used] = torch.tensor(rows, dtype=view.dtype)
