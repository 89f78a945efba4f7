"""Speculation with the MTP layer: drafts after each step, and the verification of those before.

Shapes: S sequences, V vocabulary entries. A decode step that verifies has query_len = depth + 1
tokens of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenspeed_plan.planner.layout import Split
from tokenspeed_plan.planner.models.attention_block import (
    Queries,
    attend,
    queries,
    query_heads,
    write_keys_only,
)
from tokenspeed_plan.planner.models.builder import GraphBuilder, Splits
from tokenspeed_plan.planner.models.common_blocks import (
    BATCH_PLACES,
    TokenPlaces,
    add,
    draft_head,
    embed,
    head,
    norm,
    sample,
)
from tokenspeed_plan.planner.models.feed_forward import feed_forward
from tokenspeed_plan.plans.ops import BATCH_STATE
from tokenspeed_plan.plans.types import Attr

MTP_PREFIX = "mtp."
_LAYER = f"{MTP_PREFIX}layers.0."
_ACCEPT_INPUTS = (
    "context_lens",
    "src_state_slots",
    "max_lens",
    "stop_ids",
    "seed",
    "rng_offset",
    "forced_accept",
)


@dataclass(frozen=True, slots=True)
class LastToken:
    """How to take the last token of each sequence: operator, second operand, constants."""

    kind: str
    operand: str
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def take(self, graph: GraphBuilder, name: str, x: str, split: Split | None = None) -> str:
        """`x` of the last token of each sequence."""
        (last,) = graph.op(
            f"{name}.last",
            self.kind,
            (x, self.operand),
            attrs=self.attrs,
            out_splits=(split,),
        )
        return last


@dataclass(frozen=True, slots=True)
class DraftStart:
    """What drafts start from.

    Attributes:
        tokens: the token after each of the batch's tokens.
        hidden: the target's hidden state of each of the batch's tokens.
        last: how to take the last token of each sequence.
        lens: length of each sequence, its last certain token included.
        last_tokens: the token after the last certain one.
    """

    tokens: str
    hidden: str
    last: LastToken
    lens: str
    last_tokens: str


def verify(graph: GraphBuilder, hidden: str) -> tuple[str, ...]:
    """Sample after every token, accept the drafts that agree, draft anew, move the inputs on."""
    attrs = graph.query_attrs
    logits = head(graph, hidden, "verify_logits")
    sampled = sample(graph, logits, "verify_tokens")
    accepted, lens, last_tokens = graph.op(
        "accept",
        "accept",
        ("token_ids", sampled, *_ACCEPT_INPUTS),
        states=("accept_counts",),
        attrs=attrs,
        out_names=("accepted", "committed_lens", "last_tokens"),
    )
    last = LastToken("select_row", accepted, attrs)
    drafts = make_drafts(graph, DraftStart(sampled, hidden, last, lens, last_tokens))
    commit_state_len(graph)
    graph.op(
        "advance",
        "advance_rows",
        (accepted, drafts, "page_table"),
        states=BATCH_STATE,
        attrs=attrs | {"page_size": graph.context.limits.page_size},
    )
    return logits, sampled, accepted, drafts


def commit_state_len(graph: GraphBuilder) -> None:
    """Note how many tokens the recurrent states hold, where a step recomputes them."""
    if graph.recomputes:
        graph.op(
            "commit_state_len",
            "commit_state_len",
            ("context_lens",),
            states=("state_lens",),
            attrs=graph.query_attrs,
        )


def make_drafts(graph: GraphBuilder, start: DraftStart) -> str:
    """[last token | drafts] of each sequence, drafts one after the other.

    The first pass of the MTP layer is over all certain tokens, and their keys and values stay. The
    input for token i is the token after it, with the target's hidden state of token i. Only the
    last token of each sequence continues. Each later pass is over one draft; its keys and values
    are overwritten once the real token is known.
    """
    drafts = start.last_tokens
    hidden = start.hidden
    for number in range(1, graph.depth + 1):
        if number == 1:
            hidden = _first_pass(graph, start)
        else:
            graph.suffix = f"@{number}"
            places = _places_after(graph, start.lens, number - 1)
            hidden = _next_pass(graph, drafts, hidden, places)
        logits = draft_head(graph, hidden, "draft_logits")
        graph.suffix = ""
        name = f"drafts_so_far.{number}"
        if number == graph.depth:
            name = f"drafts_{number}"
        (drafts,) = graph.op(f"draft.{number}", "draft", (logits, drafts), out_names=(name,))
    return drafts


def write_draft_keys(graph: GraphBuilder, tokens: str, hidden: str) -> None:
    """Keys and values of the MTP layer for tokens after which nothing is drafted yet."""
    name = _layer_name(graph)
    x = _draft_input(graph, tokens, hidden)
    with graph.within("mixer", graph.config.num_layers):
        write_keys_only(graph, name, _LAYER, _mixer_norm(graph, name, x))


def _layer_name(graph: GraphBuilder) -> str:
    return f"L{graph.config.num_layers}"


def _first_pass(graph: GraphBuilder, start: DraftStart) -> str:
    """Keys and values of the batch's tokens; the hidden state of each sequence's last token."""
    name = _layer_name(graph)
    heads = query_heads(graph)
    last = start.last
    x = _draft_input(graph, start.tokens, start.hidden)
    with graph.within("mixer", graph.config.num_layers):
        normed = _mixer_norm(graph, name, x)
        every = queries(graph, name, _LAYER, normed, BATCH_PLACES)
        q = last.take(graph, f"{name}.q", every.q, heads)
        gate = None
        if every.gate is not None:
            gate = last.take(graph, f"{name}.gate", every.gate, heads)
        x = last.take(graph, f"{name}.x", x)
        places = TokenPlaces(context_lens=start.lens)
        x = _rest_of_pass(graph, name, x, Queries(q, gate), places)
    return _draft_hidden(graph, x)


def _next_pass(graph: GraphBuilder, tokens: str, hidden: str, places: TokenPlaces) -> str:
    """One draft of each sequence in, the hidden state that predicts the next one out."""
    name = _layer_name(graph)
    x = _draft_input(graph, tokens, hidden)
    with graph.within("mixer", graph.config.num_layers):
        normed = _mixer_norm(graph, name, x)
        made = queries(graph, name, _LAYER, normed, places)
        x = _rest_of_pass(graph, name, x, made, places)
    return _draft_hidden(graph, x)


def _rest_of_pass(
    graph: GraphBuilder, name: str, x: str, made: Queries, places: TokenPlaces
) -> str:
    y = attend(graph, name, _LAYER, made, places)
    x = add(graph, f"{name}.mixer_add", y, x)
    return feed_forward(graph, name, _LAYER, x)


def _draft_hidden(graph: GraphBuilder, x: str) -> str:
    return norm(graph, "draft_hidden", f"{MTP_PREFIX}norm.weight", x)


def _mixer_norm(graph: GraphBuilder, name: str, x: str) -> str:
    weight = f"{_LAYER}input_layernorm.weight"
    return norm(graph, f"{name}.mixer_norm", weight, x)


def _draft_input(graph: GraphBuilder, tokens: str, hidden: str) -> str:
    """fc [norm(embedding of the next token) | norm(hidden state)]."""
    size = graph.config.hidden_size
    x = embed(graph, "mtp.embed", tokens)
    weight = f"{MTP_PREFIX}pre_fc_norm_embedding.weight"
    embedded = norm(graph, "mtp.embed_norm", weight, x)
    weight = f"{MTP_PREFIX}pre_fc_norm_hidden.weight"
    normed = norm(graph, "mtp.hidden_norm", weight, hidden)
    block: dict[str, tuple[int, Splits]] = {f"{MTP_PREFIX}fc.weight": (size, {})}
    fc = graph.matrix("mtp.fc.weight", block, 2 * size)
    with graph.within("draft"):
        (joined,) = graph.op("mtp.concat", "concat", (embedded, normed))
        (y,) = graph.linear("mtp.fc", joined, fc, ((size, None),))
    return y


def _places_after(graph: GraphBuilder, lens: str, step: int) -> TokenPlaces:
    """Where the token after `lens + step - 1` tokens of each sequence is."""
    page_size = graph.context.limits.page_size
    positions, slot_mapping, context_lens = graph.op(
        "draft_place",
        "draft_place",
        (lens, "page_table"),
        attrs={"page_size": page_size, "step": step},
    )
    return TokenPlaces(positions, slot_mapping, context_lens)
