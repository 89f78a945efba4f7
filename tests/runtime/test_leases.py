"""A batch on several machines: a shard is one worker's, none is lost or doubled, whoever dies."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_fake import FakeEngine, FakeTokenizer, plan
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from lease_fake import BorderEngine, bucket, started, worker

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch import BatchOptions, run_batch
from tokenspeed_plan.runtime.serving.batch.writers import read_whole_lines
from tokenspeed_plan.runtime.serving.leases import row_checks, shard_lease, shard_runs
from tokenspeed_plan.runtime.serving.leases.job_index import JobIndex, make_index
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
from tokenspeed_plan.runtime.serving.leases.job_store import (
    FolderStore,
    Store,
    open_files,
    open_store,
)
from tokenspeed_plan.runtime.serving.leases.lease_worker import Worker, WorkerOptions
from tokenspeed_plan.runtime.serving.leases.merge import Merge
from tokenspeed_plan.runtime.serving.leases.shard_lease import Lease, LeaseLost, Leases, done_name
from tokenspeed_plan.runtime.serving.leases.shard_parts import open_part, parts_of


def row(index: int, **body: Any) -> str:
    body = {"prompt": f"row {index}", "max_tokens": 8} | body
    line = {"custom_id": f"c{index}", "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line)


def write(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Rows, with blank lines among them."""
    lines = [row(index, temperature=3.0) if index in bad else row(index) for index in range(count)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def single(source: Path, output: Path, max_errors: int = 0) -> bytes:
    """The output of a run that is not shared."""
    options = BatchOptions(source, output, quiet=True, max_errors=max_errors)
    run_batch(options, plan(), FakeTokenizer(), FakeEngine)
    return output.read_bytes()


def wait_until(happens: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("shards", [1, 3, 7, 100])
def test_the_output_is_that_of_a_single_run(tmp_path: Path, shards: int) -> None:
    source = write(tmp_path / "in.jsonl", 23, bad=(0, 11, 22))
    wanted = single(source, tmp_path / "single.jsonl", max_errors=3)
    store = FolderStore(tmp_path / "job")
    output = tmp_path / "out.jsonl"
    assert worker(store, source, output, shards, max_errors=3).run() == 1  # some rows have failed
    assert output.read_bytes() == wanted
    assert store.names("parts") == []
    engine = FakeEngine()
    assert worker(store, source, output, shards, engine, max_errors=3).run() == 1
    assert engine.seen == []  # all of it is done


def test_a_limit_and_no_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 9)
    output = tmp_path / "out.jsonl"
    worker(FolderStore(tmp_path / "job"), source, output, limit=5).run()
    lines = output.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"c{i}" for i in range(5)]
    source.write_text("\n", encoding="utf-8")
    assert worker(FolderStore(tmp_path / "none"), source, tmp_path / "none.jsonl").run() == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_bad_rows_are_refused_before_anything_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 9, bad=(8,))
    engine = FakeEngine()
    with pytest.raises(RequestError, match="1 of 9 lines cannot be run\n  line 17"):
        worker(FolderStore(tmp_path), source, tmp_path / "o.jsonl", engine=engine).run()
    source.write_text(f"{row(0)}\n{row(1)}\n{row(0)}\n", encoding="utf-8")
    with pytest.raises(RequestError, match="was used on line 1, in another shard"):
        worker(
            FolderStore(tmp_path), source, tmp_path / "o.jsonl", engine=engine, max_errors=9
        ).run()
    assert not engine.seen
    wanted = single(source, tmp_path / "single.jsonl", max_errors=1)
    worker(FolderStore(tmp_path), source, tmp_path / "o.jsonl", shards=1, max_errors=1).run()
    assert (tmp_path / "o.jsonl").read_bytes() == wanted  # in one shard it is a bad row


