"""The history: a run is counted rightly, kept whole, and read whatever stands beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, make_spec
from drafting import plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launches import captured
from symbolic import SymbolicExecutor

from tokenspeed_plan.planner.advisor import calibration
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.machines.hardware import (
    find_hardware,
    prices_digest,
    read_profile,
    to_hardware,
)
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.bench.host_terms import HostTerms
from tokenspeed_plan.runtime.history import history_file, lessons
from tokenspeed_plan.runtime.history.history_file import (
    append_record,
    history_path,
    older_path,
    read_history,
)
from tokenspeed_plan.runtime.history.keeping import Prices, priced
from tokenspeed_plan.runtime.history.load_watch import LoadWatch
from tokenspeed_plan.runtime.history.run_record import (
    LoadFacts,
    Measured,
    Predicted,
    RunRecord,
    Spread,
    StepRow,
)
from tokenspeed_plan.runtime.history.sparse_sample import SparseSample

PRICES = prices_digest(find_hardware("cpu"))
NO_TERMS = HostTerms(7.0, 1.0, 9.0)


def row(phase: Any = "decode", bucket: int = 8, **changes: Any) -> StepRow:
    facts: dict[str, Any] = {"steps": 100, "wall_s": 0.1, "seqs": float(bucket), "tokens": 8.0}
    facts |= {"context": 90.0, "committed": float(bucket), "timed": 100, "device_us": 1000.0}
    return StepRow(phase=phase, bucket=bucket, **facts | {"host_us": 50.0} | changes)


def record(*rows: StepRow, **changes: Any) -> RunRecord:
    predicted = Predicted(profile="cpu", prices=PRICES, tokens_per_s_out=None)
    facts: dict[str, Any] = {"command": "run", "plan": "p", "model": "m", "gpu": "cpu", "ranks": 1}
    facts |= {"device": "cpu", "versions": {}, "predicted": predicted, "at": "2026-01-01"}
    return RunRecord(steps=rows, **facts | changes)


@given(st.integers(0, 500), st.integers(1, 20))
def test_a_sample_is_bounded_and_even(count: int, most: int) -> None:
    sample = SparseSample[int](most)
    for number in range(count):
        sample.add(number)
    assert sample.count == count and len(sample.values) <= most
    stride = 1
    while len(range(0, count, stride)) > max(most, 1):
        stride *= 2
    assert sample.values == list(range(0, count, stride))


def engine_of(checkpoint: Any, ahead: bool) -> Engine:
    plan = plan_of(checkpoint("moe"), 0)
    plan = captured(plan) if ahead else plan
    return Engine(plan, SymbolicExecutor(plan))  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [False, True])
def test_everything_that_an_engine_does_is_counted_once(checkpoint: Any, ahead: bool) -> None:
    """By the engine's own counters; prompts of several lengths, some longer than a step."""
    engine = engine_of(checkpoint, ahead)
    prompts = [[length, *range(1, length)] for length in (5, 290, 70, 33, 17)]
    watch = LoadWatch(engine)
    done = engine.generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True))
    rows, load, metrics = watch.rows(), watch.load(), engine.metrics
    assert sum(each.steps for each in rows) == metrics.steps
    decode = [each for each in rows if each.phase == "decode"]
    assert sum(each.steps for each in decode) == metrics.decode_steps
    assert sum(each.steps * each.seqs for each in decode) == pytest.approx(metrics.decode_passes)
    prefill = [each for each in rows if each.phase == "prefill"]
    assert sum(each.steps * each.tokens for each in prefill) == pytest.approx(
        metrics.computed_tokens, rel=1e-3
    )
    assert sum(each.steps * each.prompts for each in prefill) == pytest.approx(len(prompts), 1e-3)
    assert load.requests == len(prompts) and load.concurrency_max == len(prompts)
    assert load.prompt_tokens == sum(map(len, prompts))
    assert load.output_tokens == sum(len(each.token_ids) for each in done) == 45
    assert load.prompt_len is not None and load.prompt_len.max == 290
    measured = watch.measured()
    assert measured.ttft_ms is not None and measured.busy_s <= measured.total_s


