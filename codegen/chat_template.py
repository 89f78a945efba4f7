"""A model's chat template: messages in, the text of a prompt out."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenspeed_plan.plans.chat_format import CallFormat, Chat, ChatFormat
from tokenspeed_plan.plans.errors import PlanError, RequestError
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.plans.tokenizer_files import chat_template, special_tokens
from tokenspeed_plan.plans.worker_process import WorkerFault, WorkerProcess

Json = dict[str, Any]

MAX_CPU_S = 5.0  # for one prompt; published templates take milliseconds
_WORKER = Path(__file__).with_name("chat_worker.py")
_HINT = "mend the messages, or use `/v1/completions`"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Renderer:
    """Renders one template in a process; the system ends it where the template takes too much."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process = self._started()

    def ask(self, chats: Sequence[Json]) -> list[str | RequestError]:
        """The text of the template with the variables of each chat, or why there is none."""
        try:
            return [_outcome(reply) for reply in self._replies(chats)]
        except (WorkerFault, OSError) as error:
            if len(chats) > 1:  # one of them has ended the process
                return [outcome for chat in chats for outcome in self.ask([chat])]
            return [_refused(_reason(error))]

    def _replies(self, chats: Sequence[Json]) -> list[Json]:
        with self._lock:
            if not self._process.is_alive:
                self._process = self._started()
            replies: list[Json] = self._process.ask({"chats": chats})["chats"]
            return replies

    def _started(self) -> WorkerProcess:
        return WorkerProcess([str(_WORKER), str(MAX_CPU_S)], {"source": self._source})


def _outcome(reply: Json) -> str | RequestError:
    if "error" in reply:
        return _refused(printable_line(reply["error"]))
    return str(reply["text"])


def _refused(reason: str) -> RequestError:
    return RequestError(f"the model's chat template refuses the messages: {reason}", _HINT)


def _reason(error: WorkerFault | OSError) -> str:
    code = getattr(error, "code", None)
    if code == -signal.SIGPROF:
        return "it does not come to an end"
    if code is not None:
        return f"its process ended with code {code}"
    return printable_line(str(error))