def chats(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Rows of another url, each with other messages."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            role = {"content": f"é {index}", "role": "user"}
            body = {"messages": [role], "max_tokens": 60 if index in bad else 8}
            url = "/v1/chat/completions"
            row = {"custom_id": f"c{index}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(row) + "\n")
    return path


def test_workers_check_what_the_index_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_checks, "LOOKED_INTO", 4)
    monkeypatch.setattr(row_checks, "CHECK_ROWS", 10)
    source = chats(tmp_path / "in.jsonl", 60, bad=(30, 59))
    job, output = tmp_path / "job", tmp_path / "out.jsonl"
    engine = FakeEngine()
    for _ in range(2):  # whoever comes later refuses it, too, and does not check again
        with pytest.raises(
            RequestError, match=r"2 of 60 lines cannot be run\n  line 31: .*\n  line 60"
        ):
            worker(FolderStore(job), source, output, 20, engine, max_errors=1).run()
    assert not engine.seen
    checks = {name for name in os.listdir(job / "done") if name.startswith("check")}
    assert len(checks) == 6 and "checks.json" in checks
    assert set(os.listdir(job / "leases")) == {"index.1", "checks.1"} | {
        name.replace("json", "1") for name in checks - {"checks.json"}
    }
    workers = [started(job, source, output, shards=20, max_errors=2) for _ in range(3)]
    for process in workers:
        process.join()
        assert process.exitcode == 1
    assert output.read_bytes() == single(source, tmp_path / "single.jsonl", max_errors=2)


def test_checks_go_on_after_a_worker_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_checks, "LOOKED_INTO", 4)
    monkeypatch.setattr(row_checks, "CHECK_ROWS", 10)
    source, output = chats(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    store = FolderStore(tmp_path / "job")
    lost = started(tmp_path / "job", source, output, shards=20, dies=True)
    lost.join()
    assert lost.exitcode == -signal.SIGKILL and store.names("leases") != []
    assert worker(store, source, output, 20).run() == 0
    assert output.read_bytes() == single(source, tmp_path / "single.jsonl")
    assert any(name.startswith("check-") and name.endswith(".2") for name in store.names("leases"))


@pytest.mark.parametrize("other", [{"digest": "e"}, {"shards": 5}, {"limit": 3}])
def test_a_folder_has_one_job(tmp_path: Path, other: dict[str, Any]) -> None:
    source = write(tmp_path / "in.jsonl", 8)
    store = FolderStore(tmp_path / "job")
    worker(store, source, tmp_path / "o.jsonl").run()
    with pytest.raises(RequestError, match="a job of other plans"):
        worker(store, source, tmp_path / "o.jsonl", **other).run()


def test_a_worker_with_another_input_answers_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 8)
    store = FolderStore(tmp_path / "job")
    made = make_index(JobInput(str(source), 4), plan(), FakeTokenizer(), lambda: None)
    store.create(done_name("index"), json.dumps(made.as_result()).encode())
    source.write_text(source.read_text().replace("row 3", "row 9"), encoding="utf-8")
    with pytest.raises(RequestError, match="are not those of this job"):
        worker(store, source, tmp_path / "o.jsonl").run()
    assert not (tmp_path / "o.jsonl").exists()


def test_silence_is_judged_by_what_is_seen_with_the_own_clock(tmp_path: Path) -> None:
    """A heartbeat that changes keeps a lease, one that does not loses it; dates mean nothing."""
    store, clock = FolderStore(tmp_path), [1e9]
    held = Lease(store, "00000", 1, "a", timeout_s=3600)
    assert store.create(held.name, shard_lease.content("a", 0))
    os.utime(tmp_path / held.name, (0, 0))
    leases = Leases(store, "b", 10.0, lambda: clock[0])
    for _ in range(5):
        assert leases.take(["00000"]) is None
        clock[0] += 9
        held.write_beat()
    assert leases.take(["00000"]) is None
    clock[0] += 10
    lease = leases.take(["00000"])
    assert lease is not None and lease.generation == 2
    lease.end(release=True)
    other = Leases(store, "c", 1e6, lambda: clock[0]).take(["00000"])
    assert other is not None and other.generation == 3  # a lease that was given back is free
    other.end()


