"""Starts the ranks of a plan on this host: rank 0 is this process, the others run the same command.

The others have no terminal and no signals from it. What they print is shown only where one of them
is lost. They end with this process, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from tokenspeed_plan.plans.errors import RankError

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.execution.rank_loss import RankLoss

_LOOPBACK = "127.0.0.1"
_LOOK_S = 0.05
_END_S = 10.0  # in which a rank that was told to stop ends by itself
_FAILED_S = 2.0  # the same, where rank 0 has failed
_SHOWN_BYTES = 1 << 16  # of what a rank printed
_COMMAND = "from tokenspeed_plan.planner.cli import main; main()"
# Variables that say which rank a process is begin so.
_PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_")
_PARENT = "TOKENSPEED_PARENT"  # the process that started this rank
_STDERR = "TOKENSPEED_STDERR"  # the number of its standard error here
_WITNESS = "TOKENSPEED_WITNESS"  # the number of the pipe to the witness here
# Prints its argument when nobody holds the pipe any more, unless somebody has written a line to it.
_WATCH_PIPE = 'read -r said || printf "%s\\n" "$1" >&2'
_SAID = b"said\n"
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


@dataclass(slots=True)
class _Process:
    """A rank that was started, and the file with what it prints."""

    rank: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    is_lost: bool = False

    @property
    def fault(self) -> str:
        """Why it is lost; empty while it runs or where it ended well."""
        code = self.process.poll()
        name = f"rank {self.rank} (process {self.process.pid})"
        if not code:
            return ""
        if code < 0:
            return f"{name} was killed by {signal.Signals(-code).name}"
        return f"{name} has ended with code {code}{self._last_error()}"

    def _last_error(self) -> str:
        """The error that it printed, in one line."""
        for line in self.printed().splitlines():
            if line.startswith("error: "):
                return f": {line.removeprefix('error: ')}"
        return ""

    def printed(self) -> str:
        """The end of what it printed."""
        self.output.seek(0, os.SEEK_END)
        self.output.seek(max(self.output.tell() - _SHOWN_BYTES, 0))
        return self.output.read().decode(errors="replace")


@contextmanager
def started_ranks(count: int, args: Sequence[str]) -> Iterator[None]:
    """Start the ranks 1 to `count` - 1, and end them.

    In the body this process is rank 0. The ranks get SIGKILL where they do not end by themselves.

    Args:
        count: number of ranks.
        args: of the command that every rank runs.
    """
    from tokenspeed_plan.runtime.execution.rank_loss import LOSS

    listener = socket.create_server((_LOOPBACK, 0))
    witness = _Witness()
    port = listener.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port)}
    ranks: list[_Process] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(ranks, LOSS, done), name="ranks", daemon=True)
    LOSS.begin()

    def end_all() -> None:
        witness.dismiss()
        _end(ranks, 0.0, show=True)

    LOSS.before_end = end_all
    own = place | {"RANK": "0", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in own}
    patience_s, show = 0.0, False
    suspend = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a rank that stands still is lost
    try:
        for rank in range(1, count):
            ranks.append(_start(rank, place, args, witness))
        os.environ |= own
        watch.start()
        # The others load PyTorch meanwhile.
        from tokenspeed_plan.runtime.execution.rank_place import meet_at

        meet_at(listener)
        yield
        patience_s = _END_S
    except RankError:
        show = True
        raise
    except BaseException:
        from tokenspeed_plan.runtime.execution.rank_links import joined

        if joined().orders is not None:  # else they do not know that they have to end
            patience_s = _FAILED_S
        raise
    finally:
        done.set()
        from tokenspeed_plan.runtime.execution.rank_links import leave

        leave()
        listener.close()
        witness.dismiss()
        _end(ranks, patience_s, show)
        _restore(before)
        signal.signal(signal.SIGTSTP, suspend)


class _Witness:
    """A process that says so where rank 0 is killed, which can say nothing itself.

    It is a shell that waits for the end of a pipe, which rank 0 and the ranks that it has started
    hold open.
    """

    def __init__(self) -> None:
        from tokenspeed_plan.runtime.execution.rank_loss import HINT

        error = RankError(f"rank 0 (process {os.getpid()}) was killed, or has crashed", HINT)
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH_PIPE, "witness", str(error)],
            stdin=subprocess.PIPE,
            env={},
            process_group=0,
        )

    @property
    def pipe(self) -> int:
        """The descriptor that is held open."""
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def dismiss(self) -> None:
        """Rank 0 ends by itself: there is nothing to say."""
        with suppress(OSError, ValueError):
            os.write(self.pipe, _SAID)
        self._process.communicate()


def _start(rank: int, place: dict[str, str], args: Sequence[str], witness: _Witness) -> _Process:
    """Start one rank, in a process group of its own, so that Ctrl-C does not reach it."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the process
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _WITNESS: str(witness.pipe)}
    with parent_variables() as (variables, stderr):
        process = subprocess.Popen(
            own_command(args),
            env=os.environ | place | own | variables,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[stderr, witness.pipe],
            process_group=0,
        )
    return _Process(rank, process, output)


