"""Replay programs on a random batch: microseconds, bytes, share of the floor, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.schema import BatchSize, Call, LibraryCall, Limits, Plan, Program, Work
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.runtime.bench.clock import LIBRARY, RUNS, captured, kernel_times_us, time_us
from tokenspeed_plan.runtime.bench.machine import Machine, measure_machine, used_bytes
from tokenspeed_plan.runtime.execution.backend import KernelBackend
from tokenspeed_plan.runtime.execution.executor import Executor
from tokenspeed_plan.runtime.execution.inputs import write_inputs
from tokenspeed_plan.runtime.request import Request, SamplingParams
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Options:
    """What to replay.

    Attributes:
        batch: sequences that decode.
        context: tokens that each of them has.
        chunk: tokens of one prompt to prefill; 0 for no prefill.
    """

    batch: int
    context: int
    chunk: int = 0


DEFAULT_CONTEXT = 1024
LEAST_US = 1e-3  # of a call, where calls share a time
ROUND_US = 5e5  # that a round of replays takes, at most


def default_context(plan: Plan, batch: int) -> int:
    """Tokens of a context that so many sequences can have while they are measured."""
    limits = plan.pool.limits
    held = min(limits.max_seq_len, limits.num_pages // batch * limits.page_size)
    most = held - RUNS * (limits.max_depth + 1)
    return max(min(DEFAULT_CONTEXT, most), 1)


def bench(plan: Plan, executor: Executor, options: Options) -> dict[str, Any]:
    """Everything that `tokenspeed bench` prints.

    Raises:
        PlanError: the plan has no program, or no memory, for such a batch; nothing was measured.
    """
    device = plan.target.device
    queries = _query_len(plan, options.batch)
    replays = [Replay(plan, executor, "decode", options.batch, queries, options.context)]
    if options.chunk:
        replays.append(Replay(plan, executor, "prefill", 1, options.chunk, options.context))
    machine = measure_machine(device)
    programs = []
    for replay in replays:
        replay.reset()  # the inputs of all are in the same buffers
        programs.append(replay.measure(machine))
    memory = {
        "planned_bytes": plan.pool.memory_bytes_per_rank.total,
        "reserved_bytes": plan.pool.memory_bytes_per_rank.reserved,
    }
    return {
        "machine": asdict(machine),
        "plan": plan.digest,
        "model": plan.model.name,
        "programs": programs,
        "memory": memory | {"measured_bytes": used_bytes(device)},
    }


class Replay:
    """One program on a batch of sequences of `context` tokens, `count` of them new.

    Raises:
        PlanError: the plan has no program, or no memory, for such a batch.
    """

    def __init__(
        self, plan: Plan, executor: Executor, phase: Phase, num_seqs: int, count: int, context: int
    ) -> None:
        self.plan, self.executor = plan, executor
        self.device = plan.target.device
        self.tokens, self.seqs, self.context = num_seqs * count, num_seqs, max(context, count)
        self.program = _program(plan, phase, self.tokens, num_seqs)
        sequences = tuple(self._sequence(i, count) for i in range(num_seqs))
        self.batch = Batch.of(self.program, sequences, (count,) * num_seqs)
        # With padding, if the program is captured.
        self.run_tokens, self.run_seqs = self.batch.run_tokens, self.batch.run_seqs
        self.reset()

    def reset(self) -> None:
        """Write the inputs again, since a decode step moves them on to the next one.

        All drafts are accepted, so that the next step has the most states to recompute.
        """
        write_inputs(
            self.batch, lambda name: self.executor.buffer(name, *self._size), self.plan.pool.limits
        )
        if "forced_accept" in self.program.inputs:
            self.executor.buffer("forced_accept", *self._size).fill_(1.0)

    @property
    def _size(self) -> tuple[int, int]:
        return self.run_tokens, self.run_seqs

    def _sequence(self, index: int, count: int) -> Sequence:
        limits = self.plan.pool.limits
        max_len = self.context
        if self._advances():
            max_len += RUNS * self.program.query_len
        pages = -(-max_len // limits.page_size)
        if max_len > limits.max_seq_len or (index + 1) * pages > limits.num_pages:
            raise PlanError(
                f"the plan cannot hold {self.seqs} x {max_len} tokens, it has {limits.num_pages} "
                f"pages of {limits.page_size} and max_seq_len {limits.max_seq_len}",
                "lower --context or --batch",
            )
        random = torch.Generator().manual_seed(index)
        ids = torch.randint(
            0, self.plan.model.vocab_size, (self.context,), generator=random
        ).tolist()
        start = 1 + index * limits.state_slots_per_seq
        before = self.context - count
        request = Request(
            str(index), tuple(ids), SamplingParams(max_tokens=1 + max_len - self.context)
        )
        return Sequence(
            request,
            0.0,
            ids,
            num_computed=before,
            num_kept=min(limits.kept_inputs, before) if self.program.phase == "decode" else 0,
            pages=list(range(index * pages, (index + 1) * pages)),
            state_slot=start if before else 0,
            own_slots=_own_slots(start, limits),
        )

    def measure(self, machine: Machine) -> dict[str, Any]:
        """Times of the whole program and of each kernel."""
        hits = list(self._hits())
        replay = captured(self.run, self.device)
        taken_us = time_us(replay, self.device, self._runs, self.reset)
        calls = self._calls()
        work = [self._work(call, hit) for call, hit in zip(calls, hits, strict=True)]
        floor = round(sum(each.floor_bytes for each in work))
        floor_us = floor / machine.read_bytes_per_s * 1e6
        flops = sum(each.product_flops for each in work)
        return {
            "phase": self.program.phase,
            "bucket": self.program.bucket,
            "batch": self.seqs,
            "tokens": self.tokens,
            "context": self.context,
            "launches": self.program.launches,
            "launches_per_layer": round(self.program.launches / self.plan.num_layers, 2),
            "measured_us": taken_us,
            "predicted_us": self.program.predicted_us,
            "floor_bytes": floor,
            "floor_us": floor_us,
            "share_of_floor": floor_us / taken_us,
            "flops": flops,
            "share_of_matrix_rate": flops / taken_us * 1e6 / machine.matrix_flops_per_s,
            "depth": self.program.depth,
            # Counted as if no draft were accepted.
            "tokens_per_s": self.tokens / self.program.query_len / taken_us * 1e6,
            "kernels": self._kernels(calls, work, machine),
        }

    @property
    def _runs(self) -> int:
        """Replays of a round: ten, or fewer of a long program; the same on all ranks."""
        return max(2, min(RUNS, round(ROUND_US / max(self.program.predicted_us, 1.0))))

    def _work(self, call: Call, experts_hit: int) -> Work:
        """FLOPs and bytes of a call for this batch, without padding."""
        return call.cost.at(BatchSize(self.tokens, self.seqs, self.context, experts_hit))

    def run(self) -> None:
        """Replay the program once."""
        self.executor.run(self.program, *self._size)

    def _calls(self) -> list[Call]:
        return [step for step in self.program.steps if isinstance(step, Call)]

    def _advances(self) -> bool:
        kernels = (self.executor.kernels[call.kernel] for call in self._calls())
        return any(
            part.kind in ("advance", "advance_rows") for kernel in kernels for part in kernel.parts
        )

    def _hits(self) -> Iterator[int]:
        """For each kernel call, how many distinct experts the tokens of its layer chose.

        The program is replayed step by step, and the router's logits are read on the way.
        """
        hit = 0
        for call, run in self._one_by_one():
            run()
            kernel = self.executor.kernels[call.kernel]
            choice = next((part for part in kernel.parts if part.kind == "topk"), None)
            if choice is not None:
                index = [param.name for param in kernel.tensors].index(choice.operands[0])
                logits = self.executor.buffer_of(self.program, call.args[index], *self._size)
                ids = logits[: self.tokens].topk(integer(choice.attrs, "top_k")).indices
                hit = int(ids.unique().numel())
            yield hit

    def _one_by_one(self) -> Iterator[tuple[Call, Callable[[], None]]]:
        for step, instructions in self.executor.steps(self.program, *self._size):

            def run(instructions: Any = instructions) -> None:
                self.executor.execute(instructions)

            if isinstance(step, Call):
                yield step, run
            else:
                run()

    def _kernels(
        self, calls: list[Call], work: list[Work], machine: Machine
    ) -> list[dict[str, Any]]:
        """For each kernel: calls, mean microseconds, bytes a second and their share of the peak."""
        times = self._times(calls)
        rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for call, each, time in zip(calls, work, times, strict=True):
            rows[self._shown(call)].append((time, each.moved_bytes, call.predicted_us))
        made = (_row(name, found, machine) for name, found in rows.items())
        return sorted(made, key=lambda row: -row["total_us"])

    def _times(self, calls: list[Call]) -> list[float]:
        self.reset()
        if self.device == "cpu":
            return [time_us(run, "cpu", 1) for _, run in self._one_by_one()]
        separate = self.executor.without_overlap()
        replay = captured(lambda: separate.run(self.program, *self._size), self.device)
        self.reset()
        names = [self._launched_as(call) for call in calls]
        return times_of(names, kernel_times_us(replay, set(names)), calls)

    def _launched_as(self, call: Call) -> str:
        """The name of what the call launches."""
        if self._calls_library(call):
            return LIBRARY
        return kind_of(self.executor.kernels[call.kernel])

    def _shown(self, call: Call) -> str:
        """The function of a library that the call runs, else the kernel."""
        if isinstance(call, LibraryCall) and self._calls_library(call):
            return call.function
        return call.kernel

    def _calls_library(self, call: Call) -> bool:
        backend = self.executor.backend
        return isinstance(backend, KernelBackend) and backend.library_of(call) is not None


def times_of(names: Seq[str], found: Seq[tuple[str, float]], calls: Seq[Call]) -> list[float]:
    """The time of each call.

    Calls of libraries that follow each other are found as one, since all that they launch has other
    names than our kernels: they share its time as their predictions do.

    Args:
        names: of what each call launches.
        found: names and microseconds, in order.
        calls: of the program.
    """
    runs: list[list[int]] = []
    for index, name in enumerate(names):
        if name == LIBRARY and index and names[index - 1] == LIBRARY:
            runs[-1].append(index)
        else:
            runs.append([index])
    assert [name for name, _ in found] == [names[run[0]] for run in runs], "lost a kernel"
    times = []
    for run, (_, time) in zip(runs, found, strict=True):
        predicted = [max(calls[index].predicted_us, LEAST_US) for index in run]
        times += [time * each / sum(predicted) for each in predicted]
    return times


def _own_slots(start: int, limits: Limits) -> list[int]:
    """The state slots that a sequence writes, where it reads `start`."""
    if limits.in_place:
        return [start]
    return list(range(start + 1, start + limits.state_slots_per_seq))


def _row(name: str, found: list[tuple[float, float, float]], machine: Machine) -> dict[str, Any]:
    total, moved, predicted = (sum(column) for column in zip(*found, strict=True))
    rate = moved / total * 1e6 if total else 0.0
    return {
        "kernel": name,
        "calls": len(found),
        "us": total / len(found),
        "total_us": total,
        "predicted_us": predicted / len(found),
        "bytes": round(moved) // len(found),
        "bytes_per_s": rate,
        "share": rate / machine.read_bytes_per_s,
    }


def _query_len(plan: Plan, seqs: int) -> int:
    """Queries of each sequence in the decode program for so many sequences."""
    fitting = [p for p in plan.pool.programs if p.phase == "decode" and p.max_seqs >= seqs]
    if not fitting:
        return 1
    return min(fitting, key=lambda p: p.bucket).query_len


def _program(plan: Plan, phase: Phase, tokens: int, seqs: int) -> Program:
    fitting = [
        p
        for p in plan.pool.programs
        if p.phase == phase and p.max_tokens >= tokens and p.max_seqs >= seqs
    ]
    if not fitting:
        raise PlanError(
            f"no {phase} program takes {tokens} tokens of {seqs} sequences",
            "see `tokenspeed show DIR`",
        )
    return min(fitting, key=lambda p: p.bucket)
