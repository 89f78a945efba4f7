"""Steps that take no time but on a clock of their own.

The scheduler, the cache and the commits are the engine's. What a device would do is replaced by the
time that it is predicted to take: it begins a step when the host has prepared it and the step
before is over; the host waits for it where it reads what it computed.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.cache.slot_copies import Copying, SlotCopy
from tokenspeed_plan.runtime.execution.bound_programs import Part
from tokenspeed_plan.runtime.execution.launch import HostValues
from tokenspeed_plan.runtime.in_flight import InFlightBatch
from tokenspeed_plan.runtime.output import FIRST_TOKEN, host_outputs
from tokenspeed_plan.runtime.request_check import stop_ids_of
from tokenspeed_plan.runtime.scheduling.batch import Batch

NOTHING = torch.empty(0)


class StepTimes(Protocol):
    """What steps are predicted to take, in microseconds."""

    def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
        """A prefill step.

        Args:
            tokens: of all its sequences.
            seqs: how many share them.
            context: tokens that the sequence of a token had before, on average.
        """

    def decode_us(self, bucket: int, seqs: int, context: float) -> float:
        """A decode step.

        Args:
            bucket: of its program.
            seqs: that it computes for.
            context: tokens of each, on average.
        """

    def host_us(self, seqs: int, prompts: int) -> float:
        """The host before a step, which hides behind the step before.

        Args:
            seqs: of the step.
            prompts: that it begins.
        """


@dataclass(slots=True)
class VirtualClock:
    """The time of the host, and when the device has done all that was launched, in seconds.

    `busy_s` is what the device has worked so far.
    """

    now_s: float = 0.0
    free_s: float = 0.0
    busy_s: float = 0.0

    def __call__(self) -> float:
        """The time of the host."""
        return self.now_s

    def wait_until(self, time_s: float) -> None:
        """Let the time pass up to then, if it has not come."""
        self.now_s = max(self.now_s, time_s)

    def launch(self, host_us: float, step_us: float) -> None:
        """The host prepares a step, and the device computes it as soon as it can."""
        self.now_s += host_us * 1e-6
        self.free_s = max(self.free_s, self.now_s) + step_us * 1e-6
        self.busy_s += step_us * 1e-6


@dataclass(slots=True)
class StepRecord:
    """A step: its program, when the device began and ended it, and what it computed."""

    phase: str
    bucket: int
    seqs: int
    tokens: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ShortBatch(Batch):
    """A decode step of which only those sequences are listed that are awake.

    Attributes:
        num_asleep: so many others.
        known_asleep: tokens of all of these that are computed, or in flight, before it.
    """

    num_asleep: int = 0
    known_asleep: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all of its sequences."""
        return len(self.sequences) + self.num_asleep


@dataclass(slots=True)
class _VirtualBatch(InFlightBatch):
    """A step without logits, of which nothing can be wanted."""

    def take_look(self, indices: list[int]) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class _VirtualCopy:
    """A copy that is over at a moment of the clock."""

    is_load: bool
    number: int
    clock: VirtualClock
    end_s: float

    def is_done(self) -> bool:
        """Whether the host has come to that moment."""
        return self.clock.now_s >= self.end_s

    def wait(self) -> None:
        """Let the time pass up to then."""
        self.clock.wait_until(self.end_s)


class VirtualMover:
    """Copies between a plan's caches and its host, which take the bytes over the rate of the link.

    Those of one direction come one after the other, and begin when all that was launched is done.

    Args:
        plan: says what a page, a state and the link are.
        clock: of host and device.
    """

    def __init__(self, plan: Plan, clock: VirtualClock) -> None:
        self._spec = plan.pool.host_cache
        self._clock = clock
        self._free_s = [0.0, 0.0]
        self._num_started = 0

    def start_copy(self, copy: SlotCopy) -> Copying:
        """Let the clock know of a copy."""
        assert self._spec is not None, "a plan without a second tier copies nothing"
        size_bytes = len(copy.pages) * self._spec.page_bytes + self._spec.state_bytes
        begin_s = max(self._free_s[copy.is_load], self._clock.free_s, self._clock.now_s)
        end_s = begin_s + size_bytes / self._spec.bytes_per_s
        self._free_s[copy.is_load] = end_s
        self._num_started += 1
        return _VirtualCopy(copy.is_load, self._num_started, self._clock, end_s)

    def end_copy(self, copying: Copying) -> None:
        """Nothing: whoever needs a copy has waited for it."""


