"""Compiles grammars for another process, which a hostile schema must not take down.

Requests and replies are lines of JSON. The first request has the `tokens` of each vocabulary, as
XGrammar writes them; the others have a `form`, a structural tag, and the number of its
`vocabulary`, and their replies the compiled `grammar`. The system
ends this process when a schema takes too much time, memory or stack.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any

import numpy as np
from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, TokenizerInfo

from tokenspeed_plan.plans.ops import mask_words

MAX_MEMORY_BYTES = 2 << 30  # beside what the libraries take
MAX_CHARS = 1 << 25  # of a compiled grammar
# What XGrammar raises of a form that it cannot compile; its own errors are `RuntimeError`s.
_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")  # time and line of XGrammar's source
FAULTS = (RuntimeError, ValueError, TypeError, MemoryError, RecursionError)


def main() -> None:
    """Answer requests until there are no more. The argument is the CPU time of one, in seconds."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    max_cpu_s = float(sys.argv[1])
    tokens = json.loads(sys.stdin.readline())["tokens"]
    infos = [TokenizerInfo.deserialize_json(text) for text in tokens]
    compilers = [GrammarCompiler(info, max_threads=1, cache_enabled=False) for info in infos]
    _limit_memory()
    _reply(replies, {})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        try:
            asked = json.loads(line)
            compiler = compilers[asked["vocabulary"]]
            reply = _compiled(compiler, asked["form"], infos[0].vocab_size)
        except FAULTS as error:
            reply = {"error": _PLACE.sub("", str(error)).strip()}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, reply)


def _reply(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply, allow_nan=False) + "\n")
    replies.flush()


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _compiled(compiler: GrammarCompiler, form: Any, vocab_size: int) -> dict[str, Any]:
    compiled = compiler.compile_structural_tag({"type": "structural_tag", "format": form})
    if not _begins(compiled, vocab_size):
        return {"error": "no text has this form"}
    text = compiled.serialize_json()
    if len(text) > MAX_CHARS:
        return {"error": "its grammar is too large"}
    return {"grammar": text}


def _begins(compiled: CompiledGrammar, vocab_size: int) -> bool:
    """Whether there is a first token."""
    mask = np.zeros((1, mask_words(vocab_size)), dtype=np.int32)
    GrammarMatcher(compiled).fill_next_token_bitmask(mask, 0)
    return bool(mask.any())


if __name__ == "__main__":
    main()
