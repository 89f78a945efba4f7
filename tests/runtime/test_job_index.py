"""The index of a job: rows that are known to be like others are judged as each alone would be."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_fake import LIMITS, FakeTokenizer, plan

from tokenspeed_plan.plans.chat_format import Chat
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.batch.files import InputLine
from tokenspeed_plan.runtime.serving.batch.lines import Row
from tokenspeed_plan.runtime.serving.batch.scan import MAX_SHOWN, check_lines, refuse_bad
from tokenspeed_plan.runtime.serving.leases import job_index, row_checks
from tokenspeed_plan.runtime.serving.leases.job_index import make_index
from tokenspeed_plan.runtime.serving.leases.job_input import JobInput
from tokenspeed_plan.runtime.serving.leases.known_shapes import KnownShapes, SeenIds
from tokenspeed_plan.runtime.serving.leases.row_checks import RowChecker, check_shards, check_units

ODD = ('\\"', "\\\\", "\\n", "\\u00e9", "\\ud800", "é", "\x01", '"', "\\x", "", "a" * 70, "b" * 20)
PIECES = (
    "0", "e1", ".5", "{", "}", ",", ":", '"', "\\", "[", "]", " ", "null", "1", "-", "\t", "\x0b",
    '"prompt": "x"', '"custom_id": "x"', '"user": "u"', '"metadata": {"prompt": "y"}',
    '"metadata": {"custom_id": "y", "n": "m"}', '"response_format": {"type": "json_object"}',
)  # fmt: skip


def line_of(rng: random.Random) -> str:
    """A row in one of a few spellings; some are bad."""
    number = rng.randrange(60)
    body: dict[str, Any] = {"prompt": f"prompt {number}", "max_tokens": rng.choice((1, 8))}
    if rng.random() < 0.3:
        body["user"] = f"user {number}"
    if rng.random() < 0.2:
        body["temperature"] = rng.choice((0, 1, 3.0))
    if rng.random() < 0.3:
        body["seed"] = rng.choice((0, 7, number, -1, 1.5, 10**17, 10**19, "7", True))
    row = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}
    text = json.dumps(row, separators=rng.choice(((", ", ": "), (",", ":"))))
    if rng.random() < 0.2:
        text = text.replace(f"prompt {number}", rng.choice(ODD))
    if rng.random() < 0.1:
        text = text.replace(f'"c{number}"', f'"{rng.choice(ODD)}"')
    if rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
    return text


def test_a_known_line_would_pass_alone() -> None:
    """Of many mutations no line is taken for a known one that is bad, or has another id."""
    rng, known, num_known = random.Random(0), KnownShapes(LIMITS.max_seq_len), 0
    for number in range(1, 30000):
        raw = line_of(rng).encode("utf-8", "surrogatepass").replace(b"\n", b"")
        line = InputLine(number, 0, raw)
        name = known.id_of(line)
        (row,) = check_lines([line], "d", SeenIds(), FakeTokenizer(), LIMITS)
        if not isinstance(row, Row):
            assert name is None, (raw, row)
            continue
        known.learn(line, row)
        if name is not None:
            assert name.decode() == row.custom_id, raw
            num_known += 1
    assert num_known > 15000


@pytest.mark.parametrize("max_errors", [0, 10**6])
def test_the_index_is_that_of_rows_checked_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_errors: int
) -> None:
    """Files with and without bad rows, and with ids that come twice in a shard or in two."""
    outcomes: list[list[object]] = [[], []]
    for seed in range(60):
        rng = random.Random(seed)
        lines = [line_of(rng) for _ in range(rng.choice((3, 12, 40)))]
        if seed % 3 == 0:  # these are good, and differ
            lines = [line.replace('"c', f'"{at}-c', 1) for at, line in enumerate(lines)]
        path = tmp_path / "in.jsonl"
        path.write_bytes("\n\n".join(lines).encode("utf-8", "surrogatepass"))
        job = JobInput(str(path), rng.choice((1, 3)), rng.choice((None, 20)), max_errors)
        for found, repeats in zip(outcomes, (False, True), strict=True):
            with monkeypatch.context() as patch:
                if repeats:  # else they are checked in this way only where ids seem to repeat
                    patch.setattr(SeenIds, "may_repeat", lambda self: True)
                try:
                    found.append(make_index(job, plan(), FakeTokenizer(), lambda: None))
                except RequestError as error:
                    found.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert 0 < sum(isinstance(outcome, str) for outcome in outcomes[0]) < 60


def chat_of(rng: random.Random, number: int) -> str:
    """A chat; some are bad, and some have an id that is not where it seems to be."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": rng.choice(ODD)}]}
    body["max_tokens"] = rng.choice((1, 8, 60, 0))
    row = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    text = json.dumps(row)
    if rng.random() < 0.3:
        end = rng.choice(
            ("", ' "custom_id": "z", "custom_id": "y"}', ' "custom\\u005fid": "x"}', "}}")
        )
        text = text[:-1] + "," * bool(end) + end
    if rng.random() < 0.1:
        text = text.replace(f'"c{number}"', rng.choice(("7", '"\\ud800"', f'"{"i" * 5000}"', '""')))
    return text


