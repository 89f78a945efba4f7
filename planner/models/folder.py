"""Where the folder of a model is, and what the model is called after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_HUB_PREFIX = "models--"
_HUB_SNAPSHOTS = "snapshots"


def find_folder(path: str, near: Path | None) -> Path | None:
    """The folder of that path: from a folder above `near`, else from here; `~` is the user's."""
    roots: list[Path] = []
    if near is not None:
        roots += near.resolve().parents
    roots.append(Path())
    given = os.path.expanduser(path)
    for root in roots:
        if (root / given).is_dir():
            return root / given
    return None


def model_name(folder: Path) -> str:
    """The name of a model: its folder's.

    In Hugging Face's cache, `models--Org--Name/snapshots/REVISION`, it is `Org/Name`.
    """
    parts = folder.absolute().parts
    if ".." in parts or not folder.name:
        parts = folder.resolve().parts
    return _hub_name(parts) or parts[-1]


def _hub_name(parts: Sequence[str]) -> str:
    """The name in Hugging Face's hub; empty where the folder is not of its cache."""
    if len(parts) < 3 or parts[-2] != _HUB_SNAPSHOTS or not parts[-3].startswith(_HUB_PREFIX):
        return ""
    return parts[-3].removeprefix(_HUB_PREFIX).replace("--", "/")
