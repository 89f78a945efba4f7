"""Fuse: runs of neighbouring operators become one kernel.

`FUSIONS` is the whole policy: a kernel kind and the run of operators that it replaces. A run that
stands together in a topological order is always convex, so no rewrite can make a cycle. What is
only used inside stays in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.codegen.tiling import GEMV_COLUMNS, GEMV_ROWS
from tokenspeed_plan.planner.graph import Op, OpGraph, Stage
from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.types import Phase


@dataclass(frozen=True, slots=True)
class Fusion:
    """One rewrite: `run` (kinds, in order) becomes a kernel of kind `kind`, in the phases where it pays.

    Its members feed each other, unless they only share a launch. With `gemv_only` it pays where a
    product is plain arithmetic: for few rows, or few columns.
    """

    kind: str
    run: tuple[str, ...]
    phases: tuple[Phase, ...] = ("prefill", "decode")
    independent: bool = False
    gemv_only: bool = False


FEW: tuple[Phase, ...] = ("decode",)  # a few rows

FUSIONS = (
    # Sums over ranks end in the residual stream and its norm. Few rows are read from all peers at
    # once; many would cross the links once for each pair of ranks.
    Fusion("reduce_add_norm", ("all_reduce", "add", "rms_norm"), FEW),
    # Products take in the norm before them, and what is done to their result. On the tensor cores
    # the norm is a launch of its own, so that operands go straight to them: on an H200 four rows
    # through 12,288 x 4096 take 47 us with the norm inside, 2 + 25 us without.
    Fusion("norm_head", ("rms_norm", "last_token", "linear"), FEW, gemv_only=True),
    Fusion("head", ("last_token", "linear")),
    Fusion("norm_linear_silu_mul", ("rms_norm", "linear", "silu_mul"), FEW, gemv_only=True),
    Fusion("norm_linear", ("rms_norm", "linear"), FEW, gemv_only=True),
    Fusion("linear_silu_mul", ("linear", "silu_mul")),
    Fusion("expert_sum_linear_add", ("expert_sum", "linear", "gated_add", "add")),
    Fusion("expert_sum_linear", ("expert_sum", "linear", "gated_add")),
    Fusion("linear_add", ("linear", "add")),
    Fusion("add_norm", ("add", "rms_norm")),
    # Attention.
    Fusion(
        "qk_norm_rope_write", ("split_gate", "head_norm", "rope", "head_norm", "rope", "kv_write")
    ),
    Fusion("k_norm_rope_write", ("head_norm", "rope", "kv_write")),
    Fusion("attention_gate", ("attention", "sigmoid_gate")),
    # Gated DeltaNet: one step of it, and the chunked form.
    Fusion(
        "delta_recompute",
        ("recompute_state", "causal_conv", "qk_l2_norm", "delta_gates", "delta_rule", "gated_norm"),
    ),
    Fusion("delta_step", ("causal_conv", "qk_l2_norm", "delta_gates", "delta_rule", "gated_norm")),
    Fusion("conv_qk_norm", ("causal_conv", "qk_l2_norm")),
    Fusion("gates_delta_chunk", ("delta_gates", "delta_chunk")),
    # Mixture of experts, a few rows.
    Fusion("moe_up", ("topk", "experts_up", "linear", "silu_mul")),
    Fusion("moe_down_add", ("experts_down", "linear", "gated_add", "add")),
    Fusion("moe_down", ("experts_down", "linear", "gated_add")),
    # Drafts: what goes into the layer that makes them, the one row of each sequence that goes on,
    # where the next goes.
    Fusion("embed_norm_concat", ("embed", "rms_norm", "rms_norm", "concat")),
    Fusion("norm_concat", ("rms_norm", "rms_norm", "concat")),
    Fusion("select_rows", ("select_row",) * 3, independent=True),
    Fusion("last_rows", ("last_token",) * 3, independent=True),
    Fusion("draft_then_place", ("draft", "draft_place"), independent=True),
)
FUSED_KINDS = frozenset(fusion.kind for fusion in FUSIONS)


def fuse(
    graph: OpGraph, num_tokens: int = 1, num_seqs: int = 1, fusions: Sequence[Fusion] = FUSIONS
) -> OpGraph:
    """The graph of a program of this size; each run is replaced by the first line of the table that fits."""
    sizes = (num_tokens, num_seqs)
    order = list(graph.ordered())
    at_hand = [fusion for fusion in fusions if graph.phase in fusion.phases]
    ops: list[Op] = []
    index = 0
    while index < len(order):
        likely = (f for f in at_hand if f.run[0] == order[index].kind)
        fusion = next((f for f in likely if _matches(graph, order, index, f, sizes)), None)
        length = len(fusion.run) if fusion else 1
        ops.append(_merge(graph, order, index, fusion) if fusion else order[index])
        index += length
    return graph.to(Stage.FUSED, ops=tuple(ops))


def _matches(
    graph: OpGraph, order: Sequence[Op], index: int, fusion: Fusion, sizes: tuple[int, int]
) -> bool:
    """Whether the run is there, and each member takes something that the run made, or makes what it takes.

    A state that both touch counts too.
    """
    run = order[index : index + len(fusion.run)]
    if tuple(op.kind for op in run) != fusion.run:
        return False
    if fusion.gemv_only and not all(
        _is_gemv(graph, op, sizes) for op in run if op.kind == "linear"
    ):
        return False
    made = {name for op in run for name in op.outputs}
    return fusion.independent or all(_feeds(op, run, made) for op in run)


def _is_gemv(graph: OpGraph, op: Op, sizes: tuple[int, int]) -> bool:
    rows = graph.tensors[op.inputs[0]].spec.bind(*sizes)[0]
    columns = graph.weights[op.weights[0]].spec.bind(0, 0)[0]
    return rows <= GEMV_ROWS or columns <= GEMV_COLUMNS


def _feeds(op: Op, run: Sequence[Op], made: set[str]) -> bool:
    used = {name for other in run for name in other.inputs}
    touched = {name for other in run if other is not op for name, _ in other.states}
    return bool(
        made & set(op.inputs) or used & set(op.outputs) or touched & {name for name, _ in op.states}
    )


def _merge(graph: OpGraph, order: Sequence[Op], index: int, fusion: Fusion) -> Op:
    run = tuple(order[index : index + len(fusion.run)])
    made = [name for op in run for name in op.outputs]
    outside = {
        name for op in (*order[:index], *order[index + len(run) :]) for name in op.inputs
    } | set(graph.outputs)
    states: dict[str, Access] = {}
    for op in run:
        states |= {name: access for name, access in op.states if states.get(name) != "update"}
    return Op(
        name=run[-1].name,
        kind=fusion.kind,
        inputs=_unique(name for op in run for name in op.inputs if name not in made),
        outputs=tuple(name for name in made if name in outside),
        weights=_unique(name for op in run for name in op.weights),
        states=tuple(states.items()),
        parts=tuple(replace(op) for op in run),
    )


def _unique(names: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
