"""Run a batch file: check every line, take over what is done, run the rest, write in order."""

from __future__ import annotations

import json
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from tokenspeed_plan.runtime.batch.answers import answer_line, error_line
from tokenspeed_plan.runtime.batch.check import Notebook, Selection, check_file, read_rows, refuse_bad
from tokenspeed_plan.runtime.batch.files import STDIO, LineWriter, open_writer, spool
from tokenspeed_plan.runtime.batch.order import Backlog
from tokenspeed_plan.runtime.batch.progress import Progress
from tokenspeed_plan.runtime.batch.resume import Sidecar, check_paths
from tokenspeed_plan.runtime.batch.rows import Codec, Row, RowLimits, parse_row, to_requests
from tokenspeed_plan.runtime.batch.summary import Tally, as_text
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.request import Completion, Request

ANSWERED, SOME_FAILED, INTERRUPTED = 0, 1, 130


class BatchEngine(Protocol):
    """What the runner needs of an engine."""

    startup_s: dict[str, float]

    @property
    def metrics(self) -> Metrics:
        """What it has done so far."""

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[Completion]:
        """One step; returns what it finished."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What the command line says."""

    input: Path
    output: Path
    errors: Path | None = None
    summary: Path | None = None
    order: Literal["input", "completion"] = "input"
    max_errors: int = 0
    max_concurrency: int | None = None
    selection: Selection = field(default_factory=Selection)
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What the plan says."""

    digest: str
    model: str
    max_seqs: int
    limits: RowLimits
    predicted: Mapping[str, float]
    min_shared_tokens: int = 0  # rows that begin with so many equal tokens start together


@dataclass(slots=True)
class _Pending:
    """A row that was read and is not written yet."""

    row: Row | None
    requests: tuple[Request, ...] = ()
    choices: dict[int, Completion] = field(default_factory=dict)
    line: bytes | None = None


def run_batch(options: BatchOptions, plan: BatchPlan, codec: Codec, load_engine: Callable[[], BatchEngine]) -> int:
    """Answer a batch file. `load_engine` is called once all lines are checked, if there is anything to run.

    Returns:
        0 all answered, 1 some rows failed, 130 interrupted.

    Raises:
        RequestError: refused; nothing was written.
    """
    check_paths(options.input, options.output, options.errors)
    source, spooled = spool(options.input)
    notebook = Notebook()
    try:
        found = check_file(source, options.selection, plan.digest, codec, plan.limits, notebook)
        refuse_bad(found, options.max_errors)
        tally = Tally(found.num_selected)
        with _Run(options, plan, codec, load_engine, notebook, tally) as run:
            run.all(source)
    finally:
        notebook.close()
        if spooled:
            spooled.close()
    summary = tally.as_dict(plan.predicted, run.interrupted)
    if options.summary:
        options.summary.write_text(json.dumps(summary, indent=1) + "\n")
    if not options.quiet:
        run.progress.close()
        print(as_text(summary), file=run.progress.stream, flush=True)
    return INTERRUPTED if run.interrupted else SOME_FAILED if tally.failed else ANSWERED


class _Run:
    """The second pass."""

    def __init__(
        self,
        options: BatchOptions,
        plan: BatchPlan,
        codec: Codec,
        load_engine: Callable[[], BatchEngine],
        notebook: Notebook,
        tally: Tally,
    ) -> None:
        self.options, self.plan, self.codec = options, plan, codec
        self.interrupted = False
        self.progress = Progress(tally, options.quiet)
        self._load_engine = load_engine
        self._engine: BatchEngine | None = None
        self._notebook = notebook
        self._tally = tally
        self._window: deque[_Pending] = deque()
        self._of_request: dict[str, _Pending] = {}
        self._waiting: Backlog[_Pending] = Backlog(plan.min_shared_tokens)
        self._concurrency = options.max_concurrency or plan.max_seqs
        self._max_window = 8 * plan.max_seqs + 64

    def __enter__(self) -> _Run:
        self._sidecar = None if self.options.output == STDIO else Sidecar(self.options.output, self._notebook)
        self._writer = open_writer(self.options.output)
        self._errors: LineWriter = open_writer(self.options.errors) if self.options.errors else self._writer
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._writer.close()
        if self._errors is not self._writer:
            self._errors.close()
        if self._sidecar:
            self._sidecar.close(done=kind is None and not self.interrupted)

    def all(self, source: Path) -> None:
        """Read ahead, start, step, write; until nothing is left or a signal says stop."""
        rows = self._selected(source)
        with self._signals():
            more = True
            while more or self._window:
                while more and not self.interrupted and len(self._window) < self._max_window:
                    more = self._read_next(rows)
                if self.interrupted:
                    more = False
                    self._drop_waiting()
                self._start()
                if self._engine and self._engine.num_unfinished:
                    for completion in self._engine.step():
                        self._collect(completion)
                self._write_ready()
                self.progress.show()

    def _selected(self, source: Path) -> Iterator[tuple[bool, int, bytes]]:
        """(asked for, line number, bytes) of each row."""
        return ((self.options.selection.holds(number), line, raw) for number, line, raw in read_rows(source))

    def _read_next(self, rows: Iterator[tuple[bool, int, bytes]]) -> bool:
        """Read one row; False at the end of the file."""
        asked, line, raw = next(rows, (False, 0, b""))
        if line == 0:
            return False
        bad = self._notebook.bad(line)
        if bad is not None:
            if asked:
                self._write_error(bad[0], line, "invalid_request", bad[1])
            return True
        row = parse_row(raw, line, self.plan.digest)
        saved = self._sidecar.line(row.key) if self._sidecar else None
        if saved is not None:
            self._tally.skipped += asked
            self._window.append(_Pending(None, line=saved))
        elif asked:
            pending = _Pending(row, to_requests(row, self.codec, self.plan.limits))
            self._window.append(pending)
            tokens = sum(request.params.max_tokens for request in pending.requests)
            self._waiting.add(pending, pending.requests[0].prompt_ids, tokens, line)
        return True

    def _start(self) -> None:
        """Start rows while there is room."""
        while len(self._waiting) and (self._engine is None or self._engine.num_unfinished < self._concurrency):
            if self._engine is None:
                self._engine = self._load_engine()
                self._tally.startup_s = self._engine.startup_s
                self._tally.metrics = self._engine.metrics
                self._tally.start_running()
            pending = self._waiting.pop()
            for request in pending.requests:
                self._of_request[request.request_id] = pending
                self._engine.add(request)

    def _drop_waiting(self) -> None:
        """After a signal: forget what has not started. What finishes behind it is kept in the sidecar."""
        dropped = {id(pending) for pending in self._waiting}
        self._waiting.clear()
        self._window = deque(pending for pending in self._window if id(pending) not in dropped)

    def _collect(self, completion: Completion) -> None:
        """Take one choice; when the row is whole, make its line."""
        pending = self._of_request.pop(completion.request_id)
        pending.choices[int(completion.request_id.rpartition(":")[2])] = completion
        self._tally.add(completion)
        if pending.row is None or len(pending.choices) < len(pending.requests):
            return
        choices = [pending.choices[index] for index in sorted(pending.choices)]
        pending.line = _encode(answer_line(pending.row, choices, self.codec, self.plan.model))
        self._tally.answered += 1
        if self._sidecar and self.options.order == "input" and pending is not self._window[0]:
            self._sidecar.save(pending.row.key, pending.line)  # it must wait for its turn, and survive a kill

    def _write_ready(self) -> None:
        if self.options.order == "completion":
            for pending in [p for p in self._window if p.line is not None]:
                self._writer.write(pending.line or b"")
                self._window.remove(pending)
            return
        while self._window and (line := self._window[0].line) is not None:
            self._writer.write(line)
            self._window.popleft()

    def _write_error(self, custom_id: str | None, line: int, code: str, message: str) -> None:
        self._tally.fail(code)
        text = _encode(error_line(custom_id, line, code, message))
        if self._errors is self._writer and self.options.order == "input":
            self._window.append(_Pending(None, line=text))
        else:
            self._errors.write(text)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets running rows finish, the second stops at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _encode(line: Mapping[str, object]) -> bytes:
    return json.dumps(line, ensure_ascii=True, sort_keys=True).encode() + b"\n"