@contextmanager
def parent_variables() -> Iterator[tuple[dict[str, str], int]]:
    """What a process that this one starts needs to end with it; see `end_with_parent`.

    Yields:
        Variables, and the number of a copy of standard error that it has to get.
    """
    stderr = os.dup(2)
    try:
        yield {_PARENT: str(os.getpid()), _STDERR: str(stderr)}, stderr
    finally:
        os.close(stderr)


def _watch(ranks: Sequence[_Process], loss: RankLoss, done: threading.Event) -> None:
    """Note the first rank that ends as it should not."""
    while not done.wait(_LOOK_S):
        for rank in ranks:
            fault = rank.fault
            if fault:
                rank.is_lost = True
                loss.note(fault)
                return


def _end(ranks: Sequence[_Process], patience_s: float, show: bool) -> None:
    """Wait for all ranks, and kill those that go on; `show`: say what a lost one has printed."""
    until = time.monotonic() + patience_s
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(until - time.monotonic(), 0.0))
    for rank in ranks:
        if rank.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()
        if rank.is_lost and show:
            for line in rank.printed().splitlines():
                print(f"[rank {rank.rank}] {line}", file=sys.stderr)
        if rank.process.stdin:
            rank.process.stdin.close()


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def own_command(args: Sequence[str]) -> list[str]:
    """What starts a process that runs a command of ours."""
    return [sys.executable, "-P", "-c", _COMMAND, *args]


def environment_alone() -> dict[str, str]:
    """The environment without a place among ranks: that of a process that starts its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_PLACES)}


def child_environment() -> dict[str, str]:
    """What a process has that ends with this one; it gets a pipe as its standard input."""
    return {_PARENT: str(os.getpid()), _STDERR: "2"}


def end_with_parent() -> None:
    """In a rank that another process started: end when that one does, even while frozen."""
    if _PARENT not in os.environ:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[_PARENT]):
        os._exit(1)
    threading.Thread(target=_end_with_pipe, name="parent", daemon=True).start()
    from tokenspeed_plan.runtime.execution.rank_loss import LOSS

    LOSS.on_loss = _end_frozen_parent


def _end_frozen_parent(error: RankError) -> None:
    """Where rank 0 is frozen, it cannot say so itself, and would keep its memory."""
    from tokenspeed_plan.runtime.execution.heartbeat import FROZEN_STATES, process_state

    parent = int(os.environ[_PARENT])
    if process_state(parent) in FROZEN_STATES:
        os.write(int(os.environ[_STDERR]), f"{error}\n".encode())
        if _WITNESS in os.environ:
            os.write(int(os.environ[_WITNESS]), _SAID)
        os.kill(parent, signal.SIGKILL)


def _end_with_pipe() -> None:
    """Nothing is ever written to standard input; its end is the end of whoever holds it open."""
    while os.read(0, 1):
        pass
    os._exit(1)
