"""OpenAI batch files: bad lines are named, no row is lost or doubled, order and resume hold."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import batch_fake
import pytest
from batch_fake import LIMITS, FakeEngine, FakeTokenizer, plan
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime import Engine, SamplingParams
from tokenspeed_plan.runtime.serving.batch import (
    BatchOptions,
    Selection,
    reading,
    run_batch,
    scan,
)
from tokenspeed_plan.runtime.serving.batch.files import STDIO, InputFile
from tokenspeed_plan.runtime.serving.batch.kept_rows import ROW_BYTES
from tokenspeed_plan.runtime.serving.batch.lines import Row, parse_row
from tokenspeed_plan.runtime.serving.batch.order import GROUP_TOKENS, Waiting
from tokenspeed_plan.runtime.serving.batch.summary import Histogram
from tokenspeed_plan.runtime.serving.batch.writers import open_writer, read_whole_lines
from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError
from tokenspeed_plan.runtime.serving.openai.conversion import check_body, to_requests

FAKE = ROOT / "tests" / "support" / "batch_fake.py"


def row(index: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": f"row {index}", "max_tokens": 8} | body
    return {"custom_id": f"c{index}", "method": "POST", "url": "/v1/completions", "body": body}


def chat(index: int, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"hi {index}"}], "max_tokens": 8} | body
    return {"custom_id": f"c{index}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_whole_lines(path)]


class Runner:
    """Runs batches in a folder, and remembers the engines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = FakeEngine()

    def __call__(
        self, rows: list[Any] | None, output: str = "out.jsonl", digest: str = "d", **options: Any
    ) -> int:
        source = self.folder / "in.jsonl"
        if rows is not None:
            write(source, rows)
        self.engine = FakeEngine()
        settings = BatchOptions(source, self.folder / output, **({"quiet": True} | options))
        return run_batch(settings, plan(digest), FakeTokenizer(), lambda: self.engine)

    def out(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return read(self.folder / name)


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_rows_come_back_in_order_with_every_field(run: Runner) -> None:
    assert run([row(i) for i in range(40)]) == 0
    lines = run.out()
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(40)]
    first = lines[0]
    assert set(first) == {"id", "custom_id", "response", "error"}
    assert first["error"] is None
    assert set(first["response"]) == {"status_code", "request_id", "body"}
    body = first["response"]["body"]
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (
        body["usage"]["total_tokens"]
        == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    )
    assert not (run.folder / "out.jsonl.resume").exists()


