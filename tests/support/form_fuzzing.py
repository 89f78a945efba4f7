"""Forms of answers: schemas of all kinds, hostile ones among them, and answers drawn from them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from chat_fuzzing import MODEL, tokenizer_of

Json = Any
MAX_TOKENS = 80  # of an answer
MAX_FILL_S = 1.0  # for one mask, on a slow machine
CLOSING = ('"', "}", "]", "1", "e", "l", "true", "null", "\n</parameter>", "</", "\n", ">")
PATTERNS = ("^a+$", "[a-z]{2,4}", "(a|b)*c", "(a*)*", "\\d{1,3}", "(", "(?=a)b", "[^x]", "a{9999}")
NUMBERS = (0, 1, 2, 5, -1, 10**6, 10**12, 10**30, 2.5, True, "1")
KEYWORDS = (
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "multipleOf"),
)
ODD = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a"},
    {"$ref": "http://x/y"},
    {"not": {}},
    {"enum": []},
    {"enum": ["a", 1, None, {"b": [True]}]},
    {"const": 'x\n</parameter>"é'},
    {"type": "tuple"},
    {"allOf": [{}, {}]},
    {"uniqueItems": True},
    {"additionalProperties": {"type": "string"}},
    True,
    False,
    5,
)


def schema(rng: random.Random, depth: int = 3) -> Json:
    """A schema; most of them are sound."""
    if rng.random() < 0.1:
        return rng.choice(ODD)
    kinds = ("string", "integer", "number", "boolean", "null")
    if depth:
        kinds += ("object", "array", "any", "object")
    kind = rng.choice(kinds)
    found: dict[str, Json] = {"type": kind}
    if kind == "any":
        return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "object":
        names = rng.sample(("a", "b c", "é", 'x"', "$ref"), rng.randrange(4))
        found["properties"] = {name: schema(rng, depth - 1) for name in names}
        found["required"] = [name for name in names if rng.random() < 0.6]
        found |= rng.choice(({}, {"additionalProperties": False}))
    if kind == "array":
        found["items"] = schema(rng, depth - 1)
    if kind == "string":
        found |= rng.choice(({}, {"pattern": rng.choice(PATTERNS)}, {"format": "date"}, {}))
    if rng.random() < 0.2:
        found[rng.choice(KEYWORDS)] = rng.choice(NUMBERS)
    if depth == 3 and rng.random() < 0.3:
        found["$defs"] = {"a": schema(rng, 1)}
    return found


def make_form(
    rng: random.Random, mutate: Callable[..., Json], encode: Callable[..., bytes]
) -> dict[str, bytes]:
    """A body that asks for a form, the template of its model, and a seed for its answer."""
    asked = schema(rng)
    if rng.random() < 0.05:
        for _ in range(rng.choice((10, 40))):
            asked = {"type": "array", "items": {"anyOf": [asked, {"type": "integer"}]}}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": asked, "strict": True}}
    body: dict[str, Json] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    template = rng.choice(("tags", "json", "none"))
    if rng.random() < 0.6:
        body["response_format"] = rng.choice((form, form, form, {"type": "json_object"}))
    if template != "none" and rng.random() < 0.5:
        function = {"name": "pick", "parameters": asked, "strict": rng.random() < 0.5}
        body["tools"] = [{"type": "function", "function": function}]
        named = {"type": "function", "function": {"name": "pick"}}
        body["tool_choice"] = rng.choice(("auto", "required", named))
    if rng.random() < 0.3:
        body = mutate(rng, body, rng.choice((1, 2)))
    plan = {"template": template, "seed": rng.randrange(1 << 30)}
    return {"body.json": encode(body), "plan.json": json.dumps(plan).encode()}


@cache
def compiler() -> Json:
    """Compiles grammars for the demo's tokenizer."""
    from tokenspeed_plan.runtime.grammars.grammar_compiler import GrammarCompiler

    config = json.loads((MODEL / "config.json").read_text())
    text = config.get("text_config", config)
    found = GrammarCompiler(tokenizer_of("tags"), text["vocab_size"], [text["eos_token_id"]])
    found.warm_up()
    return found


def fault_of(files: Json, limits: Json) -> str | None:
    """What is wrong with an answer that its grammar allows, if anything.

    Raises:
        ApiError: the body is refused.
    """
    from dataclasses import replace

    from tokenspeed_plan.runtime.serving.http.parsing import parse

    plan = json.loads(files["plan.json"])
    tokenizer = tokenizer_of(plan["template"])
    limits = replace(limits, grammars=compiler())
    request = parse(files["body.json"], "/v1/chat/completions", "m", tokenizer, limits)
    grammar = request.requests[0].grammar
    if grammar is None:
        return None
    text, fault = drawn(grammar, random.Random(plan["seed"]), tokenizer, limits.vocab_size)
    body = request.asked
    if fault or text is None or plan["template"] != "none" or not body.get("response_format"):
        return fault
    return schema_fault(text, body["response_format"])


def drawn(
    grammar: Json, rng: random.Random, tokenizer: Json, vocab_size: int
) -> tuple[str | None, str | None]:
    """An answer, None where it is not over in time; and what is wrong with its grammar."""
    matcher = grammar.matcher()
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    closing = [token for text in CLOSING for token in tokenizer.encode(text, False)[:1]]
    tokens: list[int] = []
    (stop,) = compiler()._stop_ids
    for _ in range(MAX_TOKENS):
        begun = time.perf_counter()
        matcher.fill(mask, 0)
        if time.perf_counter() - begun > MAX_FILL_S:
            return None, "a mask takes too long"
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed):
            return None, None  # a schema that contradicts itself deep inside
        likely = [token for token in (stop, *closing) if token in allowed]
        token = int(rng.choice(likely if likely and rng.random() < 0.7 else allowed))
        other = rng.randrange(2000)
        is_text = not tokenizer.is_special(other) and other not in allowed
        if is_text and matcher.accept(other):
            return None, "a token is taken that the mask forbids"
        if not matcher.accept(token):
            return None, "a token is refused that the mask allows"
        if token == stop:
            return tokenizer.decode(tokens), None
        tokens.append(token)
    return None, None


def schema_fault(text: str, form: Json) -> str | None:
    """Why an answer has not the form that was asked for."""
    from jsonschema import Draft202012Validator

    if form["type"] == "json_object":
        return None if isinstance(json.loads(text), dict) else "no object"
    wanted = form["json_schema"]["schema"]
    found = json.loads(text)
    error = next(Draft202012Validator(wanted).iter_errors(found), None)
    return None if error is None else f"the answer is not as the schema says: {error.message:.200}"
