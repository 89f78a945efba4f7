"""The operators: what each takes, gives and touches, and which shapes fit together.

`OPS` has one row for each operator. The planner builds graphs from these rows, the validator checks
plans against them, and `runtime/reference` and the templates of `codegen` give each row its two
bodies. The rows of a family are in a file of its name.

Letters in formulas: T tokens, S sequences, H hidden, V vocabulary, D head_dim, Q query heads, K kv
heads, A delta-rule key heads, B delta-rule value heads, E experts on this rank, k experts a token.

A decode step that verifies drafts has R = `query_len` queries of each sequence, one after the
other, so that T = S * R. To roll back rejected drafts it either writes a state after each query
(snapshot), or it keeps the inputs of its queries, and the next step begins by computing the state
after the accepted ones (`recompute_state`).
"""

from tokenspeed_plan.plans.ops.attention_ops import ATTENTION_OPS
from tokenspeed_plan.plans.ops.batch_inputs import (
    ADJUSTMENTS,
    BATCH_INPUTS,
    BATCH_STATE,
    DRAFT_INPUTS,
    IS_ADJUSTED,
    IS_MASKED,
    LATE_INPUTS,
    MASK_WORD_BITS,
    MAX_BIASED,
    MIN_P,
    PENALTIES,
    SAMPLING_INPUTS,
    STOP_IDS,
    TOKEN_MASK,
    adjustment_words,
    mask_words,
)
from tokenspeed_plan.plans.ops.delta_net_ops import (
    DELTA_CHUNK,
    DELTA_NET_OPS,
    L2_EPS,
    RECOMPUTED,
)
from tokenspeed_plan.plans.ops.dense_ops import DENSE_OPS
from tokenspeed_plan.plans.ops.moe_ops import MOE_OPS
from tokenspeed_plan.plans.ops.op_def import (
    Access,
    Attrs,
    OpDef,
    ShapeError,
    Specs,
    check_numbers,
    integer,
    number,
    query_len,
    require,
)
from tokenspeed_plan.plans.ops.sampling_ops import SAMPLING_OPS
from tokenspeed_plan.plans.ops.speculation_ops import SPECULATION_OPS

__all__ = [
    "ADJUSTMENTS",
    "BATCH_INPUTS",
    "BATCH_STATE",
    "COLLECTIVES",
    "DELTA_CHUNK",
    "DRAFT_INPUTS",
    "IS_ADJUSTED",
    "IS_MASKED",
    "L2_EPS",
    "LATE_INPUTS",
    "MASK_WORD_BITS",
    "MAX_BIASED",
    "MIN_P",
    "OPS",
    "PENALTIES",
    "RECOMPUTED",
    "SAMPLING_INPUTS",
    "STOP_IDS",
    "TOKEN_MASK",
    "Access",
    "Attrs",
    "OpDef",
    "ShapeError",
    "Specs",
    "adjustment_words",
    "check_numbers",
    "integer",
    "mask_words",
    "number",
    "query_len",
    "require",
]

OPS: dict[str, OpDef] = {
    **DENSE_OPS,
    **ATTENTION_OPS,
    **DELTA_NET_OPS,
    **MOE_OPS,
    **SAMPLING_OPS,
    **SPECULATION_OPS,
}
COLLECTIVES = ("all_reduce", "all_gather")