def test_the_last_shards_are_left_to_the_faster(tmp_path: Path) -> None:
    """Who is slower begins none of the last ones, unless those who should do them are gone."""
    store, clock = FolderStore(tmp_path), [0.0]
    units = ["00000", "00001", "00002"]
    fast = Leases(store, "fast", 3600.0).take(units)
    slow = Leases(store, "slow", 10.0, lambda: clock[0])
    assert fast is not None
    for _ in range(3):
        assert slow.take(units, leave_last=2) is None
        clock[0] += 9
        fast.write_beat()
    fast.end()
    assert slow.take(units, leave_last=2) is None
    clock[0] += 10
    taken = []
    for _ in units:
        lease = slow.take(units, leave_last=2)
        assert lease is not None
        lease.commit({})
        lease.end()
        taken.append(lease.unit)
    assert taken[0] == fast.unit and sorted(taken) == units
    early = Leases(FolderStore(tmp_path / "other"), "slow", 10.0).take(units, leave_last=2)
    assert early is not None  # three are left
    early.end()


def test_a_job_may_have_several_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is answered by one plan, whose rows have its ids; workers know all plans."""
    source, store = write(tmp_path / "in.jsonl", 24), FolderStore(tmp_path / "job")
    output = tmp_path / "o.jsonl"
    index = make_index(JobInput(str(source), 4), plan(), FakeTokenizer(), lambda: None)
    store.create(done_name("index"), json.dumps(index.as_result() | {"plans": ["d", "e"]}).encode())
    options = WorkerOptions(JobInput(str(source), 4), str(output), plans=("d", "e"), quiet=True)

    def work(digest: str) -> Worker:
        return Worker(store, options, plan(digest), FakeTokenizer(), FakeEngine)

    first, second = work("d"), work("e")
    lease = first._leases.take(index.names)
    assert lease is not None
    monkeypatch.setattr(shard_runs, "MOST_SHARDS", 1)
    first._runs(index).run(lease)
    assert second.run() == 0
    expected = {}
    for digest in "de":
        alone = tmp_path / f"{digest}.jsonl"
        run_batch(
            BatchOptions(source, alone, quiet=True), plan(digest), FakeTokenizer(), FakeEngine
        )
        expected[digest] = alone.read_text(encoding="utf-8").splitlines()
    lines = output.read_text(encoding="utf-8").splitlines()
    digests = []
    for number, line in enumerate(lines):
        digests.append(next(digest for digest in "de" if expected[digest][number] == line))
    assert sorted(digests) == ["d"] * 6 + ["e"] * 18
    with pytest.raises(RequestError, match="a job of other plans"):
        worker(store, source, output).run()


def test_the_worker_that_was_taken_over_stops(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = Leases(store, "a", 0.1).take(["00000"])
    assert first is not None
    first.check()
    assert store.create("leases/00000.2", b"{}")
    with pytest.raises(LeaseLost):
        wait_until(first.check)
    first.end(release=True)
    assert b"released" not in (store.read(first.name) or b"")


def test_a_worker_that_stands_still_lets_its_lease_lapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_lease, "STALL_S", 0.2)
    store = FolderStore(tmp_path)
    first = Leases(store, "a", 0.1).take(["00000"])
    other = Leases(store, "b", 0.1)
    taken: list[Lease] = []

    def take() -> bool:
        taken.extend(filter(None, [other.take(["00000"])]))
        return bool(taken)

    wait_until(take)
    assert first is not None
    for lease in (first, *taken):
        lease.end()


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_one_of_many_gets_a_lease(tmp_path: Path, kind: str) -> None:
    store: Store = FolderStore(tmp_path)
    if kind == "bucket":
        store = bucket(tmp_path.name + kind)
    taken: list[Lease] = []
    barrier = threading.Barrier(16)

    def take(number: int) -> None:
        leases = Leases(store, f"w{number}", 60.0)
        barrier.wait()
        for _ in range(8):
            taken.extend(filter(None, [leases.take([f"{i:05d}" for i in range(40)])]))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter(lease.name for lease in taken)
    assert len(counts) == 40 and set(counts.values()) == {1}
    for lease in taken:
        lease.end()


def test_a_second_commit_finds_the_first(tmp_path: Path) -> None:
    """Whoever is first decides; a worker that comes back from a long sleep changes nothing."""
    store = FolderStore(tmp_path)
    first, second = (Lease(store, "00000", number, str(number), 60.0) for number in (1, 2))
    assert second.commit({"rows": 2})
    assert not first.commit({"rows": 1})
    assert json.loads(store.read(done_name("00000")) or b"") == {"rows": 2, "generation": 2}


def test_an_answer_of_the_store_that_was_lost(tmp_path: Path) -> None:
    """A client that tries an upload again finds its own object, and knows it."""
    store = bucket(tmp_path.name)
    upload = store.files.pipe_file

    def twice(path: str, data: bytes, mode: str = "overwrite") -> None:
        upload(path, data, mode)
        upload(path, data, mode)

    store.files.pipe_file = twice
    assert store.create("done/00000.json", b"mine")
    assert not store.create("done/00000.json", b"other")


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_shard_goes_on_at_its_last_line(tmp_path: Path, kind: str) -> None:
    """The lines of a worker that vanished are not answered again, nor lost."""
    source = write(tmp_path / "in.jsonl", 40)
    wanted = single(source, tmp_path / "single.jsonl")
    store: Store = FolderStore(tmp_path / "job")
    if kind == "bucket":
        store = bucket(tmp_path.name)
    made = make_index(JobInput(str(source), 1), plan(), FakeTokenizer(), lambda: None)
    store.create(done_name("index"), json.dumps(made.as_result()).encode())
    lease = Lease(store, "00000", 1, "gone", 0.2)
    store.create(lease.name, shard_lease.content("gone", 0))
    part = open_part(lease, tmp_path)
    lines = wanted.splitlines(keepends=True)
    part.path.write_bytes(b"".join(lines[:7]) + lines[7][:30])
    part.save()
    part.path.write_bytes(b"".join(lines[:9]) + lines[9][:30])
    part.save()
    engine = FakeEngine()
    assert worker(store, source, tmp_path / "o.jsonl", 1, engine, timeout_s=0.2).run() == 0
    assert len(engine.seen) == 40 - 9
    assert (tmp_path / "o.jsonl").read_bytes() == wanted
    assert parts_of(store, "00000") == []


@pytest.mark.parametrize("shards", [2, 6])
def test_the_batch_stays_full_where_two_shards_meet(tmp_path: Path, shards: int) -> None:
    """While rows are left that nobody has begun, as many run as the plan has sequences."""
    source, output = write(tmp_path / "in.jsonl", 60), tmp_path / "o.jsonl"
    engine = BorderEngine(60 // shards)
    assert worker(FolderStore(tmp_path / "job"), source, output, shards, engine).run() == 0
    running = [running for running, begun in engine.counts if begun < 60]
    assert running == [plan().max_seqs] * len(running) and len(running) > 20
    assert output.read_bytes() == single(source, tmp_path / "single.jsonl")


def test_all_rows_of_a_shard_are_begun_before_the_next_is_taken(tmp_path: Path) -> None:
    """Also where so many are finished already that the rows to run are not read yet."""
    source, store = write(tmp_path / "in.jsonl", 400), FolderStore(tmp_path / "job")
    lines = single(source, tmp_path / "single.jsonl").splitlines(keepends=True)
    made = make_index(JobInput(str(source), 2), plan(), FakeTokenizer(), lambda: None)
    store.create(done_name("index"), json.dumps(made.as_result()).encode())
    for number, unit in enumerate(made.names):
        lease = Lease(store, unit, 1, "gone", 0.2)
        store.create(lease.name, shard_lease.content("gone", 0))
        finished = lines[200 * number : 200 * number + 150]
        open_part(lease, tmp_path).path.write_bytes(b"".join(finished))
    begun: list[int] = []

    class Watching(FakeEngine):
        def step(self) -> Any:
            if {"00000.2", "00001.2"} <= set(store.names("leases")):
                begun.append(len(self.seen))
            return super().step()

    engine = Watching()
    assert worker(store, source, tmp_path / "o.jsonl", 2, engine, timeout_s=0.2).run() == 0
    assert begun[0] >= 50 and len(engine.seen) == 100
    assert (tmp_path / "o.jsonl").read_bytes() == b"".join(lines)


def test_a_lease_that_is_lost_takes_no_other_with_it(tmp_path: Path) -> None:
    """Its rows are dropped and nothing more is written for it, while the next shard goes on."""
    source, folder = write(tmp_path / "in.jsonl", 60), tmp_path / "job"
    store, parts = FolderStore(folder), folder / "parts"
    seen: dict[str, Any] = {}

    def written() -> list[bytes]:
        return [path.read_bytes() for path in sorted(parts.glob(f"{seen['lost']:05d}.1*"))]

    class Usurped(BorderEngine):
        def step(self) -> Any:
            if "after" not in seen and "before" in seen:
                seen.update(after=written(), left=self.shards)
            return super().step()

    def usurp(shards: list[int]) -> None:
        seen.update(lost=shards[0], other=shards[1])
        assert store.create(f"leases/{shards[0]:05d}.2", shard_lease.content("other", 0))
        time.sleep(0.4)  # the heartbeat sees it meanwhile
        seen["before"] = written()

    engine = Usurped(30, usurp)
    assert worker(store, source, tmp_path / "o.jsonl", 2, engine).run() == 0
    assert seen["left"] == [seen["other"]] and seen["before"] == seen["after"] != []
    names = set(store.names("leases"))
    assert f"{seen['lost']:05d}.3" in names and f"{seen['other']:05d}.2" not in names
    assert (tmp_path / "o.jsonl").read_bytes() == single(source, tmp_path / "single.jsonl")


def test_a_worker_that_is_killed_with_two_shards(tmp_path: Path) -> None:
    """Both go on at their last lines, none is lost or answered twice."""
    source, output, folder = (
        write(tmp_path / "in.jsonl", 60),
        tmp_path / "o.jsonl",
        tmp_path / "job",
    )
    lost = started(folder, source, output, shards=2, dies_at_border_of=30)
    lost.join()
    store = FolderStore(folder)
    assert lost.exitcode == -signal.SIGKILL and store.names("done") == ["index.json"]
    assert sorted(store.names("leases")) == ["00000.1", "00001.1", "index.1"]
    lines = {line for path in (folder / "parts").glob("*") for line in read_whole_lines(path)}
    engine = FakeEngine()
    assert worker(store, source, output, 2, engine).run() == 0
    assert len(engine.seen) == 60 - len(lines) < 40
    assert output.read_bytes() == single(source, tmp_path / "single.jsonl")


class FreezingEngine(FakeEngine):
    """Stands still at its tenth step until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.stands, self.goes_on = threading.Event(), threading.Event()

    def step(self) -> Any:
        self.steps += 1
        if self.steps == 10:
            self.stands.set()
            assert self.goes_on.wait(20)
        return super().step()


