"""Mutated inputs of all doors: each is taken, or refused in words. Used by tests and tools/fuzz.py.

A target makes an example from a seed, as files by name, and judges what is done with it. Whatever
is neither taken nor refused with a message and a hint is a failure, and so is what takes more than
`MAX_S` seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import chat_fuzzing
import form_fuzzing
import yaml
from click.testing import CliRunner

from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.plans.bundle import dump_plan, load_plan, parse_plan, seal
from tokenspeed_plan.plans.errors import TokenspeedError

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "demo" / "model"
BUNDLE = ROOT / "plans" / "frozen" / "demo-cpu"
MULTIPLIER = max(int(os.environ.get("TOKENSPEED_FUZZ", "1")), 1)
MAX_S = 10
Files = dict[str, bytes]
Json = Any

EXTREMES: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**7,
    10**30,
    -(10**30),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "0",
    "auto",
    "off",
    "nan",
    "\0",
    "\x1b[31m",
    "\n",
    "\ud83d",
    "\udfff\ud800",
    "\U0001f600",
    "e\u0301" * 40,
    "a" * 5_000,
    "../../etc",
    "/dev/zero",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"": None},
    [1, "a", None, {}],
    [-1],
    [2**31],
    [[1], "a"],
)


def nested(depth: int, is_list: bool) -> Json:
    """A value inside `depth` lists or objects."""
    value: Json = 1
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def any_value(rng: random.Random) -> Json:
    """An extreme value, or many of one, or a deep one; its own copy, for it may be changed."""
    kind = rng.random()
    if kind < 0.9:
        return deepcopy(rng.choice(EXTREMES))
    if kind < 0.96:
        return [deepcopy(rng.choice(EXTREMES))] * rng.choice((2, 10, 1_000))
    return nested(rng.choice((5, 60, 400)), rng.random() < 0.5)


def places(value: Json) -> list[tuple[Any, Any]]:
    """(container, key or index) of each value inside a value."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item))
        for key in list(keys):
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                waiting.append(item[key])
    return found


def mutate_json(rng: random.Random, value: Json, times: int = 3) -> Json:
    """A value with one to `times` changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, times)):
        found = places(value) if isinstance(value, (dict, list)) else []
        if not found or rng.random() < 0.01:
            return any_value(rng)
        container, key = rng.choice(found)
        rng.choice(_CHANGES)(rng, container, key)
    return value


def _replace(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = any_value(rng)


def _nudge(rng: random.Random, container: Any, key: Any) -> None:
    """Change a value a little: what is nearly right passes most checks."""
    old = container[key]
    if isinstance(old, bool) or old is None:
        container[key] = not old
    elif isinstance(old, (int, float)):
        container[key] = rng.choice((old + 1, old - 1, old * 2, old // 2, -old, float(old)))
    elif isinstance(old, str):
        container[key] = mutate_text(rng, old)
    elif isinstance(old, list):
        container[key] = old[:-1] if rng.random() < 0.5 else old + old[:1]
    else:
        container[key] = [list(item) for item in old.items()]


def _remove(rng: random.Random, container: Any, key: Any) -> None:
    del container[key]


def _wrap(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}


def _stringify(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = json.dumps(container[key])


def _add(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, list):
        container.insert(key, any_value(rng))
    else:
        container[rng.choice(("x", "", "\ud800", "a\nb", str(key) + "s"))] = any_value(rng)


def _swap(rng: random.Random, container: Any, key: Any) -> None:
    keys = list(container.keys()) if isinstance(container, dict) else range(len(container))
    other = rng.choice(keys)
    container[key], container[other] = container[other], container[key]


_CHANGES = (_replace, _replace, _replace, _nudge, _nudge, _remove, _wrap, _stringify, _add, _swap)
_PIECES = (
    '!!int ""',
    '!!float ""',
    '!!int "x"',
    '!!timestamp "x"',
    '!!bool "x"',
    "!!binary x",
    "!!python/object:os.system x",
    "&a [*a]",
    "*nope",
    "<<: 1",
    "{",
    "]",
    "\t",
    "- ",
    ": ",
    "'",
    "\x00",
    "\x1b",
    "\ufeff",
    "\x85",
    "1_000",
    "0x7f",
    "1e400",
    ".nan",
    ".inf",
    "~",
    "null",
    "99999999999999999999999",
    "{% for x in range(9**9) %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ''.__class__ }}",
    "{% include 'x' %}",
    "{{ messages[9].content }}",
    "\ud800",
)


def mutate_text(rng: random.Random, text: str) -> str:
    """A text in which a piece or a line was removed, doubled, replaced or put in."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(text))
        end = min(start + rng.choice((0, 1, 3, 12)), len(text))
        kind = rng.random()
        if kind < 0.4:
            text = text[:start] + rng.choice(_PIECES) + text[end:]
        elif kind < 0.6:
            text = text[:start] + text[end:]
        elif kind < 0.8:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
        else:
            values = list(re.finditer(r"(?<=: )[^\s{},]+", text))
            if values:
                found = rng.choice(values)
                text = text[: found.start()] + _spelled(rng) + text[found.end() :]
    return text


