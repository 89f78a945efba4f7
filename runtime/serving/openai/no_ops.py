"""Fields that clients send and that may say nothing: such a value is accepted, others refused.

OpenAI's own clients, LangChain and LiteLLM send the defaults of what they know, and so do clients
that were written for vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

# The values of each field that change no answer of ours.
NO_OPS: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "prompt_cache_retention": ("in_memory", "in-memory", "24h"),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default", "flex", "priority", "standard_only"),
    "store": (False,),
    "verbosity": ("medium",),
    "stream": (False,),
    "stream_options": (
        {},
        {"include_usage": False},
        {"include_usage": False, "continuous_usage_stats": False},
        {"continuous_usage_stats": False},
    ),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    # those of vLLM and its kin
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "include": ([],),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "priority": (0,),
    "repetition_penalty": (1,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "typical_p": (1,),
    "use_beam_search": (False,),
}


def drop_no_ops(fields: dict[str, Any], supported: Container[str]) -> tuple[str, str] | None:
    """Remove the fields that say nothing.

    Args:
        fields: of a body; without nulls.
        supported: fields whose other values are served.

    Returns:
        The first field with a value that is not supported, and the values that it may have.
    """
    for name in [name for name in fields if name in NO_OPS]:
        value, allowed = fields[name], NO_OPS[name]
        if name == "best_of":  # the best n of n are all of them
            allowed = (fields.get("n", 1),)
        if any(_is_same(value, other) for other in allowed) or _is_zero_bias(name, value):
            del fields[name]
        elif name not in supported:
            return name, " or ".join(json.dumps(value, allow_nan=False) for value in allowed)
    return None


def _is_same(value: object, allowed: object) -> bool:
    """Whether they are equal; true and 1 are not, and 1.0 and 1 are."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _is_zero_bias(name: str, value: object) -> bool:
    """Whether it is a bias of nothing on some tokens."""
    if name != "logit_bias" or not isinstance(value, dict):
        return False
    return all(_is_same(bias, 0) for bias in value.values())
