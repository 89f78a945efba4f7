"""Sequences of different lengths, side by side.

Shapes: T tokens, S sequences, L longest sequence of the batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


class Ragged:
    """The tokens of several sequences, one sequence a line, padded with zeros.

    Args:
        cu_seqlens: where each sequence begins, and where the last one ends: [S + 1].
        multiple: L is rounded up to a multiple of it, unless it is smaller.

    Attributes:
        num_seqs: S.
        padded_len: L.
        is_even: whether all sequences have L tokens, so that nothing is padded.
        valid_SL: false where a sequence has no token; where nothing is padded it is left out.
    """

    def __init__(self, cu_seqlens: Tensor, multiple: int = 1) -> None:
        bounds: list[int] = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        max_len = max(lengths)
        self.num_seqs = len(lengths)
        self._num_tokens = bounds[-1]
        self.padded_len = max_len
        if max_len > multiple:
            self.padded_len = -(-max_len // multiple) * multiple
        self.is_even = min(lengths) == self.padded_len
        if not self.is_even:
            place_L = torch.arange(self.padded_len, device=cu_seqlens.device)
            start_S1 = cu_seqlens[:-1].unsqueeze(1)
            self.valid_SL = place_L < cu_seqlens.diff().unsqueeze(1)
            # The number of each token; 0 where there is none.
            self._token_SL = (start_S1 + place_L).where(self.valid_SL, 0)

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...]."""
        if self.is_even:
            return x_T.view(self.num_seqs, -1, *x_T.shape[1:])
        if self.num_seqs == 1:
            num_missing = self.padded_len - x_T.shape[0]
            return F.pad(x_T, (*[0, 0] * (x_T.dim() - 1), 0, num_missing)).unsqueeze(0)
        x_SL = x_T[self._token_SL]
        x_SL[~self.valid_SL] = 0
        return x_SL

    def pack(self, x_SL: Tensor) -> Tensor:
        """[S, L, ...] -> [T, ...]."""
        if self.is_even:
            return x_SL.flatten(0, 1)
        if self.num_seqs == 1:
            return x_SL[0, : self._num_tokens]
        return x_SL[self.valid_SL]
