"""Sequences of different lengths, side by side.

Shapes: T tokens, S sequences, L longest sequence of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ragged:
    """The tokens of several sequences, one sequence a line, padded with zeros.

    Args:
        cu_seqlens: where each sequence begins, and where the last one ends: [S + 1].
        multiple: L is rounded up to a multiple of it.

    Attributes:
        lengths_S: tokens of each sequence.
        valid_SL: false where a sequence has no token.
        token_SL: the number of each token; 0 where there is none.
    """

    def __init__(self, cu_seqlens: Tensor, multiple: int = 1) -> None:
        bounds = cu_seqlens.long()
        start_S = bounds[:-1]
        end_S = bounds[1:]
        self.lengths_S = end_S - start_S
        max_len = int(self.lengths_S.max())
        num_blocks = -(-max_len // multiple)
        padded_len = num_blocks * multiple
        place_L = torch.arange(padded_len, device=bounds.device)
        lengths_S1 = self.lengths_S.unsqueeze(1)
        start_S1 = start_S.unsqueeze(1)
        self.valid_SL = place_L < lengths_S1
        token_SL = start_S1 + place_L
        self.token_SL = token_SL.where(self.valid_SL, 0)

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...]."""
        x_SL = x_T[self.token_SL]
        valid = self.valid_SL
        while valid.dim() < x_SL.dim():
            valid = valid.unsqueeze(-1)
        return x_SL * valid

    def pack(self, x_SL: Tensor) -> Tensor:
        """[S, L, ...] -> [T, ...]."""
        return x_SL[self.valid_SL]
