"""Run a batch file: check every line, take over finished ones, answer the rest, write in order."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing

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
    check_paths(options.input, options.output, options.errors, options.summary)
    interrupt = Interrupt(signal.SIGINT, signal.SIGTERM)
    opened = InputFile(options.input, first_line=options.first_line)
    with opened as source, closing(Notebook()) as notebook:
        kept = KeptRows(options.max_kept_bytes)
        scanner = Scanner(plan.digest, tokenizer, plan.limits, notebook, kept)
        scanned = scanner.scan(source, options.selection)
        refuse_bad(scanned, options.max_errors)
        tally = Tally(scanned.num_selected)
        progress = Progress(tally, options.quiet)
        with open_finished(options.output, notebook) as finished:
            batch = _Batch(options, plan, tokenizer, tally)
            if notebook.has_work():
                batch.start_engine(load_engine)
            rows = RowReader(source, notebook, kept, finished, plan.digest, tokenizer, plan.limits)
            with Output(options, finished) as output:
                batch.run(iter(rows), output, interrupt, progress)
            finished.complete = not interrupt.seen
    _report(options, plan, tally, progress, interrupt.seen)
    return _exit_code(tally, interrupt.seen)


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


class _Batch:
    """The loop over the engine: read ahead, start rows, step, write."""

    def __init__(
        self, options: BatchOptions, plan: BatchPlan, tokenizer: TextTokenizer, tally: Tally
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._tally = tally
        self._engine: BatchEngine | None = None
        self._waiting = Waiting[ActiveRow]()
        self._running: dict[str, ActiveRow] = {}  # by request
        self._max_concurrency = options.max_concurrency or plan.max_seqs
        self._max_window = 8 * plan.max_seqs + 64

    def start_engine(self, load_engine: LoadEngine) -> None:
        """Load the engine; rates count from here."""
        self._engine = load_engine()
        self._tally.startup_s = self._engine.startup_s
        self._tally.start_running()

    def run(
        self,
        rows: Iterator[Answered | Faulty | ActiveRow],
        output: Output,
        interrupt: Interrupt,
        progress: Progress,
    ) -> None:
        """Run until all rows are written; after a signal, until running rows are finished."""
        with interrupt:
            more = True
            while more or output.num_held:
                more = more and self._read_ahead(rows, output, interrupt)
                if interrupt.seen:
                    more = False
                    output.drop(self._waiting.clear())
                self._start_rows(output)
                self._step(output)
                output.write_ready()
                progress.show()

    def _read_ahead(
        self,
        rows: Iterator[Answered | Faulty | ActiveRow],
        output: Output,
        interrupt: Interrupt,
    ) -> bool:
        """Fill the window with rows; False at the end of the file."""
        while not interrupt.seen and output.num_held < self._max_window:
            row = next(rows, None)
            if row is None:
                return False
            self._take(row, output)
        return True

    def _take(self, row: Answered | Faulty | ActiveRow, output: Output) -> None:
        if isinstance(row, Answered):
            self._tally.skipped += row.selected
            output.add_line(row.line)
        elif isinstance(row, Faulty):
            self._tally.fail("invalid_request")
            output.add_fault(row)
        else:
            output.add_row(row)
            max_tokens = sum(request.params.max_tokens for request in row.requests)
            self._waiting.add(row, row.requests[0].prompt_ids, max_tokens, row.row.line)

    def _start_rows(self, output: Output) -> None:
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
                    self._collect(failed(request, error.message), output)

    def _step(self, output: Output) -> None:
        if self._engine and self._engine.num_unfinished:
            for completion in self._engine.step():
                self._collect(completion, output)

    def _collect(self, completion: Completion, output: Output) -> None:
        """Take one finished choice; when the row is whole, make its line."""
        if completion.error is None:
            self._tally.add(completion)
        row = self._running.pop(completion.request_id)
        if not row.add(completion):
            return
        completions = row.completions()
        failure = failure_line(row.row, completions)
        if failure is not None:
            self._tally.fail(REQUEST_FAILED)
            output.fail(row, encode_line(failure))
            return
        rules = answer_rules(row.row.body, row.requests[0].prompt_ids, self._tokenizer)
        line = answer_line(row.row, completions, self._tokenizer, self._plan.model, rules)
        self._tally.answered += 1
        output.finish(row, encode_line(line))
