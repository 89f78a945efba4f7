"""The pool that computes prompts: it takes orders from decode pools, and hands their caches over.

One thread steps the engine and pushes; others wait for callers and read their messages. A caller
that leaves has no orders any more: what was computed for it stays in the prefix cache.
"""

from __future__ import annotations

import itertools
import queue
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tokenspeed_plan.plans.errors import PoolError, RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.pools.caller import Caller
from tokenspeed_plan.runtime.pools.channel import (
    Channel,
    ChannelClosed,
    Facts,
    Message,
    greet_caller,
    unpacked,
)
from tokenspeed_plan.runtime.pools.layer_launch import LayerLaunch
from tokenspeed_plan.runtime.pools.pool_ranks import PoolRanks, Ranks
from tokenspeed_plan.runtime.pools.prefill_jobs import Order, PrefillJob
from tokenspeed_plan.runtime.pools.reception import Reception
from tokenspeed_plan.runtime.pools.return_receiver import ReturnReceiver
from tokenspeed_plan.runtime.pools.transport import Transport
from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler
from tokenspeed_plan.runtime.step_loop import StepLoop

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine

BEAT_S = 0.5
_LOOK_S = 0.0002  # between two looks at what is under way, where nothing is computed
_ALIKE = "start both pools with one version and one bundle"
_PARAMS = SamplingParams(max_tokens=1, ignore_eos=True)

Event = Callable[[], None]


