"""Blocks that every decoder has: embedding, norms, residual sums, head and sampler.

Shapes: T tokens, H hidden, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed_plan.planner.graph import Source
from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.builder import GraphBuilder
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.fp8_format import BLOCK
from tokenspeed_plan.plans.ops import (
    ADJUSTMENTS,
    IS_MASKED,
    MIN_P,
    PENALTIES,
    SAMPLING_INPUTS,
    TOKEN_MASK,
)
from tokenspeed_plan.plans.types import Attr


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Names of the tensors that say where tokens are: those of the batch, or of `draft_place`."""

    positions: str = "positions"
    slot_mapping: str = "slot_mapping"
    context_lens: str = "context_lens"


BATCH_PLACES = TokenPlaces()


def embed(graph: GraphBuilder, name: str, token_ids: str) -> str:
    """x = E[token_ids]."""
    vocab_size = graph.config.vocab_size
    split = Split("vocab", vocab_size)
    with graph.within("embed"):
        table = _embedding_table(graph)
        (x,) = graph.op(
            name,
            "embed",
            (token_ids,),
            (table,),
            partial=True,
            shifts={"row_start": (vocab_size, split)},
        )
    return x


def _embedding_table(graph: GraphBuilder) -> str:
    vocab_size = graph.config.vocab_size
    name = _embedding_name(graph)
    block = (vocab_size, {0: Split("vocab", vocab_size)})
    return graph.matrix("embed.table", {name: block}, graph.config.hidden_size)


def _embedding_name(graph: GraphBuilder) -> str:
    return f"{graph.config.prefix}embed_tokens.weight"


def norm_attrs(graph: GraphBuilder) -> dict[str, Attr]:
    """Constants of an RMSNorm; `plain` where the weight is `w`, not `1 + w`."""
    attrs: dict[str, Attr] = {"eps": graph.config.rms_norm_eps}
    if graph.config.plain_norms:
        attrs["plain"] = True
    return attrs


def norm(graph: GraphBuilder, name: str, source: str, x: str) -> str:
    """RMSNorm over the hidden dimension."""
    weight = graph.vector(f"{name}.weight", source, graph.config.hidden_size)
    attrs = norm_attrs(graph)
    with graph.within("residual"):
        (y,) = graph.op(name, "rms_norm", (x,), (weight,), attrs=attrs)
    return y


def add(graph: GraphBuilder, name: str, x: str, residual: str) -> str:
    """x + residual."""
    with graph.within("residual"):
        (y,) = graph.op(name, "add", (x, residual))
    return y


def head(graph: GraphBuilder, x: str, logits: str) -> str:
    """Logits [., V] over the whole vocabulary."""
    vocab_size = graph.config.vocab_size
    weight = _head_weight(graph, "head.weight", vocab_size)
    return _head_product(graph, "head", x, weight, vocab_size, logits)


def draft_head(graph: GraphBuilder, x: str, logits: str) -> str:
    """Logits over the tokens that drafts are chosen from: the first `draft_vocab`, or all."""
    vocab_size = graph.config.vocab_size
    rows = graph.context.draft_vocab or vocab_size
    name = "draft_head.weight"
    if rows == vocab_size:
        name = "head.weight"
    weight = _head_weight(graph, name, rows)
    return _head_product(graph, "draft_head", x, weight, rows, logits)


def _head_product(
    graph: GraphBuilder, name: str, x: str, weight: str, rows: int, logits: str
) -> str:
    split = Split("vocab", rows)
    outs = ((rows, split),)
    with graph.within("head"):
        (out,) = graph.linear(name, x, weight, outs, (logits,), gathered=True)
    return out


def _head_weight(graph: GraphBuilder, name: str, rows: int) -> str:
    """The first `rows` rows of the head, which is the embedding table where the two are tied.

    Raises:
        SpecError: it shall be in FP8, and is not whole blocks.
    """
    config = graph.config
    tied, in_fp8 = config.tie_word_embeddings, graph.context.fp8_head
    if in_fp8 and (rows % BLOCK or config.hidden_size % BLOCK):
        raise SpecError(
            f"`model.head` is fp8, and a head of {rows} x {config.hidden_size} is not whole blocks "
            f"of {BLOCK} x {BLOCK}",
            "leave `model.head` out",
        )
    if tied and rows == config.vocab_size and not in_fp8:
        return _embedding_table(graph)
    source = "lm_head.weight"
    if tied:
        source = _embedding_name(graph)
    shape = (config.vocab_size, config.hidden_size)
    size = (rows, config.hidden_size)
    split = Split("vocab", rows)
    part = Source(source, shape, (0, 0), size, ((0, split),))
    return graph.weight(name, size, (part,), in_fp8=in_fp8)


def sample(graph: GraphBuilder, logits: str, name: str) -> str:
    """The next token after each row of logits, as penalties and a grammar have changed them."""
    kind, operands = "sample", (*SAMPLING_INPUTS,)
    if graph.context.penalties:
        kind, operands = "sample_min_p", (*SAMPLING_INPUTS, MIN_P)
        changes = ("token_ids", *PENALTIES, ADJUSTMENTS)
        (logits,) = graph.op("adjust", "adjust", (logits, *changes), attrs=graph.query_attrs)
    if graph.context.grammar:
        masks = (IS_MASKED, TOKEN_MASK)
        (logits,) = graph.op("mask", "mask", (logits, *masks), attrs=graph.query_attrs)
    attrs: dict[str, Attr] = {"num_valid_tokens": graph.context.num_valid_tokens}
    (tokens,) = graph.op(
        "sample",
        kind,
        (logits, *operands),
        attrs=attrs | graph.query_attrs,
        out_names=(name,),
    )
    return tokens