def _spelled(rng: random.Random) -> str:
    """A value as it stands in YAML."""
    if rng.random() < 0.5:
        return rng.choice(_PIECES)
    return json.dumps(rng.choice(EXTREMES))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes of which some were flipped, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + rng.choice((1, 2, 100))]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 4)))
        else:
            changed[at:at] = changed[at : at + 50]
    return bytes(changed)


def encode(value: Json) -> bytes:
    """JSON, as Python writes it: with NaN, with half a surrogate pair as its escape."""
    return json.dumps(value).encode()


def mutate_file(rng: random.Random, data: bytes) -> bytes:
    """The bytes of a JSON file: mostly its values are changed, sometimes its text."""
    if rng.random() < 0.85:
        return encode(mutate_json(rng, json.loads(data)))
    return mutate_bytes(rng, data)


class TooSlow(BaseException):
    """An example took longer than `MAX_S`. No `except Exception` hides it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after some seconds; in the main thread alone."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Wrong(Exception):
    """An example was neither taken nor refused as it should be."""


@dataclass
class Target:
    """What is fuzzed.

    Attributes:
        make: an example of a seed.
        judge: takes the example, which also lies in a folder; returns whether it was accepted.
            Raises a refusal, or anything else that is a failure.
        load: loads what it needs, which takes longer than an example may.
    """

    make: Callable[[random.Random], Files]
    judge: Callable[[Files, Path], bool]
    load: Callable[[], object] = lambda: None


@dataclass
class Failure:
    """An example that failed; `kind` is the same for those with one cause."""

    seed: int
    kind: str
    text: str


@dataclass
class Tally:
    """Counts of examples, and those that failed."""

    accepted: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)


def rng_of(name: str, seed: int) -> random.Random:
    """The generator of an example: of its target and seed alone."""
    return random.Random(f"{name} {seed}")


def examine(name: str, seed: int, kept: Path | None = None) -> bool | Failure:
    """Run the example of a seed: whether it was accepted, or its failure.

    Args:
        name: of the target.
        seed: of the example.
        kept: folder for the files of examples that fail.
    """
    target = target_of(name)
    files = target.make(rng_of(name, seed))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        write_files(files, folder)
        try:
            with deadline(MAX_S):
                return target.judge(files, folder)
        except TokenspeedError as error:
            failure = refusal_fault(error.message, error.hint)
        except Refused:
            return False
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = Failure(seed, kind_of(error), "".join(traceback.format_exception(error)))
        if failure is None:
            return False
        failure.seed = seed
        if kept is not None:
            keep(files, kept / f"{name}-{seed}", failure)
        return failure


class Refused(Exception):
    """An example was refused in words that were checked."""


def write_files(files: Files, folder: Path) -> None:
    """Write an example. Behind the header of a safetensors file there are zeros, on no disk."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if path.suffix == ".safetensors":
            os.truncate(path, len(data) + _tiny_model()[1])


def keep(files: Files, folder: Path, failure: Failure) -> None:
    """Write an example that failed, and how."""
    shutil.rmtree(folder, ignore_errors=True)
    write_files(files, folder)
    (folder / "failure.txt").write_text(failure.text, encoding="utf-8", errors="backslashreplace")