class Turns:
    """A loop whose turns are told, and the watch of it."""

    def __init__(self, ahead: bool) -> None:
        self.loop = SimpleNamespace(last_batch=None, in_flight=None, sequences={}, elsewhere=None)
        pool = SimpleNamespace(programs=(SimpleNamespace(captured=ahead),))
        metrics = SimpleNamespace(host_s=0.0, steps=0, preemptions=0)
        engine: Any = SimpleNamespace(
            loop=self.loop, plan=SimpleNamespace(pool=pool), metrics=metrics
        )
        self.watch = LoadWatch(engine)
        self.now_s = self.watch._ended_s

    def turn(
        self,
        launch: Any = None,
        *,
        ends_at_once: bool = False,
        pause: float = 0.0,
        wall: float,
        waited: float = 0.0,
    ) -> None:
        if launch is not None:
            self.loop.last_batch = launch
        flies = launch is not None and not ends_at_once
        self.loop.in_flight = SimpleNamespace(batch=launch) if flies else None
        self.now_s += pause
        self.watch.note(self.now_s, self.now_s + wall, waited, [])
        self.now_s += wall

    def us(self, name: str) -> list[float | None]:
        return [
            look.device_us and round(look.device_us, 3)
            for look in self.watch._programs[name].device.values
        ]


def step(phase: str, bucket: int, count: int = 1) -> Any:
    program = SimpleNamespace(phase=phase, bucket=bucket, depth=0, name=f"{phase}/{bucket}")
    sequences = [SimpleNamespace(num_computed=50 + count, num_cached_tokens=0)]
    return SimpleNamespace(program=program, sequences=sequences, counts=[count], num_tokens=count)


def test_a_step_ahead_takes_from_one_commit_to_the_next() -> None:
    turns = Turns(ahead=True)
    turns.turn(step("decode", 1), wall=0.001)
    turns.turn(step("decode", 1), wall=0.004, waited=0.003)
    turns.turn(step("decode", 1), wall=0.003, waited=0.002, pause=0.002)
    assert turns.us("decode/1") == [4000.0, 5000.0]


def test_a_step_that_the_host_did_not_wait_for_tells_nothing_of_the_device() -> None:
    turns = Turns(ahead=True)
    turns.turn(step("decode", 1), wall=0.001)
    turns.turn(step("decode", 1), wall=0.004, waited=0.0001)
    assert turns.us("decode/1") == [None]
    assert turns.watch.rows()[0].device_us is None


def test_a_step_behind_a_part_of_a_prompt_tells_nothing_of_the_device() -> None:
    """The part has no outputs: nobody knows when it ended."""
    turns = Turns(ahead=True)
    turns.turn(step("prefill", 64, 64), ends_at_once=True, wall=0.001)
    turns.turn(step("prefill", 64, 64), wall=0.001)
    turns.turn(step("decode", 1), wall=0.05, waited=0.049)
    turns.turn(wall=0.002, waited=0.001)
    assert turns.us("prefill/64") == [None, None] and turns.us("decode/1") == [2000.0]


def test_elsewhere_a_step_takes_what_the_host_waited() -> None:
    turns = Turns(ahead=False)
    turns.turn(step("decode", 1), ends_at_once=True, wall=0.004, waited=0.003)
    turns.turn(wall=0.001)  # nothing to do
    assert turns.us("decode/1") == [3000.0]
    assert turns.watch.rows()[0].host_us == pytest.approx(1000.0)


def test_a_load_is_priced_step_by_step() -> None:
    """100 steps of 2 ms and 50 of 10 ms, and half a second in which nobody asked."""

    class Times:
        def decode_us(self, bucket: int, seqs: int, context: float) -> float:
            assert (bucket, seqs, context) == (8, 6, 91.0)
            return 2000.0

        def prefill_us(self, tokens: int, seqs: int, context: float) -> float:
            return 10_000.0

        def host_us(self, seqs: int, prompts: int) -> float:
            return 500.0

    load = LoadFacts(
        requests=1,
        failed=0,
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=600,
        concurrency_mean=1.0,
        concurrency_max=1,
        prompt_len=None,
        output_len=None,
    )
    measured = Measured(
        total_s=1.5,
        busy_s=1.0,
        tokens_per_s_out=400.0,
        ttft_ms=None,
        tpot_ms=None,
        queue_ms=Spread.of([]),
        host_us_per_step=1.0,
        preemptions=0,
    )
    run = record(row(seqs=6.0), row("prefill", 64, steps=50), load=load, measured=measured)
    for hides, seconds in ((True, 0.5 + 0.2 + 0.5), (False, 0.5 + 0.2 + 0.5 + 150 * 500e-6)):
        predicted = priced(run, Prices("cpu", PRICES, Times(), hides)).predicted
        assert predicted is not None
        assert predicted.tokens_per_s_out == pytest.approx(600 / seconds, rel=1e-3)


