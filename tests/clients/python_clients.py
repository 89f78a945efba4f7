"""One client in Python: python_clients.py NAME URL KEY ANSWER, or --list. See check_clients.py.

Each function finishes a loop with one tool and returns the last text, or says how it was refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

QUESTION = "How is the weather in Paris?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather now.", "parameters": SCHEMA},
}
RESULT = "21 degrees"
VOTE: Any = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
STRUCTURED = "answered in form"


def litellm_chat(url: str, key: str, stream: bool = False, route: str = "openai") -> str:
    import litellm

    base = f"{url}/v1" if route == "openai" else url
    shared: Any = {"model": f"{route}/m", "api_base": base, "api_key": key, "tools": [TOOL]}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    while True:
        found: Any = litellm.completion(messages=messages, stream=stream, **shared)
        if stream:
            found = litellm.stream_chunk_builder(list(found), messages=messages)
        message = found.choices[0].message
        if not message.tool_calls:
            return str(message.content)
        messages.append(message.model_dump())
        for call in message.tool_calls:
            assert json.loads(call.function.arguments) == {"city": "Paris"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})


def litellm_stream(url: str, key: str) -> str:
    return litellm_chat(url, key, stream=True)


def litellm_anthropic(url: str, key: str) -> str:
    return litellm_chat(url, key, route="anthropic")


def langchain_openai(url: str, key: str, **more: Any) -> str:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: str) -> str:
        """The weather now."""
        return RESULT

    model: Any = ChatOpenAI(model="m", base_url=f"{url}/v1", api_key=key, **more)
    bound, messages = model.bind_tools([get_weather]), [HumanMessage(QUESTION)]
    while True:
        answer = bound.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            return str(answer.text)
        for call in answer.tool_calls:
            text = get_weather.invoke(call["args"])
            messages.append(ToolMessage(text, tool_call_id=call["id"]))


def langchain_responses(url: str, key: str) -> str:
    return langchain_openai(url, key, use_responses_api=True)


def langchain_structured(url: str, key: str) -> str:
    """All of its ways need a grammar."""
    from langchain_openai import ChatOpenAI

    model: Any = ChatOpenAI(
        model="m", base_url=f"{url}/v1", api_key=key, max_retries=0, temperature=0
    )
    schema = VOTE | {"title": "Vote", "description": "A vote."}
    for method in ("function_calling", "json_mode", "json_schema"):
        bound = model.with_structured_output(schema, method=method)
        found = bound.invoke("[[vote]]")
        assert found["answer"] in ("yes", "no"), (method, found)
    return STRUCTURED


def openai_parse(url: str, key: str) -> str:
    from openai import OpenAI
    from pydantic import create_model

    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    model = create_model("Vote", answer=(Literal["yes", "no"], ...))
    asked: Any = [{"role": "user", "content": "[[vote]]"}]
    chat: Any = client.chat.completions.parse(
        model="m", messages=asked, response_format=model, temperature=0
    )
    response: Any = client.responses.parse(model="m", input=asked, text_format=model, temperature=0)
    assert chat.choices[0].message.parsed.answer == response.output_parsed.answer == "yes"
    return STRUCTURED


def openai_agents(url: str, key: str, responses: bool = False, stream: bool = False) -> str:
    from agents import (
        Agent,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    @function_tool
    def get_weather(city: str) -> str:
        """The weather now."""
        return RESULT

    kind = OpenAIResponsesModel if responses else OpenAIChatCompletionsModel
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    agent = Agent(name="a", instructions="Be brief.", model=kind("m", client), tools=[get_weather])

    async def run() -> str:
        if not stream:
            return str((await Runner.run(agent, QUESTION)).final_output)
        result = Runner.run_streamed(agent, QUESTION)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    return asyncio.run(run())


def openai_agents_responses(url: str, key: str) -> str:
    return openai_agents(url, key, responses=True)


def openai_agents_responses_stream(url: str, key: str) -> str:
    return openai_agents(url, key, responses=True, stream=True)


def pydantic_ai(url: str, key: str, api: str = "chat") -> str:
    from pydantic_ai import Agent

    model: Any
    if api == "messages":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        model = AnthropicModel("m", provider=AnthropicProvider(base_url=url, api_key=key))
    else:
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        kind: Any = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
        model = kind("m", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather now."""
        return RESULT

    return str(agent.run_sync(QUESTION).output)


