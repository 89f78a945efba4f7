"""Changes to the data of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The data with other sections; of two mappings the keys are merged, one level deep."""
    result = dict(data)
    for key, value in changes.items():
        if isinstance(result.get(key), dict) and isinstance(value, dict):
            value = result[key] | value
        result[key] = value
    return result