class VirtualLauncher:
    """Starts steps on a virtual clock; their tokens are all alike.

    Args:
        plan: of the programs.
        times: of its steps.
        clock: of host and device.
        acceptance: the chance of each draft, by place, that it is accepted if those before were;
            the last stands for the places after it.
        seed: of these chances.
    """

    def __init__(
        self,
        plan: Plan,
        times: StepTimes,
        clock: VirtualClock,
        acceptance: Seq[float] = (),
        seed: int = 0,
    ) -> None:
        self.steps: list[StepRecord] = []
        self._times = times
        self._clock = clock
        self._acceptance = acceptance or (0.0,)
        self._random = random.Random(seed)
        self._token = plain_token(plan)

    def start(self, batch: Batch, part: Part = "whole") -> float:
        """Let the clock know of a step."""
        clock, program = self._clock, batch.program
        seqs, tokens = _num_seqs(batch), batch.num_tokens
        step_us = self._step_us(batch, seqs)
        clock.launch(self._times.host_us(seqs, _num_new(batch)), step_us)
        begin_s = clock.free_s - step_us * 1e-6
        self.steps.append(
            StepRecord(program.phase, program.bucket, seqs, tokens, begin_s, clock.free_s)
        )
        return 0.0

    def repeat(self, batch: ShortBatch, most: float, until_s: float, is_ahead: bool) -> int:
        """Start a decode step and others after it, in which each sequence gets one more token.

        Each is read, where steps are launched ahead once the next one is started.

        Args:
            batch: the first one, in which all sleep.
            most: steps.
            until_s: no other one is started when the clock has come so far.
            is_ahead: whether a step is in flight now.

        Returns:
            How many steps were started.
        """
        clock, times, seqs = self._clock, self._times, batch.num_asleep
        bucket, known, count = batch.program.bucket, batch.known_asleep, 0
        host_us = times.host_us(seqs, 0)
        while count < most and (not count or clock.now_s < until_s):
            read_s = clock.free_s  # the end of the step before
            step_us = times.decode_us(bucket, seqs, (known + count * seqs) / seqs + 1)
            clock.launch(host_us, step_us)
            begin_s, end_s = clock.free_s - step_us * 1e-6, clock.free_s
            self.steps.append(StepRecord("decode", bucket, seqs, seqs, begin_s, end_s))
            clock.wait_until(read_s if is_ahead else end_s)
            count += 1
        return count

    def _step_us(self, batch: Batch, seqs: int) -> float:
        before = [sequence.num_computed + sequence.num_ahead for sequence in batch.sequences]
        if batch.program.phase == "prefill":
            tokens = batch.num_tokens  # each of which attends to what its own sequence has
            pairs = sum(map(operator.mul, batch.counts, before))
            return self._times.prefill_us(tokens, seqs, pairs / tokens)
        known = sum(before)
        if isinstance(batch, ShortBatch):
            known += batch.known_asleep
        return self._times.decode_us(batch.program.bucket, seqs, known / seqs + 1)

    def in_flight(self, batch: Batch, part: Part = "whole") -> InFlightBatch:
        """The step that was started last; reading its outputs waits for its end."""
        end_s, values = self._clock.free_s, self._values(batch.program, _num_seqs(batch))

        def outputs() -> tuple[list[int], ...]:
            self._clock.wait_until(end_s)
            return values

        read: HostValues = outputs
        return _VirtualBatch(batch, read, NOTHING, NOTHING)

    def finish(self, in_flight: InFlightBatch) -> float:
        """Nothing: no request of a simulation has to be read before its next step."""
        return 0.0

    def _values(self, program: Program, seqs: int) -> tuple[list[int], ...]:
        """What the host reads of a step."""
        if not program.depth:
            return ([self._token] * seqs,)
        values = {
            program.tokens: [self._token] * (seqs * program.query_len),
            program.drafts: [self._token] * (seqs * (program.depth + 1)),
        }
        if program.query_len > 1:
            values["accepted"] = [self._num_accepted(program.query_len - 1) for _ in range(seqs)]
        return tuple(values[name] for name in host_outputs(program))

    def _num_accepted(self, drafts: int) -> int:
        """Drafts before the first that is refused."""
        last = len(self._acceptance) - 1
        for place in range(drafts):
            if self._random.random() >= self._acceptance[min(place, last)]:
                return place
        return drafts


def short_digests(parent: bytes, token_ids: Seq[int], page_size: int) -> list[bytes]:
    """Names of whole pages that come after one of that name, in a third of the time of digests.

    They are 8 bytes of Python's own hashes. Where two are equal by chance, the cache compares the
    tokens, as it does with digests.
    """
    found, words = [], tuple(token_ids)
    for start in range(0, len(words), page_size):
        name = hash((parent, words[start : start + page_size]))
        parent = name.to_bytes(8, "little", signed=True)
        found.append(parent)
    return found


def _num_seqs(batch: Batch) -> int:
    """Sequences of a step, those that sleep included."""
    listed = len(batch.sequences)
    return listed + batch.num_asleep if isinstance(batch, ShortBatch) else listed


def _num_new(batch: Batch) -> int:
    """Prompts that a step begins."""
    if batch.program.phase == "decode":
        return 0
    return sum(each.num_computed == (each.num_cached_tokens or 0) for each in batch.sequences)


def plain_token(plan: Plan) -> int:
    """The least token that ends nothing, and that NaN does not give."""
    special = {FIRST_TOKEN, *stop_ids_of(plan)}
    return next(token for token in range(plan.model.vocab_size) if token not in special)
