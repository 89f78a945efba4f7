"""OpenAI's and Anthropic's own clients against `tokenspeed serve`: whole loops with a tool.

The model is scripted (tests/support/scripted.py): what it says is known, and all else is real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from bundles import write_bundle
from chat_models import JSON_SCRIPT, TAGS_SCRIPT, in_json, in_tags, tool
from conftest import ROOT
from scripted import write_scripted
from serving import KEY, Server, good_server

pytestmark = pytest.mark.slow  # whole processes, or whole models

CITY = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS: list[Any] = [tool("get_weather", CITY, required=["city"]), tool("list", {})]
ARGUMENTS = {"city": 'Paris </parameter> "<é>"\n', "days": 3}
DONE = "It is 21 °C in Paris."
THOUGHT = "I must look."
ASKED: Any = {"role": "user", "content": "How is the weather in Paris?"}


def scripts(call: Any, opens: bool) -> dict[str, str]:
    begin = "<think>\n" if opens else ""
    one = call("get_weather", ARGUMENTS)
    two = one + "\n" + call("list", {})
    return {
        "plain": f"{begin}Hm.\n</think>\n\nHello there.",
        "call": f"{begin}{THOUGHT}\n</think>\n\nLet me look it up.\n\n{one}",
        "two": f"{begin}Two at once.\n</think>\n\n{two}",
        "inside": f"{begin}So I call{one}",
        "folder": f"{begin}So.\n</think>\n\n{call('list_folder', {'path': '.'})}",
        "done": f"{begin}Good.\n</think>\n\n{DONE}",
    }


FORMATS = {
    "tags": (TAGS_SCRIPT, scripts(in_tags, opens=False)),
    "json": (JSON_SCRIPT, scripts(in_json, opens=True)),
}


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    template, said = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("scripted")
    write_scripted(folder / "model", template, said, special_tags=request.param == "json")
    workload = {"first_turn_tokens": 3000, "output_tokens": 64, "concurrency": 4}
    write_bundle(folder / "bundle", folder / "model", workload=workload)
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


def test_a_loop_with_a_tool(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, ASKED]
    create = client.chat.completions.create
    first = create(model="m", messages=messages, tools=TOOLS, parallel_tool_calls=True)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look it up."
    assert choice.message.reasoning_content == THOUGHT  # type: ignore[attr-defined]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    last = create(model="m", messages=messages, tools=TOOLS).choices[0]
    assert (last.finish_reason, last.message.content) == ("stop", DONE)
    assert not last.message.tool_calls


@pytest.mark.parametrize("script", ["call", "two", "inside", "plain"])
def test_a_stream_is_the_same(script: str, client: openai.OpenAI) -> None:
    asked: Any = {"role": "user", "content": f"[[{script}]]"}
    whole = client.chat.completions.create(model="m", messages=[asked], tools=TOOLS).choices[0]
    with client.chat.completions.stream(
        model="m", messages=[asked], tools=TOOLS, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    streamed = final.choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    calls = [[c.function for c in m.tool_calls or []] for m in (whole.message, streamed.message)]
    pairs = [[(f.name, f.arguments) for f in found] for found in calls]  # type: ignore[union-attr]
    assert pairs[0] == pairs[1] and len(pairs[0]) == {"two": 2, "plain": 0}.get(script, 1)
    assert final.usage and final.usage.completion_tokens > 0


def test_the_example_of_an_agent(
    client: openai.OpenAI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "examples")
    agent = run_path(str(ROOT / "examples" / "agent" / "agent.py"))
    assert agent["list_folder"](".").splitlines()[0] == "agent"
    assert agent["list_folder"]("..").startswith("error")
    assert agent["run"](client, "m", "[[folder]]") == DONE
    assert capsys.readouterr().out == '[list_folder({"path": "."})]\n'


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    asked: Any = {"role": "user", "content": "[[two]]"}
    found = client.chat.completions.create(
        model="m", messages=[asked], tools=TOOLS, parallel_tool_calls=False
    )
    (call,) = found.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"  # type: ignore[union-attr]


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="m", messages=[ASKED], tools=TOOLS, tool_choice="none"
    )
    message = found.choices[0].message
    assert found.choices[0].finish_reason == "stop" and not message.tool_calls
    assert "<tool_call>" in (message.content or "")


def test_thinking_can_be_switched_off(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    prompts = [
        server.http.post("/tokenize", json=body | more).json()["count"]
        for more in (
            {},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "none"},
        )
    ]
    assert prompts[0] < prompts[1] == prompts[2]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "list"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_would_need_a_grammar_is_refused(more: Any, param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[ASKED], tools=TOOLS, **more)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_a_response_and_its_items(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **item["function"]} for item in TOOLS]
    items: list[Any] = [ASKED]
    first = client.responses.create(
        model="m", input=items, tools=tools, instructions="Be brief.", store=False
    )
    kinds = [item.type for item in first.output]
    assert (kinds, first.status) == (["reasoning", "message", "function_call"], "completed")
    assert first.output_text == "Let me look it up."
    call: Any = first.output[-1]
    assert json.loads(call.arguments) == ARGUMENTS
    items += [item.model_dump() for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21"})
    last = client.responses.create(model="m", input=items, tools=tools)
    assert last.output_text == DONE
    assert last.usage and last.usage.input_tokens > 0


def test_a_streamed_response(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **item["function"]} for item in TOOLS]
    with client.responses.stream(model="m", input="[[two]]", tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    calls: list[Any] = [item for item in final.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather", "list"]
    assert json.loads(calls[0].arguments) == ARGUMENTS
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == calls[0].arguments + calls[1].arguments


def test_a_response_that_is_cut(client: openai.OpenAI) -> None:
    found = client.responses.create(model="m", input="hi", max_output_tokens=3)
    assert found.status == "incomplete"
    assert found.incomplete_details and found.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"text": {"format": {"type": "json_object"}}}, "response_format"),
        ({"tools": [{"type": "mcp"}]}, "tools[0]"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"tool_choice": "required", "tools": [{"type": "function", "name": "a"}]}, "tool_choice"),
    ],
)
def test_what_responses_do_not_have(more: Any, param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "m", "input": "hi"} | more))
    assert caught.value.param == param


def claude_tools() -> list[Any]:
    functions = [item["function"] for item in TOOLS]
    return [
        {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
        for f in functions
    ]


def test_a_loop_of_messages(claude: anthropic.Anthropic) -> None:
    asked: list[Any] = [ASKED]
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    shared: Any = {"model": "m", "max_tokens": 200, "system": system, "tools": claude_tools()}
    first = claude.messages.create(messages=asked, **shared)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert first.stop_reason == "tool_use"
    call: Any = first.content[-1]
    assert (call.name, call.input) == ("get_weather", ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21"}
    asked += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    last = claude.messages.create(messages=asked, **shared)
    assert [block.text for block in last.content if block.type == "text"] == [DONE]
    assert last.stop_reason == "end_turn" and last.usage.cache_read_input_tokens is not None
    counted = claude.messages.count_tokens(
        model="m", messages=asked, system=system, tools=claude_tools()
    )
    usage = last.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("script", ["call", "two", "inside", "plain"])
def test_a_streamed_message_is_the_same(script: str, claude: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": f"[[{script}]]"}]
    shared: Any = {"model": "m", "max_tokens": 200, "messages": asked, "tools": claude_tools()}
    whole = claude.messages.create(**shared)
    with claude.messages.stream(**shared) as stream:
        final = stream.get_final_message()
    dumped = [
        [block.model_dump(exclude={"id"}) for block in found.content] for found in (whole, final)
    ]
    assert dumped[0] == dumped[1] and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_message_may_ask_for_more_than_there_is(claude: anthropic.Anthropic) -> None:
    """Its clients must send a limit, and send the largest that they know."""
    found = claude.messages.create(model="m", max_tokens=128_000, messages=[ASKED], timeout=60)
    assert found.stop_reason == "end_turn"


def test_errors_in_anthropics_form(server: Server, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": "x " * 5000}]
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=5, messages=[ASKED])
    stranger = httpx.post(f"{server.url}/v1/messages", json={}, headers={"x-api-key": "wrong"})
    assert (stranger.status_code, stranger.json()["type"]) == (401, "error")
    picture: Any = {"type": "image", "source": {"type": "url", "url": "x"}}
    with pytest.raises(anthropic.BadRequestError, match="text"):
        claude.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": [picture]}]
        )


def test_names_of_requests_come_back(server: Server) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    found = server.http.get("/health", headers={"x-request-id": "abc", "traceparent": trace})
    assert found.headers["x-request-id"] == "abc" and found.headers["traceparent"] == trace
    found = server.http.get("/health", headers={"x-request-id": "a b", "traceparent": "x"})
    assert found.headers["x-request-id"].startswith("req_") and "traceparent" not in found.headers


def test_small_endpoints(server: Server, claude: anthropic.Anthropic) -> None:
    for path in ("/health", "/ready", "/v1/models", "/metrics"):
        assert server.http.head(path).status_code == 200
        assert server.http.head(path).content == b""
    text = "def f(x):\n  <tool_call>é"
    tokens = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    back = server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    assert server.http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert server.http.post("/tokenize", json={}).status_code == 400
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 401
    assert [model.id for model in claude.models.list()] == ["m"]


def test_dashboards_find_their_names(server: Server) -> None:
    text = server.http.get("/metrics").text
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
        "prefix_cache_hits_total",
        "generation_tokens_total",
        "num_requests_running",
    ):
        assert f'vllm:{name}{{model_name="m"}}' in text, name


def test_counts_as_they_grow(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="m", messages=[ASKED], stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts) and len(counts) == len(chunks)


def test_the_time_before_each_token(server: Server, client: openai.OpenAI) -> None:
    """Each token but the first of an answer is in the histogram."""
    name = 'vllm:inter_token_latency_seconds_count{model_name="m"} '

    def count() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).removeprefix(name))

    before = count()
    found = client.chat.completions.create(model="m", messages=[ASKED], max_completion_tokens=9)
    assert found.usage and count() - before == found.usage.completion_tokens - 1


def test_thoughts_are_counted(client: openai.OpenAI, server: Server) -> None:
    """Up to the tag at their end, whole and streamed; none where there is none."""
    options: Any = {"include_usage": True}
    asked: list[Any] = [{"role": "user", "content": "[[call]]"}]
    whole = client.chat.completions.create(model="m", messages=asked, tools=TOOLS)
    *_, last = client.chat.completions.create(
        model="m", messages=asked, tools=TOOLS, stream=True, stream_options=options
    )
    for usage in (whole.usage, last.usage):
        assert usage and usage.completion_tokens_details
        thoughts = usage.completion_tokens_details.reasoning_tokens
        assert thoughts and 2 < thoughts < usage.completion_tokens
        assert thoughts == whole.usage.completion_tokens_details.reasoning_tokens  # type: ignore
    response = client.responses.create(model="m", input=asked)
    assert response.usage and response.usage.output_tokens_details.reasoning_tokens > 2
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    short = client.chat.completions.create(
        model="m", messages=asked, max_completion_tokens=2, extra_body=off
    )
    assert short.usage and short.usage.completion_tokens_details
    assert short.usage.completion_tokens_details.reasoning_tokens == 0


def test_tokenizer_info(server: Server, bundle: Path) -> None:
    found = server.http.get("/tokenizer_info").json()
    assert found["tokenizer_class"] and found["eos_token"] == "<|im_end|>"
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bundle.parent / "model")
    assert found["chat_template"] == theirs.chat_template
    assert httpx.get(f"{server.url}/tokenizer_info").status_code == 401


def test_an_agents_turns_are_found_in_the_cache(server: Server, client: openai.OpenAI) -> None:
    """Twelve turns with thoughts and calls: what came before is computed once.

    The scripted model's tokens are never those that its text would be cut into.
    """
    words = " ".join(f"Rule {number}: be brief." for number in range(60))
    messages: list[Any] = [{"role": "system", "content": words}, ASKED]
    prompts, cached = [], []
    for turn in range(12):
        found = client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
        message, usage = found.choices[0].message, found.usage
        assert usage and usage.prompt_tokens_details
        prompts.append(usage.prompt_tokens)
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
        assert message.tool_calls and message.reasoning_content == THOUGHT  # type: ignore
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id}
        messages += [message, result | {"content": f"[[call]] {turn}"}]
    assert prompts == sorted(prompts)
    assert sum(cached[1:]) > 0.9 * sum(prompts[1:]), (cached, prompts)
