"""A batch run with a fake engine: answers are a function of the prompt, steps take a set time.

python batch_fake.py INPUT OUTPUT [--order ...] [--step-ms ...] [--die-after N]
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forks import FORKS

from tokenspeed_plan.plans.chat_format import Chat, ChatFormat
from tokenspeed_plan.plans.errors import RequestError, TokenspeedError
from tokenspeed_plan.runtime.request import Completion, Request, TokenLogprobs
from tokenspeed_plan.runtime.serving.batch import (
    BatchOptions,
    BatchPlan,
    RequestLimits,
    Selection,
    run_batch,
)
from tokenspeed_plan.runtime.serving.batch.kept_rows import MAX_KEPT_BYTES

LIMITS = RequestLimits(max_seq_len=64, default_max_tokens=8, vocab_size=256, model="fake")


class FakeTokenizer:
    """A byte is a token."""

    joins_bytes = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def most_tokens(self, text: str) -> int | None:
        return len(text) if text.isascii() else None

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("latin-1")

    def is_special(self, token_id: int) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    chat_format = ChatFormat()

    def spell(self, ids: Sequence[int]) -> str:
        return self.decode(ids)

    def render_chat(
        self, messages: list[dict[str, Any]], tools: Any = None, variables: Any = None
    ) -> str:
        return "".join(f"{m['role']}:{m.get('content', '')};" for m in messages)

    def render_chats(self, chats: Sequence[Chat]) -> list[str | RequestError]:
        return [self.render_chat(*chat) for chat in chats]


class FakeEngine:
    """Finishes requests out of order: each takes as many steps as its answer is long."""

    def __init__(self, step_ms: float = 0.0) -> None:
        self.startup_s = {"fake_s": 0.0}
        self.requests: dict[str, tuple[Request, int]] = {}
        self.step_ms = step_ms
        self.seen: list[str] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        self.seen.append(request.request_id)
        length = 1 + (sum(request.prompt_ids) + request.params.seed) % request.params.max_tokens
        self.requests[request.request_id] = (request, length)

    def cancel(self, request_id: str) -> bool:
        return self.requests.pop(request_id, None) is not None

    def step(self) -> list[Completion]:
        time.sleep(self.step_ms / 1e3)
        done = []
        for name, (request, left) in list(self.requests.items()):
            if left > 1:
                self.requests[name] = (request, left - 1)
                continue
            del self.requests[name]
            length = 1 + (sum(request.prompt_ids) + request.params.seed) % request.params.max_tokens
            ids = tuple((sum(request.prompt_ids) + i) % 26 + 97 for i in range(length))
            top = tuple((token, -1.0 - token) for token in range(request.params.num_logprobs or 0))
            logprobs = tuple(TokenLogprobs(token, -0.5, top) for token in ids)
            done.append(
                Completion(
                    name,
                    ids,
                    FakeTokenizer().decode(ids),
                    "length",
                    len(request.prompt_ids),
                    0.01,
                    0.02,
                    logprobs if request.params.num_logprobs is not None else (),
                )
            )
        return done


def plan(digest: str = "d") -> BatchPlan:
    return BatchPlan(digest, "fake", 8, LIMITS, {"tpot_ms": 1.0})


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--order", default="input")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument(
        "--die-after", type=int, help="Kill this process at the n-th write to a file."
    )
    parser.add_argument("--errors", type=Path)
    parser.add_argument("--max-errors", type=int, default=0)
    parser.add_argument("--max-kept-bytes", type=int, default=MAX_KEPT_BYTES)
    parser.add_argument("--talk", action="store_true", help="Show the summary.")
    args = parser.parse_args(words)
    if args.die_after:
        die_at_write(args.die_after)
    options = BatchOptions(
        args.input,
        args.output,
        args.errors,
        order=args.order,
        max_errors=args.max_errors,
        selection=Selection(),
        quiet=not args.talk,
        max_kept_bytes=args.max_kept_bytes,
    )
    try:
        return run_batch(options, plan(), FakeTokenizer(), lambda: FakeEngine(args.step_ms))
    except TokenspeedError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def started(*words: object) -> BaseProcess:
    """The command in a process that was forked from one that has loaded the product."""
    process: BaseProcess = FORKS.Process(target=_be_run, args=([*map(str, words)],), daemon=True)
    process.start()
    return process


def run(*words: object) -> int | None:
    """The exit code of the command in a process of its own."""
    process = started(*words)
    process.join()
    return process.exitcode


def _be_run(words: Sequence[str]) -> None:
    gc.freeze()
    sys.exit(main(words))


def die_at_write(count: int) -> None:
    """kill -9 this process at the n-th event that touches a file: open, truncate, remove, write."""
    state = {"left": count}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in (
            "open",
            "os.truncate",
            "os.remove",
            "fcntl.flock",
        ) and "tokenspeed-" not in str(args[0]):
            tick()

    def tick() -> None:
        state["left"] -= 1
        if state["left"] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    from tokenspeed_plan.runtime.serving.batch import resume, writers

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            tick()
            result = function(*args)
            tick()
            return result

        return call

    for cls, name in ((writers.FileWriter, "write"), (resume.Sidecar, "save")):
        setattr(cls, name, counted(getattr(cls, name)))
    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
