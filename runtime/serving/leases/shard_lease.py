"""Leases: who works at a unit of a job, judged by whether its heartbeat changes.

A unit is a shard, the index or the merge. Its lease is a file `leases/UNIT.GENERATION`, made for
one worker alone. The worker writes a number into it that grows. Whoever has seen the same content
for `timeout_s` of its own clock makes the file of the next generation. No clock is compared with
that of another machine, and no file of a generation is written by two workers. What a unit comes to
is decided once: by who makes `done/UNIT.json`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from tokenspeed_plan.plans.errors import RequestError, TokenspeedError
from tokenspeed_plan.runtime.serving.leases.job_store import Store

LEASES, DONE = "leases", "done"
BEATS_PER_TIMEOUT = 5
STALL_S = 600.0  # a worker that has not moved for so long lets its lease lapse
MAX_WATCHED = 16  # leases of others that an idle worker looks at
MAX_GENERATIONS = 200  # a unit that so many workers have not finished is given up


class LeaseLost(TokenspeedError):
    """Another worker has taken over, or has finished, what this one worked at."""

    exit_code = 1

    def __init__(self, unit: str) -> None:
        super().__init__(f"the lease of {unit} was taken over", "nothing: its new worker goes on")


class _Seen(NamedTuple):
    """What a lease held, and since when (own clock)."""

    generation: int
    content: bytes
    since_s: float


def done_name(unit: str) -> str:
    """The file that says what a unit has come to."""
    return f"{DONE}/{unit}.json"


def newest_leases(store: Store) -> dict[str, int]:
    """The newest generation of each unit that has been leased."""
    newest: dict[str, int] = {}
    for name in store.names(LEASES):
        unit, _, generation = name.rpartition(".")
        if generation.isdecimal():
            newest[unit] = max(newest.get(unit, 0), int(generation))
    return newest


def finished_units(store: Store) -> set[str]:
    """The units that are done."""
    return {name.removesuffix(".json") for name in store.names(DONE)}


@dataclass(eq=False)
class Lease:
    """A unit that this worker has, while its heartbeat runs.

    Attributes:
        before_beat: called by the heartbeat's thread; it saves what has been done.
    """

    store: Store
    unit: str
    generation: int
    owner: str
    timeout_s: float
    before_beat: Callable[[], None] | None = None
    _lost: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _moved_s: float = field(default_factory=time.monotonic)
    _num_beats: int = 0

    @property
    def name(self) -> str:
        """Its file."""
        return f"{LEASES}/{self.unit}.{self.generation}"

    def begin(self) -> None:
        """Start the heartbeat."""
        self._thread = threading.Thread(target=self._beat, name=self.name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Note that the work moves.

        Raises:
            LeaseLost: it is another worker's by now.
        """
        self._moved_s = time.monotonic()
        if self._lost.is_set():
            raise LeaseLost(self.unit)

    def commit(self, result: dict[str, object]) -> bool:
        """Say what the unit has come to; False where another worker was first."""
        text = json.dumps(result | {"generation": self.generation}, allow_nan=False)
        return self.store.create(done_name(self.unit), text.encode())

    @property
    def is_done(self) -> bool:
        """Whether the unit has come to something, by whomever."""
        return self.store.read(done_name(self.unit)) is not None

    def end(self, release: bool = False) -> None:
        """Stop the heartbeat; `release`: others need not wait until it is missed."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if release and not self._lost.is_set():
            self.store.replace(self.name, content(self.owner, "released"))

    def _beat(self) -> None:
        """Write beats; where that has failed for the timeout, somebody else may have the unit."""
        written_s = time.monotonic()
        while not self._ended.wait(self.timeout_s / BEATS_PER_TIMEOUT):
            try:
                if self._is_taken():
                    break
                if time.monotonic() - self._moved_s < STALL_S:
                    self.write_beat()
                written_s = time.monotonic()
            except OSError:
                if time.monotonic() - written_s > self.timeout_s:
                    break
        else:
            return
        self._lost.set()

    def write_beat(self) -> None:
        """Write the next beat, and save what has been done."""
        self._num_beats += 1
        self.store.replace(self.name, content(self.owner, self._num_beats))
        if self.before_beat is not None:
            self.before_beat()

    def _is_taken(self) -> bool:
        following = f"{LEASES}/{self.unit}.{self.generation + 1}"
        return self.store.read(following) is not None or self.is_done


@contextmanager
def holding(lease: Lease, say: Callable[[str], None]) -> Iterator[None]:
    """End a lease with its work; what is not done is given back. `say` hears that it was lost."""
    try:
        yield
    except LeaseLost as error:
        say(error.message)
    except (RequestError, FileNotFoundError):
        if not lease.is_done:  # else its new worker has deleted our files
            raise
    finally:
        lease.end(release=not lease.is_done)


def content(owner: str, beat: int | str) -> bytes:
    """What the file of a lease holds."""
    return json.dumps({"beat": beat, "owner": owner}, allow_nan=False).encode()


class Leases:
    """Takes leases for one worker.

    Args:
        store: of the job.
        owner: unique name of the worker.
        timeout_s: for how long a heartbeat may be missed.
        clock: seconds of this process, from any begin.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.owner = owner
        self.timeout_s = timeout_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def take(
        self, units: Sequence[str], leave_last: int = 0, held: Container[str] = ()
    ) -> Lease | None:
        """A lease of a unit that nobody has, or whose worker was silent for the timeout.

        Args:
            units: all that there are.
            leave_last: as many that nobody has are left to others, while one of these is alive.
            held: units that this worker has.

        Raises:
            RequestError: a unit was tried too often.
        """
        newest = newest_leases(self.store)
        finished = finished_units(self.store)
        ordered = self._own_order(units)
        left = [unit for unit in ordered if unit not in finished and unit not in held]
        fresh = [unit for unit in left if unit not in newest]
        if len(fresh) > leave_last:
            lease = self._make_first(fresh, newest)
            if lease is not None:
                return lease
            fresh = []
        begun = [unit for unit in left if unit in newest][:MAX_WATCHED]
        silent = [unit for unit in begun if self._is_silent(unit, newest[unit])]
        if len(silent) == len(begun):  # those to whom the last were left are gone
            silent += fresh
        return self._make_first(silent, newest)

    def _make_first(self, units: Sequence[str], newest: Mapping[str, int]) -> Lease | None:
        """A lease of the first unit that nobody else takes meanwhile."""
        made = (self._make(unit, newest.get(unit, 0) + 1) for unit in units)
        return next((lease for lease in made if lease is not None), None)

    def _make(self, unit: str, generation: int) -> Lease | None:
        if generation > MAX_GENERATIONS:
            raise RequestError(
                f"{unit} was begun {MAX_GENERATIONS} times and never finished",
                "run its rows alone to see why, then delete its files in `leases`",
            )
        lease = Lease(self.store, unit, generation, self.owner, self.timeout_s)
        if not self.store.create(lease.name, content(self.owner, 0)):
            return None
        lease.begin()
        return lease

    def _is_silent(self, unit: str, generation: int) -> bool:
        """Whether a lease was given back, or has held the same content for the timeout."""
        held = self.store.read(f"{LEASES}/{unit}.{generation}")
        if held is None:
            return False
        now_s = self._clock()
        seen = self._seen.get(unit)
        if seen is None or (seen.generation, seen.content) != (generation, held):
            self._seen[unit] = seen = _Seen(generation, held, now_s)
        is_released = json.loads(held).get("beat") == "released"
        return is_released or now_s - seen.since_s >= self.timeout_s

    def _own_order(self, units: Sequence[str]) -> Sequence[str]:
        """The units from one on that differs from worker to worker, so that few want the same."""
        if not units:
            return units
        digest = blake2b(self.owner.encode(), digest_size=8).digest()
        first = int.from_bytes(digest) % len(units)
        return [*units[first:], *units[:first]]