def refusal_fault(message: str, hint: str) -> Failure | None:
    """What is wrong with a refusal's words."""
    for what, text in (("message", message), ("hint", hint)):
        if not text.strip():
            return Failure(0, f"empty {what}", message)
        try:
            text.encode()
        except UnicodeEncodeError:
            return Failure(0, f"{what} is not Unicode", ascii(text))
        if "\x1b" in text or "\0" in text:
            return Failure(0, f"{what} has control characters", ascii(text))
    return None


def kind_of(error: BaseException) -> str:
    """The type of an error and the last place of ours that it passed."""
    places = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) != Path(__file__)
        and Path(frame.filename).is_relative_to(ROOT)
        and "/.venv/" not in frame.filename
    ]
    ours = [place for place in places if not place.startswith(("tests", "tools"))]
    where = (ours or places or ["?"])[-1].removeprefix("tokenspeed_plan/")
    if isinstance(error, TooSlow):
        return f"too slow in {where}"
    if isinstance(error, Wrong):
        return f"wrong: {error!s:.80}"
    return f"{type(error).__name__} in {where}"


def examine_many(name: str, count: int, seed: int) -> Tally:
    """Run some examples in this process."""
    target_of(name).load()
    tally = Tally()
    for number in range(seed, seed + count):
        outcome = examine(name, number)
        if isinstance(outcome, Failure):
            tally.failures.append(outcome)
        elif outcome:
            tally.accepted += 1
        else:
            tally.refused += 1
    return tally


# Bodies of HTTP requests and lines of batch files.

COMPLETION: Json = {
    "prompt": "def f(x):\n",
    "model": "model",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 7,
    "n": 1,
    "stop": ["\n\n", "x"],
    "stop_token_ids": [5, 6],
    "ignore_eos": False,
    "logprobs": 2,
    "return_token_ids": True,
    "user": "u",
    "metadata": {"a": "b"},
}
CHAT: Json = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": 1}'},
                }
            ],
        },
        {"role": "user", "content": "and now?"},
    ],
    "max_tokens": 4,
    "max_completion_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "stop": "x",
    "n": 2,
    "stream": False,
}
URLS = ("/v1/completions", "/v1/chat/completions")
_PROMPTS: tuple[Json, ...] = (
    [1, 2, 3],
    ["a", "b"],
    [[1], [2, 3]],
    [[1]] * 5_000,
    ["a"] * 5_000,
    "x" * 200_000,
    "\u0301" * 50_000,
    " " * 100_000,
    [7] * 100_000,
)


def any_body(rng: random.Random) -> tuple[str, Json]:
    """(url, body): some of the fields, changed."""
    is_chat = rng.random() < 0.4
    whole = CHAT if is_chat else COMPLETION
    needed = "messages" if is_chat else "prompt"
    body = {name: whole[name] for name in whole if name == needed or rng.random() < 0.4}
    if not is_chat and rng.random() < 0.1:
        body["prompt"] = rng.choice(_PROMPTS)
        body["n"] = rng.choice((1, 2, 128))
    return URLS[is_chat], mutate_json(rng, body, 2)


def make_body(rng: random.Random) -> Files:
    url, body = any_body(rng)
    raw = encode(body) if rng.random() < 0.95 else mutate_bytes(rng, encode(body))
    return {"url": url.encode(), "body.json": raw}


@cache
def _engine() -> Any:
    from tokenspeed_plan.runtime import Engine

    return Engine.load(BUNDLE)


def judge_body(files: Files, folder: Path) -> bool:
    """The server's own function; what it takes is queued, and every tenth is answered."""
    from tokenspeed_plan.runtime.serving.http.api_errors import ApiError
    from tokenspeed_plan.runtime.serving.http.parsing import parse

    engine = _engine()
    try:
        parsed = parse(files["body.json"], files["url"].decode(), "model", _tokenizer(), _limits())
    except ApiError as error:
        raise _refused(str(error), "an HTTP error has no hint") from error
    if len(parsed.requests) > 1024:
        raise Wrong(f"{len(parsed.requests)} requests of one body")
    names = [request.request_id for request in parsed.requests]
    try:
        for request in parsed.requests:
            engine.add(request)
        if len(names) < 4 and len(files["body.json"]) % 10 == 0:
            for _ in range(6):
                engine.step()
    finally:
        for name in names:
            engine.cancel(name)
        while engine.num_unfinished:
            engine.step()
    return True


