"""Files of a batch run that fail, go away or are shared: one error, and no finished row is lost."""

from __future__ import annotations

import ctypes
import fcntl
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from batch_fake import FakeEngine, FakeTokenizer, plan
from conftest import ROOT

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.execution.cpu_threads import limit_threads
from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.batch import BatchOptions, notebook, run_batch, writers
from tokenspeed_plan.runtime.serving.batch.files import STDIO, InputFile
from tokenspeed_plan.runtime.serving.batch.progress import Progress
from tokenspeed_plan.runtime.serving.batch.summary import Tally
from tokenspeed_plan.runtime.serving.batch.writers import read_whole_lines

pytestmark = pytest.mark.slow  # whole processes, or many examples

NUM_ROWS = 60
FAKE = ROOT / "tests" / "support" / "batch_fake.py"
BUNDLE = ROOT / "plans" / "frozen" / "demo-cpu"
COMMAND = (sys.executable, "-c", "from tokenspeed_plan.planner.cli import main; main()")


def rows_text(count: int = NUM_ROWS, **body: Any) -> bytes:
    lines = []
    for number in range(count):
        row = {
            "custom_id": f"c{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"row {number}", "max_tokens": 8} | body,
        }
        lines.append(json.dumps(row).encode() + b"\n")
    return b"".join(lines)


class HookedEngine(FakeEngine):
    """Does something before one of its steps."""

    def __init__(self, at_step: int, hook: Callable[[], object]) -> None:
        super().__init__()
        self.left = at_step
        self.hook = hook

    def step(self) -> list[Completion]:
        self.left -= 1
        if self.left == 0:
            self.hook()
        return super().step()


