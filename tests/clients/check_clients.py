"""Other people's clients against `tokenspeed serve` with a scripted model; see docs/clients.md.

python tests/clients/check_clients.py [NAME ...] [--python VENV/bin/python] [--node FOLDER]
    [--agents FOLDER]

The server runs in this environment (extras `grammar`, `serve` and `test`). The clients run in one
of their own, since their requirements do not agree with each other:

    python -m venv VENV
    VENV/bin/pip install anthropic instructor langchain-openai litellm mini-swe-agent \
        openai-agents 'pydantic-ai-slim[anthropic,openai]' 'smolagents[openai]'
    npm install --prefix FOLDER @openai/codex @qwen-code/qwen-code opencode-ai
    npm install --prefix FOLDER ai zod @ai-sdk/anthropic @ai-sdk/openai @ai-sdk/openai-compatible

Each line of the output is a client, its version, and what it did or how it was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "support")]

from bundles import write_bundle  # noqa: E402
from chat_models import TAGS_SCRIPT, in_tags  # noqa: E402
from scripted import write_scripted  # noqa: E402
from serving import KEY, serving  # noqa: E402

# What each coding agent is told to do with the tool that it has for it.
COMMAND = "echo hello > hello.txt"
DONE = "It is 21 degrees in Paris."
SHELLS = {
    "codex": ("exec_command", {"cmd": COMMAND}),
    "qwen": ("run_shell_command", {"command": COMMAND, "is_background": False}),
    "opencode": ("bash", {"command": COMMAND, "description": "Write a file"}),
    "mini": ("bash", {"command": f"{COMMAND} && echo '[[submit]]'"}),
    "submit": ("bash", {"command": f"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo '{DONE}'"}),
}
SCRIPTS = {
    "plain": "Hm.\n</think>\n\nHello there.",
    "call": "I must look.\n</think>\n\n" + in_tags("get_weather", {"city": "Paris"}),
    "done": f"Good.\n</think>\n\n{DONE}",
    "final": "Good.\n</think>\n\n" + in_tags("final_answer", {"answer": DONE}),
    **{name: "So.\n</think>\n\n" + in_tags(*call) for name, call in SHELLS.items()},
    "vote": 'I agree.\n</think>\n\n{"answer": "yes"}',
    "person": "Easy.\n</think>\n\n" + "```json\n" + json.dumps({"name": "Ann", "age": 5}) + "\n```",
}
WORKLOAD = {"first_turn_tokens": 60000, "output_tokens": 256, "concurrency": 2}
TIMEOUT_S = 120


@contextmanager
def scripted_server() -> Iterator[str]:
    """The URL of a server whose model looks up the weather."""
    with tempfile.TemporaryDirectory(prefix="clients-") as name:
        folder = Path(name)
        write_scripted(folder / "model", TAGS_SCRIPT, SCRIPTS)
        write_bundle(
            folder / "bundle", folder / "model", workload=WORKLOAD, serving={"grammar": True}
        )
        options = ("--api-key", KEY, "--model-name", "m")
        with serving(folder / "bundle", folder, *options) as server:
            yield server.url


def names_in(command: list[str]) -> list[str]:
    done = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def check(command: list[str], name: str, url: str) -> bool:
    """Run one client; returns whether it did what it should."""
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    try:
        done = subprocess.run(
            [*command, name, url, KEY, DONE],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: no end within {TIMEOUT_S} s", flush=True)
        return False
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing was said").splitlines()
    print(f"{name}: {lines[-1]}", flush=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr, flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--python", default=sys.executable, help="of the clients' environment")
    parser.add_argument("--node", type=Path, help="folder with the clients' node_modules")
    parser.add_argument("--agents", type=Path, help="folder with the agents' node_modules")
    args = parser.parse_args()
    commands = [[args.python, str(HERE / "python_clients.py")]]
    if args.node is not None:
        script = args.node / "node_clients.mjs"  # modules are looked for beside it
        script.write_text((HERE / "node_clients.mjs").read_text(encoding="utf-8"), encoding="utf-8")
        commands.append(["node", str(script)])
    if args.agents is not None:
        os.environ["AGENTS"] = str(args.agents / "node_modules" / ".bin")
        commands.append(["bash", str(HERE / "coding_agents.sh")])
    failed = 0
    with scripted_server() as url:
        for command in commands:
            for name in names_in(command):
                if not args.names or name in args.names:
                    failed += not check(command, name, url)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