class PromptEngine(Protocol):
    """What computes prompts: an `Engine`, or what a simulation has in its place."""

    scheduler: Scheduler
    loop: StepLoop

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none."""

    def step(self) -> list[Completion]:
        """Launch a replay, and commit the one before it; returns the requests that finished."""


class PrefillServer:
    """Serves the prefill pool of a plan.

    Args:
        engine: of that pool.
        plan: with both pools.
        ranks: of that pool.
        token: that callers must know.

    Attributes:
        on_over: called with each order whose caller was told how it went.
    """

    def __init__(self, engine: PromptEngine, plan: Plan, ranks: Ranks, token: str) -> None:
        self._engine = engine
        self._ranks = ranks
        self._facts = Facts.of(plan, ranks.transport.name)
        self._token = token
        self._limits = plan.pool.limits
        self._num_peer_ranks = plan.pool.layout.num_ranks
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._callers: list[Caller] = []
        self._caller_numbers = itertools.count(1)
        self._jobs: dict[str, PrefillJob] = {}  # of all callers, by the names of their requests
        self._returns = ReturnReceiver(engine.scheduler, ranks, plan, ranks.transport.settle_s)
        self._stopped = False
        self._next_beat_s = time.monotonic()
        self.on_over: Callable[[PrefillJob], None] | None = None

    @property
    def num_callers(self) -> int:
        """Decode pools that are connected."""
        return len(self._callers)

    @property
    def num_orders(self) -> int:
        """Prompts that they wait for."""
        return len(self._jobs)

    @property
    def is_full(self) -> bool:
        """Whether it would refuse another order."""
        return self._ranks.is_full

    @property
    def stands_s(self) -> float:
        """For how long `serve` has not told its callers that it goes on."""
        return time.monotonic() - self._next_beat_s + BEAT_S

    def stop(self) -> None:
        """End `serve`; any thread, or a signal's handler, may call it."""
        self._stopped = True
        self._events.put(lambda: None)

    def serve(self, listener: socket.socket) -> None:
        """Take orders until `stop` is called; then none of its threads is left."""
        greet = partial(greet_caller, token=self._token, own=self._facts)
        reception = Reception(listener, greet, self._hear)
        reception.begin()
        while not self._stopped:
            self._take_events()
            self._turn()
            self._beat()
        for caller in list(self._callers):
            self._leave(caller)
        reception.close()

    def _take_events(self) -> None:
        """Handle what has come; wait for it where nothing is computed."""
        wait_s = BEAT_S
        if self._jobs or self._returns.is_busy:
            wait_s = _LOOK_S
        if self._engine.num_unfinished:
            wait_s = 0.0
        with suppress(queue.Empty):
            self._events.get(block=wait_s > 0, timeout=wait_s or None)()
            while True:
                self._events.get_nowait()()

    def _turn(self) -> None:
        """Compute a step, and tell what has left."""
        if self._engine.num_unfinished:
            self._step()
        for caller in list(self._callers):
            self._advance(caller)
        self._returns.advance()

    def _step(self) -> None:
        for done in self._engine.step():
            job = self._jobs[done.request_id]
            job.num_cached = done.num_cached_tokens
            if done.error:
                job.fail()

    def announce(self, part: Part) -> None:
        """Say what leaves with the step that is launched next: it does so with its last part."""
        if part == "head":
            return
        batch, moves = self._engine.loop.last_batch, []
        assert batch is not None, "it is chosen before it is launched"
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            job = self._jobs.get(sequence.request.request_id)
            if job is not None and not job.is_over:
                moves.append(job.next_move(sequence, count))
        found = [asdict(move) for move in moves if move is not None]
        if found:
            self._ranks.do({"do": "next", "moves": found})

    def _beat(self) -> None:
        """Tell the callers that this pool goes on."""
        now = time.monotonic()
        if now >= self._next_beat_s:
            self._next_beat_s = now + BEAT_S
            for caller in self._callers:
                caller.tell({"type": "beat"})

    def _hear(self, channel: Channel) -> None:
        """On a thread of its own: pass on what a caller says."""
        caller = Caller(next(self._caller_numbers), channel)
        self._events.put(partial(self._callers.append, caller))
        try:
            while True:
                self._events.put(partial(self._obey, caller, channel.receive()))
        except ChannelClosed as closed:
            self._events.put(partial(self._leave, caller, closed.ended))

    def _leave(self, caller: Caller, ended: bool = False) -> None:
        """Forget a caller, and close its connection once nothing is written to it any more.

        Args:
            caller: that is lost, or has to go.
            ended: whether it has closed its connection itself, or its process is gone.
        """
        if caller not in self._callers:
            return
        self._callers.remove(caller)
        self._ranks.do({"do": "close", "caller": caller.number})
        for job in list(caller.jobs.values()):
            self._end(caller, job)
        self._returns.leave(caller, ended)
        caller.channel.close()

    def _obey(self, caller: Caller, message: Message) -> None:
        """Do what a caller says; one that says what cannot be is left."""
        if caller not in self._callers:
            return  # what it said before it was left
        try:
            kind = message.get("type")
            if kind == "memory":
                self._open(caller, message["memory"])
            elif kind == "prefill":
                self._begin(caller, self._order(message))
            elif kind == "cancel":
                self._cancel(caller, int(message["id"]))
            elif kind in self._returns.kinds and caller.is_open:
                self._returns.obey(caller, message)
            else:
                raise PoolError(f"a caller says {kind!r:.40}", _ALIKE)
        except (PoolError, RequestError, KeyError, TypeError, ValueError) as error:
            reason = getattr(error, "message", repr(error))
            print(f"a caller was left: {reason:.200}", file=sys.stderr)
            caller.tell({"type": "error", "reason": reason[:200]})
            self._leave(caller)

    def _open(self, caller: Caller, memory: list[Message]) -> None:
        """Reach the memory of the ranks of a caller."""
        if len(memory) != self._num_peer_ranks or caller.is_open:
            raise PoolError(f"a caller opens {len(memory)} ranks", _ALIKE)
        self._ranks.do({"do": "open", "caller": caller.number, "memory": memory})
        caller.is_open = True
        if self._returns.kinds:
            caller.tell({"type": "memory", "memory": self._ranks.descriptions})

    def _order(self, message: Message) -> Order:
        """The order of a message.

        Raises:
            PoolError, KeyError, TypeError, ValueError: it cannot be served.
        """
        token_ids = unpacked(message["token_ids"])
        pages, slot = tuple(map(int, message["pages"])), int(message["slot"])
        order = Order(int(message["id"]), token_ids, int(message["first_page"]), pages, slot)
        limits = self._limits
        num_pages = -(-len(token_ids) // limits.page_size)
        are_there = all(0 <= page < limits.num_pages for page in pages)
        if self._ranks.state_bytes:
            are_there &= 0 < slot < limits.pad_state_slot
        if not are_there or order.first_page < 0 or order.first_page + len(pages) != num_pages:
            raise PoolError("an order has no place for its prompt", _ALIKE)
        return order

    def _begin(self, caller: Caller, order: Order) -> None:
        """Compute a prompt, or send at once what is known of it."""
        if not caller.is_open or order.number in caller.jobs:
            raise PoolError(f"the order {order.number} comes twice or too soon", _ALIKE)
        if self._ranks.is_full:
            raise PoolError(f"{len(self._jobs)} orders are not done", "start more prefill pools")
        name = f"{caller.number}/{order.number}"
        reservations, number = self._engine.scheduler.reservations, self._ranks.begin()
        clock = self._engine.scheduler.clock
        job = PrefillJob(order, number, caller.number, name, reservations, self._ranks, clock)
        caller.jobs[order.number] = self._jobs[name] = job
        hit = job.match()
        job.num_returned = hit.checkpoint.num_returned
        if job.may_send(hit):
            job.num_cached = hit.num_tokens
            job.send_all(hit)
        else:
            self._engine.add(Request(name, order.token_ids, _PARAMS))

    def _cancel(self, caller: Caller, number: int) -> None:
        """Stop writing for an order; the caller is told when that is so."""
        job = caller.jobs.get(number)
        if job is None:
            caller.tell({"type": "cancelled", "id": number})
            return
        job.cancel()
        self._engine.cancel(job.name)

    def _advance(self, caller: Caller) -> None:
        """Send what was computed for a caller, and tell what has arrived."""
        try:
            for job in list(caller.jobs.values()):
                self._look_at(job)
                digest = self._ranks.result(job.number)
                if job.is_over and digest is not None:
                    caller.tell(job.report(digest))
                    if self.on_over is not None:
                        self.on_over(job)
                    self._end(caller, job)
        except PoolError as error:
            print(f"a caller is lost: {error.message}", file=sys.stderr)
            self._leave(caller)

    def _look_at(self, job: PrefillJob) -> None:
        """Where the engine has ended a job's request, send what has not left yet."""
        if job.is_over or job.name in self._engine.loop.sequences:
            return
        if job.is_sent:
            job.note_computed()
        else:
            job.send_all(job.match())

    def _end(self, caller: Caller, job: PrefillJob) -> None:
        caller.jobs.pop(job.order.number, None)
        self._jobs.pop(job.name, None)
        self._engine.cancel(job.name)
        self._ranks.forget(job.number)
        job.release()
        self._engine.scheduler.unblock()


def make_prefill_server(
    engine: Engine, plan: Plan, transport: Transport, token: str
) -> PrefillServer:
    """The server of an engine of the prefill pool.

    Args:
        engine: of that pool.
        plan: with both pools.
        transport: by which caches are handed over.
        token: that callers must know.
    """
    executor = engine.executor
    ranks = PoolRanks(plan, executor.memory, transport)
    executor.launch = LayerLaunch(executor.launch, ranks.own)
    server = PrefillServer(engine, plan, ranks, token)
    executor.before_run = server.announce
    return server
