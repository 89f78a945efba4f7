"""Answers read as they grow: thoughts, text and calls; however they are split."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from chat_models import in_json, in_tags
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values

from tokenspeed_plan.plans.chat_format import ChatFormat
from tokenspeed_plan.runtime.serving.chat.answer_parser import AnswerParser, AnswerRules
from tokenspeed_plan.runtime.serving.chat.answer_parts import ParsedAnswer, Part, assembled, joined
from tokenspeed_plan.runtime.serving.chat.argument_types import to_json, types_of

TAGS, JSON = ChatFormat("tags", thinks=True), ChatFormat("json", thinks=True)
STRING = {"type": "string"}
SCHEMAS: dict[str, Any] = {
    "write": {
        "type": "object",
        "properties": {
            "path": STRING,
            "text": STRING,
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "force": {"type": "boolean"},
            "lines": {"type": "array", "items": STRING},
            "more": {"$ref": "#/$defs/More"},
            "note": {"anyOf": [STRING, {"type": "null"}]},
            "limit": {"type": ["integer", "null"]},
        },
        "$defs": {"More": {"type": "object", "properties": {"a": STRING}}},
    },
    "list": {"type": "object", "properties": {}},
}


def rules(format: ChatFormat = TAGS, thinking: bool = False, **more: Any) -> AnswerRules:
    return AnswerRules(format, thinking, **({"schemas": SCHEMAS} | more))


def parts_of(rules: AnswerRules, pieces: list[str], is_cut: bool = False) -> list[Part]:
    parser = AnswerParser(rules)
    found = [part for piece in pieces for part in parser.push(piece)]
    return joined([*found, *parser.finish(is_cut)])


def read(text: str, rules: AnswerRules, is_cut: bool = False) -> ParsedAnswer:
    """The answer in one piece; letter by letter it must be the same."""
    whole = parts_of(rules, [text], is_cut)
    assert parts_of(rules, list(text), is_cut) == whole
    return assembled(whole)


def calls_of(text: str, rules: AnswerRules, is_cut: bool = False) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in read(text, rules, is_cut).calls]


# What makes a parser stumble, as words of which texts are made.
WORDS = (
    "<tool_call>",
    "</tool_call>",
    "<function=write>",
    "<function=list>",
    "<function=",
    "</function>",
    "<parameter=text>",
    "<parameter=count>",
    "<parameter=zzz>",
    "</parameter>",
    "<think>",
    "</think>",
    '{"name": "write", "arguments": {"text": "',
    '"}}',
    '{"name"',
    "\\",
    '"',
    "{",
    "}",
    "\n",
    "\n\n",
    " ",
    "x",
    "é",
    "<",
    "5",
    "null",
)
TEXTS = st.lists(st.sampled_from(WORDS), max_size=14).map("".join)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    format=st.sampled_from((TAGS, JSON)),
    thinking=st.booleans(),
    is_cut=st.booleans(),
    is_parallel=st.booleans(),
    data=st.data(),
)
def test_every_split_reads_the_same(
    text: str, format: ChatFormat, thinking: bool, is_cut: bool, is_parallel: bool, data: Any
) -> None:
    chosen = rules(format, thinking, is_parallel=is_parallel)
    whole = parts_of(chosen, [text], is_cut)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    assert parts_of(chosen, pieces, is_cut) == whole
    assert parts_of(chosen, list(text), is_cut) == whole
    answer = assembled(whole)
    assert len(answer.calls) <= 1 or is_parallel
    if not is_cut:
        for call in answer.calls:
            assert isinstance(json.loads(call.arguments), dict)


VALUES = {
    "path": st.text(),
    "text": TEXTS | st.text(),
    "count": st.integers(),
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "force": st.booleans(),
    "lines": st.lists(st.text(), max_size=3),
    "more": st.dictionaries(st.text(), st.integers() | st.text(), max_size=3),
    "limit": st.integers() | st.none(),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)


def ends_early(text: str) -> bool:
    """Whether a string could be read as the end of itself."""
    return "</parameter>" in text or "</function>" in text


@settings(max_examples=100, deadline=None)
@given(arguments=ARGUMENTS, thought=st.sampled_from(("", "hm\nso", "a < b")))
def test_calls_are_read_as_the_template_writes_them(
    arguments: dict[str, Any], thought: str
) -> None:
    text = f"{thought}\n</think>\n\n{in_tags('write', arguments)}"
    if not any(ends_early(str(value)) for value in arguments.values()):
        (call,) = read(text, rules(thinking=True)).calls
        assert (call.name, json.loads(call.arguments)) == ("write", arguments)
    text = f"<think>\n{thought}\n</think>\n\n{in_json('write', arguments)}"
    answer = read(text, rules(JSON))
    assert answer.reasoning == thought
    (call,) = answer.calls
    assert call.arguments == json.dumps(arguments, ensure_ascii=False)


EXAMPLE = in_tags("write", {"text": "x"})


@pytest.mark.parametrize(
    "value",
    [
        "a </parameter> b",
        "</parameter>",
        "</parameter>\n",
        "\n</parameter>\n</parameter>\n\n",
        "</tool_call>",
        "</function>\n</tool_call> and more",
        "</function>",
        "<tool_call>",
        "<parameter=text>",
        f"an example:\n{EXAMPLE}",
        EXAMPLE,
        "  two spaces \t\n\n\n",
        "\n",
        "",
        "\r\n",
        "</think>",
        "<",
        '"\\ \u2028\x00é😀',
    ],
)
def test_strings_keep_every_byte(value: str) -> None:
    first = {"text": value, "path": "p"}
    last = {"path": "p", "text": value}
    for arguments in (first, last):
        text = in_tags("write", arguments) + "\n" + in_tags("list", {})
        if value.endswith(EXAMPLE) and arguments is first:
            continue  # `<parameter=path>` after it might be in the example
        found = calls_of(text, rules())
        assert [(name, json.loads(raw)) for name, raw in found] == [
            ("write", arguments),
            ("list", {}),
        ]


def test_what_is_thought_said_and_called() -> None:
    text = "I see.\n\n</think>\n\nI write it.\n\n" + in_tags("write", {"path": "a"}) + "\n"
    assert read(text, rules(thinking=True)) == ParsedAnswer(
        "I see.", "I write it.", read(text, rules(thinking=True)).calls
    )
    assert calls_of(text, rules(thinking=True)) == [("write", '{"path": "a"}')]
    plain = "  as it is <b> \n"
    assert read(plain, rules()).content == plain
    assert read("<think>\nx\n</think>\n\ny ", rules()) == ParsedAnswer("x", "y ", [])
    assert read("only thought", rules(thinking=True)) == ParsedAnswer("only thought", "", [])


def test_a_call_inside_of_a_thought_that_is_not_closed() -> None:
    call = in_tags("write", {"path": "a"})
    for end in ("", "\n</think>\n\n", "\n</think>\n\nsaid"):
        answer = read("I must write\n" + call + end, rules(thinking=True))
        assert (answer.reasoning, len(answer.calls)) == ("I must write", 1)
        assert answer.content == end.rpartition("\n")[2]
    thought = "the form is <tool_call>\n<function=example>, or <tool_call> alone"
    answer = read(thought + "</think>x", rules(thinking=True))
    assert answer == ParsedAnswer(thought, "x", [])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<function=list>\n</function>", [("list", "{}")]),
        ("<function=list>\n</function>\n</tool_call>", [("list", "{}")]),
        ("text\n<function=list>\n</function>", [("list", "{}")]),
        ("see <function=list> and <function=other>", []),
        ("<tool_call>\n<function=unknown>\n</function>\n</tool_call>", [("unknown", "{}")]),
        ("<tool_call><function=list></tool_call>", [("list", "{}")]),
        (
            "<tool_call><function=write><parameter=path>a</function></tool_call>",
            [("write", '{"path": "a"}')],
        ),
        (
            "<tool_call><function=write><parameter=path>a</parameter></tool_call>",
            [("write", '{"path": "a"}')],
        ),
        ("<tool_call>\n<function=write>\n<parameter=path>\na", [("write", '{"path": "a"}')]),
        (
            "<tool_call><function=write><parameter=new>[1]</parameter></function></tool_call>",
            [("write", '{"new": [1]}')],
        ),
    ],
)
def test_calls_that_are_not_quite_right(text: str, wanted: list[tuple[str, str]]) -> None:
    assert calls_of(text, rules()) == wanted


@pytest.mark.parametrize(
    ("object", "arguments"),
    [
        (
            '{"name": "write", "arguments": {"text":  "a</tool_call>{"}}',
            '{"text":  "a</tool_call>{"}',
        ),
        ('{ "arguments" : { } , "name" : "write" }', "{ }"),
        ('{"name": "write", "parameters": {"n": 1.50}}', '{"n": 1.50}'),
        ('{"name": "write"}', "{}"),
        ('{"name": "write", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "write", "arguments": {"text": "a\nb"}}', '{"text": "a\\nb"}'),
        ('{"name": "write", "arguments": {"text": "a"}', '{"text": "a"}'),
        ('{"name": "write", "arguments": [1]}', None),
        ('{"name": 5, "arguments": {}}', None),
        ('{"name": "write", "arguments": {"n": NaN}}', None),
        ('{"what": {}}', None),
        ("{}", None),
    ],
)
def test_calls_as_json(object: str, arguments: str | None) -> None:
    text = f"<tool_call>\n{object}\n</tool_call>"
    wanted = [] if arguments is None else [("write", arguments)]
    answer = read(text, rules(JSON))
    assert [(call.name, call.arguments) for call in answer.calls] == wanted
    assert answer.content == ("" if wanted else text)


def test_what_is_cut_short_stays_so() -> None:
    whole = in_tags("write", {"path": "a", "text": "bcd"})
    at = whole.index("cd")
    assert calls_of(whole[:at], rules(), is_cut=True) == [("write", '{"path": "a", "text": "b')]
    whole = in_json("write", {"text": "bcd"})
    assert calls_of(whole[: whole.index("cd")], rules(JSON), is_cut=True) == [
        ("write", '{"text": "b')
    ]
    assert read(whole[:12], rules(JSON), is_cut=True).content == whole[:12]


def test_without_tools_nothing_is_called() -> None:
    text = in_tags("write", {})
    assert read(text, rules(schemas=None)) == ParsedAnswer("", text, [])


def test_strings_grow_as_they_come() -> None:
    """A long file is seen while it is written."""
    parser = AnswerParser(rules())
    parser.push("<tool_call>\n<function=write>\n<parameter=text>\n")
    assert parser.push("line 1\nline") == [Part("arguments", "line 1\\nline")]
    assert parser.push(" 2\n") == [Part("arguments", " 2")]
    assert parser.push("</para") == []
    assert parser.push("graph>") == [Part("arguments", "\\n</paragraph>")]


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        ({"type": "integer"}, " 5 ", "5"),
        ({"type": "integer"}, "3.0", "3"),
        ({"type": "integer"}, "x5", '"x5"'),
        ({"type": "integer"}, "1e999", '"1e999"'),
        ({"type": "number"}, "1.50", "1.50"),
        ({"type": "number"}, ".5", "0.5"),
        ({"type": "number"}, "nan", '"nan"'),
        ({"type": "boolean"}, "True", "true"),
        ({"type": "boolean"}, "yes", '"yes"'),
        ({"type": "object"}, "{'a': None}", '{"a": null}'),
        ({"type": "array"}, "[1,  2]", "[1,  2]"),
        ({"type": "array"}, "[" * 3000, json.dumps("[" * 3000)),
        ({"type": "array"}, "{}", '"{}"'),
        ({"type": "string"}, "null", '"null"'),
        ({"type": "string"}, " 5", '" 5"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "five", '"five"'),
        ({"enum": [1, 2]}, "2", "2"),
        ({"enum": ["a", "b"]}, "2", '"2"'),
        ({"const": True}, "true", "true"),
        ({"items": {}}, "[]", "[]"),
        ({"$ref": "#/$defs/A"}, "7", "7"),
        ({"$ref": "#"}, "7", '"7"'),
        ({"$ref": "#/x/y"}, "7", '"7"'),
        ({"type": 5}, "{}", "{}"),
        (None, "[1]", "[1]"),
        (None, "5", '"5"'),
        (True, "5", '"5"'),
    ],
)
def test_values_have_the_types_of_their_schema(schema: Any, text: str, wanted: str) -> None:
    root = {"$defs": {"A": {"type": "integer"}}}
    assert to_json(text, types_of(schema, root)) == wanted
    json.loads(wanted)


@settings(max_examples=100, deadline=None)
@given(schema=json_values(), text=st.text() | st.sampled_from(WORDS))
def test_any_schema_gives_json(schema: Any, text: str) -> None:
    json.loads(to_json(text, types_of(schema, schema)))


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"enum": ["no", "yes"]}, "no"),
        ({"type": "string", "pattern": "^no$"}, "no"),
        ({"$ref": "#/$defs/Answer"}, "no"),
        ({"type": "string"}, "\nno "),
        ({"type": "string", "minLength": 1}, "\nno "),
    ],
)
def test_space_around_a_word(schema: Any, wanted: str) -> None:
    """Where the schema says what a string is, it is none of its own, however the text is split."""
    parameters = {"properties": {"a": schema}, "$defs": {"Answer": {"const": "no"}}}
    text = (
        "<tool_call>\n<function=f>\n<parameter=a>\n\nno \n</parameter>\n</function>\n</tool_call>"
    )
    rules = AnswerRules(ChatFormat(calls="tags"), schemas={"f": parameters})
    for size in (1, 5, 1000):
        parser = AnswerParser(rules)
        parts = [p for at in range(0, len(text), size) for p in parser.push(text[at : at + size])]
        (call,) = assembled([*parts, *parser.finish(is_cut=False)]).calls
        assert json.loads(call.arguments) == {"a": wanted}