def test_the_longest_answers_start_first(run: Runner) -> None:
    """They do not run alone at the end then; the output keeps the order of the input."""
    run([row(i, max_tokens=1 + i % 5, seed=0) for i in range(20)], max_concurrency=2)
    lengths = [
        1 + int(line["custom_id"][1:]) % 5
        for name in run.engine.seen
        for line in run.out()
        if name.startswith(line["id"])
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert [line["custom_id"] for line in run.out()] == [f"c{i}" for i in range(20)]


def test_completion_order_holds_the_same_lines(run: Runner) -> None:
    rows = [row(i) for i in range(60)]
    run(rows)
    run(rows, "b.jsonl", order="completion")
    assert run.out() != run.out("b.jsonl")
    key = lambda line: line["custom_id"]  # noqa: E731
    assert sorted(run.out(), key=key) == sorted(run.out("b.jsonl"), key=key)


def test_chat_choices_token_ids_and_logprobs(run: Runner) -> None:
    run(
        [
            chat(0, n=2, return_token_ids=True, logprobs=True, top_logprobs=2, seed=1),
            row(1, prompt=[1, 2, 3], logprobs=2, return_token_ids=True, temperature=0),
        ]
    )
    answer, text = (line["response"]["body"] for line in run.out())
    assert answer["object"] == "chat.completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"])
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    logprobs = text["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["text_offset"] == list(range(len(logprobs["tokens"])))


BAD = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('"x"', "not a JSON object"),
    ('{"a": NaN}', "NaN is not JSON"),
    ("[" * 100_000, "nested too deeply"),
    (json.dumps(row(1) | {"url": "/v1/embeddings"}), "`url`"),
    (json.dumps(row(1) | {"method": "GET"}), "`method`"),
    (json.dumps(row(1) | {"custom_id": ""}), "`custom_id`"),
    (json.dumps({k: v for k, v in row(1).items() if k != "custom_id"}), "`custom_id` is missing"),
    (json.dumps(row(1) | {"extra": 1}), "unknown field `extra`"),
    (json.dumps(row(1, temprature=1)), "did you mean `temperature`?"),
    (json.dumps(row(1, temperature="hot")), "`temperature`"),
    (json.dumps(row(1, temperature=-1)), "`temperature`"),
    (json.dumps(row(1, metadata={"x": 1})).replace('"x": 1', '"x": [-1e999]'), "-1e999 is beyond"),
    (json.dumps(chat(1)).replace('"role"', '"weight": 1e999, "role"'), "1e999 is beyond"),
    (json.dumps(row(1, top_p=0)), "`top_p`"),
    (json.dumps(row(1, max_tokens=0)), "`max_tokens`"),
    (json.dumps(row(1, stream=True)), "`stream`"),
    (json.dumps(row(1, suffix="x")), "`suffix`"),
    (json.dumps(row(1, best_of=2)), "`best_of`"),
    (json.dumps(row(1, presence_penalty=0.5)), "`presence_penalty`"),
    (json.dumps(row(1, tools=[{"type": "function"}])), "`tools` is not supported"),
    (json.dumps(row(1, stop=["a"] * 5)), "`stop`: list should have at most 4"),
    (json.dumps(row(1, stop="\ud83d")), "`body.stop` of the line is not Unicode"),
    (json.dumps(row(1, stop="x" * 1025)), "`stop`: string should have at most 1024"),
    (json.dumps(row(1, stop=7)), "`stop`: input should be a string or a list of strings"),
    (json.dumps(row(1, stop_token_ids=[256])), "token id 256 is not in the vocabulary of 256"),
    (json.dumps(row(1, stop_token_ids=[1 << 31])), "`stop_token_ids[0]`"),
    (json.dumps(row(1, stop_token_ids=[1] * 1025)), "`stop_token_ids`: list should have at most"),
    (json.dumps(row(1, model="gpt-5")), "the model `gpt-5` does not exist; `fake` is served"),
    (json.dumps(row(1, metadata={"a": {"\udc00": 1}})), "`body.metadata.a.\\udc00` of the line"),
    (json.dumps(row(1, prompt=[[1], "a"])), "`prompt[1]`: input should be a valid list"),
    (json.dumps(row(1, prompt=[[1]] * 9, n=128)), "1152 choices"),
    (json.dumps(row(1, metadata={"a": 1})).replace("1}", "[" * 70 + "]" * 70 + "}"), "too deeply"),
    (json.dumps(row(1, prompt="")), "the prompt is empty"),
    (json.dumps(row(1, prompt=[])), "the prompt is empty"),
    (json.dumps(row(1, prompt=["a", ""])), "the prompt is empty"),
    (json.dumps(row(1, prompt=[300])), "token id 300"),
    (json.dumps(row(1, prompt=[-1])), "`prompt[0]`: input should be greater than"),
    (json.dumps(row(1, prompt="x" * 57)), "over the plan's limit of 64"),
    (json.dumps(row(1, max_tokens=64)), "over the plan's limit of 64"),
    (json.dumps(row(1, prompt="\ud800")), "not Unicode"),
    (json.dumps(chat(1, messages=[])), "`messages`"),
    (json.dumps(chat(1, messages=[{"role": "user", "content": "\udfff"}])), "not Unicode"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=range(len(BAD)))
def test_bad_lines_are_named_before_anything_runs(line: str, says: str, run: Runner) -> None:
    with pytest.raises(RequestError) as caught:
        run([row(0), "", line, row(2)])
    assert "line 3: " in caught.value.message
    assert says in caught.value.message
    assert "1 of 3 lines" in caught.value.message
    assert not run.engine.seen
    assert not (run.folder / "out.jsonl").exists()


@pytest.mark.parametrize(("line", "says"), BAD, ids=range(len(BAD)))
def test_the_rest_runs_when_allowed(line: str, says: str, run: Runner) -> None:
    assert run([row(0), line, row(2)], max_errors=1, errors=run.folder / "bad.jsonl") == 1
    assert [item["custom_id"] for item in run.out()] == ["c0", "c2"]
    (bad,) = run.out("bad.jsonl")
    assert bad["response"] is None
    assert bad["error"]["line"] == 2
    assert says in bad["error"]["message"]


def test_repeated_ids_name_both_lines(run: Runner) -> None:
    with pytest.raises(RequestError, match="line 3: custom_id 'c0' was used on line 1"):
        run([row(0), row(1), row(0, prompt="other")])


def test_errors_stay_in_their_place_without_an_error_file(run: Runner) -> None:
    assert run([row(0), "{", row(2)], max_errors=5) == 1
    assert [line["error"] is None for line in run.out()] == [True, False, True]


def test_all_bad_lines_are_counted_and_the_first_shown(run: Runner) -> None:
    with pytest.raises(RequestError) as caught:
        run(["{"] * 50)
    assert "50 of 50 lines" in caught.value.message
    assert caught.value.message.count("\n  line ") == 20
    assert "and 30 more" in caught.value.message


def test_byte_order_mark_and_windows_ends(run: Runner) -> None:
    text = "\ufeff" + json.dumps(row(0)) + "\r\n\r\n" + json.dumps(row(1))
    (run.folder / "in.jsonl").write_text(text, newline="")
    assert run(None) == 0
    assert len(run.out()) == 2


def test_limit_and_shards_cover_the_file(run: Runner) -> None:
    rows = [row(i) for i in range(20)]
    ids = []
    for index in (1, 2, 3):
        run(rows, f"{index}.jsonl", selection=Selection(17, index, 3))
        ids += [line["custom_id"] for line in run.out(f"{index}.jsonl")]
    assert sorted(ids) == sorted(f"c{i}" for i in range(17))


def test_a_second_run_has_nothing_to_do(run: Runner) -> None:
    rows = [row(i) for i in range(10)]
    run(rows)
    before = (run.folder / "out.jsonl").read_bytes()
    assert run(rows) == 0
    assert not run.engine.seen
    assert (run.folder / "out.jsonl").read_bytes() == before


def test_a_line_beyond_the_budget_is_read_again_only_if_it_runs(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(i) for i in range(10)]
    run(rows)
    rows[4] = row(4, prompt="new")
    scans, reads = [], []
    lines, read_bytes = InputFile.lines, InputFile.read

    def counted_lines(self: InputFile) -> Any:
        scans.append(1)
        return lines(self)

    def counted_read(self: InputFile, offset: int, size_bytes: int) -> bytes:
        reads.append(read_bytes(self, offset, size_bytes))
        return reads[-1]

    monkeypatch.setattr(InputFile, "lines", counted_lines)
    monkeypatch.setattr(InputFile, "read", counted_read)
    assert run(rows, max_kept_bytes=0) == 0
    assert len(scans) == 1
    assert reads == [json.dumps(rows[4]).encode()]


def count_parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lines that are parsed from here on, by number."""
    parsed = []

    def counted(raw: bytes, line: int, digest: str) -> Row:
        parsed.append(line)
        return parse_row(raw, line, digest)

    for module in (scan, reading):
        monkeypatch.setattr(module, "parse_row", counted)
    return parsed


def test_a_file_within_the_budget_is_read_and_parsed_once(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(self: InputFile, offset: int, size_bytes: int) -> bytes:
        raise AssertionError("a line was read again")

    parsed = count_parsed(monkeypatch)
    monkeypatch.setattr(InputFile, "read", unread)
    assert run([row(i) for i in range(300)]) == 0
    assert parsed == list(range(1, 301))


@pytest.mark.parametrize("num_kept", [0, 5])
def test_a_file_beyond_the_budget_answers_the_same(
    num_kept: int, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(i) for i in range(20)]
    rows[2:5] = ["not JSON", row(3, n=2), row(4, prompt="longer " * 4)]
    run(rows, max_errors=1)
    parsed = count_parsed(monkeypatch)
    kept = [line for line in range(1, 21) if line != 3][:num_kept]
    sizes = [len(json.dumps(rows[line - 1])) for line in kept]
    budget = sum(sizes) + num_kept * ROW_BYTES
    assert run(rows, "b.jsonl", max_errors=1, max_kept_bytes=budget) == 1
    again = [line for line in range(1, 21) if line != 3 and line not in kept]
    assert parsed == [*range(1, 21), *again]
    assert run.out("b.jsonl") == run.out()


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_lines_are_found_again_by_offset(name: str, tmp_path: Path) -> None:
    rows = [json.dumps(row(i, prompt="é" * (i % 7 + 1))) + "\r\n" * (i % 3) for i in range(50)]
    with InputFile(write(tmp_path / name, rows)) as source:
        lines = list(source.lines())
        assert len(lines) == 50
        for line in [*lines[::7], *reversed(lines)]:
            assert source.read(line.offset, len(line.raw)) == line.raw
            assert json.loads(line.raw)


def test_a_line_that_changes_after_its_check_is_not_run(run: Runner) -> None:
    """Its answer would have the id of another row."""
    source = write(run.folder / "in.jsonl", [row(i) for i in range(300)])

    def load() -> FakeEngine:
        source.write_bytes(source.read_bytes().replace(b'"row 1"', b'"row x"'))
        return FakeEngine()

    options = BatchOptions(source, run.folder / "out.jsonl", quiet=True, max_kept_bytes=0)
    assert run_batch(options, plan(), FakeTokenizer(), load) == 1
    errors = [line["error"] for line in run.out() if line["error"]]
    assert [error["line"] for error in errors] == [2]
    assert "was changed after it was checked" in errors[0]["message"]


def test_changed_rows_and_plans_run_again(run: Runner) -> None:
    rows = [row(i) for i in range(10)]
    run(rows)
    rows[4] = row(4, prompt="new")
    run(rows)
    assert len(run.engine.seen) == 1
    run(rows, digest="other")
    assert len(run.engine.seen) == 10


def test_work_for_rows_outside_the_selection_is_kept(run: Runner) -> None:
    rows = [row(i) for i in range(12)]
    run(rows, selection=Selection(None, 1, 2))
    run(rows, selection=Selection(None, 2, 2))
    assert [line["custom_id"] for line in run.out()] == [f"c{i}" for i in range(12)]
    assert len(run.engine.seen) == 6


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_a_torn_file_is_mended(name: str, run: Runner) -> None:
    rows = [row(i) for i in range(30)]
    run(rows, name)
    whole = (run.folder / name).read_bytes()
    for cut in range(0, len(whole), max(len(whole) // 25, 1)):
        (run.folder / name).write_bytes(whole[:cut])
        assert run(rows, name) == 0
        assert run.out(name) == [json.loads(line) for line in read_all(whole, name)]


def read_all(data: bytes, name: str) -> list[bytes]:
    text = gzip.decompress(data) if name.endswith(".gz") else data
    return text.splitlines()


def test_failed_rows_are_tried_again_and_not_doubled(run: Runner) -> None:
    rows: list[Any] = [row(0), "{", row(2)]
    for _ in range(2):
        run(rows, max_errors=1, errors=run.folder / "bad.jsonl")
    assert len(run.out("bad.jsonl")) == 1
    rows[1] = row(1)
    assert run(rows, errors=run.folder / "bad.jsonl") == 0
    assert len(run.out()) == 3
    assert run.out("bad.jsonl") == []


def test_somebody_elses_file_is_left_alone(run: Runner) -> None:
    target = run.folder / "out.jsonl"
    for text in ("my notes\n", "no newline", '{"a": 1}\n'):
        target.write_text(text)
        with pytest.raises(RequestError, match="not the output of a batch"):
            run([row(0)])
        assert target.read_text() == text
        assert not (run.folder / "out.jsonl.resume").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "in.jsonl"}, "named for input and for output"),
        ({"summary": "in.jsonl"}, "named for input and for summary"),
        ({"summary": "out.jsonl"}, "named for output and for summary"),
        ({"errors": "out.jsonl.resume"}, "named for errors and for finished lines"),
        ({"errors": "e", "summary": "e"}, "named for errors and for summary"),
        ({"output": "no/such/out.jsonl"}, "cannot write"),
        ({"output": "."}, "cannot write"),
        ({"errors": Path("no/such/e.jsonl")}, "cannot write"),
    ],
)
def test_paths_that_would_destroy_something(
    options: dict[str, Any], says: str, run: Runner
) -> None:
    options = {
        name: run.folder / value if name in ("errors", "summary") else value
        for name, value in options.items()
    }
    with pytest.raises(RequestError, match=says):
        run([row(0)], **options)


def test_an_input_that_is_the_finished_lines_of_its_output(run: Runner) -> None:
    source = write(run.folder / "x.jsonl.resume", [row(0)])
    options = BatchOptions(source, run.folder / "x.jsonl", quiet=True)
    with pytest.raises(RequestError, match="named for input and for finished lines"):
        run_batch(options, plan(), FakeTokenizer(), FakeEngine)
    assert source.exists()


def test_somebody_elses_finished_lines_are_left_alone(run: Runner) -> None:
    mine = run.folder / "out.jsonl.resume"
    for text in ("my notes\n", "no newline"):
        mine.write_text(text)
        with pytest.raises(RequestError, match="holds no answers"):
            run([row(0)])
        assert mine.read_text() == text


def test_answers_of_another_input_are_not_thrown_away(run: Runner) -> None:
    run([row(i) for i in range(3)])
    before = (run.folder / "out.jsonl").read_bytes()
    with pytest.raises(
        RequestError, match="holds the answer to 'c2', which the input does not have"
    ):
        run([row(0), row(1)])
    assert (run.folder / "out.jsonl").read_bytes() == before
    assert not (run.folder / "out.jsonl.resume").exists()


def test_an_engine_that_does_not_start_leaves_the_output_alone(run: Runner) -> None:
    run([row(0)])
    before = (run.folder / "out.jsonl").read_bytes()
    source = write(run.folder / "in.jsonl", [row(0), row(1)])

    def fails() -> FakeEngine:
        raise RequestError("the canary died", "hint")

    for name in ("out.jsonl", "new.jsonl"):
        with pytest.raises(RequestError, match="canary"):
            run_batch(
                BatchOptions(source, run.folder / name, quiet=True), plan(), FakeTokenizer(), fails
            )
    assert (run.folder / "out.jsonl").read_bytes() == before
    assert not (run.folder / "new.jsonl").exists()
    assert not (run.folder / "new.jsonl.resume").exists()


def test_two_runs_on_one_output(run: Runner) -> None:
    import fcntl

    with (run.folder / "out.jsonl.resume").open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="another run"):
            run([row(0)])


@pytest.mark.slow
def test_gz_input_and_stdout(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl.gz", [row(i) for i in range(5)])
    done = subprocess.run([sys.executable, FAKE, source, "-"], capture_output=True, check=True)
    assert len(done.stdout.splitlines()) == 5
    done = subprocess.run(
        [sys.executable, FAKE, "-", "-"],
        input=gzip.decompress(source.read_bytes()),
        capture_output=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 5
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, FAKE, pipe, "-"], stdout=subprocess.PIPE) as process:
        pipe.write_bytes(gzip.decompress(source.read_bytes()))
        assert process.stdout is not None and len(process.stdout.read().splitlines()) == 5


def test_closed_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(RequestError, match="standard input is closed"):
        InputFile(STDIO)
    with pytest.raises(RequestError, match="standard output is closed"):
        open_writer(STDIO)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz", "folder", "text.gz"])
def test_an_input_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.gz").write_bytes(b"not an archive")
    with pytest.raises(RequestError, match=f"cannot read `.*{name}`") as caught:
        list(InputFile(tmp_path / name).lines())
    assert "name a JSONL file" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order"), [("o.jsonl", "input"), ("o.jsonl", "completion"), ("o.jsonl.gz", "input")]
)
def test_kill_9_at_any_moment(name: str, order: str, tmp_path: Path) -> None:
    """Die at the first, second, third ... event that touches a file, and go on each time."""
    source = write(tmp_path / "in.jsonl", [row(i) for i in range(24)])
    clean = tmp_path / "clean.jsonl"
    assert batch_fake.run(source, clean, "--order", order) == 0
    target, rng, kills = tmp_path / name, random.Random(name + order), 0
    while kills < 20:
        most = rng.randrange(1, 40 + 4 * kills)  # few too: a run from nothing must be able to die
        code = batch_fake.run(source, target, "--order", order, "--die-after", most)
        kills += code == -signal.SIGKILL
        if target.exists():
            ids = [line["custom_id"] for line in read(target)]
            assert len(ids) == len(set(ids))
        if (
            kills < 20
            and not (tmp_path / f"{name}.resume").exists()
            and target.exists()
            and len(read(target)) == 24
        ):
            target.unlink()  # it got through: begin again
    assert batch_fake.run(source, target, "--order", order) == 0
    key = lambda line: line["custom_id"]  # noqa: E731
    got, wanted = read(target), read(clean)
    assert (
        (got == wanted) if order == "input" else (sorted(got, key=key) == sorted(wanted, key=key))
    )
    assert not (tmp_path / f"{name}.resume").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_the_next_run_goes_on(number: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(i) for i in range(300)])
    target = tmp_path / "o.jsonl"
    process = batch_fake.started(source, target, "--step-ms", 10)
    while not target.exists() or target.stat().st_size == 0:
        assert process.exitcode is None
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 130
    some = read(target)
    assert 0 < len(some) < 300
    numbers = [int(line["custom_id"][1:]) for line in some]
    assert numbers == sorted(numbers)
    assert batch_fake.run(source, target) == 0
    assert [line["custom_id"] for line in read(target)] == [f"c{i}" for i in range(300)]


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        source = write(tmp_path / f"{count}.jsonl", [row(i) for i in range(count)])
        arguments = [str(source), "-", f"--max-kept-bytes={1 << 20}"]
        code = f"import sys, resource; sys.argv[1:] = {arguments!r}\n"
        code += f"sys.path.insert(0, {str(FAKE.parent)!r}); import batch_fake; batch_fake.main()\n"
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert len(done.stdout.splitlines()) == count
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 24  # MiB: SQLite's page cache may grow, lists of rows may not.


def test_the_summary_counts(run: Runner) -> None:
    path = run.folder / "s.json"
    with contextlib.redirect_stderr(io.StringIO()) as talk:
        run([row(i) for i in range(10)], summary=path, quiet=False)
    summary = json.loads(path.read_text())
    assert summary["rows"] == {"total": 10, "answered": 10, "failed": 0, "skipped": 0}
    assert summary["ttft_ms"]["p50"] == pytest.approx(10, rel=0.01)
    assert summary["tokens"]["generated"] > 0
    assert summary["predicted"] == {"tpot_ms": 1.0}
    assert "10 answered" in talk.getvalue()
    assert "predicted 1.00" in talk.getvalue()


def test_percentiles_are_within_a_per_cent() -> None:
    rng, histogram = random.Random(0), Histogram()
    values = sorted(rng.lognormvariate(0, 2) for _ in range(5000))
    for value in values:
        histogram.add(value)
    for share in (0.5, 0.95, 0.99):
        assert histogram.percentile(share) == pytest.approx(
            values[int(share * 5000) - 1], rel=0.011
        )


FIELDS = st.sampled_from(
    [
        "prompt",
        "messages",
        "max_tokens",
        "stop",
        "n",
        "logprobs",
        "seed",
        "top_k",
        "temperature",
        "x",
    ]
)


def is_refused_or_runs(raw: bytes) -> None:
    try:
        parsed = parse_row(raw, 1, "d")
        check_body(parsed.body, FakeTokenizer(), LIMITS)
        to_requests(parsed.body, parsed.key, FakeTokenizer(), LIMITS)
    except InvalidRequestError as error:
        text = str(error)
        assert text
        assert text.isascii() or text.encode()
        assert "\n" not in text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_run(raw: bytes) -> None:
    is_refused_or_runs(raw)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, json_values(), max_size=4), st.booleans())
def test_any_body_is_refused_or_runs(body: dict[str, Any], is_chat: bool) -> None:
    data = (chat if is_chat else row)(1, **body)
    is_refused_or_runs(json.dumps(data).encode())


class NormalisingTokenizer(FakeTokenizer):
    """A byte is a token, after NFC."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(unicodedata.normalize("NFC", text))

    def most_tokens(self, text: str) -> int:
        return 3 * len(text.encode()) + 1


def test_the_quick_check_and_the_real_one_agree() -> None:
    """The first pass may skip tokenising; it must not let through what the second refuses."""
    for length in range(1, 80):
        for letter in ("e", "é", "\u0958"):  # Normalising doubles the length of the last one.
            parsed = parse_row(
                json.dumps(row(1, prompt=letter * length, max_tokens=8)).encode(), 1, "d"
            )
            outcomes = []
            tokenizer = NormalisingTokenizer()
            quick_check = partial(check_body, parsed.body)
            conversion = partial(to_requests, parsed.body, parsed.key)
            for step in (quick_check, conversion):
                try:
                    step(tokenizer, LIMITS)
                    outcomes.append(True)
                except InvalidRequestError:
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1]


