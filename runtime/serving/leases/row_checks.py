"""Checks of the rows of a job: by who makes its index, and of very many by all workers.

Who makes the index looks into the first rows, and into all that are like others. Of what is left it
reads the ids alone: to render a chat and to cut it into tokens takes ten times as long. Groups of
such rows are units of the job that any worker checks, before the first shard is run.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputFile, InputLine
from tokenspeed_plan.runtime.serving.batch.lines import MAX_NAME_CHARS, Row
from tokenspeed_plan.runtime.serving.batch.notebook import Notebook
from tokenspeed_plan.runtime.serving.batch.options import BatchPlan, TextTokenizer
from tokenspeed_plan.runtime.serving.batch.scan import (
    MAX_SHOWN,
    Fault,
    ScanResult,
    check_lines,
    line_groups,
)
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput, Shard, copy_rows
from tokenspeed_plan.runtime.serving.leases.job_store import Store
from tokenspeed_plan.runtime.serving.leases.known_chats import KnownChat, KnownChats
from tokenspeed_plan.runtime.serving.leases.known_shapes import KnownShapes, SeenIds
from tokenspeed_plan.runtime.serving.leases.shard_lease import done_name
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import has_room

CHECKS = "checks"  # the unit that says what came of all
LOOKED_INTO = 4096  # rows by who makes the index, beside those that are like others
CHECK_ROWS = 50_000  # of a unit: a few seconds
# A letter of `custom_id` that is written as a code point.
_SPELLED = re.compile(rb"\\u00[567]")
Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A row of which only the `custom_id` was read."""

    custom_id: str


# Of a line: its row, or one that is like others or the id of one, or one that is not looked into,
# or what is wrong with it.
Found = Row | KnownChat | bytes | Unchecked | InvalidRequestError


_Quick = KnownChat | bytes | Unchecked | None  # what is found without a look into a line


class _Group(NamedTuple):
    """Lines that are checked together, and the chats of some, which are being rendered."""

    lines: list[InputLine]
    quick: list[_Quick]
    texts: Future[list[str | RequestError]] | None


class RowChecker:
    """Checks lines in their order.

    Args:
        plan: its limits.
        tokenizer: for the prompts.
        moved: called every few lines.
        notebook: knows the ids of earlier rows; without one they are only noted, and rows may be
            like others.

    Attributes:
        seen: the ids, without a notebook.
    """

    def __init__(
        self,
        plan: BatchPlan,
        tokenizer: TextTokenizer,
        moved: Callable[[], None],
        notebook: Notebook | None = None,
    ) -> None:
        self.seen = SeenIds()
        self.notebook = notebook
        self._facts = None, notebook or self.seen, tokenizer, plan.limits
        self._moved = moved
        self._known = KnownShapes(plan.limits.max_seq_len)
        self._known_chats = KnownChats(plan.limits, tokenizer.chat_format)
        self._tokenizer = tokenizer
        self._num_looked_into = 0

    def check(
        self, lines: Iterable[InputLine], num_open: int = 0
    ) -> Iterator[tuple[InputLine, Found]]:
        """Each line with what it is found to be; only the first so many may stay unchecked."""
        waiting: list[_Group] = []  # one at most: while it is rendered, the next is parsed
        with ThreadPoolExecutor(1) as pool:
            for each in line_groups(lines):
                self._moved()
                num_open -= len(each)
                quick = [self._quick(line, num_open >= 0) for line in each]
                group = _Group(each, quick, None)
                chats = [known.chat for known in quick if isinstance(known, KnownChat)]
                self._num_looked_into += len(chats) + quick.count(None)
                if chats:
                    group = _Group(each, quick, pool.submit(self._tokenizer.render_chats, chats))
                while waiting:
                    yield from self._finish(waiting.pop())
                waiting.append(group)
                if group.texts is None:  # the next may be like these
                    yield from self._finish(waiting.pop())
            while waiting:
                yield from self._finish(waiting.pop())

    def _finish(self, group: _Group) -> Iterator[tuple[InputLine, Found]]:
        """Look into the lines that need it, and learn from them."""
        if group.texts is not None:
            self._drop_without_room(group.quick, group.texts.result())
        lines = list(zip(group.lines, group.quick, strict=True))
        checked = iter(check_lines([line for line, found in lines if found is None], *self._facts))
        for line, known in lines:
            found = known or next(checked)
            if isinstance(found, Row):
                self._known.learn(line, found)
                self._known_chats.learn(line, found)
            yield line, found

    def _drop_without_room(self, quick: list[_Quick], texts: Iterable[str | RequestError]) -> None:
        """Chats that are refused, or may be too long, are not known after all."""
        known = {number: each for number, each in enumerate(quick) if isinstance(each, KnownChat)}
        for (number, chat), text in zip(known.items(), texts, strict=True):
            if isinstance(text, str) and text and has_room(text, chat.room, self._tokenizer):
                self.seen.add(chat.custom_id.encode())
            else:
                quick[number] = None

    def _quick(self, line: InputLine, may_defer: bool) -> _Quick:
        """What is found without a look into a line; None where it needs one."""
        if self.notebook is not None:
            return None
        known = self._known.id_of(line)
        if known is not None:
            self.seen.add(known)
            return known
        if not may_defer or self._num_looked_into < LOOKED_INTO:
            return self._known_chats.find(line)
        custom_id = _certain_id(line)
        if custom_id is None:
            return None
        self.seen.add(custom_id.encode())
        return Unchecked(custom_id)


