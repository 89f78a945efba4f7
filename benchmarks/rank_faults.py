"""Kill, freeze and end the ranks of a batch under load, many times, and see that all of it ends.

    python benchmarks/rank_faults.py BUNDLE [--times 20] [--rows 400] [--faults kill1,stop0,...]

Each time it starts `tokenspeed run` on a batch, waits until answers come, and does one thing:
SIGKILL or SIGSTOP of a rank, or SIGTERM of rank 0. Then every process must end within ten seconds,
with one error that names the rank where one is left to say it. At last the batch is run to its end:
each row must be answered once. One line for each fault; the exit code is 1 where one has failed.
Where this process is ended, the last run ends with it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = (sys.executable, "-P", "-c", "from tokenspeed_plan.planner.cli import main; main()")
FAULTS = {
    "kill1": (1, signal.SIGKILL),
    "kill0": (0, signal.SIGKILL),
    "stop1": (1, signal.SIGSTOP),
    "stop0": (0, signal.SIGSTOP),
    "term0": (0, signal.SIGTERM),
}
MOST_S = 10.0
START_S = 180.0
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)
SIDE = 128  # distinct token ids in a row


def write_rows(path: Path, count: int) -> None:
    """Rows of token ids: each begins with its own number."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            prompt = [1 + row % SIDE, 1 + row // SIDE, *range(2, 2 + row % 60)]
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
            line = {"custom_id": str(row), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line, allow_nan=False) + "\n")


class Run:
    """A batch run, with its output in files."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.output = folder / "out.jsonl"
        self.errors = (folder / "stderr.txt").open("w+", encoding="utf-8")
        args = ["run", bundle, "--input", folder / "in.jsonl", "--output", self.output]
        words = [str(arg) for arg in (*args, "--quiet", "--no-canary")]
        self.process = subprocess.Popen(
            [*COMMAND, *words], stderr=self.errors, preexec_fn=end_with_parent
        )

    def wait_for_answers(self, size: int) -> None:
        """Wait until the output is larger than `size`."""
        until = time.monotonic() + START_S
        while not self.output.exists() or self.output.stat().st_size <= size:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no answers: {self.stderr()}")
            time.sleep(0.02)

    def stderr(self) -> str:
        """What it has printed."""
        self.errors.seek(0)
        return self.errors.read()

    def processes(self) -> list[int]:
        """Rank 0, the ranks that it started, and whatever else it did."""
        return [self.process.pid, *children(self.process.pid)]

    def rank(self, number: int) -> int:
        """The process of a rank."""
        if number == 0:
            return self.process.pid
        return next(each for each in children(self.process.pid) if rank_of(each) == number)


def end_with_parent() -> None:
    """In rank 0, before it begins: end when this process does, however that ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and parent_and_state(int(folder.name))[0] == process:
            found.append(int(folder.name))
    return sorted(found)


def rank_of(process: int) -> int:
    """The number of a rank by its environment; -1 for other processes."""
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        words = []
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)


def parent_and_state(process: int) -> tuple[int, str]:
    """The parent and the state letter of a process; 0 and nothing where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0, ""
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state


def is_alive(process: int) -> bool:
    """Whether a process holds anything."""
    return parent_and_state(process)[1] not in ("", "Z", "X")


def fault_once(bundle: Path, folder: Path, fault: str) -> str:
    """Do one thing to a run; returns what went wrong, or nothing."""
    rank, number = FAULTS[fault]
    size = (folder / "out.jsonl").stat().st_size if (folder / "out.jsonl").exists() else 0
    run = Run(bundle, folder)
    run.wait_for_answers(size)
    time.sleep(0.2)
    processes = run.processes()
    os.kill(run.rank(rank), number)
    begun = time.monotonic()
    while any(map(is_alive, processes)) and time.monotonic() - begun < 2 * MOST_S:
        run.process.poll()
        time.sleep(0.02)
    taken_s = time.monotonic() - begun
    left = [process for process in processes if is_alive(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    code, text = run.process.wait(), run.stderr()
    print(f"{fault}: {taken_s:.2f} s, code {code}, {text.splitlines()[:1]}", flush=True)
    if left or taken_s > MOST_S:
        return f"{fault}: {len(left)} processes were left after {taken_s:.1f} s: {text}"
    must_speak = fault != "term0"
    named = text.count("error: ") >= 1 and f"rank {rank}" in text
    if must_speak and not named:
        return f"{fault}: no error names rank {rank}: {text}"
    return ""


def finish(bundle: Path, folder: Path, count: int) -> str:
    """Run the batch to its end; returns what is lost or doubled, or nothing."""
    run = Run(bundle, folder)
    code = run.process.wait()
    names = [json.loads(line)["custom_id"] for line in run.output.open(encoding="utf-8")]
    if code or sorted(map(int, names)) != list(range(count)):
        return f"the batch ended with {code} and {len(names)} of {count} answers: {run.stderr()}"
    return ""


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rows", type=int, default=400, help="of the batch, for each round")
    parser.add_argument("--faults", default=",".join(FAULTS))
    options = parser.parse_args(words)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        faults = options.faults.split(",")
        write_rows(folder / "in.jsonl", options.rows)
        for _ in range(options.times):
            failures += filter(None, (fault_once(options.bundle, folder, each) for each in faults))
        failures += filter(None, [finish(options.bundle, folder, options.rows)])
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{options.times} x {options.faults}: {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
