"""`tokenspeed chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.commands.engines import load_chat_template, on_all_ranks, ready_engine
from tokenspeed_plan.plans.errors import RequestError

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.request import Completion, SamplingParams

Folder = click.Path(path_type=Path)
HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"


@click.command()
@click.argument("bundle", type=Folder)
@click.option("--system", help="Text of a system message to begin with.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of an answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=1.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is all.")
@click.option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Of the first answer; each further one counts on.",
)
@click.option("--weights", type=Folder, help="Checkpoint folder, where it is not the spec's.")
@click.option(
    "--backend", type=click.Choice(["reference", "kernels"]), help="As in `tokenspeed run`."
)
@click.option("--no-canary", is_flag=True, help="Do not replay the golden prompts first.")
def chat(bundle: Path, **options: Any) -> None:
    """Talk with BUNDLE's model. What is said goes to stdout, all else to stderr."""
    on_all_ranks(bundle, options, lambda: _chat(bundle, options), ignored=(signal.SIGINT,))


def _chat(bundle: Path, options: dict[str, Any]) -> None:
    template = load_chat_template(bundle, options)
    if template is None:
        raise RequestError(
            "the model has no chat template", f"use `tokenspeed run {bundle} --prompt TEXT`"
        )
    engine = ready_engine(bundle, options, template)
    conversation = _Conversation(engine, options)
    if sys.stdin.isatty():
        click.echo(HELP, err=True)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/") and line[1:].isalpha():
            click.echo(f"there is no `{line}`: {HELP}", err=True)
        else:
            conversation.say(line)


def _lines() -> Iterator[str]:
    """What the user says, until the end of the input; a Ctrl-C here drops what was typed."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo("\n" + HELP, err=True)
            continue
        if line:
            yield line


class _Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(self, engine: Engine, options: dict[str, Any]) -> None:
        self._engine = engine
        self._options = options
        self._num_answers = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        system = self._options["system"]
        self._messages = [{"role": "system", "content": system}] if system is not None else []

    def say(self, text: str) -> None:
        """Add a message and show its answer; a message that cannot be answered is taken back."""
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except RequestError as error:
            self._messages.pop()
            click.echo(f"{error}\n", err=True)
        else:
            self._messages.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        assert self._engine.tokenizer is not None
        ids = self._engine.tokenizer.encode(self._engine.tokenizer.render_chat(self._messages))
        done, text = None, ""
        with (
            _interruptible() as interrupted,
            closing(self._engine.stream(ids, self._params(len(ids)))) as deltas,
        ):
            for delta in deltas:
                text, done = text + delta.text, delta.completion
                click.echo(delta.text, nl=False)
                if interrupted:
                    break
        self._num_answers += 1
        click.echo()
        click.echo(_figures(done) if done else "[stopped]", err=True)
        return text

    def _params(self, num_prompt_tokens: int) -> SamplingParams:
        from tokenspeed_plan.runtime.request import SamplingParams

        room = self._engine.max_seq_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"the conversation has {num_prompt_tokens} tokens, the plan's limit is {self._engine.max_seq_len}",
                "forget it with `/reset`",
            )
        return SamplingParams(
            max_tokens=min(self._options["max_tokens"] or self._engine.default_max_tokens, room),
            temperature=self._options["temperature"],
            top_p=self._options["top_p"],
            top_k=self._options["top_k"],
            seed=self._options["seed"] + self._num_answers,
        )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list, and leaves it to the loop to stop between two steps; a second one does not wait for it."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _figures(done: Completion) -> str:
    tokens = len(done.token_ids)
    rate = f", then {(tokens - 1) / done.decode_s:.0f} tokens/s" if done.decode_s else ""
    cached = f"{done.num_cached_tokens} of {done.num_prompt_tokens} prompt tokens cached"
    return f"[{tokens} tokens ({done.finish_reason}), first after {done.ttft_s * 1e3:.0f} ms{rate}; {cached}]"