def test_a_worker_that_wakes_up_late_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_lease, "STALL_S", 0.2)
    source = write(tmp_path / "in.jsonl", 30)
    wanted = single(source, tmp_path / "single.jsonl")
    folder, output = tmp_path / "job", tmp_path / "o.jsonl"
    engine = FreezingEngine()
    frozen = worker(FolderStore(folder), source, output, 2, engine, timeout_s=0.2)
    other = started(folder, source, output, shards=2, timeout_s=0.2, step_ms=1)
    codes: list[int] = []

    def watch() -> None:
        assert engine.stands.wait(20)
        wait_until(lambda: output.exists())
        engine.goes_on.set()

    thread = threading.Thread(target=watch)
    thread.start()
    codes.append(frozen.run())
    thread.join()
    other.join()
    assert codes == [0] and other.exitcode == 0
    assert output.read_bytes() == wanted
    assert FolderStore(folder).names("parts") == []


@pytest.mark.slow
def test_killed_workers_lose_and_double_nothing(tmp_path: Path) -> None:
    """Five workers are killed again and again, one with a clock that is an hour off."""
    rng = random.Random(0)
    source = write(tmp_path / "in.jsonl", 300, bad=(7,))
    wanted = single(source, tmp_path / "single.jsonl", max_errors=1)
    folder, output = tmp_path / "job", tmp_path / "o.jsonl"
    options = {"shards": 12, "max_errors": 1, "timeout_s": 0.3, "step_ms": 15}
    workers, kills = [], 0
    for number in range(5):
        clock_s = 3600.0 * (number == 0)
        workers.append(started(folder, source, output, clock_s=clock_s, **options))
    until = time.monotonic() + 60
    while not output.exists():
        assert time.monotonic() < until
        time.sleep(0.15 * rng.random())
        victim = rng.randrange(5)
        if kills < 40 and workers[victim].pid:
            workers[victim].kill()
            kills += 1
            workers[victim].join()
            clock_s = 3600.0 * (victim == 0)
            workers[victim] = started(folder, source, output, clock_s=clock_s, **options)
    for process in workers:
        process.join(30)
        assert process.exitcode == 1
    assert kills > 10
    assert output.read_bytes() == wanted


