"""An agent's loop with one tool, through OpenAI's client, against `tokenspeed serve`.

    tokenspeed serve BUNDLE --port 8000
    python examples/agent/agent.py "Which files are here?" [--url http://127.0.0.1:8000/v1]

The model asks for a listing of a folder, gets it, and answers. It needs a model that was trained
to call tools, and whose chat template shows them (Qwen3.5, Qwen3): the server refuses tools for
others. The small model of examples/demo writes no calls; its template has no tools.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import openai

MAX_TURNS = 12
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "list_folder",
            "description": "List the names of the files in a folder.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "description": "The folder."}},
                "required": ["path"],
            },
        },
    }
]


def list_folder(path: str) -> str:
    """The names in a folder below this one, a line each."""
    folder = Path.cwd() / path
    if not folder.resolve().is_relative_to(Path.cwd()) or not folder.is_dir():
        return f"error: {path} is no folder here"
    return "\n".join(sorted(entry.name for entry in folder.iterdir()))


def run_call(call: Any) -> dict[str, Any]:
    """The message that answers a call; what the model did wrong it is told."""
    try:
        result = list_folder(**json.loads(call.function.arguments))
    except (TypeError, ValueError) as error:
        result = f"error: {error}"
    print(f"[{call.function.name}({call.function.arguments})]")
    return {"role": "tool", "tool_call_id": call.id, "content": result}


def run(client: openai.OpenAI, model: str, question: str) -> str:
    """Answer a question; the model may call the tool as often as it likes, up to `MAX_TURNS`."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        # As it came, thoughts included: then the prompt of the next turn begins with this one's.
        messages.append(message.model_dump(exclude_none=True))
        messages += [run_call(call) for call in message.tool_calls]
    return "[stopped: too many turns]"


def main() -> None:
    """Ask a server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    key = os.environ.get("TOKENSPEED_API_KEY", "none")
    with openai.OpenAI(base_url=args.url, api_key=key) as client:
        (model,) = client.models.list()
        try:
            print(run(client, model.id, args.question))
        except openai.BadRequestError as error:
            raise SystemExit(f"the server refuses: {error.message}") from error


if __name__ == "__main__":
    main()