def test_a_row_that_the_first_look_let_through_becomes_an_error_line(
    run: Runner, monkeypatch: Any
) -> None:
    conversion = "tokenspeed_plan.runtime.serving.openai.conversion"
    monkeypatch.setattr(f"{conversion}.check_body", lambda *_: None)
    assert run([row(0), row(1, prompt="x" * 57), row(2)]) == 1
    lines = run.out()
    assert [line["custom_id"] for line in lines] == ["c0", "c1", "c2"]
    assert [line["error"] is None for line in lines] == [True, False, True]
    assert "over the plan's limit of 64" in lines[1]["error"]["message"]


def test_rows_that_begin_alike_run_one_after_the_other() -> None:
    """Groups of a common prefix are ordered by their longest row, and each group by length."""
    waiting = Waiting[str]()
    alike = list(range(GROUP_TOKENS))
    for number, (name, prompt, tokens) in enumerate(
        [
            ("a1", [*alike, 1], 5),
            ("b", [7], 50),
            ("a2", [*alike, 2], 90),
            ("c", [8], 40),
            ("a3", [*alike, 3], 5),
        ]
    ):
        waiting.add(name, prompt, tokens, number)
    assert len(waiting) == 5
    assert [waiting.pop() for _ in range(4)] == ["a2", "a1", "a3", "b"]
    assert waiting.clear() == ["c"] and not len(waiting)


