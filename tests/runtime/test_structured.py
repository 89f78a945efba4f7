"""Forms of answers through OpenAI's and Anthropic's own clients, and in batch files.

The model is scripted. Where its script has no such form, the grammar bends what it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from bundles import write_bundle
from chat_models import JSON_SCRIPT, TAGS_SCRIPT, in_json, in_tags, tool
from click.testing import CliRunner
from pydantic import BaseModel
from scripted import write_scripted
from serving import KEY, Server, good_server

from tokenspeed_plan.planner.cli import main


class Person(BaseModel):
    name: str
    age: int


class Vote(BaseModel):
    answer: Literal["yes", "no"]
    times: Literal[1, 2]


VOTE: dict[str, Any] = {"name": "vote", "schema": Vote.model_json_schema(), "strict": True}
COLOUR = {"colour": {"enum": ["red", "blue"]}, "count": {"enum": [1, 2]}}
TOOLS: list[Any] = [tool("pick", COLOUR, required=["colour", "count"]), tool("list", {})]
STRICT: list[Any] = [
    {**item, "function": {**item["function"], "strict": item["function"]["name"] == "pick"}}
    for item in TOOLS
]


def scripts(call: Any, opens: bool) -> dict[str, str]:
    begin = "<think>\n" if opens else ""
    right = call("pick", {"colour": "blue", "count": 2})
    return {
        "plain": f"{begin}Hm.\n</think>\n\nHello there.",
        "call": f"{begin}I pick.\n</think>\n\n{right}",
        "text": f"{begin}Why?\n</think>\n\nI pick it.\n\n{right}",
        "wrong": f"{begin}Let me see.\n</think>\n\n{call('pick', {'colour': 'green', 'count': 7})}",
        "person": f'{begin}A name.\n</think>\n\n{{"name": "Ada", "age": 36}}',
        "done": f"{begin}Good.\n</think>\n\nDone.",
    }


FORMATS = {
    "tags": (TAGS_SCRIPT, scripts(in_tags, opens=False)),
    "json": (JSON_SCRIPT, scripts(in_json, opens=True)),
}


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    template, said = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("structured")
    write_scripted(folder / "model", template, said, special_tags=request.param == "json")
    workload = {"first_turn_tokens": 1500, "output_tokens": 64, "concurrency": 4}
    write_bundle(folder / "bundle", folder / "model", workload=workload, serving={"grammar": True})
    return folder / "bundle"


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with good_server(bundle, tmp_path_factory.mktemp("server"), "--model-name", "m") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as found:
        yield found


def say(script: str) -> list[Any]:
    return [{"role": "user", "content": f"[[{script}]]"}]


def test_what_is_parsed(client: openai.OpenAI) -> None:
    """What the script says anyway comes as it is, thoughts before it; else it is bent."""
    found = client.chat.completions.parse(
        model="m", messages=say("person"), response_format=Person, temperature=0
    )
    assert found.choices[0].message.parsed == Person(name="Ada", age=36)
    assert found.choices[0].message.reasoning_content == "A name."  # type: ignore[attr-defined]
    bent = client.chat.completions.parse(
        model="m", messages=say("plain"), response_format=Vote, temperature=0
    )
    assert isinstance(bent.choices[0].message.parsed, Vote)
    assert bent.choices[0].finish_reason == "stop"
    response = client.responses.parse(
        model="m", input="[[person]]", text_format=Person, temperature=0
    )
    assert response.output_parsed == Person(name="Ada", age=36)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_stream_has_the_form(thinks: bool, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="m",
        messages=say("plain"),
        response_format=Vote,
        temperature=1.5,
        extra_body={"chat_template_kwargs": {"enable_thinking": thinks}},
        max_completion_tokens=900,
    ) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    if not thinks:
        assert isinstance(choice.message.parsed, Vote)


def test_any_object(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="m", messages=say("person"), response_format={"type": "json_object"}, temperature=0
    )
    assert json.loads(found.choices[0].message.content or "") == {"name": "Ada", "age": 36}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "pick"}}], ids=["any", "named"]
)
@pytest.mark.parametrize("script", ["call", "text", "plain"])
def test_a_call_that_must_be(script: str, choice: Any, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="m",
        messages=say(script),
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
    )
    (call,) = found.choices[0].message.tool_calls or []
    assert found.choices[0].finish_reason == "tool_calls" and not found.choices[0].message.content
    function = call.function  # type: ignore[union-attr]
    assert function.name == "pick" or choice == "required"
    if function.name == "pick":
        arguments = json.loads(function.arguments)
        assert arguments["colour"] in ("red", "blue") and arguments["count"] in (1, 2)
    if script == "call":
        assert json.loads(function.arguments) == {"colour": "blue", "count": 2}


def test_strict_tools(client: openai.OpenAI) -> None:
    """A call that is right stays; one that is not becomes right; text goes free."""
    create = client.chat.completions.create
    found = [
        create(model="m", messages=say(script), tools=STRICT, temperature=0).choices[0].message
        for script in ("text", "wrong", "plain")
    ]
    assert found[0].content == "I pick it." and found[2].content == "Hello there."
    right, bent = ((message.tool_calls or [None])[0] for message in found[:2])
    assert json.loads(right.function.arguments) == {"colour": "blue", "count": 2}  # type: ignore
    arguments = json.loads(bent.function.arguments)  # type: ignore[union-attr]
    assert arguments["colour"] in ("red", "blue") and arguments["count"] in (1, 2)


def test_a_form_beside_tools(client: openai.OpenAI) -> None:
    """The answer is a call, or has the form."""
    form = {"name": "person", "schema": Person.model_json_schema()}
    for script, calls in (("call", True), ("person", False)):
        found = client.chat.completions.create(
            model="m",
            messages=say(script),
            tools=TOOLS,
            response_format={"type": "json_schema", "json_schema": form},  # type: ignore
            temperature=0,
        )
        message = found.choices[0].message
        assert bool(message.tool_calls) == calls
        assert calls or Person.model_validate_json(message.content or "")


def test_completions_and_responses(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": VOTE}
    found = client.completions.create(
        model="m", prompt=["a", "b"], n=2, max_tokens=64, extra_body={"response_format": form}
    )
    assert len({choice.index for choice in found.choices}) == 4
    assert all(Vote.model_validate_json(choice.text) for choice in found.choices)
    tools: list[Any] = [{"type": "function", **item["function"]} for item in TOOLS]
    response = client.responses.create(
        model="m",
        input="[[plain]]",
        tools=tools,
        tool_choice={"type": "function", "name": "pick"},
        temperature=0,
    )
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "pick" and json.loads(call.arguments)["count"] in (1, 2)


def test_messages(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [
        {"name": f["name"], "input_schema": f["parameters"]}
        for f in (item["function"] for item in TOOLS)
    ]
    shared: Any = {"model": "m", "max_tokens": 300, "messages": say("plain")}
    for choice in ({"type": "any"}, {"type": "tool", "name": "pick"}):
        called = claude.messages.create(
            **shared, tools=tools, tool_choice=choice, extra_body={"temperature": 0}
        )
        (call,) = [block for block in called.content if block.type == "tool_use"]
        assert call.name in ("pick", "list") and called.stop_reason == "tool_use"
    form = {"type": "json_schema", "schema": Vote.model_json_schema()}
    formed = claude.messages.create(
        **shared, extra_body={"output_config": {"format": form}, "temperature": 0}
    )
    texts = [block.text for block in formed.content if block.type == "text"]
    assert Vote.model_validate_json("".join(texts))


LOOPING = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
REFUSED: dict[str, tuple[Any, str]] = {
    "no schema": ({"type": "json_schema"}, "should be an object"),
    "no kind": ({"type": "yaml"}, "should be text, json_object or json_schema"),
    "not a schema": ({"type": "json_schema", "json_schema": {"schema": 3}}, "is an object"),
    "a loop": ({"type": "json_schema", "json_schema": {"schema": LOOPING}}, "cannot be enforced"),
    "what is not enforced": (
        {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}},
        "`schema.not` cannot be enforced",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, client: openai.OpenAI) -> None:
    form, words = REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(model="m", messages=say("plain"), response_format=form)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value.body["message"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
            "ignore_eos",
        ),
    ],
)
def test_what_does_not_fit(more: Any, param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=say("plain"), **more)
    assert caught.value.param == param


@pytest.mark.slow
def test_batch_files(bundle: Path, tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": VOTE}
    rows = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": say("plain"), "response_format": form, "temperature": heat},
        }
        for number, heat in enumerate((0, 0.7))
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["run", bundle, "--input", source, "--output", output, "--no-canary"]
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    first = json.loads(output.read_text().splitlines()[0])
    message = first["response"]["body"]["choices"][0]["message"]
    assert Vote.model_validate_json(message["content"])
    model = bundle.parent / "model"
    words = ["lengths", source, "--model", model, "--out", tmp_path / "lengths.jsonl"]
    lengths = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert lengths.exit_code == 0, lengths.output