def test_the_file_is_the_users_alone_and_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.jsonl"
    for number in range(40):
        append_record(path, record(row(), plan=f"p{number}"), max_bytes=3000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for each in (path, older_path(path)):
        assert 0 < each.stat().st_size <= 3000
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "history.1.jsonl",
        "history.jsonl",
    ]
    found = read_history(path)
    assert found.damaged == 0
    plans = [each.plan for each in found.records]
    assert plans == [f"p{number}" for number in range(40 - len(plans), 40)] and len(plans) > 4


def append_many(path: Path, name: int, count: int, max_bytes: int) -> None:
    for number in range(count):
        append_record(path, record(row(), plan=f"{name}-{number}"), max_bytes)


@pytest.mark.parametrize("max_bytes", [1 << 30, 5000])
def test_several_processes_lose_nothing_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    """Each line is whole, and none is written to a file that is full already."""
    monkeypatch.setattr(history_file, "_TRIES", 6000)  # beside other tests, they may be slow
    path, fork = tmp_path / "history.jsonl", multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=append_many, args=(path, name, 40, max_bytes)) for name in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = read_history(path)
    assert found.damaged == 0 and path.stat().st_size <= max_bytes
    plans = {each.plan for each in found.records}
    assert len(plans) == len(found.records)
    if older_path(path).exists():
        assert older_path(path).stat().st_size <= max_bytes
    else:
        assert plans == {f"{name}-{number}" for name in range(4) for number in range(40)}


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_record(path, record(row(), plan="a"))
    path.write_bytes(path.read_bytes() + b'{"format":1,"plan":"cut')
    append_record(path, record(row(), plan="b"))
    found = read_history(path)
    assert [each.plan for each in found.records] == ["a", "b"] and found.damaged == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = sorted(RunRecord.model_fields)


