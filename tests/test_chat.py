"""`tokenspeed chat`: answers with the model's template turn by turn, and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import COMMAND
from click.testing import CliRunner, Result
from conftest import ROOT

from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.planner.cli import main
from tokenspeed_plan.planner.commands.chat import ChatOptions, _Conversation
from tokenspeed_plan.plans.bundle import dump_plan, load_plan, seal
from tokenspeed_plan.plans.chat_format import ChatFormat
from tokenspeed_plan.runtime import Completion, Engine, SamplingParams
from tokenspeed_plan.runtime.streaming import Delta

pytestmark = pytest.mark.slow  # whole processes, or many examples

BUNDLE = ROOT / "plans/frozen/demo-cpu"
MODEL = ROOT / "examples/demo/model"
PARAMS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40}
FLAGS = (
    "--max-tokens",
    12,
    "--temperature",
    0.7,
    "--top-p",
    0.9,
    "--top-k",
    40,
    "--seed",
    5,
    "--no-canary",
)


def chat(typed: str | bytes, *options: object) -> Result:
    args = ["chat", str(BUNDLE), *map(str, (*FLAGS, *options))]
    return CliRunner().invoke(main, args, input=typed, catch_exceptions=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUNDLE, chat=ChatTemplate.load(MODEL))


def answers(
    engine: Engine, texts: list[str], system: str | None = None, seed: int = 5
) -> list[str]:
    """The engine's answer to each text, with the conversation before it."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        assert engine.tokenizer
        ids = engine.tokenizer.encode(engine.tokenizer.render_chat(messages))
        (done,) = engine.generate([ids], SamplingParams(**PARAMS, seed=seed + number))
        messages.append({"role": "assistant", "content": done.text})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_turns_build_on_each_other(engine: Engine) -> None:
    texts = ["read a file", "now write one", "  and close it "]
    done = chat("\n\n".join(texts) + "\n")
    assert done.exit_code == 0
    assert done.stdout == "".join(
        f"{text}\n" for text in answers(engine, [text.strip() for text in texts])
    )
    figures = done.stderr.splitlines()
    cached = [int(re.search(r"; (\d+) of \d+ prompt tokens cached\]", line)[1]) for line in figures]  # type: ignore[index]
    assert len(cached) == 3 and cached[0] == 0 < cached[1] < cached[2], (
        "each turn goes on where the last one ended"
    )


def test_reset_system_and_exit(engine: Engine) -> None:
    done = chat("one\n/reset\ntwo\n/what\n/exit\nnever\n", "--system", "Be brief.")
    first, second = answers(engine, ["one"], "Be brief."), answers(engine, ["two"], "Be brief.", 6)
    assert done.stdout == f"{first[0]}\n{second[0]}\n"
    assert "there is no `/what`: /reset forgets" in done.stderr


def test_a_conversation_that_has_grown_too_long_goes_on_after_a_reset(engine: Engine) -> None:
    done = chat("x " * 1300 + "\nshort\n")
    assert done.exit_code == 0
    assert (
        done.stderr.count("error: the conversation has ") == 1
        and "\nhint: forget it with `/reset`" in done.stderr
    )
    assert done.stdout == answers(engine, ["short"])[0] + "\n", "what was refused is not part of it"


def test_what_is_not_utf_8_is_still_a_message() -> None:
    assert chat(b"caf\xe9 \xff\n").exit_code == 0


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "plan"))
    plan = load_plan(BUNDLE)
    files = {name: digest for name, digest in plan.model.files.items() if "chat" not in name}
    facts = plan.model.model_copy(update={"files": files})
    text = dump_plan(seal(plan.model_copy(update={"model": facts})))
    (bundle / "plan.json").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, ["chat", str(bundle), "--weights", str(model)], input="hi\n")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "error: the model has no chat template\n\nhint: use `tokenspeed run "
    )


