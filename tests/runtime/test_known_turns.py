"""Tokens of earlier turns: taken where a text begins with theirs, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tokenspeed_plan.runtime.request import Completion
from tokenspeed_plan.runtime.serving.chat import known_turns
from tokenspeed_plan.runtime.serving.chat.known_turns import KnownTurns

END = ord("\n")


class _Letters:
    """Letters are tokens; those from 1000 on are pairs, which no text is cut into."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def spell(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) if token < 1000 else chr(token - 1000) * 2 for token in ids)


def answer(prompt: Sequence[int], ids: Sequence[int]) -> Completion:
    done = Completion("0", tuple(ids), "", "stop", len(prompt), 0.0, 0.0)
    return replace(done, prompt_ids=tuple(prompt))


PAIR = 1000 + ord("a")


def test_a_conversation_that_goes_on() -> None:
    turns = KnownTurns(_Letters(), [END])
    prompt = turns.encode("hi")
    assert prompt == [ord("h"), ord("i")]
    turns.note(answer(prompt, [PAIR, END]))
    second = turns.encode("hiaa\nok")
    assert second == [*prompt, PAIR, END, ord("o"), ord("k")]
    turns.note(answer(second, [PAIR, PAIR, END]))
    assert turns.encode("hiaa\nokaaaa\n") == [*second, PAIR, PAIR, END]
    assert turns.encode("hiaa\nno")[:4] == [*prompt, PAIR, END]


def test_what_is_not_known() -> None:
    turns = KnownTurns(_Letters(), [END])
    prompt = turns.encode("hi")
    turns.note(answer(prompt, [PAIR]))  # it was cut
    turns.note(answer([1, 2], [PAIR, END]))  # no chat
    turns.note(answer(prompt, []))  # it failed
    for text in ("hiaa\nok", "hiaa", "haa\n"):
        assert turns.encode(text) == [ord(letter) for letter in text]
    turns.note(answer(prompt, [PAIR, END]))
    assert turns.encode("hi") == prompt and PAIR not in turns.encode("hia")


def test_what_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were not asked for longest."""
    monkeypatch.setattr(known_turns, "MAX_CHARS", 10)
    turns = KnownTurns(_Letters(), [END])
    for letter in "xyz":
        turns.note(answer(turns.encode(letter), [PAIR, END]))
        turns.encode("xaa\n")
    known = [PAIR in turns.encode(f"{letter}aa\n") for letter in "xyz"]
    assert known == [True, False, True]
    turns = KnownTurns(_Letters(), [END])
    first, _ = turns.encode("p"), turns.encode("q" * 10)
    turns.note(answer(first, [PAIR, END]))
    assert PAIR not in turns.encode("paa\n")