@st.composite
def damaged_lines(draw: Callable[..., Any]) -> bytes:
    """Bytes, JSON, or a record of which a field is another thing."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return bytes(draw(st.binary(max_size=80)).replace(b"\n", b" "))
    if kind == 1:
        return json.dumps(draw(JSON)).encode()
    data = json.loads(record(row()).model_dump_json())
    data[draw(st.sampled_from(NAMES))] = draw(st.sampled_from([-1, "x" * 300, [None], 1e999]))
    return json.dumps(data).encode()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(damaged_lines(), max_size=6))
def test_damaged_lines_are_passed_over(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "history.jsonl"
    good = [record(row(), plan=f"p{number}") for number in range(len(lines) + 1)]
    text = b""
    for line, each in zip([*lines, b""], good, strict=True):
        text += each.model_dump_json().encode() + b"\n" + line + b"\n"
    path.write_bytes(text)
    found = read_history(path)
    assert [each.plan for each in found.records] == [each.plan for each in good]
    assert found.damaged == sum(bool(line.strip()) for line in lines)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def place(**variables: str) -> Path | None:
        for name in ("TOKENSPEED_HISTORY", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": str(tmp_path)} | variables).items():
            monkeypatch.setenv(name, value)
        return history_path()

    state = tmp_path / ".local/state/tokenspeed/history.jsonl"
    assert place() == place(TOKENSPEED_HISTORY="") == state
    assert place(XDG_STATE_HOME="relative") == state
    assert place(XDG_STATE_HOME="/x") == Path("/x/tokenspeed/history.jsonl")
    assert place(TOKENSPEED_HISTORY="~/h") == tmp_path / "h"
    assert place(TOKENSPEED_HISTORY="off") is place(TOKENSPEED_HISTORY="OFF") is None


def machine_runs(factor: float = 1.3, prices: str = PRICES) -> list[RunRecord]:
    """Two plans on a machine that needs 40 us and 2 for each sequence; one run was disturbed."""
    runs = []
    for number in range(6):
        slow = 9.0 if number == 3 else 1.0
        rows = [
            row(
                bucket=size,
                device_us=slow * factor * 100.0 * size,
                predicted_us=100.0 * size,
                host_us=slow * (40.0 + 2.0 * size),
            )
            for size in (1, 4, 16)
        ]
        prompt_us = slow * (40.0 + 2.0 * 4 + 25.0 * 3)
        rows.append(
            row("prefill", 64, committed=4.0, prompts=3.0, device_us=None, host_us=prompt_us)
        )
        predicted = Predicted(profile="cpu", prices=prices, tokens_per_s_out=None)
        runs.append(record(*rows, plan=f"p{number % 2}", predicted=predicted))
    return runs


def test_lessons_are_what_made_the_runs() -> None:
    found = lessons.learn(machine_runs(), PRICES, NO_TERMS)
    assert found.host == HostTerms(pytest.approx(40.0), pytest.approx(2.0), pytest.approx(25.0))
    assert found.factor == pytest.approx(1.3) and found.spread == pytest.approx(0.0)
    assert (found.runs, found.programs, found.plans) == (6, 6, 2) and found.is_enough


def test_predictions_by_other_prices_say_nothing() -> None:
    found = lessons.learn(machine_runs(prices="other"), PRICES, NO_TERMS)
    assert found.factor is None and found.host is not None


def test_one_size_of_a_batch_leaves_the_profiles_slope() -> None:
    rows = [row(bucket=4, host_us=60.0, device_us=None)]
    assert lessons.host_terms(rows, NO_TERMS) == HostTerms(56.0, 1.0, 9.0)
    assert lessons.host_terms([row(host_us=None)], NO_TERMS) is None


@pytest.mark.parametrize(
    "runs",
    [
        [],
        machine_runs()[:2],
        [record(row(steps=19))] * 40,
        [record(row(steps=99))] * 3,
    ],
)
def test_too_little_is_not_believed(runs: list[RunRecord]) -> None:
    assert not lessons.learn(runs, PRICES, NO_TERMS).is_enough


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "history" / "h.jsonl"
    monkeypatch.setenv(history_file.VARIABLE, str(path))
    return path


def cli(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_a_profile_learns_from_the_history(history: Path, tmp_path: Path) -> None:
    for each in machine_runs():
        append_record(history, each)
    append_record(history, record(row(), device="NVIDIA H200"))
    out = tmp_path / "mine.yaml"
    done = cli("calibrate", "--from-history", "-o", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "6 runs" in done.stderr and "1.300 x what cpu says" in done.stderr
    assert "1 of other machines" in done.stderr
    mine, base = find_hardware(str(out)), find_hardware("cpu")
    assert mine.host_step_us == 40.0 and mine.host_seq_us == 2.0 and mine.host_prompt_us == 25.0
    for name, residual in base.residuals.items():
        assert mine.residuals[name] == pytest.approx(1.3 * residual, rel=1e-3)
        assert mine.waits_us[name] == pytest.approx(1.3 * base.waits_us[name], rel=1e-3)
    assert mine.launch_us == pytest.approx(1.3 * base.launch_us, rel=1e-3)
    assert mine.read_bytes_per_s == base.read_bytes_per_s
    assert "6 runs" in mine.sources["residuals"] if "residuals" in mine.sources else True
    assert "`cpu` times 1.3" in mine.sources["launch_us"]
    assert "6 runs" in mine.sources["host_step_us"]
    printed = cli("calibrate", "--from-history", "--device", "cpu")
    assert read_profile(printed.stdout, "printed") == read_profile(out.read_text(), "mine")


def test_a_profile_that_has_learnt_is_not_corrected_twice(history: Path, tmp_path: Path) -> None:
    """Runs that were predicted before say nothing of it; those after it do."""
    out = tmp_path / "mine.yaml"
    for each in machine_runs():
        append_record(history, each)
    assert cli("calibrate", "--from-history", "-o", out, "--device", "cpu").exit_code == 0
    args = ("calibrate", "--from-history", "--device", "cpu", "--base", out)
    assert "no run was predicted by the prices" in cli(*args).stderr
    own = prices_digest(to_hardware(calibration.base_profile(str(out))))
    for each in machine_runs(1.1, own):
        append_record(history, each)
    assert "1.100 x" in cli(*args).stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives_are_slower_where_ranks_have_added_up(ranks: int) -> None:
    base = calibration.base_profile("NVIDIA H200")
    runs = [each.model_copy(update={"ranks": ranks}) for each in machine_runs()]
    found = lessons.learn(runs, PRICES, NO_TERMS)
    assert found.has_sums == (ranks > 1) and found.factor is not None
    made = to_hardware(calibration.slower(base, 1.3, 0.0, found.has_sums, "x", "a test"))
    for name in ("one_shot_us", "two_shot_us", "push_us", "library_us", "gather_us"):
        for count, times in getattr(to_hardware(base), name).items():
            factor = 1.3 if ranks > 1 else 1.0
            own = getattr(made, name)[count]
            assert own == {size: pytest.approx(factor * us, 5e-3) for size, us in times.items()}


def test_a_spread_widens_the_intervals() -> None:
    base = calibration.base_profile("cpu")
    made = to_hardware(calibration.slower(base, 2.0, 0.4, False, "x", "a test"))
    was = to_hardware(base).errors
    for kind in ("memory", "matrix", "launch"):
        assert made.errors[kind] == max(0.4, was[kind])
    assert made.errors["collective"] == was["collective"]


def test_nothing_is_made_of_nothing(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in machine_runs()[:2]:
        append_record(history, each)
    history.write_bytes(history.read_bytes() + b"no\n")
    few = cli("calibrate", "--from-history", "--device", "cpu")
    assert few.exit_code == 2 and few.stderr.startswith("error: 2 runs on cpu with 800 steps")
    assert "1 lines are damaged" in few.stderr and "\n\nhint: run, serve or bench" in few.stderr
    monkeypatch.setenv(history_file.VARIABLE, "off")
    off = cli("calibrate", "--from-history", "--device", "cpu")
    assert off.exit_code == 2 and off.stderr.startswith("error: the history is off")
    assert "Missing option '-o'" in cli("calibrate", "--device", "cpu").stderr


@pytest.fixture(scope="module")
def bundle(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    spec = make_spec(checkpoint("moe")).model_dump_json(exclude_none=True)
    (folder / "spec.yaml").write_text(spec)
    assert cli("plan", folder / "spec.yaml", "-o", folder / "plan").exit_code == 0
    return folder / "plan"


def kept_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_kept_with_what_was_predicted(bundle: Path, history: Path) -> None:
    secret = "def secret_name(x):"
    assert cli("run", bundle, "--prompt", secret, "--max-tokens", 30).exit_code == 0
    (line,) = kept_lines(history)
    assert line["command"] == "run" and line["device"] == "cpu" and line["ranks"] == 1
    assert line["load"]["requests"] == 1 and line["load"]["output_tokens"] <= 30
    assert line["predicted"]["prices"] == PRICES and line["predicted"]["tokens_per_s_out"] > 0
    assert all(each["predicted_us"] > 0 and each["device_us"] > 0 for each in line["steps"])
    text = history.read_text()
    assert "secret" not in text and str(bundle.parent) not in text


@pytest.mark.slow
def test_bench_is_kept(bundle: Path, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenspeed_plan.runtime.bench.machine.READ_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(
        "tokenspeed_plan.runtime.bench.machine.MATRIX", {"cpu": (16, torch.float32)}
    )
    args = ("--workload", "batch", "--rows", 3, "--prompt", 8, "--out", 6)
    assert cli("bench", bundle, *args).exit_code == 0
    assert cli("bench", bundle, "--context", 16).exit_code == 0
    rows, programs = kept_lines(history)
    assert rows["load"]["requests"] == 4  # one of them warms up
    assert "load" not in programs and programs["steps"][0]["timed"] == 50
    assert programs["steps"][0]["predicted_us"] > 0


@pytest.mark.slow
def test_the_history_can_be_off(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(history_file.VARIABLE, "off")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert cli("run", bundle, "--prompt", "x", "--max-tokens", 2).exit_code == 0
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "full", "under a file", "locked"])
def test_a_history_that_cannot_be_written_fails_no_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import fcntl

    (tmp_path / "file").write_text("")
    place = {
        "folder": tmp_path,
        "full": Path("/dev/full"),
        "under a file": tmp_path / "file" / "h",
        "locked": tmp_path / "file",
    }[kind]
    monkeypatch.setenv(history_file.VARIABLE, str(place))
    monkeypatch.setattr(history_file, "_TRIES", 2)
    with (tmp_path / "file").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cli("run", bundle, "--prompt", "x", "--max-tokens", 2)
    assert done.exit_code == 0 and done.stdout
    assert done.stderr.count("warning: the history") == 1, done.stderr


def test_tests_write_no_history() -> None:
    """Not even a command in a process of its own."""
    code = "from tokenspeed_plan.runtime.history.history_file import history_path as p; print(p())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "None" and os.environ[history_file.VARIABLE] == "off"