class RefusingTokenizer(FakeTokenizer):
    """Its chat template refuses some texts, and system messages, as which a developer's count."""

    def render_chats(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        texts = super().render_chats(chats)
        no = RequestError("no", "no")
        return [no if re.search("bb|system:", str(text)) else text for text in texts]


def test_a_chat_of_a_known_shape_is_judged_as_it_would_be_alone() -> None:
    rng, lines = random.Random(1), []
    for number in range(1, 4000):
        text = chat_of(rng, number)
        if rng.random() < 0.3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
        elif rng.random() < 0.3:
            role = rng.choice(("system", "developer", "assistant", "tool", "", 7))
            more = rng.choice(("seed", "user", "temperature", "name", "stop"))
            value = rng.choice((number, "u", 1, True, 1.0, -1, None, ["u"]))
            text = text.replace('"user"', json.dumps(role)).replace(
                '"max_tokens"', f'"{more}": {json.dumps(value)}, "max_tokens"'
            )
        raw = text.encode("utf-8", "surrogatepass").replace(b"\n", b"")
        lines.append(InputLine(number, 0, raw))
    checker, num_known = RowChecker(plan(), RefusingTokenizer(), lambda: None), 0
    for line, found in checker.check(lines):
        (row,) = check_lines([line], "d", SeenIds(), RefusingTokenizer(), LIMITS)
        if isinstance(row, Row):
            assert getattr(found, "custom_id", None) == row.custom_id, line.raw
            num_known += not isinstance(found, Row)
        else:
            assert str(found) == str(row), line.raw
    assert num_known > 500


def outcome_of(job: JobInput) -> object:
    """The index of a job once all its rows are checked, or why it is refused."""
    try:
        index = make_index(job, plan(), FakeTokenizer(), lambda: None)
        total = index.found()
        for shards in check_units(index.shards).values():
            found = check_shards(job, shards, RowChecker(plan(), FakeTokenizer(), lambda: None))
            total.num_bad += found.num_bad
            total.shown += found.shown
        total.shown = sorted(set(total.shown))[:MAX_SHOWN]
        refuse_bad(total, job.max_errors)
    except RequestError as error:
        return str(error)
    return total, [replace(shard, unchecked=0, bad=0) for shard in index.shards]


def test_what_is_left_to_all_workers_is_found_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that looks into few rows and checks of the others find what a whole one does."""
    monkeypatch.setattr(row_checks, "CHECK_ROWS", 4)
    path, outcomes, num_left = tmp_path / "in.jsonl", list[object](), 0
    for seed in range(150):
        rng = random.Random(seed)
        lines = [
            rng.choice((line_of(rng), chat_of(rng, at), chat_of(rng, at)))
            for at in range(rng.choice((3, 12, 18)))
        ]
        path.write_bytes("\n\n".join(lines).encode("utf-8", "surrogatepass"))
        job = JobInput(
            str(path), rng.choice((1, 3)), rng.choice((None, None, 9)), rng.choice((0, 99))
        )
        outcomes.append(outcome_of(job))
        with monkeypatch.context() as patch:
            patch.setattr(row_checks, "LOOKED_INTO", 2)
            found = outcome_of(job)
            if job.max_errors == 0:  # it may be refused for the first of its faults
                assert isinstance(found, str) == isinstance(outcomes[-1], str), lines
            else:
                assert found == outcomes[-1], lines
            if not isinstance(outcomes[-1], str):
                index = make_index(job, plan(), FakeTokenizer(), lambda: None)
                num_left += sum(shard.unchecked for shard in index.shards)
    assert 20 < sum(isinstance(outcome, str) for outcome in outcomes) < 130
    assert num_left > 100


def test_good_rows_are_read_without_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl"
    row = '{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'
    path.write_text("\n".join(row % number for number in range(100)), encoding="utf-8")
    checked = []

    def check(lines: Any, *args: Any) -> Any:
        checked.extend(lines)
        return check_lines(lines, *args)

    monkeypatch.setattr(row_checks, "check_lines", check)
    monkeypatch.setattr(job_index, "Notebook", None)
    index = make_index(JobInput(str(path), 3), plan(), FakeTokenizer(), lambda: None)
    assert index.rows == 100 and len(checked) == 1