@cache
def _limits() -> Any:
    from tokenspeed_plan.planner.commands import run

    return run._batch_plan(load_plan(BUNDLE), _tokenizer()).limits


@cache
def _tokenizer() -> Any:
    from tokenspeed_plan.codegen.chat_template import ChatTemplate
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    return Tokenizer.load(MODEL, ChatTemplate.load(MODEL))


def _refused(message: str, hint: str) -> Exception:
    failure = refusal_fault(message, hint)
    if failure is not None:
        return Wrong(failure.kind)
    if "\n" in message:
        return Wrong("message of several lines")
    return Refused(message)


def make_row(rng: random.Random) -> Files:
    url, body = any_body(rng)
    row: Json = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    if rng.random() < 0.3:
        row = mutate_json(rng, row)
    raw = encode(row)
    if rng.random() < 0.1:
        raw = mutate_bytes(rng, raw)
    return {"row.jsonl": raw.replace(b"\n", b" ")}


def judge_row(files: Files, folder: Path) -> bool:
    """The checks of a batch, and the error line of what they refuse."""
    from tokenspeed_plan.runtime.serving.batch.lines import encode_line, error_line, parse_row
    from tokenspeed_plan.runtime.serving.openai.bodies import InvalidRequestError
    from tokenspeed_plan.runtime.serving.openai.conversion import check_body, to_requests

    try:
        row = parse_row(files["row.jsonl"], 1, "digest")
        check_body(row.body, _tokenizer(), _limits())
        requests = to_requests(row.body, row.key, _tokenizer(), _limits())
    except InvalidRequestError as error:
        json.loads(encode_line(error_line("a", 1, "invalid_request", str(error))))
        raise _refused(str(error), "a line has no hint") from error
    if len(requests) > 1024:
        raise Wrong(f"{len(requests)} requests of one row")
    return True


def make_form(rng: random.Random) -> Files:
    return form_fuzzing.make_form(rng, mutate_json, encode)


def judge_form(files: Files, folder: Path) -> bool:
    """A form of an answer: refused in words, or its grammar allows what the schema does."""
    from tokenspeed_plan.runtime.serving.http.api_errors import ApiError

    try:
        fault = form_fuzzing.fault_of(files, _limits())
    except ApiError as error:
        if error.status != 400:
            raise Wrong(f"status {error.status}") from error
        raise _refused(str(error), "an HTTP error has no hint") from error
    if fault:
        raise Wrong(fault)
    return True


def make_messages(rng: random.Random) -> Files:
    return dict(chat_fuzzing.make_chat(rng, mutate_json, encode))


def judge_messages(files: Files, folder: Path) -> bool:
    """A chat of one of the APIs, its answer whole and streamed; both must say the same."""
    from tokenspeed_plan.runtime.serving.http.api_errors import ApiError

    try:
        whole, events = chat_fuzzing.answer_chat(files, _limits())
    except ApiError as error:
        json.dumps([error.body, error.anthropic_body], allow_nan=False)
        if not 400 <= error.status < 500:
            raise Wrong(f"status {error.status}") from error
        raise _refused(str(error), "an HTTP error has no hint") from error
    if fault := chat_fuzzing.contradiction(whole, events):
        raise Wrong(fault)
    return True


# Specs.

_SPEC = """version: 1
model: {MODEL}
target: {gpu: GPU, count: COUNT}
parallelism: LAYOUT
workload:
  kind: batch
  first_turn_tokens: 1024
  output_tokens: 128
  concurrency: 4
objective: {minimize: cost_per_token}
speculation: SPECULATION
disaggregation: auto
"""
_SPEC_VALUES = (
    ("preset: qwen3.5-0.8b", "H200", "1", "auto", "off"),
    ("preset: qwen3.5-35b-a3b", "B200", "2", "auto", "auto"),
    ("path: model", "cpu", "1", "auto", "{acceptance: 0.4}"),
    ("preset: qwen3-8b", "H100", "2", "{attention: {tp: 2}}", "off"),
)


