"""The plain PyTorch body of every operator: the CPU path, and the oracle of every kernel.

A body takes the constants of its operator, then its operands in the order of `plans.ops.OPS`, and
returns its outputs as a tuple. Persistent state is updated in place. Sums and exponentials are
taken in fp32 (fp64 in fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tokenspeed_plan.runtime.reference import (
    attention,
    delta,
    delta_chunks,
    dense,
    moe,
    sampling,
    speculation,
    step_inputs,
)

Attrs = Mapping[str, bool | int | float | str]
Body = Callable[..., tuple[Tensor, ...]]

REFERENCE_BODIES: dict[str, Body] = {
    "embed": dense.embed,
    "rms_norm": dense.rms_norm,
    "head_norm": dense.head_norm,
    "linear": dense.linear,
    "quantise": dense.quantise,
    "add": dense.add,
    "silu_mul": dense.silu_mul,
    "last_token": dense.last_token,
    "concat": dense.concat,
    "split_gate": attention.split_gate,
    "rope": attention.rope,
    "kv_write": attention.kv_write,
    "attention": attention.attention,
    "sigmoid_gate": attention.sigmoid_gate,
    "causal_conv": delta.causal_conv,
    "ring_conv": delta.ring_conv,
    "qk_l2_norm": delta.qk_l2_norm,
    "delta_gates": delta.delta_gates,
    "delta_rule": delta.delta_rule,
    "recompute_state": delta.recompute_state,
    "commit_state_len": delta.commit_state_len,
    "delta_chunk": delta_chunks.delta_chunk,
    "delta_scan": delta_chunks.delta_scan,
    "gated_norm": delta.gated_norm,
    "topk": moe.topk,
    "experts_up": moe.experts_up,
    "experts_down": moe.experts_down,
    "expert_sort": moe.expert_sort,
    "expert_count": moe.expert_count,
    "expert_place": moe.expert_place,
    "grouped_up": moe.grouped_up,
    "grouped_down": moe.grouped_down,
    "expert_sum": moe.expert_sum,
    "gated_add": moe.gated_add,
    "adjust": sampling.adjust,
    "mask": sampling.mask,
    "sample": sampling.sample,
    "sample_min_p": sampling.sample,
    "advance": step_inputs.advance,
    "shift_tokens": speculation.shift_tokens,
    "accept": speculation.accept,
    "select_row": speculation.select_row,
    "draft": speculation.draft,
    "draft_place": speculation.draft_place,
    "advance_rows": speculation.advance_rows,
}

__all__ = ["REFERENCE_BODIES", "Body"]