class Runs:
    """Batch runs of one input in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "in.jsonl"
        self.source.write_bytes(rows_text())
        self.engine = FakeEngine()

    def __call__(
        self,
        output: str | Path = "out.jsonl",
        at_step: int = 0,
        hook: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> int:
        self.engine = HookedEngine(at_step, hook)
        options = {"quiet": True} | options
        settings = BatchOptions(self.source, self.folder / output, **options)
        return run_batch(settings, plan(), FakeTokenizer(), lambda: self.engine)

    def ids(self, name: str = "out.jsonl") -> list[str]:
        return [json.loads(line)["custom_id"] for line in read_whole_lines(self.folder / name)]


ALL_IDS = [f"c{number}" for number in range(NUM_ROWS)]


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def lose(path: Path) -> None:
    path.unlink()


def move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("another file\n")
    other.rename(path)


def cut(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"another writer\n")


@pytest.mark.parametrize("harm", [lose, move, replace])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("order", ["input", "completion"])
def test_an_output_that_goes_away_ends_the_run_and_its_rows_are_kept(
    harm: Callable[[Path], None], name: str, order: str, run: Runs
) -> None:
    target = run.folder / name
    with pytest.raises(RequestError, match=r"was deleted, replaced or changed") as caught:
        run(name, 30, lambda: harm(target), order=order)
    assert "the answers are kept in" in caught.value.hint
    assert not target.exists() or target.read_text() == "another file\n"
    num_started = len(run.engine.seen)
    assert num_started < NUM_ROWS
    target.unlink(missing_ok=True)
    assert run(name, order=order) == 0
    assert sorted(run.ids(name)) == sorted(ALL_IDS)
    assert NUM_ROWS - num_started <= len(run.engine.seen) < NUM_ROWS - 10


@pytest.mark.parametrize("harm", [cut, append])
def test_an_output_that_another_process_writes_ends_the_run(
    harm: Callable[[Path], None], run: Runs
) -> None:
    with pytest.raises(RequestError, match=r"was deleted, replaced or changed"):
        run("out.jsonl", 30, lambda: harm(run.folder / "out.jsonl"))
    assert run() == 0
    assert run.ids() == ALL_IDS


def test_an_output_that_is_deleted_after_its_last_row_is_missed(run: Runs) -> None:
    """Nothing is written any more then; the run looks once more before it reports success."""
    run.source.write_bytes(rows_text(1))
    intact = writers.FileWriter.is_intact

    def look(self: writers.FileWriter) -> bool:
        still = intact(self)
        if self._size:
            (run.folder / "out.jsonl").unlink(missing_ok=True)
        return still

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers.FileWriter, "is_intact", look)
        with pytest.raises(RequestError, match="was deleted"):
            run()
    assert run() == 0 and not run.engine.seen


def test_an_error_file_that_goes_away_ends_the_run(run: Runs) -> None:
    errors = run.folder / "bad.jsonl"
    with pytest.raises(RequestError, match=r"bad.jsonl` was deleted"):
        run("out.jsonl", 30, errors.unlink, errors=errors)
    assert run(errors=errors) == 0
    assert run.ids() == ALL_IDS


def other_spelling(target: Path) -> Path:
    return target.parent / ".." / target.parent.name / target.name


def hard_link(target: Path) -> Path:
    os.link(target, target.with_name("hard.jsonl"))
    return target.with_name("hard.jsonl")


def soft_link(target: Path) -> Path:
    target.with_name("soft.jsonl").symlink_to(target)
    return target.with_name("soft.jsonl")


@pytest.mark.parametrize("name_of", [other_spelling, hard_link, soft_link])
def test_a_second_run_on_another_name_of_the_output_is_refused(
    name_of: Callable[[Path], Path], run: Runs
) -> None:
    second = Runs(run.folder)

    def start_second() -> None:
        with pytest.raises(RequestError, match="another run is writing"):
            second(name_of(run.folder / "out.jsonl"))

    assert run("out.jsonl", 30, start_second) == 0
    assert run.ids() == ALL_IDS
    assert not second.engine.seen
    assert not list(run.folder.glob("*.resume"))


def test_links_to_no_file_share_one_run(run: Runs) -> None:
    """Neither output exists when the runs begin."""
    for name in ("a.jsonl", "b.jsonl"):
        (run.folder / name).symlink_to(run.folder / "out.jsonl")
    second = Runs(run.folder)

    def start_second() -> None:
        with pytest.raises(RequestError, match="another run is writing"):
            second("b.jsonl")

    assert run("a.jsonl", 1, start_second) == 0
    assert run.ids() == ALL_IDS
    assert (run.folder / "a.jsonl").is_symlink()


def test_an_output_that_another_run_wrote_meanwhile_is_not_overwritten(run: Runs) -> None:
    second = Runs(run.folder)
    options = BatchOptions(run.source, run.folder / "out.jsonl", quiet=True)

    def load() -> FakeEngine:
        second("second.jsonl")
        os.link(run.folder / "second.jsonl", run.folder / "out.jsonl")
        return FakeEngine()

    with pytest.raises(RequestError, match="another run has written"):
        run_batch(options, plan(), FakeTokenizer(), load)
    assert run.ids("second.jsonl") == ALL_IDS


def test_two_runs_with_one_error_file(run: Runs) -> None:
    second, errors = Runs(run.folder), run.folder / "bad.jsonl"

    def start_second() -> None:
        with pytest.raises(RequestError, match=r"another run is writing `.*bad.jsonl"):
            second("b.jsonl", errors=errors)

    assert run("a.jsonl", 5, start_second, errors=errors) == 0


def test_a_symbolic_link_to_itself_is_refused(run: Runs) -> None:
    loop = run.folder / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises((RequestError, OSError)):
        run("loop.jsonl")


def test_a_lock_on_a_file_without_a_name_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before ends, and deletes the file, between our `open` and our lock."""
    path, lock = tmp_path / "out.jsonl.resume", fcntl.flock
    calls: list[int] = []

    def late(file: BinaryIO, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with writers.open_locked(path) as file:
        assert writers.has_name(file, path)
    assert len(calls) == 2


def test_the_output_is_on_the_disk_before_the_finished_lines_go(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sidecar = run.folder / "out.jsonl", run.folder / "out.jsonl.resume"
    sync, events = os.fsync, []

    def noted(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        events.append((path, sidecar.exists(), target.exists() and target.stat().st_size))
        sync(number)

    monkeypatch.setattr(os, "fsync", noted)
    assert run() == 0
    assert (str(target), True, target.stat().st_size) in events
    assert (str(run.folder), True, target.stat().st_size) in events
    assert not sidecar.exists()


@contextmanager
def full_disk(max_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond a size: the kernel refuses the write, as if full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("order", ["input", "completion"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("max_bytes", [0, 1, 5_000])
def test_a_full_disk_is_one_error_and_the_next_run_goes_on(
    name: str, order: str, max_bytes: int, run: Runs
) -> None:
    if max_bytes > 1 and name.endswith(".gz"):
        max_bytes = 1_200
    with pytest.MonkeyPatch.context() as patch, full_disk(max_bytes):
        patch.setattr(notebook.sqlite3, "connect", connect_in_memory)
        with pytest.raises(RequestError, match=r"cannot write `.*out\.jsonl.*`: File too large"):
            run(name, order=order)
    assert run(name, order=order) == 0
    assert sorted(run.ids(name)) == sorted(ALL_IDS)
    assert len(run.engine.seen) < NUM_ROWS or max_bytes <= 1


def test_a_full_disk_while_a_run_resumes_loses_nothing(run: Runs) -> None:
    """The finished lines of the output do not fit a second time."""
    run()
    before = (run.folder / "out.jsonl").read_bytes()
    run.source.write_bytes(rows_text() + rows_text(61).splitlines(keepends=True)[-1])
    with pytest.MonkeyPatch.context() as patch, full_disk(len(before) // 2):
        patch.setattr(notebook.sqlite3, "connect", connect_in_memory)
        with pytest.raises(RequestError, match=r"cannot write `.*resume`"):
            run()
    assert (run.folder / "out.jsonl").read_bytes() == before
    assert run() == 0
    assert run.engine.seen and len(run.engine.seen) == 1


CONNECT = notebook.sqlite3.connect


def connect_in_memory(name: str, isolation_level: None) -> Any:
    return CONNECT(":memory:", isolation_level=isolation_level)


@pytest.mark.parametrize("max_pages", [3, 6, 8])
def test_a_full_folder_of_temporary_files_is_one_error(
    max_pages: int, run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.source.write_bytes(rows_text(400))
    limit = f"PRAGMA max_page_count = {max_pages}"
    monkeypatch.setattr(notebook, "_SETUP", (limit, *notebook._SETUP))
    with pytest.raises(RequestError, match=r"cannot write a temporary file: .*full") as caught:
        run()
    assert "TMPDIR" in caught.value.hint
    monkeypatch.undo()
    assert run() == 0


def test_no_folder_of_temporary_files(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(run.folder / "missing"))
    with pytest.raises(RequestError, match="cannot write a temporary file"):
        run()
    pipe = run.folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    with pytest.raises(RequestError, match="cannot write a temporary file"):
        InputFile(pipe)
    os.close(reader)


REWRITTEN = [b"", b"{}\n", b"\xff" * 5_000, b"[" * 20_000, rows_text(NUM_ROWS, seed=1)]


@pytest.mark.parametrize("text", REWRITTEN, ids=range(len(REWRITTEN)))
def test_an_input_that_is_rewritten_is_told_row_by_row(text: bytes, run: Runs) -> None:
    options = BatchOptions(run.source, run.folder / "out.jsonl", quiet=True, max_kept_bytes=20_000)

    def load() -> FakeEngine:
        run.source.write_bytes(text)
        return FakeEngine()

    assert run_batch(options, plan(), FakeTokenizer(), load) == 1
    lines = [json.loads(line) for line in read_whole_lines(run.folder / "out.jsonl")]
    assert len(lines) == NUM_ROWS
    failed = [line for line in lines if line["error"]]
    assert 0 < len(failed) < NUM_ROWS
    assert {line["error"]["message"] for line in failed} == {
        "the line was changed after it was checked"
    }


@pytest.mark.parametrize(
    "text",
    [b"", b"not an archive", gzip.compress(b"{}\n", mtime=0)],
    ids=["empty", "no archive", "another archive"],
)
def test_an_archive_that_is_rewritten_is_one_error(text: bytes, run: Runs) -> None:
    source = run.folder / "in.jsonl.gz"
    source.write_bytes(gzip.compress(rows_text(3_000)))
    options = BatchOptions(source, run.folder / "out.jsonl", quiet=True, max_kept_bytes=0)

    def load() -> FakeEngine:
        source.write_bytes(text)
        return FakeEngine()

    try:
        assert run_batch(options, plan(), FakeTokenizer(), load) == 1
    except RequestError as error:
        assert "cannot read" in error.message


def damaged(text: bytes, at: int) -> bytes:
    whole = gzip.compress(text, compresslevel=0)
    return whole[:at] + bytes(byte ^ 0xFF for byte in whole[at : at + 8]) + whole[at + 8 :]


@pytest.mark.parametrize("name", ["cut", "flipped"])
def test_rows_before_the_damage_of_an_archive_are_answered(name: str, run: Runs) -> None:
    run.source = run.folder / "in.jsonl.gz"
    text = rows_text()
    data = {"cut": gzip.compress(text, 0)[:-300], "flipped": damaged(text, -8)}
    run.source.write_bytes(data[name])
    with pytest.raises(RequestError, match=r"1 of \d+ lines.*\n.*the archive is damaged here"):
        run()
    assert not (run.folder / "out.jsonl").exists()
    assert run(max_errors=1) == 1
    lines = [json.loads(line) for line in read_whole_lines(run.folder / "out.jsonl")]
    answered = [line["custom_id"] for line in lines if line["error"] is None]
    assert len(lines) == len(answered) + 1
    assert answered == ALL_IDS[: len(answered)] and len(answered) > 10
    assert "the archive is damaged here" in lines[-1]["error"]["message"]


def test_a_line_that_is_too_long_is_not_kept(run: Runs) -> None:
    """16 MiB of one letter, 16 KB as an archive; the rows around it are answered."""
    text = rows_text(3)
    first, second, third = text.splitlines(keepends=True)
    long = b'{"custom_id": "long", "x": "' + b"x" * (16 << 20) + b'"}\n'
    source = run.folder / "in.jsonl.gz"
    source.write_bytes(gzip.compress(first + long + second + third, compresslevel=1))
    del text
    tracemalloc.start()
    with InputFile(source, max_line_bytes=1 << 18) as file:
        lines = list(file.lines())
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        assert [line.number for line in lines] == [1, 2, 3, 4]
        assert lines[1].fault == f"the line has {len(long)} bytes, the most is {1 << 18}"
        assert lines[1].raw.startswith(b'{"custom_id": "long"')
        assert file.read(lines[3].offset, len(lines[3].raw)) == third.rstrip()
    tracemalloc.stop()


@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_longest_line_that_is_taken(end: bytes, tmp_path: Path) -> None:
    for size in (99, 100, 101):
        source = tmp_path / "in.jsonl"
        source.write_bytes(b"x" * size + end)
        with InputFile(source, max_line_bytes=100) as file:
            (line,) = file.lines()
        assert (line.fault is None) == (size <= 100)


def test_a_reader_of_stderr_that_leaves_does_not_end_the_run(run: Runs) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, FAKE, run.source, run.folder / "out.jsonl", "--talk"]
    done = subprocess.run(command, stderr=theirs, check=False)
    os.close(theirs)
    assert done.returncode == 0
    assert run.ids() == ALL_IDS


def test_progress_without_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    for quiet in (True, False):
        progress = Progress(Tally(1), quiet)
        progress.write("x")
        progress.close()


def test_a_full_device_as_output_is_one_error(run: Runs) -> None:
    with pytest.raises(RequestError, match="cannot write `/dev/full`: No space left"):
        run("/dev/full")
    assert not Path("/dev/full.resume").exists()
    assert run("/dev/null") == 0


def test_standard_output_that_is_full_is_one_error(run: Runs) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, FAKE, run.source, STDIO],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_no_file_gets_the_number_of_a_closed_standard_stream() -> None:
    code = (
        "import os, sys, warnings\n"
        "from tokenspeed_plan.planner.commands.process import set_up_process\n"
        "set_up_process()\n"
        "assert os.open(os.devnull, os.O_RDONLY) > 2\n"
        "print('gone', file=sys.stderr)\n"
    )
    script = f'exec "$0" -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, sys.executable], check=False).returncode == 0


def test_a_command_lets_idle_threads_sleep_unless_told_otherwise() -> None:
    code = (
        "import os\n"
        "from tokenspeed_plan.planner.commands.process import set_up_process\n"
        "set_up_process()\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    )
    for own, wanted in (({}, "passive 0"), ({"OMP_WAIT_POLICY": "active"}, "active 0")):
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        env = {name: value for name, value in os.environ.items() if name not in names}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env | own, capture_output=True, check=True, text=True
        )
        assert done.stdout.strip() == wanted


@pytest.mark.parametrize(
    ("width", "sm", "own", "wanted"),
    [(256, 0, None, 1), (4096, 0, None, 2), (256, 90, None, 2), (256, 0, "2", 2)],
)
def test_a_narrow_model_on_a_cpu_takes_one_thread(
    width: int, sm: int, own: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = load_plan(BUNDLE)
    model = frozen.model.model_copy(update={"hidden_size": width})
    target = frozen.target.model_copy(update={"sm": sm})
    counts = [2]
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    limit_threads(frozen.model_copy(update={"model": model, "target": target}))
    assert counts[-1] == wanted


FAULTS = """
import resource, sys, torch
from pathlib import Path
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.runtime.execution.cpu_memory import keep_freed_memory

def faults():
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [torch.ones(1 << 21) for _ in range(6)]  # 8 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

torch.set_num_threads(1)
before = faults()
keep_freed_memory(load_plan(Path(sys.argv[1])))
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_a_step_finds_the_memory_of_the_one_before() -> None:
    """Glibc begins with a threshold, and raises it in its own time; here it may not."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(BUNDLE)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert after < before / 20


@pytest.mark.parametrize("quiet", ["", "--quiet"])
def test_a_command_without_stderr_answers(quiet: str, run: Runs) -> None:
    run.source.write_bytes(rows_text(2, max_tokens=2))
    target = run.folder / "out.jsonl"
    options = [f"--input={run.source}", f"--output={target}", "--no-canary", *quiet.split()]
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "run", str(BUNDLE), *options]
    assert subprocess.run(command, check=False).returncode == 0
    assert run.ids() == ["c0", "c1"]