def _spec(values: tuple[str, ...]) -> str:
    """A spec that is right."""
    text = _SPEC
    for name, value in zip(("MODEL", "GPU", "COUNT", "LAYOUT", "SPECULATION"), values, strict=True):
        text = text.replace(name, value)
    return text


# Values of keys that a spec may leave out, each right with some of the others.
_OPTIONAL: dict[str, tuple[Json, ...]] = {
    "slo": ({"ttft_ms": 900}, {"ttft_p95_ms": 900, "tpot_p99_ms": 40}, {"tpot_p50_ms": 1}),
    "serving.host_cache_gib": (4, 0.01, 500),
    "serving.kv_dtype": ("fp8", "auto"),
    "serving.checkpoint_tokens": (0, 256),
    "serving.prefill_chunk": (64, 4096),
    "serving.grammar": (True,),
    "serving.penalties": (True,),
    "serving.state": ("bf16",),
    "target.libraries": ("required", "none", ["fa3"], ["flashinfer", "cublas"]),
    "model.weights": ("fp8", "nvfp4", "nvfp4-mixed"),
    "model.head": ("fp8",),
    "disaggregation": ({"prefill": 1, "decode": 1}, "off"),
    "workload.shared_prompt_tokens": (512, 1023, 1024),
    "workload.first_turn_tokens": ({"mean": 700, "p95": 900, "max": 2000},),
    "workload.concurrency": ("auto", 64),
    "workload.kind": ("agentic",),
    "workload.turns": (3,),
    "workload.turn_tokens": (200,),
    "workload.arrivals_per_s": (0.5, 1000),
    "workload.rows": (1, 5000),
    "workload.skew": (1.5,),
}


def _with_optional(rng: random.Random, spec: Json) -> Json:
    """The spec with some keys that it left out."""
    for name in rng.sample(sorted(_OPTIONAL), rng.randint(1, 5)):
        section, _, key = name.rpartition(".")
        inner = spec.setdefault(section, {}) if section else spec
        inner[key or name] = deepcopy(rng.choice(_OPTIONAL[name]))
    return spec


def make_spec(rng: random.Random) -> Files:
    text = _spec(rng.choice(_SPEC_VALUES))
    if rng.random() < 0.6:
        text = json.dumps(_with_optional(rng, yaml.safe_load(text)))
    if rng.random() < 0.5:
        text = json.dumps(mutate_json(rng, yaml.safe_load(text)))
    if rng.random() < 0.6:
        text = mutate_text(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        data = mutate_bytes(rng, data)
    return {"spec.yaml": data}


def _load_advisor() -> None:
    from tokenspeed_plan.runtime.simulation import load_run

    assert load_run.simulate  # percentiles need it, and PyTorch with it
    judge_command("--help")


def judge_spec(files: Files, folder: Path) -> bool:
    (folder / "model").symlink_to(MODEL)
    return judge_command("predict", folder / "spec.yaml")


def judge_command(*args: object) -> bool:
    """Run a command in this process: it succeeds, or says one error and one hint."""
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if "\x1b" in done.output or "\0" in done.output:
        raise Wrong("control characters are written to the terminal")
    if done.exit_code == 0:
        return True
    text = done.stderr
    if text.count("error: ") < 1 or len(re.findall("^hint: .+", text, re.MULTILINE)) != 1:
        raise Wrong(f"not one error and one hint: {text!r:.300}")
    raise _refused(" ".join(text.split()), "it is in the text")


# Plans.


# Ranks, pools, drafts, libraries and the host's cache are in these, and not in the demo's own plan.
_PLANNED = (
    """target: {gpu: H200, count: 2, libraries: required}
workload: {kind: agentic, first_turn_tokens: 300, turns: 3, turn_tokens: 64, output_tokens: 32}
parallelism: {attention: {tp: 2}, moe: {ep: 2}}
speculation: {depth: 2}
disaggregation: off
serving: {host_cache_gib: 1, kv_dtype: fp8, grammar: true, penalties: true, state: bf16}
""",
    """target: {gpu: H200, count: 3}
workload: {kind: agentic, first_turn_tokens: 300, turns: 3, turn_tokens: 64, output_tokens: 32}
speculation: {depth: 1}
disaggregation: {prefill: 1, decode: 2}
""",
)


@cache
def _plan_fields(number: int) -> Json:
    """The demo's plan, or another of its model."""
    if number == len(_PLANNED):
        return json.loads((BUNDLE / "plan.json").read_bytes())
    from tokenspeed_plan.planner.compile import compile_bundle, find_model
    from tokenspeed_plan.planner.spec import parse_spec

    model = f"model: {{path: {json.dumps(str(MODEL))}, weights: bf16}}\n"
    spec = parse_spec(f"version: 1\n{model}{_PLANNED[number]}", "a spec")
    return json.loads(dump_plan(seal(compile_bundle(spec, find_model(spec)).plan)))


def make_plan(rng: random.Random) -> Files:
    """A plan with changes in one or two of its parts."""
    fields = dict(_plan_fields(rng.randrange(len(_PLANNED) + 1)))
    # Most of a plan is steps of programs. Every part of it gets its share of the changes.
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(fields))
        changed = mutate_json(rng, {name: fields[name]}, 2)
        fields = {**fields, **changed} if isinstance(changed, dict) else fields
    return {"plan.json": encode(fields)}


