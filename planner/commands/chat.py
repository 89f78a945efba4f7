"""`tokenspeed chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenspeed_plan.planner.commands.engines import (
    EngineOptions,
    ReplayCommand,
    engine_options,
    load_chat_template,
    on_all_ranks,
    ready_engine,
)
from tokenspeed_plan.planner.commands.option_types import Number
from tokenspeed_plan.plans.errors import RequestError, RequestFailed

if TYPE_CHECKING:
    from tokenspeed_plan.runtime.engine import Engine
    from tokenspeed_plan.runtime.request import Completion, SamplingParams

Folder = click.Path(path_type=Path)
HELP = (
    "/reset forgets the conversation, /think on and /think off switch thoughts, /exit leaves; "
    "Ctrl-C stops an answer"
)
THINK = {"/think on": True, "/think off": False}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Options of a conversation.

    Attributes:
        system: text of the system message; None for no such message.
        max_tokens: tokens of an answer; the plan's default if None.
        seed: of the first answer; each further answer adds one.
    """

    system: str | None
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int


@click.command(cls=ReplayCommand)
@click.argument("bundle", type=Folder)
@click.option("--system", help="Text of a system message to begin with.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of an answer.")
@click.option(
    "--temperature",
    type=Number(0, 2),
    default=1.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option("--top-p", type=Number(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is all.")
@click.option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Of the first answer; each further one counts on.",
)
@engine_options
def chat(
    bundle: Path,
    system: str | None,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    engine: EngineOptions,
) -> None:
    """Talk with BUNDLE's model. Answers go to stdout, all else to stderr."""
    options = ChatOptions(system, max_tokens, temperature, top_p, top_k, seed)
    on_all_ranks(bundle, engine, lambda: _chat(bundle, engine, options), ignored=(signal.SIGINT,))


def _chat(bundle: Path, engine_options: EngineOptions, options: ChatOptions) -> None:
    template = load_chat_template(bundle, engine_options)
    if template is None:
        raise RequestError(
            "the model has no chat template", f"use `tokenspeed run {bundle} --prompt TEXT`"
        )
    engine = ready_engine(bundle, engine_options, template)
    conversation = _Conversation(engine, options)
    if sys.stdin.isatty():
        click.echo(HELP, err=True)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line in THINK:
            conversation.think(THINK[line])
        elif line.startswith("/") and line[1:].split(" ")[0].isalpha():
            click.echo(f"there is no `{line}`: {HELP}", err=True)
        else:
            conversation.answer(line)


def _lines() -> Iterator[str]:
    """Lines of the user until the end of the input. Ctrl-C drops a line that is being typed."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
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

    def __init__(self, engine: Engine, options: ChatOptions) -> None:
        from tokenspeed_plan.runtime.serving.chat.known_turns import KnownTurns

        assert engine.tokenizer is not None
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._turns = KnownTurns(engine.tokenizer, engine.plan.model.eos_token_ids)
        self._variables: dict[str, Any] = {}
        self._options = options
        self._num_answers = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self._messages: list[dict[str, Any]] = []
        if self._options.system is not None:
            self._messages.append({"role": "system", "content": self._options.system})

    def think(self, wanted: bool) -> None:
        """Switch thoughts on or off, where the template knows them."""
        if not self._tokenizer.chat_format.thinks:
            click.echo("the model's chat template knows no thoughts", err=True)
            return
        self._variables["enable_thinking"] = wanted

    def answer(self, text: str) -> None:
        """Add a message and print its answer. A message without an answer is removed."""
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except (RequestError, RequestFailed) as error:
            self._messages.pop()
            click.echo(f"{error}\n", err=True)
        else:
            self._messages.append(answer)

    def _answer(self) -> dict[str, Any]:
        """Print the answer to the last message as it grows; Ctrl-C stops it after a step.

        Returns:
            The message of the answer.
        """
        from tokenspeed_plan.runtime.serving.interrupt import Interrupt

        prompt = self._tokenizer.render_chat(self._messages, None, self._variables)
        ids = self._turns.encode(prompt)
        completion, text = None, ""
        deltas = self._engine.stream(ids, self._params(len(ids)))
        with Interrupt(signal.SIGINT) as interrupt, closing(deltas):
            for delta in deltas:
                text += delta.text
                completion = delta.completion
                click.echo(delta.text, nl=False)
                if interrupt.seen:
                    break
        self._num_answers += 1
        click.echo()
        figures = "[stopped]"
        if completion:
            figures = _figures(completion)
            self._turns.note(completion)
        click.echo(figures, err=True)
        return self._message(ids, text, is_cut=completion is None)

    def _message(self, prompt_ids: list[int], text: str, is_cut: bool) -> dict[str, Any]:
        """An answer as templates take it, its thought apart."""
        from tokenspeed_plan.runtime.serving.chat.answer_parser import AnswerParser, AnswerRules
        from tokenspeed_plan.runtime.serving.chat.answer_parts import assembled
        from tokenspeed_plan.runtime.serving.openai.answers import ends_in_thought

        format = self._tokenizer.chat_format
        if not format.thinks:
            return {"role": "assistant", "content": text}
        parser = AnswerParser(AnswerRules(format, ends_in_thought(prompt_ids, self._tokenizer)))
        answer = assembled([*parser.push(text), *parser.finish(is_cut)])
        message = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        return message

    def _params(self, num_prompt_tokens: int) -> SamplingParams:
        from tokenspeed_plan.runtime.request import SamplingParams

        room = self._engine.max_seq_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"the conversation has {num_prompt_tokens} tokens, "
                f"the plan's limit is {self._engine.max_seq_len}",
                "forget it with `/reset`",
            )
        return SamplingParams(
            max_tokens=min(self._options.max_tokens or self._engine.default_max_tokens, room),
            temperature=self._options.temperature,
            top_p=self._options.top_p,
            top_k=self._options.top_k,
            seed=self._options.seed + self._num_answers,
        )


def _figures(completion: Completion) -> str:
    num_tokens = len(completion.token_ids)
    rate = ""
    if completion.decode_s:
        rate = f", then {(num_tokens - 1) / completion.decode_s:.0f} tokens/s"
    return (
        f"[{num_tokens} tokens ({completion.finish_reason}), "
        f"first after {completion.ttft_s * 1e3:.0f} ms{rate}; "
        f"{completion.num_cached_tokens} of {completion.num_prompt_tokens} prompt tokens cached]"
    )