def pydantic_ai_responses(url: str, key: str) -> str:
    return pydantic_ai(url, key, "responses")


def pydantic_ai_messages(url: str, key: str) -> str:
    return pydantic_ai(url, key, "messages")


def instructor_markdown(url: str, key: str) -> str:
    """A structured answer by the prompt alone, and by all ways that force it."""
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    inner = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    client: Any = instructor.from_openai(inner, mode=instructor.Mode.MD_JSON)
    messages = [{"role": "user", "content": "Ann is 5. [[person]]"}]
    found = client.chat.completions.create(
        model="m", response_model=Person, messages=messages, max_retries=1
    )
    assert (found.name, found.age) == ("Ann", 5)

    class Vote(BaseModel):
        answer: Literal["yes", "no"]

    modes = instructor.Mode
    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON, modes.JSON_SCHEMA):
        strict: Any = instructor.from_openai(inner, mode=mode)
        vote = strict.chat.completions.create(
            model="m",
            response_model=Vote,
            messages=[{"role": "user", "content": "[[vote]]"}],
            max_retries=1,
            temperature=0,
        )
        assert vote.answer in ("yes", "no"), (mode, vote)
    return STRUCTURED


def smolagents_tools(url: str, key: str, **more: Any) -> str:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    @tool
    def get_weather(city: str) -> str:
        """The weather now.

        Args:
            city: where.
        """
        return f"{RESULT} [[final]]"

    model = OpenAIServerModel("m", api_base=f"{url}/v1", api_key=key, temperature=0, **more)
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
    return str(agent.run(QUESTION))


def smolagents_auto(url: str, key: str) -> str:
    return smolagents_tools(url, key, tool_choice="auto")


def mini_swe_agent(url: str, key: str) -> str:
    """Its command, without leave to be asked for, in a folder and a home of its own."""
    words = ["--yolo", "--exit-immediately", "--model", "openai/m"]
    words += ["--task", "[[mini]] Write hello.txt.", "--output", "run.json"]
    words += ["--config", "mini.yaml", "--config", f"model.model_kwargs.api_base={url}/v1"]
    settings = {"MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors"}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | settings | {"HOME": folder, "OPENAI_API_KEY": key}
        command = [str(Path(sys.executable).parent / "mini"), *words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert Path(folder, "hello.txt").read_text(encoding="utf-8") == "hello\n"
        run = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))
    return str(run["info"]["submission"]).strip()


CLIENTS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "litellm": ("litellm", litellm_chat),
    "litellm-stream": ("litellm", litellm_stream),
    "litellm-anthropic": ("litellm", litellm_anthropic),
    "langchain-openai": ("langchain-openai", langchain_openai),
    "langchain-openai-responses": ("langchain-openai", langchain_responses),
    "langchain-openai-structured": ("langchain-openai", langchain_structured),
    "openai-agents": ("openai-agents", openai_agents),
    "openai-agents-responses": ("openai-agents", openai_agents_responses),
    "openai-agents-responses-stream": ("openai-agents", openai_agents_responses_stream),
    "pydantic-ai": ("pydantic-ai-slim", pydantic_ai),
    "pydantic-ai-responses": ("pydantic-ai-slim", pydantic_ai_responses),
    "pydantic-ai-anthropic": ("pydantic-ai-slim", pydantic_ai_messages),
    "instructor": ("instructor", instructor_markdown),
    "openai-parse": ("openai", openai_parse),
    "smolagents": ("smolagents", smolagents_tools),
    "smolagents-auto": ("smolagents", smolagents_auto),
    "mini-swe-agent": ("mini-swe-agent", mini_swe_agent),
}


def main() -> None:
    if sys.argv[1] == "--list":
        print(*CLIENTS)
        return
    name, url, key, answer = sys.argv[1:]
    package, client = CLIENTS[name]
    found = client(url, key)
    assert found in (answer, STRUCTURED), found
    print(f"{package} {version(package)}: {found}")


if __name__ == "__main__":
    main()
