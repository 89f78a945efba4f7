"""Run a batch file: check every line, take over finished ones, answer the rest, write in order."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.request import Completion, failed
from tokenspeed_plan.runtime.serving.batch.files import InputFile
from tokenspeed_plan.runtime.serving.batch.kept_rows import KeptRows
from tokenspeed_plan.runtime.serving.batch.lines import (
    REQUEST_FAILED,
    answer_line,
    encode_line,
    failure_line,
)
from tokenspeed_plan.runtime.serving.batch.notebook import Notebook
from tokenspeed_plan.runtime.serving.batch.options import (
    BatchEngine,
    BatchOptions,
    BatchPlan,
    TextTokenizer,
)
from tokenspeed_plan.runtime.serving.batch.order import Waiting
from tokenspeed_plan.runtime.serving.batch.progress import Progress
from tokenspeed_plan.runtime.serving.batch.reading import ActiveRow, Answered, Faulty, RowReader
from tokenspeed_plan.runtime.serving.batch.resume import check_paths, open_finished
from tokenspeed_plan.runtime.serving.batch.scan import Scanner, refuse_bad
from tokenspeed_plan.runtime.serving.batch.summary import Tally, as_text
from tokenspeed_plan.runtime.serving.batch.writing import Output
from tokenspeed_plan.runtime.serving.interrupt import Interrupt
from tokenspeed_plan.runtime.serving.openai.answers import answer_rules

ANSWERED, SOME_FAILED, INTERRUPTED = 0, 1, 130
LoadEngine = Callable[[], BatchEngine]


def run_batch(
    options: BatchOptions, plan: BatchPlan, tokenizer: TextTokenizer, load_engine: LoadEngine
) -> int:
    """Answer a batch file.

    `load_engine` is called once all lines are checked, and only if a row has to run.

    Returns:
        0 if all rows were answered, 1 if some failed, 130 if a signal came.

    Raises:
        RequestError: the run is refused; nothing was written.
    """
    interrupt = Interrupt(signal.SIGINT, signal.SIGTERM)
    with open_batch(options, plan, tokenizer, load_engine, interrupt) as batch:
        progress = Progress(batch.tally, options.quiet)
        with interrupt:
            while not batch.is_over:
                batch.advance()
                batch.step()
                progress.show()
    _report(options, plan, batch.tally, progress, interrupt.seen)
    return _exit_code(batch.tally, interrupt.seen)


@contextmanager
def open_batch(
    options: BatchOptions,
    plan: BatchPlan,
    tokenizer: TextTokenizer,
    load_engine: LoadEngine,
    interrupt: Interrupt,
) -> Iterator[Batch]:
    """Check a batch file and take over its finished lines; its rows are answered in the body.

    Args:
        options: paths, and what is answered.
        plan: its digest and limits.
        tokenizer: of the model.
        load_engine: called once all lines are checked, and only if a row has to run.
        interrupt: once it has seen a signal, no more rows are begun.

    Raises:
        RequestError: the run is refused; nothing was written.
    """
    check_paths(options.input, options.output, options.errors, options.summary)
    opened = InputFile(options.input, first_line=options.first_line)
    with opened as source, closing(Notebook()) as notebook:
        kept = KeptRows(options.max_kept_bytes)
        scanner = Scanner(plan.digest, tokenizer, plan.limits, notebook, kept)
        scanned = scanner.scan(source, options.selection)
        refuse_bad(scanned, options.max_errors)
        tally = Tally(scanned.num_selected)
        with open_finished(options.output, notebook) as finished:
            engine = None
            if notebook.has_work():
                engine = load_engine()
                tally.startup_s = engine.startup_s
                tally.start_running()  # rates count from here
            rows = RowReader(source, notebook, kept, finished, plan.digest, tokenizer, plan.limits)
            with Output(options, finished) as output:
                yield Batch(options, plan, tokenizer, tally, engine, iter(rows), output, interrupt)
            finished.complete = not interrupt.seen


def _report(
    options: BatchOptions, plan: BatchPlan, tally: Tally, progress: Progress, interrupted: bool
) -> None:
    summary = tally.as_dict(plan.predicted, interrupted)
    load = tally.load(min(options.max_concurrency or plan.max_seqs, plan.max_seqs))
    if plan.load is not None and not load.is_like(plan.load):
        summary["other_load"] = f"{plan.load}; these rows were {load}"
    if options.summary:
        text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
        options.summary.write_text(text, encoding="utf-8")
    if not options.quiet:
        progress.close()
        progress.write(as_text(summary) + "\n")


def _exit_code(tally: Tally, interrupted: bool) -> int:
    if interrupted:
        return INTERRUPTED
    if tally.failed:
        return SOME_FAILED
    return ANSWERED


class Batch:
    """Rows of a file on their way into an engine, and lines on their way out.

    Attributes:
        tally: what has come of its rows.
    """

    def __init__(
        self,
        options: BatchOptions,
        plan: BatchPlan,
        tokenizer: TextTokenizer,
        tally: Tally,
        engine: BatchEngine | None,
        rows: Iterator[Answered | Faulty | ActiveRow],
        output: Output,
        interrupt: Interrupt,
    ) -> None:
        self.tally = tally
        self._plan = plan
        self._tokenizer = tokenizer
        self._engine = engine
        self._rows = rows
        self._output = output
        self._interrupt = interrupt
        self._waiting = Waiting[ActiveRow]()
        self._running: dict[str, ActiveRow] = {}  # by request
        self._is_read = False  # to its end, or to where a signal came
        self._max_concurrency = options.max_concurrency or plan.max_seqs
        self._max_window = 8 * plan.max_seqs + 64

    @property
    def is_over(self) -> bool:
        """Whether all rows are written; after a signal, those that were begun."""
        return self._is_read and not self._output.num_held

    @property
    def has_more(self) -> bool:
        """Whether it has rows that it would begin if the engine had room."""
        has_window = self._output.num_held < self._max_window
        return bool(self._waiting) or (has_window and not self._is_read)

    def advance(self) -> None:
        """Give the engine rows while it has room, and write lines whose turn it is."""
        self._read_ahead()
        if self._interrupt.seen:
            self._is_read = True
            self._output.drop(self._waiting.clear())
        self._start_rows()
        self._output.write_ready()

    def step(self) -> None:
        """Run a step of the engine, and write what it has finished."""
        if self._engine is None or not self._running:
            return
        done = self._engine.step()
        for completion in done:
            self._collect(completion)
        if done:
            self._output.write_ready()

    def _read_ahead(self) -> None:
        """Fill the window with rows."""
        while not (self._is_read or self._interrupt.seen):
            if self._output.num_held >= self._max_window:
                return
            row = next(self._rows, None)
            if row is None:
                self._is_read = True
                return
            self._take(row)

    def _take(self, row: Answered | Faulty | ActiveRow) -> None:
        if isinstance(row, Answered):
            self.tally.skipped += row.selected
            self._output.add_line(row.line)
        elif isinstance(row, Faulty):
            self.tally.fail("invalid_request")
            self._output.add_fault(row)
        else:
            self._output.add_row(row)
            max_tokens = sum(request.params.max_tokens for request in row.requests)
            self._waiting.add(row, row.requests[0].prompt_ids, max_tokens, row.row.line)

    def _start_rows(self) -> None:
        """Give the engine waiting rows while there is room."""
        engine = self._engine
        if engine is None:
            return
        while self._waiting and engine.num_unfinished < self._max_concurrency:
            row = self._waiting.pop()
            for request in row.requests:
                self._running[request.request_id] = row
                try:
                    engine.add(request)
                except RequestError as error:  # nothing that the row's checks let pass
                    self._collect(failed(request, error.message))

    def _collect(self, completion: Completion) -> None:
        """Take one finished choice; when the row is whole, make its line."""
        if completion.error is None:
            self.tally.add(completion)
        row = self._running.pop(completion.request_id)
        if not row.add(completion):
            return
        completions = row.completions()
        failure = failure_line(row.row, completions)
        if failure is not None:
            self.tally.fail(REQUEST_FAILED)
            self._output.fail(row, encode_line(failure))
            return
        rules = answer_rules(row.row.body, row.requests[0].prompt_ids, self._tokenizer)
        line = answer_line(row.row, completions, self._tokenizer, self._plan.model, rules)
        self.tally.answered += 1
        self._output.finish(row, encode_line(line))
