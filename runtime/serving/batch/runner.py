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

from tokenspeed_plan.runtime.request import Completion, Request
from tokenspeed_plan.runtime.serving.batch.files import STDIO, LineWriter, open_writer, spool
from tokenspeed_plan.runtime.serving.batch.order import Waiting
from tokenspeed_plan.runtime.serving.batch.progress import Progress
from tokenspeed_plan.runtime.serving.batch.resume import Sidecar, check_paths
from tokenspeed_plan.runtime.serving.batch.scan import (
    Notebook,
    Selection,
    check_file,
    refuse_bad,
    src_state_slots,
)
from tokenspeed_plan.runtime.serving.batch.summary import Tally, as_text
from tokenspeed_plan.runtime.serving.openai.answers import answer_line, error_line
from tokenspeed_plan.runtime.serving.openai.requests import (
    Row,
    RowError,
    RowLimits,
    Tokenizer,
    parse_row,
    to_requests,
)

ANSWERED, SOME_FAILED, INTERRUPTED = 0, 1, 130


class BatchEngine(Protocol):
    """What the runner needs of an engine."""

    startup_s: dict[str, float]

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


@dataclass(slots=True)
class _Pending:
    """A row that was read and is not written yet."""

    row: Row | None
    requests: tuple[Request, ...] = ()
    choices: dict[int, Completion] = field(default_factory=dict)
    line: bytes | None = None


def run_batch(
    options: BatchOptions,
    plan: BatchPlan,
    tokenizer: Tokenizer,
    load_engine: Callable[[], BatchEngine],
) -> int:
    """Answer a batch file. `load_engine` is called once all lines are checked, if there is anything to run.

    Returns:
        0 all answered, 1 some rows failed, 130 interrupted.

    Raises:
        RequestError: refused; nothing was written.
    """
    check_paths(options.input, options.output, options.errors, options.summary)
    source, spooled = spool(options.input)
    notebook = Notebook()
    try:
        found = check_file(source, options.selection, plan.digest, tokenizer, plan.limits, notebook)
        refuse_bad(found, options.max_errors)
        tally = Tally(found.num_selected)
        with _Run(options, plan, tokenizer, load_engine, notebook, tally).open(source) as run:
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
        tokenizer: Tokenizer,
        load_engine: Callable[[], BatchEngine],
        notebook: Notebook,
        tally: Tally,
    ) -> None:
        self.options, self.plan, self.tokenizer = options, plan, tokenizer
        self.interrupted = False
        self.progress = Progress(tally, options.quiet)
        self._load_engine = load_engine
        self._engine: BatchEngine | None = None
        self._notebook = notebook
        self._tally = tally
        self._window: deque[_Pending] = deque()
        self._of_request: dict[str, _Pending] = {}
        self._waiting = Waiting[_Pending]()
        self._concurrency = options.max_concurrency or plan.max_seqs
        self._max_window = 8 * plan.max_seqs + 64

    def open(self, source: Path) -> _Run:
        """Take over what is done, load the engine if there is more to do, and only then begin the output anew."""
        self._sidecar = (
            None if self.options.output == STDIO else Sidecar(self.options.output, self._notebook)
        )
        try:
            if self._has_work(source):
                self._engine = self._load_engine()
                self._tally.startup_s = self._engine.startup_s
                self._tally.start_running()
        except BaseException:
            if self._sidecar:
                self._sidecar.close()
            raise
        return self

    def __enter__(self) -> _Run:
        self._writer = open_writer(self.options.output)
        self._errors: LineWriter = (
            open_writer(self.options.errors) if self.options.errors else self._writer
        )
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

    def _has_work(self, source: Path) -> bool:
        """Whether a row that was asked for has no answer yet."""
        for asked, line, raw in self._selected(source):
            if asked and self._notebook.bad(line) is None:
                key = parse_row(raw, line, self.plan.digest).key
                if self._sidecar is None or self._sidecar.line(key) is None:
                    return True
        return False

    def _selected(self, source: Path) -> Iterator[tuple[bool, int, bytes]]:
        """(asked for, line number, bytes) of each row."""
        return (
            (self.options.selection.holds(number), line, raw)
            for number, line, raw in src_state_slots(source)
        )

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
            try:
                requests = to_requests(row, self.tokenizer, self.plan.limits)
            except RowError as error:  # the quick look of the first pass had let it through
                self._write_error(row.custom_id, line, "invalid_request", str(error))
                return True
            pending = _Pending(row, requests)
            self._window.append(pending)
            tokens = sum(request.params.max_tokens for request in pending.requests)
            self._waiting.add(pending, pending.requests[0].prompt_ids, tokens, line)
        return True

    def _start(self) -> None:
        """Start rows while there is room."""
        while self._waiting and self._engine and self._engine.num_unfinished < self._concurrency:
            pending = self._waiting.pop()
            for request in pending.requests:
                self._of_request[request.request_id] = pending
                self._engine.add(request)

    def _drop_waiting(self) -> None:
        """After a signal: forget what has not started. What finishes behind it is kept in the sidecar."""
        dropped = {id(pending) for pending in self._waiting.clear()}
        self._window = deque(pending for pending in self._window if id(pending) not in dropped)

    def _collect(self, completion: Completion) -> None:
        """Take one choice; when the row is whole, make its line."""
        pending = self._of_request.pop(completion.request_id)
        pending.choices[int(completion.request_id.rpartition(":")[2])] = completion
        self._tally.add(completion)
        if pending.row is None or len(pending.choices) < len(pending.requests):
            return
        choices = [pending.choices[index] for index in sorted(pending.choices)]
        pending.line = _encode(answer_line(pending.row, choices, self.tokenizer, self.plan.model))
        self._tally.answered += 1
        if self._sidecar and self.options.order == "input" and pending is not self._window[0]:
            self._sidecar.save(
                pending.row.key, pending.line
            )  # it must wait for its turn, and survive a kill

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
