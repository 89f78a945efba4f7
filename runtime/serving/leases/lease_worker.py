"""One worker of a job: it leases shard after shard with one engine, and the last one merges."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from uuid import uuid4

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.options import BatchPlan, TextTokenizer
from tokenspeed_plan.runtime.serving.batch.runner import ANSWERED, INTERRUPTED, SOME_FAILED
from tokenspeed_plan.runtime.serving.batch.scan import ScanResult, refuse_bad
from tokenspeed_plan.runtime.serving.interrupt import Interrupt
from tokenspeed_plan.runtime.serving.leases.job_index import INDEX, JobIndex, make_index
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
from tokenspeed_plan.runtime.serving.leases.job_store import Store, is_url
from tokenspeed_plan.runtime.serving.leases.merge import MERGE, Merge, summary
from tokenspeed_plan.runtime.serving.leases.pauses import Pauses
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
    Leases,
    done_name,
    finished_units,
    holding,
)
from tokenspeed_plan.runtime.serving.leases.shard_parts import PARTS
from tokenspeed_plan.runtime.serving.leases.shard_runs import ShardRuns
from tokenspeed_plan.runtime.serving.leases.shared_engine import CancellingEngine, SharedEngine

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
        most = options.max_concurrency or plan.max_seqs
        self._engine = SharedEngine(load_engine, most)
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
            with holding(lease, self._say):
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

        def merge(lease: Lease) -> None:
            self._merge(lease, index)

        runs = self._runs(index)
        return self._work(index.names, runs.run, MERGE, merge, self._options.leave_last)

    def _runs(self, index: JobIndex) -> ShardRuns:
        options = self._options
        return ShardRuns(
            index,
            options.input,
            self._plan,
            self._tokenizer,
            self._engine,
            options.max_concurrency,
            self._leases,
            options.leave_last,
            self._pauses(),
            self._interrupt,
            self._say,
        )

    def _work(self, units: list[str], do: Work, last: str, end: Work, leave_last: int = 0) -> bool:
        """Do units until all are done, and the last, which needs them; False after a signal."""
        while not self._is_done(last):
            lease = self._next(units, last, leave_last)
            if lease is None:
                return self._is_done(last)
            if lease.unit == last:
                with holding(lease, self._say):
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
        pauses = self._pauses()
        while not self._interrupt.seen and not self._is_done(last):
            lease = self._leases.take(units, leave_last)
            if lease is None and finished_units(self._store) >= set(units):
                lease = self._leases.take([last])
            if lease is not None:
                return lease
            time.sleep(pauses.begin())
        return None

    def _pauses(self) -> Pauses:
        return Pauses(self._options.timeout_s, self._jitter)

    def _index(self) -> JobIndex | None:
        """The index; made here, or by another worker. None after a signal.

        Raises:
            RequestError: the input is refused, or the folder has another job.
        """
        pauses = self._pauses()
        while not self._interrupt.seen:
            text = self._store.read(done_name(INDEX))
            if text is not None:
                index = JobIndex.parse(text)
                self._check_is_same(index)
                return index
            lease = self._leases.take([INDEX])
            if lease is None:
                self._engine.ready()  # meanwhile
                time.sleep(pauses.begin(INDEX_POLL_S))
                continue
            with holding(lease, self._say):
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
