"""Kernels of decode steps that verify drafts, with several queries of each sequence.

Each agrees with its reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kernel_lab import (
    DEVICE,
    TOLERANCE,
    Case,
    Inputs,
    broken,
    errors,
    is_caught,
    kernels_of,
    reference,
    run_kernel,
)
from overlap import overlapped

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.runtime.compare import difference


def queries(count: int, before: tuple[int, ...], **changes: object) -> Case:
    """Sequences of `count` queries each; those without a context read state slot 0."""
    case = Case("decode", (count,) * len(before), before, depth=count - 1)
    return replace(case, **changes)  # type: ignore[arg-type]


# Contexts that end a token or two behind a block, a page, a split; eleven whose splits end
# inside a block.
CASES = {
    "two queries": queries(2, (0, 1, 15, 63, 100)),
    "two queries of eleven, H200 tiles": queries(
        2, (0, 1, 14, 63, 64, 95, 126, 127, 300, 400, 510), gpu="H200"
    ),
    "three queries of one": queries(3, (40,), gpu="H200"),
    "three queries, three value heads a key head": queries(3, (0, 30), kind="ratio3"),
    "four queries, the deepest program has six": queries(
        4, (0, 62, 126, 300), gpu="H200", deeper=2
    ),
    "six queries": queries(6, (9, 0, 505)),
    "six queries, H200 tiles": queries(6, (250, 0, 505), gpu="H200"),
    "one query, the deepest program has three": queries(1, (9, 0, 505), gpu="H200", deeper=2),
    "bf16, heads of 128 and 256": queries(4, (0, 90), dtype="bf16", kind="kernel", gpu="H200"),
    "experts of a rank": queries(2, (0, 9, 64), layout=ParallelLayout(2, 1, 2)),
    "one query, splits in groups": queries(1, (1600, 511, 512), gpu="H200", max_seq_len=1664),
    "four queries, splits in groups": queries(4, (2040, 1025, 100), gpu="H200", max_seq_len=2048),
}
KEPT = {
    "four queries, kept": queries(4, (0, 62, 126, 300, 7), gpu="H200", recomputes=True),
    "two queries, six are kept": queries(
        2, (64, 9, 0, 300, 66, 7), gpu="H200", deeper=4, recomputes=True
    ),
    "one query, three are kept": queries(1, (9, 0, 505, 7), deeper=2, recomputes=True),
    "six queries, three value heads a key head, kept": queries(
        6, (0, 30, 9), kind="ratio3", recomputes=True
    ),
    "bf16, heads of 128 and 256, kept": queries(
        4, (0, 90, 5), dtype="bf16", kind="kernel", gpu="H200", recomputes=True
    ),
    "heads of a rank, kept": queries(
        2, (5, 9, 64), layout=ParallelLayout(2, 1, 2), recomputes=True
    ),
}
ONE = CASES["one query, the deepest program has three"]
FOUR = CASES["four queries, the deepest program has six"]
SIX = CASES["six queries, H200 tiles"]
ONE_EACH, TWO = (queries(n, (0, 64, 300), gpu="H200") for n in (1, 2))
FOUR_KEPT = KEPT["four queries, kept"]
GROUPS = CASES["one query, splits in groups"]
ONE_SEQ = queries(1, (1600,), gpu="H200", max_seq_len=1664)
ELEVEN = CASES["two queries of eleven, H200 tiles"]
# The smallest batches on which a broken delta rule can fail.
SMALL = queries(2, (62, 9), kind="few heads", deeper=1)
COLUMNS = queries(2, (62,), kind="few heads", gpu="H200")
SMALL_KEPT = queries(2, (64, 9), kind="few heads", deeper=1, recomputes=True)


# test_kernels.py has the others, with as many queries.
BY_QUERY = {
    "attention_gate",
    "delta_step",
    "delta_recompute",
    "commit_state_len",
    "advance",
    "advance_rows",
    "k_norm_rope_write",
}


def alone(case: Case) -> list[Built]:
    """Kernels that have a text and need no other rank."""
    return [
        built
        for built in kernels_of(case)
        if built.source is not None and built.kernel.reduced_operand is None
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", (CASES | KEPT).values(), ids=(CASES | KEPT).keys())
def test_kernels_equal_their_references(case: Case) -> None:
    kernels = [built for built in alone(case) if kind_of(built.kernel) in BY_QUERY]
    step = {"delta_recompute", "commit_state_len"} if case.recomputes else {"delta_step"}
    assert {kind_of(built.kernel) for built in kernels} >= {"attention_gate", *step}
    for built in kernels:
        for rank in range(case.layout.num_ranks):
            for name, error in errors(built, case, rank=rank):
                assert error <= TOLERANCE[case.dtype], (built.kernel.name, name, rank)


def arrives_in_time(built: Built, case: Case) -> bool:
    """Whether a kernel is right if its inputs appear only when it waits for them."""
    tensors = Inputs(case).of(built.kernel)
    got = run_kernel(built, tensors, case, around=overlapped)
    reference(built.kernel, tensors)
    outputs = [i for i, param in enumerate(built.kernel.tensors) if param.role == "output"]
    return all(difference(got[i], tensors[i]) <= TOLERANCE[case.dtype] for i in outputs)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="plays with the interpreter's time")
@pytest.mark.parametrize(
    "case",
    [ONE_EACH, TWO, SIX, FOUR_KEPT],
    ids=["one query", "two queries", "six queries", "four, kept"],
)
def test_nothing_is_loaded_before_it_is_there(case: Case) -> None:
    """This holds for keys of new tokens, and in a draft pass for `context_lens` itself."""
    kernels = [
        built
        for built in alone(case)
        if case in (ONE_EACH, TWO) or kind_of(built.kernel) in BY_QUERY
    ]
    assert all("gdc_wait" in (built.source or "") for built in kernels)
    assert any("newest" in (built.source or "") for built in kernels)
    for built in kernels:
        assert arrives_in_time(built, case), built.kernel.name


EARLY = [
    (
        FOUR,
        "attention_gate",
        {
            "(c < length - QUERY_LEN)": "(c < length - 1)",
            "(c >= length - QUERY_LEN)": "(c >= length - 1)",
        },
    ),
    (
        ONE_EACH,
        "attention_gate",
        {"(c < length - 1)": "(c < length)", "(c == length - 1)": "(c == length)"},
    ),
    (FOUR, "delta_step", {"gdc_wait()": "gdc_launch_dependents()"}),
    (FOUR_KEPT, "delta_recompute", {"gdc_wait()": "gdc_launch_dependents()"}),
]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="plays with the interpreter's time")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN
@pytest.mark.parametrize(
    ("case", "kind", "changes"),
    EARLY,
    ids=["all new keys but the last", "the new key", "all", "all, kept"],
)
def test_what_is_loaded_too_early_is_caught(case: Case, kind: str, changes: dict[str, str]) -> None:
    first = next(iter(changes))
    (kernel,) = (
        built
        for built in alone(case)
        if kind_of(built.kernel) == kind and first in (built.source or "")
    )
    for old, new in changes.items():
        kernel = broken(kernel, old, new)
    assert not arrives_in_time(kernel, case)


# A line for each branch that several queries, or several destination slots, add to a template.
MUTATIONS = [
    (SMALL, "delta_step", "inputs[i + 1 + t]", "inputs[i + t]"),
    (SMALL, "delta_step", "inputs[i + t]", "inputs[t]"),
    (SMALL, "delta_step", "(dst[i] * B", "(dst[0] * B"),
    (
        SMALL,
        "delta_step",
        "causal_conv_conv_state, dst[i], i, v_c",
        "causal_conv_conv_state, dst[i], 0, v_c",
    ),
    (SMALL, "delta_step", "s * DST_SLOTS + i", "s * QUERY_LEN + i"),
    (SMALL, "delta_step", "head % GROUP == 0", "head % GROUP == 5"),
    (SMALL, "delta_step", "gates[i][0]", "gates[0][0]"),
    (SMALL, "delta_step", "gates[i][1]", "gates[0][1]"),
    (SMALL, "delta_step", "begin = s * QUERY_LEN", "begin = s"),
    (SMALL, "delta_step", "(r < QUERY_LEN)", "(r < QUERY_LEN - 1)"),
    (SMALL, "delta_step", "r[:, None] == i", "r[:, None] == 0"),
    (COLUMNS, "delta_step", "DV // BLOCK_V - 1", "DV // BLOCK_V - 2"),
    (COLUMNS, "delta_step", "tl.store(counters + s * B + head, 0)", "pass"),
    (
        ONE,
        "delta_step",
        "causal_conv_dst_state_slots + s * DST_SLOTS",
        "causal_conv_dst_state_slots + s",
    ),
    (SMALL_KEPT, "delta_recompute", "i < count", "i <= count"),
    (SMALL_KEPT, "delta_recompute", "logs[KEPT_INPUTS - 1] - logs[i]", "logs[KEPT_INPUTS - 1]"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "for l in tl.static_range(i):",
        "for l in tl.static_range(i - 1):",
    ),
    (
        SMALL_KEPT,
        "delta_recompute",
        "for l in tl.static_range(i + 1):",
        "for l in tl.static_range(i):",
    ),
    (SMALL_KEPT, "delta_recompute", "gates[i][1] * u", "gates[0][1] * u"),
    (SMALL_KEPT, "delta_recompute", "tl.exp(logs[i]) * seen[i]", "seen[i]"),
    (SMALL_KEPT, "delta_recompute", "    - QUERY_LEN\n", ""),
    (SMALL_KEPT, "delta_recompute", "inputs[p + t]", "inputs[p]"),
    (SMALL_KEPT, "delta_recompute", "pending == p,", "pending >= p + 1,"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "recompute_state_kept_inputs, src * KEPT_INPUTS",
        "recompute_state_kept_inputs, src * QUERY_LEN",
    ),
    (SMALL_KEPT, "delta_recompute", "kept_b, kept_b + KEPT_INPUTS * B", "kept_b, kept_b"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "recompute_state_kept_gates + src * 2",
        "recompute_state_kept_gates + dst * 2",
    ),
    (SMALL_KEPT, "delta_recompute", "(dst * 2 * KEPT_INPUTS + r)", "(dst * KEPT_INPUTS + r)"),
    (SMALL_KEPT, "delta_recompute", "kept + KEPT_INPUTS * B", "kept"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "recompute_state_ssm_state + (dst * B",
        "recompute_state_ssm_state + (src * B",
    ),
    (SMALL_KEPT, "delta_recompute", "dst, -1, v_c", "dst, 0, v_c"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "    v_in[TAPS - 1 + i]",
        "    v_in[TAPS - 1]",
    ),
    (SMALL_KEPT, "delta_recompute", "    k_in[TAPS - 1 + i]", "    k_in[i]"),
    (SMALL_KEPT, "delta_recompute", "begin = s * QUERY_LEN", "begin = s"),
    (
        SMALL_KEPT,
        "delta_recompute",
        "head % GROUP == 0",
        "head % GROUP == 5",
    ),
    (FOUR_KEPT, "commit_state_len", "- QUERY_LEN", "- QUERY_LEN + 1"),
    (FOUR_KEPT, "advance_rows", "tl.store(dst_ptr, src, mask=ok)", "pass"),
    (ONE, "advance", "dst_state_slots + s * DST_SLOTS", "dst_state_slots + s"),
    (ONE, "k_norm_rope_write", "offset + PAGE * KV * D", "offset + KV * D"),
    (FOUR, "attention_gate", "length - (QUERY_LEN - 1)", "length - (QUERY_LEN - 2)"),
    (
        FOUR,
        "attention_gate",
        "tl.minimum(length - (QUERY_LEN - 1) + g // GROUP, end)",
        "end + 0 * g",
    ),
    (ELEVEN, "attention_gate", "g // GROUP, end)", "g // GROUP, length)"),
    (FOUR, "attention_gate", "g // GROUP) * Q", "g % QUERY_LEN) * Q"),
    (FOUR, "attention_gate", "h // GROUP) * Q", "h % QUERY_LEN) * Q"),
    (FOUR, "attention_gate", "-1e30", 'float("-inf")'),
    (ONE_SEQ, "attention_gate", "tl.store(counter + GROUPS, 0)", "pass"),
    (ONE_SEQ, "attention_gate", "num_splits - group * GROUP_SIZE", "num_splits - group"),
    (ONE_SEQ, "attention_gate", "num_groups - 1", "num_groups - 2"),
    (GROUPS, "attention_gate", "num_splits > GROUP_SIZE", "num_splits > GROUP_SIZE + 1"),
    (ONE_SEQ, "attention_gate", "top + tl.log2(total)", "top"),
    (ONE_SEQ, "attention_gate", "(base + group) *", "base *"),
    (FOUR, "attention_gate", "tl.where(total > 0.0, total, 1.0)", "total"),
    (
        FOUR,
        "attention_gate",
        "row = (base + p)[None, :] * heads",
        "row = (base + p)[None, :] * (heads // 2)",
    ),
    (FOUR, "attention_gate", "(c >= length - QUERY_LEN)", "(c >= length - 1)"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN
@pytest.mark.parametrize(
    ("case", "kind", "old", "new"),
    MUTATIONS,
    ids=[f"{kind}: {new}" for _, kind, _, new in MUTATIONS],
)
def test_a_broken_kernel_is_caught(case: Case, kind: str, old: str, new: str) -> None:
    if DEVICE != "cpu" and old in ("DV // BLOCK_V - 1", "num_groups - 1"):
        pytest.skip("the last but one to end may find the last one's result there on a GPU")
    assert is_caught(case, kind, old, new)
