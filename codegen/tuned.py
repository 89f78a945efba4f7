"""Tiles that were measured on a machine (`tools/tune.py`), by architecture and kernel.

They come before the tiles of the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TUNED = Path(__file__).parent / "tuned.yaml"


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile of a program.

    Attributes:
        m: rows.
        n: columns.
        k: depth of a product; splits a multiprocessor in decode attention.
        num_warps: warps of the program.
        num_stages: loads in flight at once.
        splits: programs that share the depth of a product on the tensor cores; of a grouped one
            whose rows stay in shared memory, that share its columns.
    """

    m: int
    n: int
    k: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1


@cache
def _table() -> dict[str, dict[str, list[int]]]:
    return yaml.safe_load(TUNED.read_text(encoding="utf-8")) or {}


def find_tile(sm: int, key: str) -> Tile | None:
    """The measured tile of a kernel on an architecture, or None.

    Args:
        sm: compute capability, 90 for an H200.
        key: `Work.key` of the kernel.
    """
    architecture = _table().get(f"sm_{sm}", {})
    if key not in architecture:
        return None
    return Tile(*architecture[key])
