"""The shards that a worker answers at once.

The last rows of a shard run beside the first ones of the next, so that the engine's batch stays
full. Each shard is a generator: it gives the engine rows, yields for a step, and takes its answers.
It has its own lease and writes its own part. Where the lease is lost it ends, and the others go on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenspeed_plan.runtime.serving.batch.options import BatchOptions, BatchPlan, TextTokenizer
from tokenspeed_plan.runtime.serving.batch.runner import open_batch
from tokenspeed_plan.runtime.serving.interrupt import Interrupt
from tokenspeed_plan.runtime.serving.leases.job_index import JobIndex
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput, Shard, copy_rows
from tokenspeed_plan.runtime.serving.leases.merge import check_part, measure
from tokenspeed_plan.runtime.serving.leases.pauses import Pauses
from tokenspeed_plan.runtime.serving.leases.shard_lease import (
    Lease,
    Leases,
    finished_units,
    holding,
)
from tokenspeed_plan.runtime.serving.leases.shard_parts import (
    Part,
    open_part,
    part_name,
    remove_parts,
)
from tokenspeed_plan.runtime.serving.leases.shared_engine import EngineShare, SharedEngine

# Two are enough where a shard has more rows than run at once, and no row takes longer than a shard.
# More of them would be taken from workers that are idle.
MOST_SHARDS = 4
Run = Generator[bool, None, None]


@dataclass(eq=False, slots=True)
class ShardRuns:
    """Runs the shards of a job that one worker has.

    Attributes:
        index: of the job.
        input: its rows.
        plan: its digest and limits.
        tokenizer: of the model.
        engine: what the shards share.
        max_concurrency: requests in it at once; the plan's `max_seqs` by default.
        leases: for more shards.
        leave_last: how many of the last ones are left to others.
        pauses: between two looks for more, where all are taken.
        interrupt: once it has seen a signal, no more rows are begun.
        say: where to say what was done.
    """

    index: JobIndex
    input: JobInput
    plan: BatchPlan
    tokenizer: TextTokenizer
    engine: SharedEngine
    max_concurrency: int | None
    leases: Leases
    leave_last: int
    pauses: Pauses
    interrupt: Interrupt
    say: Callable[[str], None]
    _runs: dict[str, Run] = field(default_factory=dict)  # by shard, the oldest first
    _unbegun: set[str] = field(default_factory=set)  # shards with rows that wait for room

    def run(self, lease: Lease) -> None:
        """Run a shard, and more of them while there are any; returns when all have ended."""
        try:
            self._begin(lease)
            while self._runs:
                following = self._following()
                if following is not None:
                    self._begin(following)
                    continue
                self.engine.step()
                for unit in [*self._runs]:
                    self._advance(unit)
        finally:
            for run in self._runs.values():
                run.close()
            self._runs.clear()

    def _begin(self, lease: Lease) -> None:
        self._runs[lease.unit] = self._run(lease)
        self._advance(lease.unit)

    def _advance(self, unit: str) -> None:
        """Let a shard go on to where it waits for a step, or to its end."""
        has_more = next(self._runs[unit], None)
        self._unbegun.discard(unit)
        if has_more is None:
            del self._runs[unit]
        elif has_more:
            self._unbegun.add(unit)

    def _following(self) -> Lease | None:
        """A lease of one more shard, where the rows of those that are here leave room."""
        is_full = bool(self._unbegun) or not self.engine.has_room or len(self._runs) >= MOST_SHARDS
        if is_full or self.interrupt.seen or not self.pauses.is_over:
            return None
        lease = self.leases.take(self.index.names, self.leave_last, self._runs)
        if lease is None:
            self.pauses.begin()
        else:
            self.pauses.reset()
        return lease

    def _run(self, lease: Lease) -> Run:
        """Run a shard; yields where it waits for a step whether it has rows that wait for room."""
        shard, begun_s = self.index.shard(lease.unit), time.monotonic()
        with holding(lease, self.say), tempfile.TemporaryDirectory(prefix="tokenspeed-") as folder:
            rows = Path(folder) / "rows.jsonl"
            copy_rows(self.input, shard, rows)
            part = open_part(lease, Path(folder))
            lease.before_beat = part.save
            yield from self._answer(rows, part.path, shard.first_line, lease)
            if self.interrupt.seen:
                part.save()
                return
            self._commit(shard, part, lease)
            num_done = len(finished_units(self.leases.store) & set(self.index.names))
            self.say(
                f"shard {shard.name}: {shard.rows} rows in {time.monotonic() - begun_s:.1f} s; "
                f"{num_done} of {len(self.index.shards)} shards are done"
            )

    def _answer(self, rows: Path, output: Path, first_line: int, lease: Lease) -> Run:
        """Answer the rows of a shard; after a signal, those that were begun.

        Raises:
            LeaseLost: another worker has it.
        """
        options = BatchOptions(
            rows,
            output,
            max_errors=sys.maxsize,  # the index has refused or allowed them
            max_concurrency=self.max_concurrency,
            quiet=True,
            first_line=first_line,
        )
        with (
            closing(EngineShare(self.engine)) as share,
            open_batch(options, self.plan, self.tokenizer, share.load, self.interrupt) as batch,
        ):
            while not batch.is_over:
                batch.advance()
                yield batch.has_more
                lease.check()
                batch.step()

    def _commit(self, shard: Shard, part: Part, lease: Lease) -> None:
        """Say what a shard has come to, once all of it is safe.

        Raises:
            LeaseLost: another worker has it.
            RequestError: its answers are not those to its rows.
        """
        facts = measure(part.path, lease.generation)
        check_part(facts, shard)
        lease.check()
        part.publish()
        if lease.commit(asdict(facts)):
            remove_parts(lease.store, shard.name, but=lease.generation)
        else:
            lease.store.remove(part_name(shard.name, lease.generation))
