"""The one place where an error of any kind is caught: the error of one request is only its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tokenspeed_plan.plans.errors import (
    EngineStopped,
    RankError,
    RequestFailed,
    TokenspeedError,
)
from tokenspeed_plan.runtime.request_check import ascii_text
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

T = TypeVar("T")

DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)
# These are nobody's own: no request can be served after them.
SHARED_ERRORS = (*DEVICE_ERRORS, EngineStopped, RankError)
MAX_CHARS = 300


def alone(sequence: Sequence, work: Callable[[], T], otherwise: T) -> T:
    """Do work that concerns one sequence; what it raises becomes the sequence's `error`.

    It is for work on the host that changes nothing which sequences share: texts, stop strings,
    logprobs, callbacks.
    """
    try:
        return work()
    except SHARED_ERRORS:
        raise
    except Exception as error:  # whatever it is, the other sequences are to go on
        sequence.error = describe(error)
        return otherwise


def owned(work: Callable[[], T]) -> T:
    """The result of work on the answer to one request; whatever goes wrong is that one's error.

    Raises:
        RequestFailed: there is no result.
    """
    try:
        return work()
    except RequestFailed:
        raise
    except Exception as error:  # the loop and its other readers are to go on
        raise RequestFailed(describe(error), "the other requests are answered") from error


def describe(error: Exception) -> str:
    """An error in one line of ASCII."""
    if isinstance(error, TokenspeedError):
        return ascii_text(error.message)[:MAX_CHARS]
    return ascii_text(f"{type(error).__name__}: {error}")[:MAX_CHARS]
