"""One worker of a job: it leases shard after shard with one engine, and the last one merges."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Protocol
from uuid import uuid4

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.serving.batch.options import (
    BatchEngine,
    BatchOptions,
    BatchPlan,
    TextTokenizer,
)
from tokenspeed_plan.runtime.serving.batch.runner import (
    ANSWERED,
    INTERRUPTED,
    SOME_FAILED,
    run_batch,
)
from tokenspeed_plan.runtime.serving.batch.scan import ScanResult, refuse_bad
from tokenspeed_plan.runtime.serving.interrupt import Interrupt
from tokenspeed_plan.runtime.serving.leases.job_index import INDEX, JobIndex, make_index
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput, copy_rows
from tokenspeed_plan.runtime.serving.leases.job_store import Store, is_url
from tokenspeed_plan.runtime.serving.leases.merge import MERGE, Merge, check_part, measure, summary
from tokenspeed_plan.runtime.serving.leases.row_checks import (
    CHECKS,
    RowChecker,
    all_faults,
    check_shards,
    check_units,
    faults_as_result,
)
from tokenspeed_plan.runtime.serving.leases.shard_lease import (
    Lease,
    LeaseLost,
    Leases,
    done_name,
    finished_units,
)
from tokenspeed_plan.runtime.serving.leases.shard_parts import (
    PARTS,
    open_part,
    part_name,
    remove_parts,
)

# How often an idle worker looks, first soon: a thousand of them read two folders each time.
FIRST_POLL_S = 0.25
POLLS_PER_TIMEOUT = 4
INDEX_POLL_S = 2.0
Work = Callable[[Lease], None]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Options of a worker.

    Attributes:
        input: what to answer.
        output: a path or a URL; the last worker writes it.
        timeout_s: for how long a worker may be silent before its shard is another's.
        max_concurrency: requests in the engine at once; the plan's `max_seqs` by default.
        summary: where the totals of the job go, as JSON.
        quiet: say nothing.
        leave_last: how many of the last shards it leaves to others, while these are alive.
        plans: digests of all plans with which the job may be answered; none is its own alone.
    """

    input: JobInput
    output: str
    timeout_s: float = 60.0
    max_concurrency: int | None = None
    summary: Path | None = None
    quiet: bool = False
    leave_last: int = 0
    plans: tuple[str, ...] = ()


class CancellingEngine(BatchEngine, Protocol):
    """An engine that can drop requests."""

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs."""


class WatchedEngine:
    """An engine that stops between two steps once the lease is another worker's."""

    def __init__(self, engine: CancellingEngine) -> None:
        self.startup_s = engine.startup_s
        self.lease: Lease | None = None
        self._engine = engine
        self._requests: set[str] = set()

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._engine.num_unfinished

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._engine.add(request)
        self._requests.add(request.request_id)

    def step(self) -> list[Completion]:
        """Run one step.

        Raises:
            LeaseLost: another worker has the shard.
        """
        if self.lease is not None:
            self.lease.check()
        done = self._engine.step()
        self._requests.difference_update(completion.request_id for completion in done)
        return done

    def drop_all(self) -> None:
        """Cancel what was not finished."""
        for name in self._requests:
            self._engine.cancel(name)
        self._requests.clear()


