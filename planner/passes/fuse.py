"""Fuse: runs of neighbouring operators become one kernel.

`FUSIONS` is the whole policy: a kernel kind and the run of operators that it replaces. Operators
that stand together in a topological order are always convex, so no rewrite can make a cycle. What
only the run itself uses stays in registers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenspeed_plan.codegen.tiling import GEMV_COLUMNS, GEMV_ROWS, NORMED_ROWS
from tokenspeed_plan.planner.graph import Op, OpGraph, Stage
from tokenspeed_plan.plans.encodings import NVFP4
from tokenspeed_plan.plans.ops import Access
from tokenspeed_plan.plans.types import Phase


@dataclass(frozen=True, slots=True)
class Fusion:
    """One rewrite: `run` becomes a kernel of kind `kind`, in the phases where that pays.

    Attributes:
        kind: the kernel's.
        run: kinds of operators, in order.
        phases: where it pays.
        independent: the members only share a launch; elsewhere they feed each other.
        gemv_only: it pays only where a product waits for its weight: few rows, or some rows and few
            columns.
        pushes: it adds up ranks, which pays in some programs (`planner/passes/reduction.py`).
        leaves: kinds after its first member that belong to another kernel, which has no other.
    """

    kind: str
    run: tuple[str, ...]
    phases: tuple[Phase, ...] = ("prefill", "decode")
    independent: bool = False
    gemv_only: bool = False
    pushes: bool = False
    leaves: tuple[str, ...] = ()


FEW: tuple[Phase, ...] = ("decode",)  # programs of a few tokens
DRAFT_INPUT = ("rms_norm", "rms_norm", "concat")  # of the MTP layer

FUSIONS = (
    # A sum over ranks is added to the residual stream, which is then normed: each rank pushes its
    # part to all peers at once. Of many ranks, many tokens would cross the links too often.
    Fusion("reduce_add_norm", ("all_reduce", "add", "rms_norm"), pushes=True),
    Fusion("reduce_norm", ("all_reduce", "rms_norm"), pushes=True, leaves=DRAFT_INPUT),
    Fusion("reduce", ("all_reduce",), independent=True, pushes=True),
    # Products include the norm before them and the operators after them. On the tensor cores the
    # norm is a launch of its own, so that operands go straight to them: on an H200, four rows times
    # 12,288 x 4096 take 47 us with the norm inside and 2 + 25 us without. A router reads its rows
    # again for each block of columns: 64 and 512 rows times 257 take 12 and 28 us,
    # without it 8 and 13.
    Fusion("norm_head", ("rms_norm", "last_token", "linear"), FEW, gemv_only=True),
    Fusion("head", ("last_token", "linear")),
    Fusion("norm_linear_silu_mul", ("rms_norm", "linear", "silu_mul"), FEW, gemv_only=True),
    # The products of a Gated DeltaNet whose large one is in FP8: two weights, one launch.
    Fusion("norm_linear", ("rms_norm", "linear", "linear"), FEW, gemv_only=True),
    Fusion("norm_linear", ("rms_norm", "linear"), FEW, gemv_only=True),
    Fusion("linear_silu_mul", ("linear", "silu_mul")),
    Fusion("expert_sum_linear_add", ("expert_sum", "linear", "gated_add", "add")),
    Fusion("expert_sum_linear", ("expert_sum", "linear", "gated_add")),
    Fusion("expert_sum_add", ("expert_sum", "add")),
    Fusion("linear_add", ("linear", "add")),
    Fusion("add_norm_quantise", ("add", "rms_norm", "quantise")),
    Fusion("norm_quantise", ("rms_norm", "quantise")),
    Fusion("add_norm", ("add", "rms_norm")),
    # Attention.
    Fusion(
        "qk_norm_rope_write", ("split_gate", "head_norm", "rope", "head_norm", "rope", "kv_write")
    ),
    Fusion("qk_norm_rope_write", ("head_norm", "rope", "head_norm", "rope", "kv_write")),
    Fusion("k_norm_rope_write", ("head_norm", "rope", "kv_write")),
    Fusion("attention_gate", ("attention", "sigmoid_gate")),
    Fusion("attention_only", ("attention",), independent=True),
    # Gated DeltaNet: the decode step, and the chunked form of prefill.
    Fusion(
        "delta_recompute",
        ("recompute_state", "causal_conv", "qk_l2_norm", "delta_gates", "delta_rule", "gated_norm"),
    ),
    Fusion("delta_step", ("causal_conv", "qk_l2_norm", "delta_gates", "delta_rule", "gated_norm")),
    Fusion("delta_step", ("ring_conv", "qk_l2_norm", "delta_gates", "delta_rule", "gated_norm")),
    Fusion("conv_qk_norm", ("causal_conv", "qk_l2_norm")),
    Fusion("conv_qk_norm", ("ring_conv", "qk_l2_norm")),
    Fusion("gates_delta_chunk", ("delta_gates", "delta_chunk")),
    Fusion("gated_norm_quantise", ("gated_norm", "quantise")),
    # Mixture of experts with a few tokens.
    Fusion("moe_up", ("topk", "experts_up", "linear", "silu_mul")),
    Fusion("moe_down_add", ("experts_down", "linear", "gated_add", "add")),
    Fusion("moe_down", ("experts_down", "linear", "gated_add")),
    # The same without a shared expert.
    Fusion("moe_up", ("topk", "experts_up")),
    Fusion("moe_down_add", ("experts_down", "add")),
    Fusion("moe_down", ("experts_down",), independent=True),
    # Drafts: the input of the MTP layer, the one row of each sequence that continues, and the
    # positions and slots of the next draft.
    Fusion("embed_norm_concat", ("embed", "rms_norm", "rms_norm", "concat")),
    Fusion("norm_concat", DRAFT_INPUT),
    Fusion("select_rows", ("select_row",) * 3, independent=True),
    Fusion("last_rows", ("last_token",) * 3, independent=True),
    Fusion("draft_then_place", ("draft", "draft_place"), independent=True),
)
FUSED_KINDS = frozenset(fusion.kind for fusion in FUSIONS)
QUANTISED_SUM = ("add", "rms_norm", "quantise")


def with_sums_in_norms(fusions: Sequence[Fusion]) -> tuple[Fusion, ...]:
    """The fusions, but a norm that quantises takes the sum before it from the product.

    That is for libraries, whose products have no residual: they would add it in a pass of its own.
    """
    return tuple(
        replace(each, leaves=QUANTISED_SUM) if each.kind == "linear_add" else each
        for each in fusions
    )


def fuse(
    graph: OpGraph,
    num_tokens: int = 1,
    num_seqs: int = 1,
    fusions: Sequence[Fusion] = FUSIONS,
    pushes: bool = True,
) -> OpGraph:
    """The graph of a program of this size; each run is replaced by the first fusion that fits.

    Args:
        graph: of the program.
        num_tokens: of it, at most.
        num_seqs: of it, at most.
        fusions: that are tried, in this order.
        pushes: whether kernels add up ranks.
    """
    order = tuple(graph.ordered())
    work = _Fuser(graph, order, _readers(order), (num_tokens, num_seqs))
    by_first: dict[str, list[Fusion]] = {}
    for fusion in fusions:
        if graph.phase in fusion.phases and (pushes or not fusion.pushes):
            by_first.setdefault(fusion.run[0], []).append(fusion)
    ops: list[Op] = []
    index = 0
    while index < len(order):
        begun = by_first.get(order[index].kind, ())
        found = next((each for each in begun if work.matches(index, each)), None)
        if found is None:
            ops.append(order[index])
            index += 1
        else:
            ops.append(work.merge(index, found))
            index += len(found.run)
    return graph.to(Stage.FUSED, ops=tuple(ops))


def _readers(order: Sequence[Op]) -> dict[str, list[int]]:
    """The places of the operators that read each tensor."""
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(order):
        for name in op.inputs:
            readers.setdefault(name, []).append(index)
    return readers


@dataclass(frozen=True, slots=True)
class _Fuser:
    """The operators of a program in order, who reads each tensor, and tokens and sequences."""

    graph: OpGraph
    order: tuple[Op, ...]
    readers: Mapping[str, Sequence[int]]
    sizes: tuple[int, int]

    def matches(self, index: int, fusion: Fusion) -> bool:
        """Whether the run begins at this index.

        Each member must read or update something that another member writes, or write something
        that another reads, unless they only share a launch.
        """
        end = index + len(fusion.run)
        run = self.order[index:end]
        if fusion.run != tuple(op.kind for op in run) or self._is_left(index, fusion):
            return False
        if fusion.gemv_only:
            products = [op for op in run if op.kind == "linear"]
            if not all(self._is_gemv(op) for op in products):
                return False
        if fusion.independent:
            return True
        return _are_connected(run)

    def _is_left(self, index: int, fusion: Fusion) -> bool:
        """Whether what follows belongs to another kernel."""
        after = self.order[index + 1 : index + 1 + len(fusion.leaves)]
        return bool(fusion.leaves) and fusion.leaves == tuple(op.kind for op in after)

    def _is_gemv(self, product: Op) -> bool:
        """Whether a product has few rows, or some and few columns; with NVFP4 it has no norm."""
        (x,) = product.inputs
        (weight,) = product.weights
        if self.graph.weights[weight].spec.format == NVFP4:
            return False
        rows, _ = self.graph.tensors[x].spec.bind(*self.sizes)
        columns, _ = self.graph.weights[weight].spec.bind(0, 0)
        return rows <= GEMV_ROWS or (rows <= NORMED_ROWS and columns <= GEMV_COLUMNS)

    def merge(self, index: int, fusion: Fusion) -> Op:
        """The kernel in place of the run at this index. It has the name of the last member."""
        end = index + len(fusion.run)
        run = self.order[index:end]
        last = run[-1]
        read = [name for op in run for name in op.inputs]
        written = [name for op in run for name in op.outputs]
        inside = range(index, end)
        return Op(
            name=last.name,
            kind=fusion.kind,
            inputs=_unique(name for name in read if name not in written),
            outputs=tuple(name for name in written if self._leaves(name, inside)),
            weights=_unique(name for op in run for name in op.weights),
            states=_states(run),
            parts=run,
            layer=last.layer,
            role=last.role,
        )

    def _leaves(self, name: str, inside: range) -> bool:
        """Whether a tensor is needed outside of the operators at these places."""
        if name in self.graph.outputs:
            return True
        return any(index not in inside for index in self.readers.get(name, ()))


def _are_connected(run: Sequence[Op]) -> bool:
    """Whether each operator shares a tensor or a state with another of the run."""
    read = {name for op in run for name in op.inputs}
    written = {name for op in run for name in op.outputs}
    holders = Counter(name for op in run for name, _ in op.states)
    return all(
        not written.isdisjoint(op.inputs)
        or not read.isdisjoint(op.outputs)
        or any(holders[name] > 1 for name, _ in op.states)
        for op in run
    )


def _states(run: Sequence[Op]) -> tuple[tuple[str, Access], ...]:
    """The states of a run; one that a member updates is updated."""
    states: dict[str, Access] = {}
    for op in run:
        for name, access in op.states:
            if states.get(name) != "update":
                states[name] = access
    return tuple(states.items())


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
