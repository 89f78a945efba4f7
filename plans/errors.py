"""Errors that a user can act on: what is wrong, and one hint."""

from __future__ import annotations

from tokenspeed_plan.plans.text import printable


class TokenspeedError(Exception):
    """Something the user asked for cannot be done.

    What it quotes is escaped here, so that no terminal obeys it and every response can hold it.

    Attributes:
        message: what is wrong, with the two values that disagree; one line, no full stop.
        hint: what to do about it, one line; a command where there is one.
        exit_code: 2 where the request was refused, 1 where it was carried out and something
            differs.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        self.message = printable(message)
        self.hint = printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"error: {self.message}\n\nhint: {self.hint}"


class SpecError(TokenspeedError):
    """The YAML spec, or the model that it names, cannot be planned."""


class PlanError(TokenspeedError):
    """A plan is malformed, corrupted, or does not fit this machine or these weights."""


class CheckpointError(SpecError, PlanError):
    """A model's folder is damaged: it can be neither planned nor loaded."""


class StalePlanError(TokenspeedError):
    """A frozen plan is not what its spec compiles to."""

    exit_code = 1


class CanaryError(TokenspeedError):
    """A plan replays, but not to the golden tokens that it carries."""


class RankError(TokenspeedError):
    """A process of a sharded plan has ended while another one still needed it."""

    exit_code = 1


class PoolError(TokenspeedError):
    """Two pools of a plan do not reach or do not know each other."""


class EngineStopped(TokenspeedError):
    """The engine has failed or was closed; it takes no requests, and those that it had are lost."""

    exit_code = 1


class RequestError(TokenspeedError):
    """A prompt or a batch file asks for what the plan cannot serve."""


class RequestFailed(TokenspeedError):
    """One request could not be answered; the others go on."""

    exit_code = 1
