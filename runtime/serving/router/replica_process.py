"""What the fleet needs of a replica, wherever it runs; and replicas that are processes here."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

_LONGEST_LINE = 1 << 20  # that a replica prints, in bytes


class Life(Protocol):
    """A replica from its start to its end."""

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""

    def lines(self) -> AsyncIterator[str]:
        """What it says on stderr, until it ends."""

    async def wait(self) -> str:
        """Wait for its end; says how it has ended."""

    def terminate(self) -> None:
        """Tell it to end."""

    def kill(self) -> None:
        """End it now."""


Start = Callable[[int], Awaitable[Life]]  # of the replica with this number


def on_this_host(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Start:
    """Replicas that are processes of this host.

    Args:
        command: of each; it says on stderr where it listens.
        environments: what each has beside the variables of this process.
    """

    async def start(index: int) -> Life:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(os.environ) | dict(environments[index]),
            stdin=PIPE,
            stderr=PIPE,
            process_group=0,
            limit=_LONGEST_LINE,
        )
        return _ProcessLife(process)

    return start


class _ProcessLife:
    """A process with a group of its own."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def lines(self) -> AsyncIterator[str]:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            yield raw.decode(errors="replace").rstrip()

    async def wait(self) -> str:
        return how_ended(await self._process.wait())

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def how_ended(code: int) -> str:
    """The exit code of a process in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"has ended with code {code}"
