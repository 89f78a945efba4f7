"""Tiles that were measured on a machine (`tools/tune.py`), by architecture and kernel; the rules come after them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TUNED = Path(__file__).parent / "tuned.yaml"


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a program's tile, its warps, and how many loads run ahead."""

    m: int
    n: int
    k: int
    num_warps: int = 4
    num_stages: int = 3


@cache
def _table() -> dict[str, dict[str, list[int]]]:
    return yaml.safe_load(TUNED.read_text()) or {}


def find_tile(sm: int, key: str) -> Tile | None:
    """The measured tile of a kernel on an architecture."""
    found = _table().get(f"sm_{sm}", {}).get(key)
    return Tile(*found) if found else None
