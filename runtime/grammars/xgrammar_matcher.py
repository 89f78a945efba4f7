"""Grammars by XGrammar (arXiv:2411.15100), an extra: nothing here imports it before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

ALL_TOKENS = -1  # a word with every bit


class XGrammarMatcher:
    """One answer in a grammar."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(compiled)

    def fill(self, mask_RW: np.ndarray, row: int) -> None:
        """Set the bit of each token that may come next."""
        if self._matcher.is_terminated():
            mask_RW[row] = ALL_TOKENS
        else:
            self._matcher.fill_next_token_bitmask(mask_RW, row)

    def accept(self, token_id: int) -> bool:
        """Go on by a token, if it may come next."""
        if self._matcher.is_terminated():
            return False
        return bool(self._matcher.accept_token(token_id))

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        self._matcher.rollback(count)


class XGrammar:
    """A compiled grammar, which any number of answers share."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled

    def matcher(self) -> XGrammarMatcher:
        """One at the begin of an answer."""
        return XGrammarMatcher(self._compiled)