class Worker:
    """Works at a job until all of it is done.

    Args:
        store: of the job.
        options: alike for all workers of a job, but for `max_concurrency` and `leave_last`.
        plan: its digest and limits.
        tokenizer: of the model.
        load_engine: called once, and only if there is something to run.
    """

    def __init__(
        self,
        store: Store,
        options: WorkerOptions,
        plan: BatchPlan,
        tokenizer: TextTokenizer,
        load_engine: Callable[[], CancellingEngine],
    ) -> None:
        owner = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._store = store
        self._options = options
        self._plan = plan
        self._plans = options.plans or (plan.digest,)
        self._tokenizer = tokenizer
        self._load_engine = load_engine
        self._engine: WatchedEngine | None = None
        self._leases = Leases(store, owner, options.timeout_s)
        self._jitter = Random(owner)
        self._interrupt = Interrupt(signal.SIGINT, signal.SIGTERM)

    def run(self) -> int:
        """Work; returns the exit code: 0, 1 where rows have failed, 130 after a signal.

        Raises:
            RequestError: the job is refused, or is not this one.
        """
        with self._interrupt:
            index = self._index()
            if index is not None and self._check_rows(index) and self._answer_rows(index):
                return self._report(index)
        return INTERRUPTED

    def _check_rows(self, index: JobIndex) -> bool:
        """Check the rows that the index has left, together with others; False after a signal.

        Raises:
            RequestError: more lines are bad than are allowed.
        """
        job, units = self._options.input, check_units(index.shards)
        if not units:
            return True

        def check(lease: Lease) -> None:
            checker = RowChecker(self._plan, self._tokenizer, lease.check)
            lease.commit(faults_as_result(check_shards(job, units[lease.unit], checker)))

        def add_up(lease: Lease) -> None:
            lease.commit(faults_as_result(all_faults(index.found(), self._store, units)))

        if not self._work([*units], check, CHECKS, add_up):
            return False
        found = all_faults(ScanResult(index.lines), self._store, [CHECKS])
        refuse_bad(found, job.max_errors, "mend them and name another folder for the job")
        return True

    def _answer_rows(self, index: JobIndex) -> bool:
        """Run shards, and the merge where nobody else does; False after a signal."""

        def run(lease: Lease) -> None:
            self._run_shard(lease, index)

        def merge(lease: Lease) -> None:
            self._merge(lease, index)

        return self._work(index.names, run, MERGE, merge, self._options.leave_last)

    def _work(self, units: list[str], do: Work, last: str, end: Work, leave_last: int = 0) -> bool:
        """Do units until all are done, and the last, which needs them; False after a signal."""
        while not self._is_done(last):
            lease = self._next(units, last, leave_last)
            if lease is None:
                return self._is_done(last)
            with self._holding(lease):
                if lease.unit == last:
                    end(lease)
                else:
                    do(lease)
        return True

    def _is_done(self, unit: str) -> bool:
        return self._store.read(done_name(unit)) is not None

    def _next(self, units: list[str], last: str, leave_last: int) -> Lease | None:
        """What to do next; None after a signal, or when there is nothing left.

        While others have all that is left, it waits for them to end or to fall silent.
        """
        polls = count()
        while not self._interrupt.seen and not self._is_done(last):
            lease = self._leases.take(units, leave_last)
            if lease is None and finished_units(self._store) >= set(units):
                lease = self._leases.take([last])
            if lease is not None:
                return lease
            self._wait(next(polls))
        return None

    def _wait(self, number: int, most_s: float = math.inf) -> None:
        """Wait for the n-th time, longer than before: of a thousand workers most wait together."""
        most_s = min(most_s, self._options.timeout_s / POLLS_PER_TIMEOUT)
        seconds = min(FIRST_POLL_S * 2 ** min(number, 16), most_s)
        time.sleep(seconds * self._jitter.uniform(0.5, 1.5))

    @contextmanager
    def _holding(self, lease: Lease) -> Iterator[None]:
        """End a lease with its work; what is not done is given back."""
        try:
            yield
        except LeaseLost as error:
            self._say(error.message)
        except (RequestError, FileNotFoundError):
            if not self._is_done(lease.unit):  # else its new worker has deleted our files
                raise
        finally:
            if self._engine is not None:
                self._engine.lease = None
                self._engine.drop_all()
            lease.end(release=not self._is_done(lease.unit))

    def _index(self) -> JobIndex | None:
        """The index; made here, or by another worker. None after a signal.

        Raises:
            RequestError: the input is refused, or the folder has another job.
        """
        polls = count()
        while not self._interrupt.seen:
            text = self._store.read(done_name(INDEX))
            if text is not None:
                index = JobIndex.parse(text)
                self._check_is_same(index)
                return index
            lease = self._leases.take([INDEX])
            if lease is None:
                self._ready_engine()  # meanwhile
                self._wait(next(polls), INDEX_POLL_S)
                continue
            with self._holding(lease):
                self._refuse_taken_output()
                made = make_index(self._options.input, self._plan, self._tokenizer, lease.check)
                lease.commit(replace(made, plans=self._plans).as_result())
        return None

    def _refuse_taken_output(self) -> None:
        output = self._options.output
        if not is_url(output) and Path(output).exists():
            raise RequestError(
                f"`{output}` exists, and this job has not written it",
                "name another output, or delete it",
            )

    def _check_is_same(self, index: JobIndex) -> None:
        wanted = (self._plans, self._options.input.num_shards, self._options.input.limit)
        if wanted == (index.plans, index.num_shards, index.limit):
            return
        raise RequestError(
            f"the lease folder has a job of other plans, `--shards` or `--limit`: "
            f"it has {index.num_shards} shards",
            "give each job a folder of its own, and all workers of a job the same options",
        )

    def _ready_engine(self) -> WatchedEngine:
        if self._engine is None:
            self._engine = WatchedEngine(self._load_engine())
        return self._engine

    def _run_shard(self, lease: Lease, index: JobIndex) -> None:
        shard = index.shard(lease.unit)
        begun_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tokenspeed-") as folder:
            scratch = Path(folder)
            rows = scratch / "rows.jsonl"
            copy_rows(self._options.input, shard, rows)
            part = open_part(lease, scratch)
            lease.before_beat = part.save
            engine = self._ready_engine()
            engine.lease = lease
            is_stopped = self._interrupt.seen  # while the engine was loaded
            if is_stopped or not self._answer(rows, part.path, shard.first_line, engine):
                self._interrupt.seen = True
                part.save()
                return
            facts = measure(part.path, lease.generation)
            check_part(facts, shard)
            lease.check()
            part.publish()
        if lease.commit(asdict(facts)):
            remove_parts(self._store, shard.name, but=lease.generation)
        else:
            self._store.remove(part_name(shard.name, lease.generation))
        seconds = time.monotonic() - begun_s
        num_done = len(finished_units(self._store) & set(index.names))
        self._say(
            f"shard {shard.name}: {shard.rows} rows in {seconds:.1f} s; "
            f"{num_done} of {len(index.shards)} shards are done"
        )

    def _answer(self, rows: Path, output: Path, first_line: int, engine: WatchedEngine) -> bool:
        """Answer the rows of a shard; False after a signal."""
        options = BatchOptions(
            rows,
            output,
            max_errors=sys.maxsize,  # the index has refused or allowed them
            max_concurrency=self._options.max_concurrency,
            quiet=True,
            first_line=first_line,
        )
        return run_batch(options, self._plan, self._tokenizer, lambda: engine) != INTERRUPTED

    def _merge(self, lease: Lease, index: JobIndex) -> None:
        merge = Merge(self._store, index, lease.check)
        merge.write(self._options.output)
        lease.commit({"rows": index.rows, "failed": merge.failed, "size_bytes": merge.size_bytes})
        for name in self._store.names(PARTS):
            self._store.remove(f"{PARTS}/{name}")

    def _report(self, index: JobIndex) -> int:
        """Say what came of the job; returns the exit code."""
        total = summary(self._store, index.names)
        if self._options.summary:
            text = json.dumps(total, indent=1, allow_nan=False) + "\n"
            self._options.summary.write_text(text, encoding="utf-8")
        self._say(
            f"{total['rows'] - total['failed']} answered, {total['failed']} failed, of "
            f"{index.rows} rows in {len(index.shards)} shards: `{self._options.output}`"
        )
        if total["failed"]:
            return SOME_FAILED
        return ANSWERED

    def _say(self, text: str) -> None:
        if not self._options.quiet:
            print(text, file=sys.stderr, flush=True)