def test_a_signal_gives_the_shard_back(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 60)
    folder, output = tmp_path / "job", tmp_path / "o.jsonl"
    process = started(folder, source, output, shards=2, timeout_s=60.0, step_ms=20)
    wait_until(lambda: list((folder / "parts").glob("*.jsonl")))
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 130
    begin_s = time.monotonic()
    assert worker(FolderStore(folder), source, output, 2, timeout_s=60.0).run() == 0
    assert time.monotonic() - begin_s < 20  # it did not wait for the heartbeat to be missed
    assert output.read_bytes() == single(source, tmp_path / "single.jsonl")


class Halt(Exception):
    """The end of a merge at some moment."""


def finished_job(folder: Path, source: Path) -> tuple[Store, JobIndex]:
    """A job of which the merge is left, and its parts."""
    store = FolderStore(folder)

    def halt(self: Merge, output: str) -> None:
        raise Halt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Halt):
        patch.setattr(Merge, "write", halt)
        worker(store, source, folder / "o.jsonl", 6).run()
    return store, JobIndex.parse(store.read(done_name("index")) or b"")


def test_a_merge_goes_on_after_any_end(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 20)
    wanted = single(source, tmp_path / "single.jsonl")
    store, index = finished_job(tmp_path / "job", source)
    output = tmp_path / "out.jsonl"
    for allowed in range(0, 40, 3):
        left = [allowed]

        def moved(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Halt

        try:
            Merge(store, index, moved).write(str(output))
        except Halt:
            assert not output.exists()
            draft = output.with_name("out.jsonl.merging")
            if draft.exists():
                assert wanted.startswith(draft.read_bytes())
    assert output.read_bytes() == wanted
    Merge(store, index, lambda: None).write(str(output))  # the one that was asleep
    assert output.read_bytes() == wanted
    output.write_bytes(wanted[:-1] + b"!")
    with pytest.raises(RequestError, match="is not the output of this job"):
        Merge(store, index, lambda: None).write(str(output))


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 20)
    store, index = finished_job(tmp_path / "job", source)
    part = next((tmp_path / "job" / "parts").glob("00003.*"))
    part.write_bytes(part.read_bytes().replace(b"c10", b"c99"))
    with pytest.raises(RequestError, match="answers of shard 00003 are damaged"):
        Merge(store, index, lambda: None).write(str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_was_there_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 4)
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n", encoding="utf-8")
    with pytest.raises(RequestError, match="this job has not written it"):
        worker(FolderStore(tmp_path / "job"), source, output).run()
    assert output.read_text(encoding="utf-8") == "mine\n"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.booleans())
