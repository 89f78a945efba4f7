"""How a published size may be called."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tokenspeed_plan.plans.errors import SpecError


def find_preset(name: str, presets: Sequence[str]) -> str:
    """The preset that a name means: in any case, with its owner, or short where that is enough.

    Raises:
        SpecError: it means none, or several.
    """
    key = name.rpartition("/")[2].lower()
    if key in presets:
        return key
    longer = [preset for preset in presets if preset.startswith(f"{key}-")]
    if len(longer) == 1:
        return longer[0]
    near = longer or difflib.get_close_matches(key, presets, 1)
    hint = f"presets: {', '.join(presets)}"
    if near:
        hint = f"did you mean `{near[0]}`? {hint}"
    raise SpecError(f"there is no preset `{name}`", hint)
