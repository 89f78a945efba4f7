"""Output and error file of a batch run: lines in the order of the input, or as rows finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import Self

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.lines import encode_line, error_line
from tokenspeed_plan.runtime.serving.batch.options import BatchOptions
from tokenspeed_plan.runtime.serving.batch.reading import ActiveRow, Faulty
from tokenspeed_plan.runtime.serving.batch.resume import FinishedLines
from tokenspeed_plan.runtime.serving.batch.writers import open_writer


class Output:
    """Holds back finished lines until those before them are written.

    With `order="input"` a line that has to wait is saved in the sidecar, so that a kill does not
    lose it. Opening it empties the files.
    """

    def __init__(self, options: BatchOptions, finished: FinishedLines) -> None:
        self._in_order = options.order == "input"
        self._finished = finished
        self._window: deque[bytes | ActiveRow] = deque()
        self._files = [(options.output, finished.open_output())]
        if options.errors:
            self._files.append((options.errors, open_writer(options.errors)))
        self._writer = self._files[0][1]
        self._errors = self._files[-1][1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Write to the disk; after an error, close only, so that it is the one that is told."""
        with ExitStack() as stack:
            if kind is not None:
                stack.enter_context(suppress(RequestError))
            for _, writer in self._files:
                stack.callback(writer.close)
            if kind is None:
                self._check()

    def _check(self) -> None:
        """End the run where a file was deleted, replaced or cut while it was written.

        Raises:
            RequestError: it was; what can be read back is kept beside the output.
        """
        for path, writer in self._files:
            if not writer.is_intact():
                hint = self._finished.rescue(self._writer.written())
                raise RequestError(
                    f"`{path}` was deleted, replaced or changed while it was written", hint
                )

    @property
    def num_held(self) -> int:
        """Number of rows that were read and are not written."""
        return len(self._window)

    def add_line(self, line: bytes) -> None:
        """Append a line that is complete."""
        self._window.append(line)

    def add_row(self, row: ActiveRow) -> None:
        """Append a row whose line follows with `finish`."""
        self._window.append(row)

    def add_fault(self, row: Faulty) -> None:
        """Write the error line of a row: to the error file, or in its place in the output."""
        line = encode_line(error_line(row.custom_id, row.line, "invalid_request", row.fault))
        if self._errors is self._writer and self._in_order:
            self.add_line(line)
        else:
            self._errors.write(line)

    def finish(self, row: ActiveRow, line: bytes) -> None:
        """Set the line of a row."""
        row.line = line
        if self._in_order and row is not self._window[0]:
            self._finished.save(row.row.key, line)

    def fail(self, row: ActiveRow, line: bytes) -> None:
        """Write the error line of a row that had begun: where that of a refused row would be."""
        if self._errors is self._writer:
            row.line = line
        else:
            self._errors.write(line)
            self.drop([row])

    def drop(self, rows: Collection[ActiveRow]) -> None:
        """Forget rows that will not run."""
        dropped = {id(row) for row in rows}
        self._window = deque(entry for entry in self._window if id(entry) not in dropped)

    def write_ready(self) -> None:
        """Write all lines whose turn it is."""
        if self._in_order:
            self._write_head()
        else:
            self._write_finished()
        self._check()

    def _write_head(self) -> None:
        while self._window:
            line = _line(self._window[0])
            if line is None:
                return
            self._writer.write(line)
            self._window.popleft()

    def _write_finished(self) -> None:
        unfinished: deque[bytes | ActiveRow] = deque()
        for entry in self._window:
            line = _line(entry)
            if line is None:
                unfinished.append(entry)
            else:
                self._writer.write(line)
        self._window = unfinished


def _line(entry: bytes | ActiveRow) -> bytes | None:
    """The output line of an entry; None while its row runs."""
    if isinstance(entry, ActiveRow):
        return entry.line
    return entry
