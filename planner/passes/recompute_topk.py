"""Choose again: of one row, the experts' way down chooses its experts itself, as the way up before it has done.

So it need not wait for the way up to know which weights it will read, and has them on their way
while that one still runs: 1.4 % of a step of Qwen3.5-35B-A3B on an H200. With more rows its
programs choose for longer than they would wait (four rows: 9 % more).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from tokenspeed_plan.planner.graph import Op, OpGraph

DOWN = ("moe_down", "moe_down_add")


def recompute_topk(graph: OpGraph, num_tokens: int, num_seqs: int) -> OpGraph:
    """The fused graph of a program of this size; a way up and the way down behind it no longer share a choice."""
    tensors, ops = dict(graph.tensors), {op.name: op for op in graph.ops}
    for up, down in pairwise(graph.ops):  # in order since they were fused
        if up.kind != "moe_up" or down.kind not in DOWN:
            continue
        if tensors[up.inputs[0]].spec.bind(num_tokens, num_seqs)[0] == 1:
            choice, old = _copied(up.parts[0], down.name), up.parts[0].outputs
            tensors |= {
                new: replace(tensors[name], name=new)
                for new, name in zip(choice.outputs, old, strict=True)
            }
            ops[down.name] = _choosing(down, choice, old)
            ops[up.name] = replace(
                up, outputs=tuple(name for name in up.outputs if name not in old)
            )
    return replace(graph, ops=tuple(ops.values()), tensors=tensors)


def _copied(topk: Op, name: str) -> Op:
    return replace(
        topk,
        name=f"{name}.topk",
        outputs=tuple(f"{name}.topk.{i}" for i in range(len(topk.outputs))),
    )


def _choosing(down: Op, choice: Op, old: tuple[str, ...]) -> Op:
    """The way down with a choice of its own in place of the old one."""
    own = dict(zip(old, choice.outputs, strict=True))
    parts = (
        choice,
        *(
            replace(part, inputs=tuple(own.get(name, name) for name in part.inputs))
            for part in down.parts
        ),
    )
    inputs = (*choice.inputs, *(name for name in down.inputs if name not in own))
    return replace(down, inputs=tuple(dict.fromkeys(inputs)), parts=parts)
