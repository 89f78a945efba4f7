"""The prefill pool's side of answers that come back, so that the next turn finds them here.

A decode pool offers the tokens of an answer with its prompt. Where that saves enough, and there is
room, memory is taken for what this cache lacks, and the decode pool writes it. What was written is
compared with what it says, and entered into the cache; half an answer is used by nobody. Memory
that somebody may still write is kept, as that of hand-overs is, and what the cache had before is
not pinned for longer than `_LEASE_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed_plan.plans.errors import PoolError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.pools.caller import Caller
from tokenspeed_plan.runtime.pools.channel import Message, unpacked
from tokenspeed_plan.runtime.pools.lost_memory import LostMemory, settle_s
from tokenspeed_plan.runtime.pools.pool_ranks import Event, Ranks
from tokenspeed_plan.runtime.request import Request, SamplingParams
from tokenspeed_plan.runtime.scheduling.reservations import Reservation
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

_LEASE_S = 5.0  # a decode pool that needs longer is frozen
_KINDS = frozenset({"return", "returned", "dropped"})
_PARAMS = SamplingParams(max_tokens=1, ignore_eos=True)


@dataclass(slots=True, eq=False)
class _Coming:
    """An answer on its way here.

    Attributes:
        caller: the decode pool.
        number: of the answer among its own.
        sequence: has its tokens.
        reservation: what is written.
        num_had: tokens of it that could be gone on from before.
        until_s: for how long what the cache had is kept for it.
        after: the steps before are over, which may still write its pages.
        is_told: whether the caller knows its place.
        digest: what the caller says that it has written; empty before.
        job: the number of its sample.
    """

    caller: Caller
    number: int
    sequence: Sequence
    reservation: Reservation
    num_had: int
    until_s: float
    after: Event | None
    is_told: bool = False
    digest: str = ""
    job: int = 0

    @property
    def name(self) -> str:
        """Of what is reserved for it."""
        return self.sequence.request.request_id


class ReturnReceiver:
    """Answers that come back to a prefill pool.

    Args:
        scheduler: of that pool.
        ranks: of that pool.
        plan: with both pools.
        transport_s: for how long bytes of a process that has ended may still come.

    Attributes:
        lost: memory that lost callers may still write.
    """

    def __init__(self, scheduler: Scheduler, ranks: Ranks, plan: Plan, transport_s: float) -> None:
        late_s = settle_s(transport_s, plan.pools[0].layout.num_ranks)
        self.lost = LostMemory(scheduler, late_s)
        self._scheduler = scheduler
        self._reservations = scheduler.reservations
        self._ranks = ranks
        self._planned = plan.pools[1].answer_returns
        self._coming: dict[tuple[int, int], _Coming] = {}
        self._abandoned: dict[tuple[int, int], Reservation] = {}

    @property
    def kinds(self) -> frozenset[str]:
        """The messages that it obeys; none where the plan has no answers come back."""
        return frozenset() if self._planned is None else _KINDS

    @property
    def is_busy(self) -> bool:
        """Whether something is looked after that no message tells of."""
        return any(each.job or not each.is_told for each in self._coming.values())

    def obey(self, caller: Caller, message: Message) -> None:
        """Do what a caller says of an answer.

        Raises:
            PoolError, KeyError, TypeError, ValueError: it says what cannot be.
        """
        number = int(message["id"])
        key = caller.number, number
        if message["type"] == "return":
            self._take(caller, number, unpacked(message["token_ids"]))
        elif key in self._abandoned:  # too late, but nobody writes it any more
            self.lost.settle(self._abandoned.pop(key))
        elif key not in self._coming or self._coming[key].job:
            raise PoolError(f"the answer {number} is not expected", "start both pools alike")
        elif message["type"] == "returned":
            self._read(self._coming[key], str(message["digest"]))
        else:
            self._drop(self._coming.pop(key))

    def _take(self, caller: Caller, number: int, token_ids: tuple[int, ...]) -> None:
        """Reserve memory for what is lacking of an answer, if that is worth it."""
        limits, key = self._scheduler.limits, (caller.number, number)
        if key in self._coming or key in self._abandoned:
            raise PoolError(f"the answer {number} comes twice", "start both pools alike")
        if not 0 < len(token_ids) <= limits.max_seq_len:
            raise PoolError(f"an answer of {len(token_ids)} tokens", "start both pools alike")
        request = Request(f"answer {caller.number}/{number}", token_ids, _PARAMS)
        sequence, cache = Sequence(request, 0.0, list(token_ids)), self._scheduler.cache
        cache.extend(sequence.digests, token_ids, len(token_ids))
        num_had = cache.match(sequence.digests, token_ids, len(token_ids)).num_tokens
        reservation = None
        if self._is_wanted(len(token_ids) - num_had):
            running = self._scheduler.running
            reservation = self._reservations.reserve(sequence, running, len(token_ids))
        if reservation is None:
            is_known = num_had == len(token_ids)
            caller.tell({"type": "no_room", "id": number, "is_known": is_known})
            return
        until_s, after = self._scheduler.clock() + _LEASE_S, self._ranks.launched()
        coming = _Coming(caller, number, sequence, reservation, num_had, until_s, after)
        self._coming[key] = coming
        self._tell(coming)

    def _is_wanted(self, saved_tokens: int) -> bool:
        """Whether an answer may come: prompts that wait for memory come first."""
        planned = self._planned
        assert planned is not None, "others are not offered"
        num_held = len(self._coming) + len(self._reservations.abandoned)
        if num_held >= planned.slots or self._ranks.is_full or self._scheduler.is_blocked:
            return False
        return saved_tokens >= planned.least_tokens

    def _tell(self, coming: _Coming) -> None:
        """Say where it goes, once no step that was launched before may write there."""
        if coming.is_told or (coming.after is not None and not coming.after.query()):
            return
        coming.is_told = True
        reservation = coming.reservation
        coming.caller.tell(
            {
                "type": "room",
                "id": coming.number,
                "first_page": reservation.num_known,
                "pages": reservation.new_pages,
                "slot": reservation.state_slot,
            }
        )

    def _read(self, coming: _Coming, digest: str) -> None:
        """Read some of what was written."""
        coming.digest, coming.job = digest, self._ranks.begin()
        order = {"do": "sample", "job": coming.job, "pages": coming.reservation.new_pages}
        self._ranks.do(order | {"state_slot": coming.reservation.state_slot})

    def advance(self) -> None:
        """Use what was read, if it is right; give back what it is time for."""
        now = self._scheduler.clock()
        for key, coming in list(self._coming.items()):
            self._tell(coming)
            if coming.job:
                self._use(key, coming)
            elif coming.until_s < now:
                del self._coming[key]
                self.lost.keep(coming.name, key, self._abandoned)
        self.lost.settle_late()

    def _use(self, key: tuple[int, int], coming: _Coming) -> None:
        """Enter what was read into the cache, if it is what was said."""
        digest = self._ranks.result(coming.job)
        if digest is None:
            return
        del self._coming[key]
        self._ranks.forget(coming.job)
        is_right = digest == coming.digest
        if is_right:
            checkpoint = self._reservations.fulfil(coming.sequence)
            checkpoint.num_returned = len(coming.sequence.token_ids) - coming.num_had
        self._drop(coming)
        coming.caller.tell({"type": "kept", "id": coming.number, "is_right": is_right})

    def _drop(self, coming: _Coming) -> None:
        """Give back what is reserved for an answer; the cache keeps what it has of it."""
        self._reservations.drop(coming.name)
        self._scheduler.unblock()

    def leave(self, caller: Caller, ended: bool) -> None:
        """A caller is lost; `ended`: it writes no more, but for what is on its way."""
        for key, coming in list(self._coming.items()):
            if coming.caller is caller:
                del self._coming[key]
                if coming.job:
                    self._ranks.forget(coming.job)
                self.lost.keep(coming.name, key, self._abandoned)
        keys = [key for key in self._abandoned if key[0] == caller.number]
        self.lost.end([self._abandoned.pop(key) for key in keys], ended)