def _certain_id(line: InputLine) -> str | None:
    """The `custom_id` that a line has, whatever else is wrong with it; None: it is not certain."""
    raw = line.raw
    if line.fault is not None or raw.count(b"custom_id") != 1 or _SPELLED.search(raw):
        return None
    try:
        data = json.loads(raw)
        if isinstance(data, dict) and isinstance(data.get("custom_id"), str):
            name: str = data["custom_id"]
            if 0 < len(name.encode()) <= MAX_NAME_CHARS:
                return name
    except (ValueError, RecursionError):
        pass  # who checks the line says what is wrong
    return None


def check_units(shards: Sequence[Shard]) -> dict[str, list[Shard]]:
    """The units that check the rows that are left, and the shards of each."""
    groups: list[list[Shard]] = []
    num_rows = CHECK_ROWS
    for shard in shards:
        if shard.unchecked:
            if num_rows >= CHECK_ROWS:
                groups.append([])
                num_rows = 0
            groups[-1].append(shard)
            num_rows += shard.unchecked
    return {f"check-{number:05d}": group for number, group in enumerate(groups)}


def check_shards(job: JobInput, shards: Iterable[Shard], checker: RowChecker) -> ScanResult:
    """Look into all rows of some shards, whose ids are known to differ.

    Raises:
        RequestError: they are not those that the index was made of.
    """
    result = ScanResult()
    for shard in shards:
        with tempfile.TemporaryDirectory(prefix="tokenspeed-") as folder:
            path = Path(folder) / "rows.jsonl"
            copy_rows(job, shard, path)
            with InputFile(path, first_line=shard.first_line) as source:
                for line, found in checker.check(source.lines()):
                    result.num_rows += 1
                    if isinstance(found, InvalidRequestError):
                        result.add_fault(line.number, str(found))
    return result


def faults_as_result(result: ScanResult) -> Json:
    """What a unit of checks comes to."""
    return {"bad": result.num_bad, "shown": result.shown}


def all_faults(total: ScanResult, store: Store, units: Iterable[str]) -> ScanResult:
    """Add to a result what units of checks have come to; the faults of the first lines stay."""
    for unit in units:
        found = json.loads(store.read(done_name(unit)) or b"{}")
        total.num_bad += found["bad"]
        total.shown += [Fault(*each) for each in found["shown"]]
    total.shown = sorted(set(total.shown))[:MAX_SHOWN]
    return total