def _load_plans() -> None:
    for number in range(len(_PLANNED) + 1):
        _plan_fields(number)
    judge_command("show", BUNDLE)


def judge_plan(files: Files, folder: Path) -> bool:
    """Seal it again if it still has a plan's form, so that its rules judge it; then show it."""
    plan = parse_plan(files["plan.json"], "plan.json")
    (folder / "plan.json").write_text(dump_plan(seal(plan)), encoding="utf-8")
    return judge_command("show", folder)


# Checkpoints.


@cache
def _tiny_model() -> tuple[Files, int]:
    """Two layers of the demo model, headers alone, and how many bytes of data follow them."""
    config = json.loads((MODEL / "config.json").read_bytes())
    text = config["text_config"]
    text["layer_types"] = ["linear_attention", "full_attention"]
    text["num_hidden_layers"] = text["full_attention_interval"] = 2
    header, end = {}, 0
    for path in sorted(MODEL.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(size))
        for name, entry in tensors.items():
            layer = re.search(r"language_model\.layers\.(\d+)\.", name)
            if name == "__metadata__" or (layer and layer[1] in "12"):
                continue
            start, stop = entry["data_offsets"]
            offsets = [end, end + stop - start]
            end = offsets[1]
            short = name.replace("language_model.layers.3.", "language_model.layers.1.")
            header[short] = {**entry, "data_offsets": offsets}
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}
    files = {
        "model/config.json": encode(config),
        "model/model.safetensors": _with_size(encode(header)),
        "model/model.safetensors.index.json": encode(index),
    }
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        files[f"model/{name}"] = (MODEL / name).read_bytes()
    return files, end


def _with_size(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


_MUTATED = (
    "config.json",
    "config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


def make_checkpoint(rng: random.Random) -> Files:
    files = dict(_tiny_model()[0])
    name = f"model/{rng.choice(_MUTATED)}"
    if not name.endswith(".safetensors"):
        files[name] = mutate_file(rng, files[name])
        return files
    header = mutate_file(rng, files[name][8:])
    files[name] = _with_size(header)
    if rng.random() < 0.1:
        files[name] = mutate_bytes(rng, files[name][:8]) + header
    return files


def judge_checkpoint(files: Files, folder: Path) -> bool:
    """Plan it; the plan is made and checked, but not replayed: its weights are zeros."""
    from tokenspeed_plan.planner import find_model, load_spec
    from tokenspeed_plan.planner.compile import compile_bundle

    path = folder / "spec.yaml"
    path.write_text(
        "version: 1\n"
        f"model: {{path: {folder / 'model'}, weights: fp32}}\n"
        "target: {gpu: cpu}\n"
        "workload: {kind: batch, first_turn_tokens: 64, output_tokens: 16, concurrency: 1}\n"
        "speculation: off\ndisaggregation: off\n"
    )
    spec = load_spec(path)
    compile_bundle(spec, find_model(spec, path))
    return True


def _load_planner() -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        files = _tiny_model()[0]
        write_files(files, Path(folder))
        judge_checkpoint(files, Path(folder))


# Tokenizers and templates.

TEXTS = ("", "def f(x):\n    return x", " e\u0301 \u00e9 <|im_start|>user", "\U0001f600\n\n\n  ")
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "<think> and?"},
]
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{%- for m in messages %}{% if m.role == 'user' %}[{{ m['content'] | tojson }}]"
    "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{%- endfor %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:"
    "{{ m.content.split('\\n')[-1] }}{% if loop.last %}!{% endif %}{% endfor %}"
    "{{ strftime_now('%Y') }}",
)


