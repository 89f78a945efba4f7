"""Mutated inputs of every door are taken or refused in words; TOKENSPEED_FUZZ=N takes N times more.

`tools/fuzz.py` runs thousands of the same examples: a failure's seed names it there, too.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from fuzzing import Failure, Target, TooSlow, Wrong, examine, examine_many

from tokenspeed_plan.plans.errors import TokenspeedError

pytestmark = pytest.mark.slow  # whole processes, or many examples

COUNTS = {
    "bodies": 200,
    "rows": 200,
    "messages": 400,
    "forms": 60,
    "specs": 12,
    "plans": 10,
    "checkpoints": 8,
    "tokenizers": 20,
}


@pytest.mark.parametrize("name", COUNTS)
def test_each_example_is_taken_or_refused_in_words(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "COMPARE", False)  # loading transformers takes seconds
    count = COUNTS[name] * fuzzing.MULTIPLIER
    tally = examine_many(name, count, 0)
    failures = [f"seed {failure.seed}: {failure.kind}" for failure in tally.failures]
    assert not failures, "\n".join(failures)
    assert tally.accepted and tally.refused


def test_what_is_taken_is_read_as_by_transformers() -> None:
    tally = examine_many("tokenizers", 30 * fuzzing.MULTIPLIER, 0)
    assert not [f"seed {failure.seed}: {failure.kind}" for failure in tally.failures]


def test_a_seed_makes_one_example() -> None:
    for name, target in fuzzing.TARGETS.items():
        examples = [target.make(fuzzing.rng_of(name, seed)) for seed in (1, 1, 2)]
        assert examples[0] == examples[1] != examples[2]


def test_no_example_depends_on_those_before() -> None:
    def bodies(seeds: Iterable[int]) -> dict[int, Any]:
        return {seed: fuzzing.make_row(fuzzing.rng_of("rows", seed)) for seed in seeds}

    assert bodies(range(600)) == bodies(reversed(range(600)))


def loops(files: Any, folder: Path) -> bool:
    while True:
        time.sleep(0.01)


def hides(files: Any, folder: Path) -> bool:
    """A broad `except` does not hide that it takes too long."""
    try:
        return loops(files, folder)
    except Exception:
        return True


def unescaped(message: str) -> TokenspeedError:
    """An error that forgot to escape what it quotes."""
    error = TokenspeedError("", "hint")
    error.message = message
    return error


def raises(error: BaseException) -> Callable[[Any, Path], bool]:
    def judge(files: Any, folder: Path) -> bool:
        raise error

    return judge


@pytest.mark.parametrize(
    ("judge", "kind"),
    [
        (raises(KeyError("x")), "KeyError in tests/test_fuzz.py:judge"),
        (raises(Wrong("differs")), "wrong: differs"),
        (raises(MemoryError()), "MemoryError in"),
        (raises(SystemExit(3)), "SystemExit in"),
        (raises(TokenspeedError("", "hint")), "empty message"),
        (raises(TokenspeedError("message", " ")), "empty hint"),
        (raises(unescaped("\ud800")), "message is not Unicode"),
        (raises(unescaped("\x1b[1m")), "message has control characters"),
        (loops, "too slow in tests/test_fuzz.py:loops"),
        (hides, "too slow in tests/test_fuzz.py:loops"),
    ],
)
def test_what_is_neither_is_found_and_kept(
    judge: Callable[[Any, Path], bool],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzzing, "MAX_S", 0.05)
    target = Target(lambda rng: {"a": rng.randbytes(3)}, judge)
    monkeypatch.setitem(fuzzing.TARGETS, "planted", target)
    outcome = examine("planted", 5, tmp_path)
    assert isinstance(outcome, Failure)
    assert outcome.seed == 5 and outcome.kind.startswith(kind)
    assert (tmp_path / "planted-5" / "a").read_bytes() == target.make(fuzzing.rng_of("planted", 5))[
        "a"
    ]
    assert (tmp_path / "planted-5" / "failure.txt").exists()


def test_a_refusal_in_words_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = raises(TokenspeedError("message", "hint"))
    monkeypatch.setitem(fuzzing.TARGETS, "planted", Target(lambda rng: {}, refuses))
    assert examine("planted", 0) is False


def test_changes_change_and_stay_json() -> None:
    value = {"a": [1, {"b": "c"}], "d": None, "e": 0.5}
    made = {repr(fuzzing.mutate_json(random.Random(seed), value)) for seed in range(200)}
    assert len(made) > 150
    assert value == {"a": [1, {"b": "c"}], "d": None, "e": 0.5}
    for seed in range(200):
        fuzzing.encode(fuzzing.mutate_json(random.Random(seed), value))


def test_too_slow_is_no_exception() -> None:
    assert not issubclass(TooSlow, Exception)


@cache
def tool(name: str) -> Any:
    path = fuzzing.ROOT / name
    spec = importlib.util.spec_from_file_location(f"{path.stem}_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rows", "names", "says"),
    [
        ({"a": 1, "b": 2}, ["a", "b"], []),
        ({"a": 1}, ["a"], ["b was lost"]),
        ({"a": 1, "b": 3}, ["a", "b"], ["b was changed: it is 3, not 2"]),
        ({"a": 1, "b": 2, "x": 1}, ["a", "b", "x"], ["x was changed: it is 1, not None"]),
        ({"a": 1, "b": 2}, ["a", "b", "a"], ["a is there twice"]),
    ],
)
def test_the_faults_of_a_kill_are_found(
    rows: dict[str, int], names: list[str], says: list[str]
) -> None:
    assert (
        tool("tools/kill.py").faults({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}, rows, names)
        == says
    )


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "it.a.b[1] is 3, not 2"),
        ({"a": [1.0]}, {"a": [1.0001]}, ""),
        ({"a": [1.0]}, {"a": [1.01]}, "it.a[0] is 1.01, not 1.0"),
        ([], [], ""),
        ([], [1], "it is [1], not []"),
        ({"a": None}, {}, "it is {}, not {'a': None}"),
        (None, {"a": 1}, "it is {'a': 1}, not None"),
    ],
)
def test_where_a_row_was_changed_is_said(wanted: Any, found: Any, says: str) -> None:
    assert tool("tools/kill.py").difference(wanted, found) == says


SOAKED = {
    "good_alone": {"p99_s": 0.4, "statuses": {"200": 9}},
    "good_among_bad": {"p99_s": 0.6, "statuses": {"200": 9, "429": 2}},
    "prompts_with_two_answers": 0,
    "resident_growth": 0.01,
    "left_in_use": {"kv_pages_used": 0.0},
    "exit_code": 0,
    "log": ["ready"],
}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, []),
        ({"resident_growth": 0.011}, ["memory"]),
        ({"left_in_use": {"kv_pages_used": 1.0}}, ["leaks"]),
        ({"left_in_use": {"file socket:[N]": 1}}, ["leaks"]),
        ({"good_among_bad": {"p99_s": 0.61, "statuses": {"200": 9}}}, ["latency"]),
        ({"good_among_bad": {"p99_s": 0.5, "statuses": {"200": 9, "500": 1}}}, ["latency"]),
        ({"prompts_with_two_answers": 1}, ["latency"]),
        ({"exit_code": 1}, ["end"]),
        ({"log": ["ready", "Traceback", "more"]}, ["end"]),
    ],
)
def test_a_soak_is_judged_by_four_things(changed: dict[str, Any], wrong: list[str]) -> None:
    found = tool("benchmarks/soak.py").judgements({**SOAKED, **changed})
    assert list(found) == ["memory", "leaks", "latency", "end"]
    assert [name for name, (is_right, _) in found.items() if not is_right] == wrong


def test_killed_runs_lose_no_row() -> None:
    count = str(4 * fuzzing.MULTIPLIER)
    command = [sys.executable, fuzzing.ROOT / "tools" / "kill.py", "--count", count]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
