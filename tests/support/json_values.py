"""Any JSON value, for tests that send nonsense."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ANY_INTEGER = st.integers()


def json_values(
    integers: st.SearchStrategy[int] = ANY_INTEGER, max_leaves: int = 6
) -> st.SearchStrategy[Any]:
    """Values of all kinds, nested up to `max_leaves` scalars; floats include NaN and infinity."""
    texts = st.text(max_size=6)

    def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3)

    scalars = st.none() | st.booleans() | integers | st.floats() | texts
    return st.recursive(scalars, nested, max_leaves=max_leaves)