def make_tokenizer(rng: random.Random) -> Files:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (MODEL / name).read_bytes() for name in names}
    files["config.json"] = (MODEL / "config.json").read_bytes()
    template = rng.choice((*TEMPLATES, files["chat_template.jinja"].decode()))
    if rng.random() < 0.6:
        template = mutate_text(rng, template)
    files["chat_template.jinja"] = template.encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.4:
        files["tokenizer_config.json"] = mutate_file(rng, files["tokenizer_config.json"])
    elif kind < 0.6:
        files["tokenizer.json"] = _mutate_tokenizer(rng, files["tokenizer.json"])
    if rng.random() < 0.3:
        config = json.loads(files["tokenizer_config.json"]) if kind >= 0.4 else {}
        config["chat_template"] = template
        del files["chat_template.jinja"]
        files["tokenizer_config.json"] = encode(config)
    return files


def _mutate_tokenizer(rng: random.Random, data: bytes) -> bytes:
    """A tokenizer.json: the vocabulary is most of it, and gets few of the changes."""
    fields = json.loads(data)
    vocabulary = fields["model"]
    fields["model"] = {name: vocabulary[name] for name in vocabulary if name != "vocab"}
    fields["model"].pop("merges", None)
    changed = mutate_json(rng, fields)
    if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
        changed["model"] = {**vocabulary, **changed["model"]}
    if rng.random() < 0.1:
        return mutate_bytes(rng, data)
    return encode(changed)


def judge_tokenizer(files: Files, folder: Path) -> bool:
    """Load, encode and render; what is taken must be what transformers makes of the files."""
    from tokenspeed_plan.codegen.chat_template import ChatTemplate
    from tokenspeed_plan.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder, ChatTemplate.load(folder))
    encoded = [tokenizer.encode(text) for text in TEXTS]
    decoded = [tokenizer.decode(ids) for ids in encoded]
    prompt = None
    try:
        prompt = tokenizer.render_chat(MESSAGES)
    except TokenspeedError as error:
        failure = refusal_fault(error.message, error.hint)
        if failure is not None:
            raise Wrong(failure.kind) from error
    if COMPARE:
        _compare(folder, encoded, prompt)
    return all(isinstance(text, str) for text in decoded)


COMPARE = True  # with transformers


def _compare(folder: Path, encoded: list[list[int]], prompt: str | None) -> None:
    """What we took, transformers may refuse; what both take must be one thing."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        wanted = [theirs.encode(text) for text in TEXTS]
    except Exception:  # the oracle refuses in many ways
        return
    if encoded != wanted:
        raise Wrong("token ids differ from those of transformers")
    try:
        rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    except Exception:
        return
    if prompt is not None and prompt != rendered:
        raise Wrong("the prompt differs from that of transformers")


def _load_tokenizers() -> None:
    _tokenizer()
    if COMPARE:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(MODEL)


TARGETS = {
    "bodies": Target(make_body, judge_body, lambda: (_engine(), _tokenizer(), _limits())),
    "rows": Target(make_row, judge_row, lambda: (_tokenizer(), _limits())),
    "messages": Target(make_messages, judge_messages, lambda: (_tokenizer(), _limits())),
    "forms": Target(make_form, judge_form, lambda: (form_fuzzing.compiler(), _limits())),
    "specs": Target(make_spec, judge_spec, _load_advisor),
    "plans": Target(make_plan, judge_plan, _load_plans),
    "checkpoints": Target(make_checkpoint, judge_checkpoint, _load_planner),
    "tokenizers": Target(make_tokenizer, judge_tokenizer, _load_tokenizers),
}


def target_of(name: str) -> Target:
    return TARGETS[name]
