"""What the engine asks of a grammar, whichever library knows it.

Shapes: R queries of a sequence, W words of the mask of one query.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tokenspeed_plan.plans.ops import MASK_WORD_BITS


class Matcher(Protocol):
    """Where one answer is in its grammar."""

    def fill(self, mask_RW: np.ndarray, row: int) -> None:
        """Set the bit of each token that may come next, and clear the others.

        Behind the end of the grammar all are set: what is sampled there is not used.
        """

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, where it may not come next."""

    def rollback(self, count: int) -> None:
        """Take back the last tokens that were accepted."""


class Grammar(Protocol):
    """What an answer may be."""

    def matcher(self) -> Matcher:
        """One at the begin of an answer."""


def fill_ahead(matcher: Matcher, mask_RW: np.ndarray, drafts: list[int]) -> None:
    """The mask of each query of a step: of the next token, and of those after its drafts.

    The matcher is left where it was. Behind a draft that may not come the masks stay as they are:
    that draft is not among the tokens that may be sampled, so what follows it is never used.
    """
    num_accepted = 0
    matcher.fill(mask_RW, 0)
    for row, draft in enumerate(drafts, start=1):
        # XGrammar writes to stderr of some tokens that it does not take: it is not asked.
        if not _has(mask_RW[row - 1], draft) or not matcher.accept(draft):
            break
        num_accepted += 1
        matcher.fill(mask_RW, row)
    if num_accepted:
        matcher.rollback(num_accepted)


def _has(mask_W: np.ndarray, token_id: int) -> bool:
    return bool(mask_W[token_id // MASK_WORD_BITS] >> (token_id % MASK_WORD_BITS) & 1)
