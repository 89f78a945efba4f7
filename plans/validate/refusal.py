"""The error of a plan that breaks a rule, and a rule for many subjects: names are unique."""

from __future__ import annotations

from collections.abc import Iterable

from tokenspeed_plan.plans.errors import PlanError

_HINT = "make the plan again with `tokenspeed plan SPEC -o DIR`"


def refuse(message: str) -> PlanError:
    """The error of a plan that breaks a rule."""
    return PlanError(f"invalid plan: {message}", _HINT)


def require_unique(what: str, names: Iterable[str]) -> None:
    """Each name must occur once.

    Raises:
        PlanError: one occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise refuse(f"two {what}s are called `{name}`")
        seen.add(name)