class ChatTemplate:
    """Chat messages -> text of a prompt that ends where the assistant's answer begins.

    Args:
        source: the template.
        special_tokens: names and texts of tokens that it sees.
        tool_source: the template of chats with tools, where that is another one.

    Attributes:
        source: the template.

    Raises:
        PlanError: a template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        tool_source: str | None = None,
    ) -> None:
        self.source = source
        self._tokens = dict(special_tokens or {})
        self._renderer = self._tool_renderer = _compiled(source)
        if tool_source is not None:
            self._tool_renderer = _compiled(tool_source)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder; None if the model has none.

        Raises:
            PlanError: a file is malformed, or a template cannot be compiled.
        """
        source = chat_template(folder)
        if source is None:
            return None
        return cls(source, special_tokens(folder), chat_template(folder, "tool_use"))

    @cached_property
    def format(self) -> ChatFormat:
        """How it spells what is no plain text."""
        if self._probe([_USER], None) is None:
            return ChatFormat()
        return ChatFormat(
            calls=self._call_format(),
            thinks=self._thinks(),
            takes_parts=self._shows([{"role": "user", "content": _PARTS}], _JOINED),
            takes_late_systems=self._shows([_USER, _SYSTEM, _USER], _TEXT_OF_SYSTEM),
        )

    def __call__(
        self,
        messages: list[Json],
        tools: Sequence[Json] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages as a prompt.

        Args:
            messages: as transformers takes them; arguments of calls may be JSON as text.
            tools: JSON schemas of functions; None without tools.
            variables: further ones of the template, as `enable_thinking`.

        Raises:
            RequestError: the template refuses the messages.
        """
        (outcome,) = self.render_all([Chat(messages, tools, variables)])
        if isinstance(outcome, RequestError):
            raise outcome
        return outcome

    def render_all(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        """Render many chats at once: the prompt of each, or why the template refuses it."""
        outcomes: dict[int, str | RequestError] = {}
        asked: dict[_Renderer, dict[int, Json]] = {}
        for number, chat in enumerate(chats):
            renderer = self._renderer
            if chat.tools is not None:
                renderer = self._tool_renderer
            try:
                asked.setdefault(renderer, {})[number] = self._variables(chat)
            except RequestError as error:
                outcomes[number] = error
        for renderer, variables in asked.items():
            outcomes |= zip(variables, renderer.ask([*variables.values()]), strict=True)
        return [outcomes[number] for number in range(len(chats))]

    def _variables(self, chat: Chat) -> Json:
        """All variables of the template.

        Raises:
            RequestError: the arguments of a call are no object.
        """
        known = {
            "messages": [_message(index, message) for index, message in enumerate(chat.messages)],
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": True,
        }
        return self._tokens | dict(chat.variables or {}) | known

    def _call_format(self) -> CallFormat | None:
        """How it writes a call. It must also show the tools that there are."""
        text = self._probe([_USER, _CALLING], [_TOOL])
        if text is None or _ABOUT_TOOL not in text:
            return None
        for name, pattern in _CALLS.items():
            if pattern.search(text):
                return name
        return None

    def _thinks(self) -> bool:
        return self._shows([_USER, _THINKING], _THOUGHT) or self._shows([_USER], _OPEN_THOUGHT)

    def _shows(self, messages: list[Json], pattern: re.Pattern[str]) -> bool:
        """Whether it writes something, and does not refuse the messages."""
        text = self._probe(messages, None)
        return text is not None and pattern.search(text) is not None

    def _probe(self, messages: list[Json], tools: Sequence[Json] | None) -> str | None:
        with suppress(RequestError):
            return self(messages, tools)
        return None


def _compiled(source: str) -> _Renderer:
    try:
        return _Renderer(source)
    except (WorkerFault, OSError) as error:
        raise PlanError(
            f"the model's chat template does not compile: {_reason(error)}",
            "use the file of the published model",
        ) from error


# What a template is asked to write, and the ways to write it that are known.
_USER = {"role": "user", "content": "probe"}
_SYSTEM = {"role": "system", "content": "probe-system"}
_TEXT_OF_SYSTEM = re.compile("probe-system")
_PARTS = [{"type": "text", "text": "probe-a"}, {"type": "text", "text": "probe-b"}]
_JOINED = re.compile(r"(?<![\"'])probe-a\s*probe-b")
_THINKING = {"role": "assistant", "content": "probe", "reasoning_content": "probe-thought"}
_THOUGHT = re.compile(r"<think>\s*probe-thought\s*</think>")
_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
_ABOUT_TOOL = "probe-about"
_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": _ABOUT_TOOL,
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_FUNCTION = {"name": "probe_name", "arguments": {"probe_key": "probe-value"}}
_CALLING: Json = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "probe", "function": _FUNCTION}],
}
_CALLS: dict[CallFormat, re.Pattern[str]] = {
    "tags": re.compile(
        r"<tool_call>\s*<function=probe_name>\s*<parameter=probe_key>\s*probe-value\s*"
        r"</parameter>\s*</function>\s*</tool_call>"
    ),
    "json": re.compile(
        r'<tool_call>\s*\{"name":\s*"probe_name",\s*'
        r'"arguments":\s*\{"probe_key":\s*"probe-value"\}\s*\}\s*</tool_call>'
    ),
}


def _message(index: int, message: Mapping[str, Any]) -> Json:
    """A message as transformers gives it to templates, and tool calls as vLLM does.

    Templates test whether a field is there, so one that is null is left out.
    """
    found = {name: value for name, value in message.items() if value is not None}
    calls = found.get("tool_calls")
    if isinstance(calls, list):
        found["tool_calls"] = [_call(f"messages[{index}].tool_calls", call) for call in calls]
    reasoning = [found[name] for name in _REASONING if name in found]
    if reasoning:
        found = {"thinking": reasoning[0]} | found | {"reasoning_content": reasoning[0]}
    return found


def _call(place: str, call: Any) -> Any:
    """A tool call, its arguments as an object: OpenAI's clients send them as the text of one.

    Raises:
        RequestError: the text is no object.
    """
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"the arguments in {place} are not a JSON object", _HINT)
    return call | {"function": call["function"] | {"arguments": arguments}}
