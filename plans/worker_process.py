"""A process that answers lines of JSON, for work that may take a process down."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

Json = dict[str, Any]


class WorkerFault(Exception):
    """There is no reply.

    Attributes:
        code: with which the process has ended; None where it goes on.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class WorkerProcess:
    """A process of Python; where it ends, its owner starts another one.

    Requests and replies are lines of JSON; a reply that has an `error` is a fault. One thread asks
    at a time.

    Args:
        command: what Python runs.
        first: the first request.

    Raises:
        WorkerFault: the first request has no reply.
    """

    def __init__(self, command: Sequence[str], first: Json) -> None:
        # `-P`: no module in the current folder is taken for a library. A session of its own: Ctrl-C
        # is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)
        self.ask(first)

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._end.alive

    def ask(self, request: Json) -> Json:
        """Send a request and wait for its reply.

        Raises:
            WorkerFault: it has none.
        """
        try:
            line = json.dumps(request, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise WorkerFault(str(error)) from error
        data = b""
        try:
            data = _exchange(self._process, line)
        finally:
            if not data:  # also where interrupted: the next request must not get this one's reply
                self._end()
        if not data:
            raise WorkerFault("its process has ended", self._process.returncode)
        reply: Json = json.loads(data)
        if "error" in reply:
            raise WorkerFault(reply["error"])
        return reply


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The reply to a line; empty if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(line + b"\n")
        process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        process.wait()
    return reply


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and close the pipes to it."""
    process.kill()
    with suppress(BrokenPipeError):
        process.communicate()