def test_shards_hold_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, shards: int, ends: bool
) -> None:
    source = write(tmp_path_factory.mktemp("shards") / "in.jsonl", count)
    if not ends:
        source.write_bytes(source.read_bytes().rstrip())
    index = make_index(JobInput(str(source), shards), plan(), FakeTokenizer(), lambda: None)
    assert index.rows == count and len(index.shards) == min(shards, count)
    sizes = [shard.rows for shard in index.shards]
    assert not sizes or max(sizes) - min(sizes) <= 1
    text = source.read_bytes()
    pieces = [text[each.start : each.start + each.size_bytes] for each in index.shards]
    assert b"".join(pieces) == text[: len(text) * bool(pieces)]
    assert JobIndex.parse(json.dumps(index.as_result()).encode()) == index


@pytest.mark.parametrize("place", ["memory://x/y", "http://host/x"])
def test_a_store_without_conditions_is_refused(place: str) -> None:
    with pytest.raises(RequestError, match="cannot hold leases"):
        open_store(place)


@pytest.mark.slow
def test_the_command_answers_as_without_leases(tmp_path: Path) -> None:
    """The demo model; the summary of a finished job has the totals of its answers."""
    source, bundle = tmp_path / "in.jsonl", str(ROOT / "plans/frozen/demo-cpu")
    rows = (ROOT / "examples/demo/batch.jsonl").read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join(rows[:12]) + "\n", encoding="utf-8")

    def run(output: Path, *options: str) -> bytes:
        words = ["run", bundle, "--input", str(source), "--output", str(output), "--no-canary"]
        done = CliRunner().invoke(main, [*words, *options])
        assert done.exit_code == 0, done.output
        return (output / "output.jsonl" if output.is_dir() else output).read_bytes()

    wanted = run(tmp_path / "single.jsonl")
    folder = tmp_path / "job"
    assert run(folder, "--lease", str(folder), "--shards", "3") == wanted
    summary = tmp_path / "summary.json"
    assert run(folder, "--lease", str(folder), "--shards", "3", "--summary", str(summary)) == wanted
    total = json.loads(summary.read_text(encoding="utf-8"))
    usages = [json.loads(line)["response"]["body"]["usage"] for line in wanted.splitlines()]
    assert total["rows"] == 12 and not total["failed"]
    assert total["generated_tokens"] == sum(usage["completion_tokens"] for usage in usages)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket of a server that speaks S3, on this machine."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


@pytest.mark.filterwarnings("default")  # what S3's client and server warn of is theirs
def test_a_job_in_a_bucket_of_s3(tmp_path: Path, s3: str) -> None:
    source = write(tmp_path / "in.jsonl", 23, bad=(11,))
    files, _ = open_files(f"{s3}/in.jsonl")
    files.pipe_file("bucket/in.jsonl", source.read_bytes())
    store = open_store(f"{s3}/job")
    won = []

    def make(number: int) -> None:
        if store.create("done/first.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.read("done/first.json") == str(won[0]).encode()
    job = JobInput(f"{s3}/in.jsonl", 4, max_errors=1)
    options = WorkerOptions(job, f"{s3}/out.jsonl", 5.0, quiet=True)
    assert Worker(store, options, plan(), FakeTokenizer(), FakeEngine).run() == 1
    found = files.cat_file("bucket/out.jsonl")
    assert found == single(source, tmp_path / "single.jsonl", max_errors=1)
    assert store.names("parts") == []
