"""Chats that are alike but for ids, texts and seed: of these only the first is checked in full.

What is left of a row without these is its shape. Whether a row of a known shape passes depends on
its texts alone: its chat template may refuse them, or they may be too long. So each is rendered,
and what has room however it is cut into tokens needs no look at its fields and no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenspeed_plan.plans.chat_format import Chat, ChatFormat
from tokenspeed_plan.runtime.serving.batch.files import InputLine
from tokenspeed_plan.runtime.serving.batch.lines import MAX_NAME_CHARS, Row
from tokenspeed_plan.runtime.serving.leases.known_shapes import MAX_SHAPES
from tokenspeed_plan.runtime.serving.openai.bodies import (
    ChatBody,
    InvalidRequestError,
    parse_json,
)
from tokenspeed_plan.runtime.serving.openai.conversion import (
    RequestLimits,
    asks_no_form,
    chat_of,
    wanted_tokens,
)

Json = dict[str, Any]
Shape = tuple[str, ...]
_FIELDS = {"custom_id", "method", "url", "body"}
_MESSAGE = {"role", "content"}
_TEXTS = ("user", "safety_identifier", "prompt_cache_key")  # in which nothing can be wrong
_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode


class KnownChat(NamedTuple):
    """A row whose chat is all that there is to check.

    Attributes:
        custom_id: its own.
        chat: what its template renders.
        room: the most tokens that it may have.
    """

    custom_id: str
    chat: Chat
    room: int


class KnownChats:
    """The shapes of chats that have passed all checks.

    Args:
        limits: of the plan.
        format: of its model's chats.
    """

    def __init__(self, limits: RequestLimits, format: ChatFormat) -> None:
        self._limits = limits
        self._format = format
        self._rest: dict[Shape, tuple[Mapping[str, Any] | None, int]] = {}  # variables, room

    def find(self, line: InputLine) -> KnownChat | None:
        """The chat of a line of a known shape."""
        if not self._rest:
            return None
        found = _taken_apart(line)
        if found is None or found[0] not in self._rest:
            return None
        shape, custom_id, messages = found
        variables, room = self._rest[shape]
        return KnownChat(custom_id, Chat(messages, None, variables), room)

    def learn(self, line: InputLine, row: Row) -> None:
        """Note the shape of a line that has passed."""
        body = row.body
        if not isinstance(body, ChatBody) or not asks_no_form(body):
            return
        found = _taken_apart(line)
        if found is None or len(self._rest) == MAX_SHAPES:
            return
        chat = chat_of(body, self._format)
        if chat.messages == found[2]:  # else the template gets others than were sent
            room = self._limits.max_seq_len - (wanted_tokens(body) or 1)
            self._rest[found[0]] = chat.variables, room


def _taken_apart(line: InputLine) -> tuple[Shape, str, list[Json]] | None:
    """The shape, the `custom_id` and the messages of a line that has roles and texts alone."""
    if line.fault is not None:
        return None
    try:
        data = parse_json(line.raw)
    except InvalidRequestError:
        return None
    name, body = data.get("custom_id"), data.get("body")
    if data.keys() != _FIELDS or not isinstance(body, dict) or not isinstance(name, str):
        return None
    messages = body.pop("messages", None)
    if not 0 < len(name) <= MAX_NAME_CHARS or not isinstance(messages, list):
        return None
    for message in messages:
        if not isinstance(message, dict) or message.keys() != _MESSAGE:
            return None
        if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
            return None
    roles = [message["role"] for message in messages]
    return (_encode([data["method"], data["url"], _without_texts(body)]), *roles), name, messages


def _without_texts(body: Json) -> Json:
    """The fields of a body, but for what may be anything."""
    for field in _TEXTS:
        if isinstance(body.get(field), str):
            body[field] = ""
    seed = body.get("seed")
    if type(seed) is int and 0 <= seed < 1 << 63:
        body["seed"] = 0
    return body
