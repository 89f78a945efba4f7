"""The ledger of a compilation: every decision, written down where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed_plan.plans.schema import Decision, Option

AS_STATED = "as the spec says"  # the reason of a decision that the spec makes


@dataclass
class Ledger:
    """Decisions in the order in which they are made; the plan lists them in the same order."""

    _decisions: list[Decision] = field(default_factory=list)

    def record(
        self,
        name: str,
        value: str,
        reason: str,
        runner_up: str | None = None,
        options: tuple[Option, ...] = (),
    ) -> None:
        """Write down one decision.

        Args:
            name: what was decided.
            value: what was chosen.
            reason: why.
            runner_up: what came second.
            options: the other choices that were looked at.
        """
        decision = Decision(
            name=name, value=value, reason=reason, runner_up=runner_up, options=options
        )
        self._decisions.append(decision)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was recorded so far."""
        return tuple(self._decisions)