@pytest.mark.parametrize("command", ["chat", "serve", "run"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_was_not_planned_is_not_compiled(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "load", lambda folder: pytest.fail("it was compiled"))
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{{ 9 ** (9 ** 9) }}", encoding="utf-8")
    args: list[object] = [command, BUNDLE, "--weights", model]
    if command == "serve":
        args += ["--port", 0]
    if command == "run":
        source = ROOT / "examples/demo/batch.jsonl"
        args += ["--input", source, "--output", tmp_path / "out.jsonl"]
    done = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 2 and done.stderr.startswith(f"error: `{model / name}` ")
    assert " planned\n\nhint: " in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    plain, engines = Engine.stream, []

    def stream(
        self: Engine, ids: list[int], params: SamplingParams
    ) -> Generator[Delta, None, None]:
        engines.append(self)
        for number, delta in enumerate(plain(self, ids, params)):
            if len(engines) == 1 and number == 3:
                signal.raise_signal(signal.SIGINT)
            yield delta

    monkeypatch.setattr(Engine, "stream", stream)
    before = signal.getsignal(signal.SIGINT)
    done = chat("one\n/reset\ntwo\n")
    whole = answers(engine, ["one"])[0]
    second = f"\n{answers(engine, ['two'], seed=6)[0]}\n"
    stopped = done.stdout.removesuffix(second)
    assert done.exit_code == 0 and done.stdout.endswith(second) and "[stopped]" in done.stderr
    assert whole.startswith(stopped) and 0 < len(stopped) < len(whole)
    assert engines[0].usage == engines[1].usage and not engines[0].num_unfinished
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *args: object) -> None:
        self.master, slave = pty.openpty()

        def own_the_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_the_terminal,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def type_until(self, typed: str, answer: str) -> None:
        """Type, and again if it was lost: readline drops what is typed before it listens."""
        for _ in range(5):
            self.type(typed)
            with contextlib.suppress(AssertionError):
                self.wait_for(answer, 10)
                return
        raise AssertionError(self.seen)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        time.sleep(0.5)


def test_on_a_terminal() -> None:
    """The terminal sends Ctrl-C, at the prompt and during an answer."""
    flags = ("--no-canary", "--max-tokens", 1200, "--temperature", 1.5)
    terminal = Terminal("chat", BUNDLE, *flags)
    try:
        terminal.wait_for("> ")
        terminal.type_until("half a thought\x03", "Ctrl-C stops an answer")
        terminal.type("write\n")
        terminal.wait_for("def ")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        terminal.type("/exit\n")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


class _Thinker:
    """An engine and its tokenizer: letters are tokens, and each answer has a thought."""

    chat_format = ChatFormat(thinks=True)
    plan = SimpleNamespace(model=SimpleNamespace(eos_token_ids=(ord("."),)))
    max_seq_len, default_max_tokens = 1000, 9

    def __init__(self) -> None:
        self.tokenizer = self
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def render_chat(self, messages: Any, tools: Any, variables: dict[str, Any]) -> str:
        self.seen.append(([dict(message) for message in messages], dict(variables)))
        return "".join(str(message["content"]) for message in messages) + "<think>\n"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def spell(self, ids: Any) -> str:
        return "".join(map(chr, ids))

    def stream(self, ids: Any, params: SamplingParams) -> Generator[Delta, None, None]:
        text = "hm\n</think>\n\nyes."
        done = Completion("0", tuple(map(ord, text)), text, "stop", len(ids), 0.1, 0.1)
        yield Delta("0", text, done.token_ids, (), replace(done, prompt_ids=tuple(ids)))


def test_thoughts_are_kept_apart_and_switched(capsys: pytest.CaptureFixture[str]) -> None:
    engine = _Thinker()
    options = ChatOptions(None, None, 1.0, 1.0, 0, 0)
    conversation = _Conversation(engine, options)  # type: ignore[arg-type]
    conversation.answer("a")
    conversation.think(False)
    conversation.answer("b")
    first, second = engine.seen
    assert first[1] == {} and second[1] == {"enable_thinking": False}
    said = {"role": "assistant", "content": "yes.", "reasoning_content": "hm"}
    assert second[0][1] == said
    conversation.reset()
    conversation.answer("c")
    assert engine.seen[2] == ([{"role": "user", "content": "c"}], {"enable_thinking": False})
    engine.chat_format = ChatFormat()
    conversation.think(True)
    assert "knows no thoughts" in capsys.readouterr().err