@pytest.mark.slow
def test_shared_prefixes_meet_in_the_cache(tmp_path: Path) -> None:
    """Two prefixes take turns in the file; answers and their order are those without a cache."""
    prefixes = [
        "def first(path):\n    " + "x = open(path)\n    " * 12,
        "class Second:\n    " + "y = 2\n    " * 20,
    ]
    rows = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "prompt": prefixes[i % 2] + f"# {i}\n",
                "max_tokens": 4,
                "temperature": 0,
            },
        }
        for i in range(40)
    ]
    source, output, summary = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "sum.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle = str(ROOT / "plans/frozen/demo-cpu")
    done = CliRunner().invoke(
        main,
        [
            "run",
            bundle,
            "--input",
            str(source),
            "--output",
            str(output),
            "--summary",
            str(summary),
            "--no-canary",
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and " of them cached), " in done.stderr
    tokens = json.loads(summary.read_text())["tokens"]
    assert tokens["cached"] > 0.8 * tokens["prompt"]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    plain = Engine.load(Path(bundle), cache=False)
    assert plain.tokenizer
    prompts = [plain.tokenizer.encode(row["body"]["prompt"]) for row in rows]
    wanted = [
        completion.text for completion in plain.generate(prompts, SamplingParams(max_tokens=4))
    ]
    assert [answer["response"]["body"]["choices"][0]["text"] for answer in answers] == wanted
