"""A decoder as an operator graph: one operator for each line of the model's definition.

The config says which family it is of: the kind of each layer's mixer and feed-forward block.
"""

from __future__ import annotations

from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.models.attention_block import attention
from tokenspeed_plan.planner.models.builder import BuildContext, GraphBuilder
from tokenspeed_plan.planner.models.common_blocks import add, embed, head, norm, sample
from tokenspeed_plan.planner.models.config import LayerType
from tokenspeed_plan.planner.models.delta_net_block import delta_net
from tokenspeed_plan.planner.models.feed_forward import feed_forward
from tokenspeed_plan.planner.models.mtp import (
    DraftStart,
    LastToken,
    commit_state_len,
    make_drafts,
    verify,
    write_draft_keys,
)
from tokenspeed_plan.plans.ops import BATCH_STATE
from tokenspeed_plan.plans.types import Attr, Phase

_MIXERS = {"linear_attention": delta_net, "full_attention": attention}


def build(context: BuildContext, phase: Phase, depth: int = 0) -> OpGraph:
    """The target model in one phase: token ids in, next tokens out, and after each `depth` drafts.

    A decode step of a depth verifies as many drafts as it makes: its sequences have `depth + 1`
    tokens each.
    """
    graph = GraphBuilder(context, phase, depth)
    x = embed(graph, "embed", "token_ids")
    for index, kind in enumerate(context.config.layer_types):
        with graph.within("mixer", index):
            x = _layer(graph, index, kind, x)
    x = norm(graph, "final_norm", f"{context.config.prefix}norm.weight", x)
    if depth and phase == "decode":
        return graph.finish(verify(graph, x))
    outputs = _next_tokens(graph, x)
    if phase == "decode":
        commit_state_len(graph)
        graph.op(
            "advance",
            "advance",
            ("next_tokens", "page_table"),
            states=BATCH_STATE,
            attrs=_advance_attrs(context),
        )
    return graph.finish(outputs)


def _advance_attrs(context: BuildContext) -> dict[str, Attr]:
    attrs: dict[str, Attr] = {"page_size": context.limits.page_size}
    if context.limits.in_place:
        attrs["in_place"] = True
    return attrs


def _layer(graph: GraphBuilder, index: int, kind: LayerType, x: str) -> str:
    """x + mixer(norm(x)), then x + ffn(norm(x))."""
    name = f"L{index}"
    source = f"{graph.config.prefix}layers.{index}."
    weight = f"{source}input_layernorm.weight"
    normed = norm(graph, f"{name}.mixer_norm", weight, x)
    mixer = _MIXERS[kind]
    y = mixer(graph, name, source, normed)
    x = add(graph, f"{name}.mixer_add", y, x)
    return feed_forward(graph, name, source, x)


def _next_tokens(graph: GraphBuilder, hidden: str) -> tuple[str, ...]:
    """The next token of each sequence; where a plan speculates, the MTP layer's part too."""
    last = graph.op("last_token", "last_token", (hidden, "cu_seqlens"))[0]
    logits = head(graph, last, "logits")
    outputs: tuple[str, ...] = (logits, sample(graph, logits, "next_tokens"))
    if not graph.context.limits.max_depth:
        return outputs
    inputs = ("token_ids", "following", "next_tokens", "cu_seqlens")
    shifted = graph.op("shift_tokens", "shift_tokens", inputs)[0]
    if not graph.depth:
        write_draft_keys(graph, shifted, hidden)
        return outputs
    take_last = LastToken("last_token", "cu_seqlens")
    start = DraftStart(shifted, hidden, take_last, "context_lens", "next_tokens")
    return (*outputs, make_drafts(graph, start))
