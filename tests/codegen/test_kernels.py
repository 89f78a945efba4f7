"""Each Triton kernel agrees with its reference: odd sizes, ragged batches, empty experts.

Broken kernels are caught.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from kernel_lab import (
    DEVICE,
    TOLERANCE,
    Case,
    Inputs,
    allowed,
    broken,
    errors,
    graph_of,
    is_caught,
    kernels_of,
    reference,
    run_kernel,
    some_programs,
    tiled,
)

from tokenspeed_plan.codegen.kernel_builder import Built
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.plans.kernel_file import kind_of
from tokenspeed_plan.plans.schema import KernelSpec
from tokenspeed_plan.runtime.compare import difference

RAGGED = (1, 64, 65, 3, 130)
# Kernels with programs for each row, which the interpreter runs one after the other. Cases with
# more rows than these leave them to the others, and to `LARGER_CASES`.
MAX_ROWS = {"sample": 8, "topk": 80, "qk_norm_rope_write": 20}
CASES = {
    "one sequence": Case("decode", (1,), (40,)),
    "one sequence, nothing before": Case("decode", (1,), (0,)),
    "seven sequences, two state slots": Case(
        "decode", (1,) * 7, (0, 1, 15, 16, 17, 100, 300), two_slots=True
    ),
    "ragged prefill, two state slots": Case("prefill", (1, 5, 2), (0, 3, 100), two_slots=True),
    "five sequences, state in place": Case(
        "decode", (1,) * 5, (1, 2, 3, 64, 65), gpu="H200", kind="few heads"
    ),
    "short prompts, state in place": Case(
        "prefill", (1, 2, 3, 4, 7), (1, 2, 3, 65, 7), kind="few heads"
    ),
    "seven sequences": Case("decode", (1,) * 7, (0, 1, 15, 16, 17, 100, 300)),
    "many sequences": Case("decode", (1,) * 19, tuple(range(0, 190, 10))),
    "dense, one sequence": Case("decode", (1,), (70,), kind="dense"),
    "three value heads a key head": Case("decode", (1,) * 3, (0, 5, 64), kind="ratio3"),
    "yarn": Case("decode", (1,) * 2, (3, 400), kind="yarn"),
    "prefill of one": Case("prefill", (1,), (0,)),
    "prefill of seven": Case("prefill", (7,), (33,)),
    "prefill of 129": Case("prefill", (129,), (0,)),
    "ragged prefill": Case("prefill", RAGGED, (0, 3, 0, 100, 17)),
    "ragged prefill, dense": Case("prefill", (5, 66), (0, 9), kind="dense"),
    "H200 tiles, one sequence": Case("decode", (1,), (200,), gpu="H200"),
    "H200 tiles, seven sequences": Case(
        "decode", (1,) * 7, (0, 1, 15, 16, 17, 100, 300), gpu="H200", kind="odd"
    ),
    "H200 tiles, prefill": Case("prefill", (1, 70), (5, 0), gpu="H200"),
    "bf16, one sequence": Case("decode", (1,), (40,), "bf16", "odd", "H200"),
    "bf16, seven sequences": Case(
        "decode", (1,) * 7, (0, 1, 15, 16, 17, 100, 300), "bf16", "odd", "H200"
    ),
    "bf16, prefill": Case("prefill", (1, 70), (5, 0), "bf16", gpu="H200"),
    "bf16, heads of 128 and 256": Case("decode", (1,) * 2, (0, 90), "bf16", "kernel", "H200"),
    "H200 tiles, four sequences": Case(
        "decode", (1,) * 4, (0, 1, 300, 511), gpu="H200", kind="odd"
    ),
    "experts of a rank": Case("decode", (1,) * 3, (0, 9, 64), layout=ParallelLayout(2, 1, 2)),
    "experts of a rank, prefill": Case("prefill", (40,), (9,), layout=ParallelLayout(2, 1, 2)),
}
# Plain norms and no gate; no shared expert.
FAMILY_CASES = {
    "qwen3, one sequence": Case("decode", (1,), (40,), kind="qwen3"),
    "qwen3, bf16, seven sequences": Case(
        "decode", (1,) * 7, (0, 1, 15, 16, 17, 100, 300), "bf16", "qwen3", "H200"
    ),
    "qwen3, prefill": Case("prefill", (1, 70), (5, 0), kind="qwen3"),
    "qwen3 moe, one sequence": Case("decode", (1,), (40,), kind="qwen3_moe"),
    "qwen3 moe, H200 tiles, three sequences": Case(
        "decode", (1,) * 3, (0, 5, 64), gpu="H200", kind="qwen3_moe"
    ),
    "qwen3 moe, prefill": Case("prefill", (1, 70), (5, 0), kind="qwen3_moe"),
    "qwen3 moe, experts of a rank": Case(
        "decode", (1,) * 3, (0, 9, 64), kind="qwen3_moe", layout=ParallelLayout(2, 1, 2)
    ),
    "qwen3 moe, experts of a rank, prefill": Case(
        "prefill", (40,), (9,), kind="qwen3_moe", layout=ParallelLayout(2, 1, 2)
    ),
}
SEVEN = (0, 1, 15, 16, 17, 100, 300)
FP8_CASES = {
    "fp8, one sequence": Case("decode", (1,), (40,), kind="blocks", fp8=True),
    "fp8, dense, one sequence": Case("decode", (1,), (40,), kind="dense blocks", fp8=True),
    "fp8, seven sequences": Case("decode", (1,) * 7, SEVEN, kind="blocks", fp8=True),
    "fp8, prefill": Case("prefill", (1, 70), (5, 0), kind="blocks", fp8=True),
    "fp8, H200 tiles, one sequence": Case(
        "decode", (1,), (40,), "bf16", kind="blocks", gpu="H200", fp8=True
    ),
    "fp8, H200 tiles, two sequences": Case(
        "decode", (1,) * 2, (40, 3), "bf16", kind="dense blocks", gpu="H200", fp8=True
    ),
    "fp8, H200 tiles, seven sequences": Case(
        "decode", (1,) * 7, SEVEN, "bf16", kind="blocks", gpu="H200", fp8=True
    ),
    "fp8, H200 tiles, prefill": Case(
        "prefill", (1, 70), (5, 0), "bf16", kind="blocks", gpu="H200", fp8=True
    ),
    "fp8 times fp8, prefill": Case(
        "prefill", (1, 70), (5, 0), kind="blocks", fp8=True, quantises=True
    ),
    "fp8 times fp8, dense, bf16, prefill": Case(
        "prefill", (40,), (5,), "bf16", kind="dense blocks", gpu="H200", fp8=True, quantises=True
    ),
    "fp8, two drafts": Case("decode", (3,), (40,), kind="blocks", depth=2, fp8=True),
    "fp8, experts of a rank": Case(
        "decode", (1,) * 2, (0, 9), kind="blocks", layout=ParallelLayout(1, 1, 2), fp8=True
    ),
}
FP4_CASES = {
    "nvfp4, one sequence": Case("decode", (1,), (40,), kind="blocks", fp4="experts"),
    "nvfp4, mixed, two drafts": Case(
        "decode", (3,), (40,), kind="blocks", depth=2, fp8=True, fp4="experts"
    ),
    "nvfp4, all matrices": Case("decode", (1,) * 2, (40, 3), kind="blocks", fp4="all"),
    "nvfp4, prefill": Case("prefill", (1, 70), (5, 0), kind="blocks", fp4="all"),
    "nvfp4, experts of a rank": Case(
        "decode", (1,) * 2, (0, 9), kind="blocks", layout=ParallelLayout(1, 1, 2), fp4="experts"
    ),
}
FP8_KEYS_CASES = {
    "fp8 keys, one sequence": Case(
        "decode", (1,), (40,), kind="dense", fp8_keys=True, key_scales=(0.5, 0.01)
    ),
    "fp8 keys, two drafts": Case(
        "decode", (3,) * 2, (40, 0), "bf16", kind="dense", gpu="H200", depth=2, fp8_keys=True
    ),
    "fp8 keys, prefill": Case(
        "prefill", (1, 70), (5, 0), kind="dense", fp8_keys=True, key_scales=(0.5, 0.01)
    ),
}
LAST_PAGE = (0, 1, 15, 16, 17, 100, 300, 505)
DRAFTED = {
    "one sequence, four queries": Case("decode", (4,), (40,), depth=3),
    "three sequences, two queries": Case("decode", (2,) * 3, (40, 0, 9), depth=1, deeper=2),
    "eight sequences, six queries": Case("decode", (6,) * 8, LAST_PAGE, depth=5, kind="odd"),
    "eight sequences, four queries, dense": Case(
        "decode", (4,) * 8, LAST_PAGE, depth=3, kind="dense"
    ),
    "H200 tiles, two sequences, four queries": Case(
        "decode", (4,) * 2, (16, 505), gpu="H200", depth=3, kind="odd"
    ),
    "bf16, one sequence, two queries": Case("decode", (2,), (40,), "bf16", "odd", "H200", depth=1),
    "prefill and three drafts": Case("prefill", (1, 65, 3), (0, 3, 100), depth=3, kind="odd"),
    "prefill of many and two drafts": Case("prefill", (2,) * 17, tuple(range(17)), depth=2),
    "experts of a rank, three drafts": Case(
        "decode", (4,) * 3, (0, 9, 64), layout=ParallelLayout(2, 1, 2), depth=3
    ),
}
MASKED = {
    "masks, one sequence": Case("decode", (1,), (40,), grammar=True),
    "masks, prefill of three": Case("prefill", (1, 5, 2), (0, 3, 100), kind="odd", grammar=True),
    "masks, three sequences, two queries of four": Case(
        "decode", (2,) * 3, (40, 0, 9), depth=1, deeper=2, kind="odd", grammar=True
    ),
    "masks, bf16, five sequences": Case(
        "decode", (1,) * 5, (0, 1, 2, 3, 4), "bf16", "odd", "H200", grammar=True
    ),
}
# For each kind of `MAX_ROWS` a batch with more rows. Keys and values of the prefill go to places in
# all pages of four sequences.
LARGER_CASES = {
    "sample": Case("decode", (1,) * 17, tuple(range(17))),
    "topk": Case("prefill", (2, 95), (0, 3)),
    "qk_norm_rope_write": Case("prefill", (1, 17, 3, 34), (0, 3, 15, 14)),
}
VERIFIED, TILED = (
    DRAFTED["eight sequences, six queries"],
    DRAFTED["H200 tiles, two sequences, four queries"],
)
ALONE = CASES["H200 tiles, one sequence"]
FORCED = replace(VERIFIED, lengths=(6,) * 30, before=tuple(range(30)), forced=(0.9, 0.9, -1.0, 0.5))


ALL_CASES = CASES | FAMILY_CASES | FP8_CASES | DRAFTED
STORED_CASES = FP4_CASES | FP8_KEYS_CASES  # only what reads or writes these formats is new


def has_more_rows_than_it_needs(kernel: KernelSpec, case: Case) -> bool:
    """Whether a slow kernel has many rows."""
    rows = kernel.params[0].tensor.bind(case.num_tokens, case.num_seqs)[0]
    return rows > MAX_ROWS.get(kind_of(kernel), rows)


def reads_fp8(kernel: KernelSpec) -> bool:
    """Whether a kernel reads or writes tensors in FP8."""
    return any(param.tensor.dtype == "fp8" for param in kernel.params)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_kernels_equal_their_references(case: Case) -> None:
    built = kernels_of(case)
    missing = {kind_of(kernel.kernel) for kernel in built if kernel.source is None}
    assert not missing, "every kernel of a plan has a Triton body"
    for kernel in built:
        if kernel.kernel.reduced_operand is not None:
            continue  # needs its peers: tests/runtime/test_ranks.py
        if has_more_rows_than_it_needs(kernel.kernel, case):
            continue
        if case.fp8 and not reads_fp8(kernel.kernel):
            continue  # as without FP8
        for rank in range(case.layout.num_ranks):
            for name, error in errors(kernel, case, rank=rank):
                assert error <= allowed(case, name), (kernel.kernel.name, name, rank)


@pytest.mark.parametrize("missing", [1, 100])
def test_some_of_many_programs_show_that_a_launch_is_too_small(missing: int) -> None:
    """The interpreter runs a few programs of such a kernel alone."""
    built = template_of(ALONE, "linear")
    assert some_programs(built.kernel, ALONE) or DEVICE != "cpu"
    assert all(error <= TOLERANCE["fp32"] for _, error in errors(built, ALONE))
    assert built.kernel.launch is not None
    rows, *others = built.kernel.launch.grid
    fewer = (rows.model_copy(update={"fixed": rows.fixed - missing}), *others)
    launch = built.kernel.launch.model_copy(update={"grid": fewer})
    short = replace(built, kernel=built.kernel.model_copy(update={"launch": launch}))
    assert not all(error <= TOLERANCE["fp32"] for _, error in errors(short, ALONE))


PENALISED = {
    name.replace("masks", "penalties"): replace(case, grammar=False, penalties=True)
    for name, case in MASKED.items()
}


@pytest.mark.parametrize("case", PENALISED.values(), ids=PENALISED.keys())
def test_adjusted_logits_equal_their_reference(case: Case) -> None:
    for kind in ("adjust", "sample_min_p"):
        (built,) = (kernel for kernel in kernels_of(case) if kind_of(kernel.kernel) == kind)
        for name, error in errors(built, case):
            assert error <= TOLERANCE[case.dtype], (kind, name)


PENALTY_MUTATIONS = [
    ("adjust", "+ bias", "- bias"),
    ("adjust", "x / repetition", "x * repetition"),
    ("adjust", "seen // 2", "seen"),
    ("adjust", "query <= s", "query < s"),
    ("adjust", "(seen % 2 > 0) |", "(seen % 2 > 1) |"),
    ("adjust", "presence, 0.0", "0.0, presence"),
    ("sample_min_p", "tl.log(share)", "tl.log(share) * 0.5"),
]


@pytest.mark.parametrize(
    ("kind", "old", "new"), PENALTY_MUTATIONS, ids=[new for _, _, new in PENALTY_MUTATIONS]
)
def test_broken_penalties_are_caught(kind: str, old: str, new: str) -> None:
    assert is_caught(PENALISED["penalties, three sequences, two queries of four"], kind, old, new)


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED.keys())
def test_masks_equal_their_reference(case: Case) -> None:
    (built,) = (kernel for kernel in kernels_of(case) if kind_of(kernel.kernel) == "mask")
    assert [error for _, error in errors(built, case)] == [0.0]
    for old, new in (("& 1 != 0)", "& 1 == 0)"), ("v % 32", "v % 31"), ("* COLUMNS", "* 0")):
        if new == "* 0" and case.num_seqs == 1:
            continue
        ((_, error),) = errors(broken(built, old, new), case)
        assert error != 0.0, new


@pytest.mark.slow
@pytest.mark.parametrize("case", STORED_CASES.values(), ids=STORED_CASES.keys())
def test_kernels_of_other_formats_equal_their_references(case: Case) -> None:
    compared = 0
    for kernel in kernels_of(case):
        dtypes = {param.tensor.dtype for param in kernel.kernel.params}
        if not dtypes & {"fp4", "fp8"}:
            continue
        for rank in range(case.layout.num_ranks):
            for name, error in errors(kernel, case, rank=rank):
                assert error <= TOLERANCE[case.dtype], (kernel.kernel.name, name, rank)
                compared += 1
    assert compared


NARROW_STATE = {
    "in place": (Case("decode", (1,) * 5, (1, 2, 3, 64, 65), kind="few heads"), "delta_step"),
    "prefill": (Case("prefill", (1, 70), (5, 0), kind="few heads"), "delta_scan"),
    "snapshots": (Case("decode", (3,) * 2, (40, 0), kind="few heads", depth=2), "delta_steps"),
    "recomputed": (
        Case("decode", (3,) * 3, (40, 9, 0), kind="few heads", depth=2, recomputes=True),
        "delta_recompute",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW_STATE)
def test_state_in_bf16_is_computed_in_fp32(name: str) -> None:
    """What a step gives is as exact as beside a whole state; what it leaves is rounded once."""
    case, template = NARROW_STATE[name]
    narrow = replace(case, stored_state="bf16")
    built, whole = (template_of(each, template) for each in (narrow, case))
    tensors = Inputs(narrow).of(built.kernel)
    assert any(x.dtype == torch.bfloat16 for x in tensors)
    got = run_kernel(built, tensors, narrow)
    reference(built.kernel, tensors)
    wide = [x.float() if x.is_floating_point() else x for x in Inputs(narrow).of(built.kernel)]
    reference(whole.kernel, wide)
    for param, mine, twin, exact in zip(built.kernel.tensors, got, tensors, wide, strict=True):
        if param.role in ("output", "state"):
            rounded = mine.dtype == torch.bfloat16 or name == "recomputed"
            for wanted in (twin, exact):
                error = difference(mine.float(), wanted.float())
                assert error <= (2**-7 if rounded else TOLERANCE["fp32"]), param.name


def template_of(case: Case, template: str) -> Built:
    """The kernel of a case that has this template."""
    return next(
        each
        for each in kernels_of(case)
        if each.kernel.launch is not None and each.kernel.launch.template == template
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGER_CASES)
def test_kernels_with_a_program_for_each_row_equal_their_references_with_many(kind: str) -> None:
    case = LARGER_CASES[kind]
    built = [kernel for kernel in kernels_of(case) if kind_of(kernel.kernel) == kind]
    assert any(has_more_rows_than_it_needs(kernel.kernel, case) for kernel in built)
    for kernel in built:
        for name, error in errors(kernel, case):
            assert error <= TOLERANCE[case.dtype], (kernel.kernel.name, name)


@pytest.mark.parametrize(
    "forced", [FORCED.forced, (1.0,) * 4, (-1.0,)], ids=["some", "all", "none"]
)
def test_simulated_acceptance_equals_the_reference(forced: tuple[float, ...]) -> None:
    case = replace(FORCED, forced=forced)
    (built,) = (kernel for kernel in kernels_of(case) if kind_of(kernel.kernel) == "accept")
    assert [name for name, error in errors(built, case) if error] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of NaN
@pytest.mark.parametrize("gpu", ["cpu", "H200"])
def test_logits_that_are_no_distribution_still_give_a_token(gpu: str) -> None:
    """With NaN and infinities, kernel and reference take one greedy token at any temperature."""
    rows = torch.zeros(8, 512)
    rows[:2], rows[2:4, 7], rows[4:6] = torch.nan, torch.inf, -torch.inf
    rows[6:, 100:], rows[6:, 3] = -torch.inf, 1.0
    case = Case("decode", (1,) * 8, (9,) * 8, gpu=gpu)
    (built,) = (kernel for kernel in kernels_of(case) if kind_of(kernel.kernel) == "sample")
    tensors = Inputs(case).of(built.kernel)
    index = {param.name.rpartition(".")[2]: i for i, param in enumerate(built.kernel.tensors)}
    tensors[index["logits"]] = rows
    tensors[index["temperature"]] = torch.tensor([0.0, 1.0] * 4)
    tensors[index["top_p"]] = torch.tensor([1.0, 1.0, 0.9, 0.9] * 2)
    got = run_kernel(built, tensors, case)[index["next_tokens"]].tolist()
    reference(built.kernel, tensors)
    assert got[:6] == tensors[index["next_tokens"]].tolist()[:6] == [0, 0, 7, 7, 0, 0]
    assert all(0 <= token < 100 for token in got[6:])


# Where they have an output row for each token, these load what an earlier step wrote.
EARLIER = {"attention_gate", "delta_step"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [VERIFIED, TILED, ALONE], ids=["many sequences", "few sequences", "one query"]
)
def test_only_weights_are_loaded_before_the_kernels_before_are_done(case: Case) -> None:
    """Everything else may be written in the same step, as a draft's token and hidden state are."""
    loading = set()
    for kernel in kernels_of(replace(case, gpu="H200")):
        rows = {param.tensor.shape[0] for param in kernel.kernel.params if param.role == "output"}
        if kernel.source is None or (kind_of(kernel.kernel) in EARLIER and "num_tokens" in rows):
            continue
        before, waits, _ = kernel.source.partition("tl.extra.cuda.gdc_wait()")
        assert waits, kernel.kernel.name
        words = set(re.findall(r"\w+", before.rpartition("\n):\n")[2]))
        named = {param for param in kernel.kernel.params if param.name in words}
        early = kernel.kernel.launch.prefetch if kernel.kernel.launch else ()
        assert all(param.role == "weight" or param.name in early for param in named), (
            kernel.kernel.name,
            named,
        )
        loading |= {kind_of(kernel.kernel)} if named else set()
    assert "moe_down_add" in loading, "some kernels do load ahead"


@pytest.mark.parametrize(("num_tokens", "is_apart"), [(1023, False), (1024, True)])
def test_where_a_library_multiplies_the_norm_that_quantises_adds(
    num_tokens: int, is_apart: bool
) -> None:
    case = Case(
        "prefill", (num_tokens,), (0,), "bf16", "dense blocks", "H200", fp8=True, quantises=True
    )
    kinds = [op.kind for op in graph_of(replace(case, max_seq_len=2048)).ops]
    assert ("add_norm_quantise" in kinds) == is_apart
    assert kinds.count("linear_add") == (1 if is_apart else 4), "the last one has no such norm"


# One constant or sign in each template, by the kinds that are made from it.
FEW, MANY = CASES["seven sequences"], CASES["ragged prefill"]
CHUNKS, SEQS = DRAFTED["prefill and three drafts"], DRAFTED["prefill of many and two drafts"]
# The smallest batches on which the slowest kernels can fail.
SOME = Case("prefill", (3, 66), (5, 0))
TWO = Case("decode", (1,) * 2, (5, 64), kind="few heads")
SHIFTED = replace(TWO, two_slots=True)
SOME_IN_PLACE = CASES["short prompts, state in place"]
COLUMNS = Case("decode", (1,), (40,), gpu="H200", kind="few heads")
PAIRS = DRAFTED["three sequences, two queries"]
SLOTS = Case("prefill", (1, 5), (0, 3), depth=3, kind="few heads")
FEW_SEQS = Case("prefill", (2,) * 3, (0, 1, 2), depth=2)
FP8_ONE, FP8_MANY = FP8_CASES["fp8, one sequence"], FP8_CASES["fp8, prefill"]
FP4_ONE, FP4_MANY = FP4_CASES["nvfp4, one sequence"], FP4_CASES["nvfp4, prefill"]
FP4_TWO = FP4_CASES["nvfp4, all matrices"]
KEYS_ONE = FP8_KEYS_CASES["fp8 keys, one sequence"]
FP8_PAIR = FP8_CASES["fp8, H200 tiles, two sequences"]
FP8_BOTH = FP8_CASES["fp8 times fp8, prefill"]
FP8_FEW = Case("decode", (1,) * 3, (5, 64, 0), kind="dense blocks", fp8=True)
MUTATIONS = [
    (MANY, "rms_norm", "/ H + EPS", "/ H + 0.1"),
    (FEW, "advance", "+ position % PAGE", "+ position % PAGE + 1"),
    (FEW, "embed", "< VOCAB)", "< VOCAB - 400)"),
    (FEW, "norm_linear", "+ EPS", "+ 0.1"),
    (FEW, "norm_linear", "1.0 + tl.load(rms_norm_w", "0.9 + tl.load(rms_norm_w"),
    (FEW, "linear_add", "out += tl.load(add_r", "out -= tl.load(add_r"),
    (FEW, "norm_head", "+ m + 1", "+ m"),
    (CASES["one sequence"], "norm_linear", "range(0, K, BLOCK_K, ", "range(BLOCK_K, K, BLOCK_K, "),
    (MANY, "linear_silu_mul", "out * tl.sigmoid(out) * up", "out * tl.sigmoid(up) * up"),
    (MANY, "expert_sum_linear_add", "for j in range(TOP_K)", "for j in range(TOP_K - 1)"),
    (FEW, "qk_norm_rope_write", "1 / 120", "1 / 12"),
    (FEW, "qk_norm_rope_write", "offset + PAGE * KV * D", "offset + KV * D"),
    (FEW, "attention_gate", "score * SCALE", "score * SCALE * 1.01"),
    (
        CASES["H200 tiles, seven sequences"],
        "attention_gate",
        "tl.log2(total)",
        "0.9 * tl.log2(total)",
    ),
    (
        CASES["H200 tiles, seven sequences"],
        "attention_gate",
        "range(0, count, BLOCK_S",
        "range(1, count, BLOCK_S",
    ),
    (MANY, "attention_gate", "<= position", "< position"),
    (TWO, "delta_step", "head % GROUP == 0", "head % GROUP == 5"),
    (COLUMNS, "delta_step", "DV // BLOCK_V - 1", "DV // BLOCK_V - 2"),
    (ALONE, "sample", "found == best", "found < best"),
    (ALONE, "sample", "tl.store(counters + s, 0)", "pass"),
    (
        CASES["H200 tiles, seven sequences"],
        "attention_gate",
        "tl.store(counter + group, 0)",
        "pass",
    ),
    (
        COLUMNS,
        "delta_step",
        "tl.store(counters + s * B + head, 0)",
        "pass",
    ),
    (TWO, "delta_step", "t == TAPS - 1,", "t == TAPS - 2,"),
    (TWO, "delta_step", "(position + 1 + t)", "(position + t)"),
    (TWO, "delta_step", "src != dst", "src == dst"),
    (TWO, "delta_step", "context_lens + s) - 1", "context_lens + s)"),
    (SHIFTED, "delta_step", "(TAPS - 1) + t - 1", "(TAPS - 1) + t"),
    (SHIFTED, "advance", "tl.store(dst_ptr, src, mask=ok)", "pass"),
    (SOME_IN_PLACE, "conv_qk_norm", "(start + at + TAPS)", "(start + at)"),
    (
        SOME_IN_PLACE,
        "conv_qk_norm",
        "src * TAPS + (start + last + TAPS)",
        "src * TAPS + (last + TAPS)",
    ),
    (SOME_IN_PLACE, "conv_qk_norm", "context_lens + s) - count", "context_lens + s)"),
    (SOME, "conv_qk_norm", "t + step < count", "t + step < count - 1"),
    (SOME, "conv_qk_norm", "x1 = x2", "x1 = x1"),
    (SOME, "conv_qk_norm", "t + step + AHEAD, c", "t + step, c"),
    (SOME, "conv_qk_norm", "step + AHEAD < STEPS", "step + AHEAD < STEPS - 1"),
    (SOME, "conv_qk_norm", "if first:", "if False:"),
    (MANY, "linear", "above + index % here", "above + index % GROUP_M"),
    (SOME, "gates_delta_chunk", "static_range(LEVELS)", "static_range(LEVELS - 1)"),
    (SOME, "gates_delta_chunk", "inverse -= tl.dot", "inverse += tl.dot"),
    (SOME, "gates_delta_chunk", "c[:, None] >= c[None, :]", "c[:, None] > c[None, :]"),
    (SOME, "gated_norm", "* tl.sigmoid(gate)", "* gate"),
    (SOME, "topk", "range(TOP_K)", "range(TOP_K - 1)"),
    (FEW, "moe_up", "half * H + offsets", "half * H + H + offsets"),
    (FEW, "moe_down_add", "* shares[j]", "* 1.0"),
    (CASES["one sequence"], "moe_down_add", "key = _without(key, best)", "pass"),
    (CASES["one sequence"], "moe_down_add", "scores[j] - scores[0]", "scores[0]"),
    (CASES["one sequence"], "moe_up", "range(slot)", "range(slot // 2)"),
    (MANY, "expert_sort", "group < expert", "group + 1 < expert"),
    (MANY, "grouped_up", "begin // BLOCK_M - expert", "begin // BLOCK_M"),
    (MANY, "grouped_down", "BLOCK_M // 2,", "BLOCK_M // 4,"),
    (MANY, "grouped_up", "acc * tl.sigmoid(acc) * acc_up", "acc * tl.sigmoid(acc_up) * acc_up"),
    (
        MANY,
        "grouped_down",
        "range(0, tl.where(is_local, K, 0)",
        "range(BLOCK_K, tl.where(is_local, K, 0)",
    ),
    (PAIRS, "sample", "x ^ (x >> SHIFT)", "x ^ (x >> SHIFT + 1)"),
    (PAIRS, "sample", "above >= 2 * step", "above >= step"),
    (
        CASES["bf16, seven sequences"],
        "sample",
        "(_key(x) == key) & (v <",
        "(_key(x) >= key) & (v <",
    ),
    (PAIRS, "sample", " + s % QUERY_LEN", ""),
    (
        PAIRS,
        "sample",
        "temperature + s // QUERY_LEN",
        "temperature + s // (QUERY_LEN + 1)",
    ),
    (VERIFIED, "accept", "range(QUERY_LEN - 1)", "range(QUERY_LEN - 2)"),
    (VERIFIED, "accept", "== stops)", "== stops - 1)"),
    (VERIFIED, "accept", "- before - 1", "- before"),
    (VERIFIED, "accept", "(count, room), 0)", "(count, room), -1)"),
    (VERIFIED, "accept", " & live[:, None]", ""),
    (FORCED, "accept", "rng_offsets + i", "rng_offsets"),
    (FORCED, "accept", "!= 0.0", "> 0.0"),
    (VERIFIED, "advance_rows", "ok &= src > 0", "ok &= src >= 0"),
    (VERIFIED, "advance_rows", "PAGES - 1", "PAGES - 2"),
    (VERIFIED, "advance_rows", "tl.store(dst_ptr, src, mask=ok)", "pass"),
    (VERIFIED, "draft", "range(EARLIER)", "range(EARLIER - 1)"),
    (TILED, "draft", "found == best", "found < best"),
    (TILED, "draft", "mask=v < VOCAB", "mask=v < 64"),
    (TILED, "draft_then_place", "tl.store(counters + s, 0)", "pass"),
    (VERIFIED, "draft_then_place", "+ STEP - 1", "+ STEP"),
    (VERIFIED, "draft_then_place", "position % PAGE", "position % (PAGE - 1)"),
    (VERIFIED, "embed_norm_concat", "t * 2 + 1", "t * 2"),
    (VERIFIED, "embed_norm_concat", "rms_norm_w2 + n", "rms_norm_w + n"),
    (
        DRAFTED["experts of a rank, three drafts"],
        "norm_concat",
        "(2 * t + half)",
        "(2 * t + 1 - half)",
    ),
    (DRAFTED["experts of a rank, three drafts"], "embed", "t * 2 + 1", "t * 2"),
    (VERIFIED, "select_rows", "s * QUERY_LEN", "s * (QUERY_LEN - 1)"),
    (CHUNKS, "last_rows", "+ s + 1) - 1", "+ s)"),
    (CHUNKS, "shift_tokens", "last >= 0", "last >= -1"),
    (CHUNKS, "shift_tokens", "t + 1 < end", "t + 2 < end"),
    (SLOTS, "conv_qk_norm", "dst_state_slots + s * DST_SLOTS", "dst_state_slots + s"),
    (SLOTS, "delta_scan", "dst_state_slots + s * DST_SLOTS", "dst_state_slots + s"),
    (CHUNKS, "moe_up", "topk_logits + t * EXPERTS", "topk_logits + t // 2 * EXPERTS"),
    (SEQS, "expert_sort", "num_seqs * TOP_K", "(num_seqs - 1) * TOP_K"),
    (SEQS, "linear_add", "m < num_seqs", "m < num_seqs - 1"),
    (FEW_SEQS, "qk_norm_rope_write", "rope_positions + t", "rope_positions"),
    (FEW_SEQS, "attention_gate", "attention_context_lens + s)", "attention_context_lens)"),
    (FP4_ONE, "moe_up", "(bits >> 3)", "(bits >> 2)"),
    (FP4_ONE, "moe_up", "8 * J - 7", "8 * J - 6"),
    (FP4_ONE, "moe_up", "factors + INNER + row", "factors + row"),
    (FP4_ONE, "moe_down_add", "factors + held * H", "factors + 0 * held"),
    (FP4_ONE, "moe_down_add", "J * 16", "J * 15"),
    (FP4_TWO, "linear_add", "q[:, None] // 4 * 2", "q[:, None] // 8 * 2"),
    (FP4_MANY, "grouped_up", "(0, 1, 3, 4, 5, 2)", "(0, 1, 4, 3, 5, 2)"),
    (FP4_MANY, "grouped_down", "(scales + at * 2 + 1", "(scales + at * 2"),
    (FP4_MANY, "linear_silu_mul", "factors + N + n", "factors + n"),
    (KEYS_ONE, "attention_gate", "tl.float32), value.to", "tl.float32), key.to"),
    (KEYS_ONE, "qk_norm_rope_write", "-448.0, 448.0", "-0.5, 0.5"),
    (FP8_ONE, "norm_linear", "first // BLOCK * (K // BLOCK)", "0"),
    (FP8_ONE, "norm_linear", "BLOCK // RUN)", "BLOCK // RUN * 2)"),
    (FP8_ONE, "norm_linear", "(tl.program_id(0) - TILES) * BESIDE_N", "BESIDE_N"),
    (FP8_ONE, "norm_linear", "(0, 1, 3, 2)", "(0, 1, 2, 3)"),
    (FP8_ONE, "moe_up", "scales += first // BLOCK", "scales += 0 * first"),
    (FP8_ONE, "moe_up", "scales + half // BLOCK", "scales + 0 * half"),
    (FP8_ONE, "moe_up", "half + RUN // 2", "half"),
    (FP8_ONE, "moe_down_add", "(factor * share[None, :])", "share[None, :]"),
    (FP8_ONE, "moe_down_add", "(TOP_K * INNER) + j * INNER", "(TOP_K * INNER) + 0 * j"),
    (FP8_ONE, "moe_down_add", "tl.where(j >= r, best, chosen)", "tl.where(j > r, best, chosen)"),
    (FP8_PAIR, "linear_add", "scales + (k0 + BLOCK_K) // BLOCK", "scales + k0 // BLOCK"),
    (FP8_FEW, "norm_linear_silu_mul", "scales + N // BLOCK", "scales + 0 * N"),
    (FP8_MANY, "grouped_up", "tl.load(scales + k0 // BLOCK)", "tl.load(scales)"),
    (FP8_MANY, "grouped_down", "scales += first // BLOCK", "scales += 0 * first"),
    (FP8_MANY, "linear_add", "tl.load(scales + k0 // BLOCK)", "tl.load(scales)"),
    (FP8_BOTH, "linear_add", "row * (K // BLOCK) + k0 // BLOCK", "row * (K // BLOCK)"),
    (FP8_BOTH, "grouped_up", "row * (K // BLOCK) + k0 // BLOCK", "row * (K // BLOCK)"),
    (FP8_BOTH, "grouped_down", "num_tokens * TOP_K", "num_tokens"),
    (FP8_BOTH, "norm_quantise", "t * (H // BLOCK) + b", "t + b"),
    (FP8_BOTH, "gated_norm_quantise", "t * (HEADS * D // BLOCK) + b", "t + b"),
    (FP8_BOTH, "gated_norm_quantise", "* gate * tl.sigmoid(gate)", "* tl.sigmoid(gate)"),
    (FP8_BOTH, "quantise", "tl.div_rn(largest, most)", "tl.div_rn(most, largest)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind", "old", "new"),
    MUTATIONS,
    ids=[f"{kind}: {new}" for _, kind, _, new in MUTATIONS],
)
def test_a_broken_kernel_is_caught(case: Case, kind: str, old: str, new: str) -> None:
    assert is_caught(case, kind, old, new)


# Tiles that are taken where they were measured to be fast, each with ways to break its kernel.
SPLIT, IN_PIECES = Tile(16, 32, 32, 4, 2, splits=3), Tile(1, 64, 16, 4, 1)
DEEP = Tile(16, 32, 256, 4, 2)
FP8_SEVEN = FP8_CASES["fp8, H200 tiles, seven sequences"]
MANY_SEQS = CASES["H200 tiles, seven sequences"]
IN_PLACE = CASES["five sequences, state in place"]
MEASURED = {
    "split product": (
        MANY_SEQS,
        "linear_add",
        SPLIT,
        (("* SPLIT_K", "* 0"), ("SPLITS - 1", "SPLITS")),
    ),
    "split SwiGLU": (
        SOME,
        "linear_silu_mul",
        SPLIT,
        (("(SPLITS + tl.program_id(2)) * size", "tl.program_id(2) * size"),),
    ),
    "split head": (SOME, "head", SPLIT, (("tl.store(counter, 0)", "pass"),)),
    "split sum of experts": (SOME, "expert_sum_linear_add", SPLIT, (("part * size", "0"),)),
    "several blocks": (FP8_SEVEN, "linear_add", DEEP, (("begin_k + block", "begin_k"),)),
    "several blocks of experts": (
        FP8_MANY,
        "grouped_up",
        replace(DEEP, k=384),
        (("begin_k + block", "begin_k"),),
    ),
    "rows that stay": (
        FP8_BOTH,
        "grouped_down",
        Tile(64, 128, 384, 8, 2),
        (("factor_1 *", "factor_0 *"), ("first + COLUMNS, N", "first + BLOCK_N, N")),
    ),
    "rows that stay, columns in parts": (
        FP8_BOTH,
        "grouped_down",
        Tile(64, 64, 384, 8, 2, splits=2),
        (("tl.program_id(0) * COLUMNS", "tl.program_id(0) * BLOCK_N"),),
    ),
    "few tokens on tensor cores": (
        replace(FP8_SEVEN, lengths=(1,) * 3, before=SEVEN[:3]),
        "moe_up",
        Tile(8, 16, 128, 1, 1),
        (
            ("d // 4 % 4 * 16", "d // 4 % 4 * 4"),
            ("up += up_sum * up_factor", "up += up_sum"),
            ("gate_1 = tl.load(weight + offsets", "gate_1 = tl.load(weight + offsets // 2"),
        ),
    ),
    "state in pieces": (
        IN_PLACE,
        "delta_step",
        IN_PIECES,
        (
            ("squares +=", "squares ="),
            ("next_c = v_c + BLOCK_V", "next_c = v_c"),
            ("(piece + 1) * BLOCK_V", "piece * BLOCK_V"),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_measured_tiles_equal_their_references(name: str) -> None:
    case, kind, tile, mutations = MEASURED[name]
    built = tiled(case, kind, tile)
    assert built.kernel.launch is not None
    constants = built.kernel.launch.constants
    assert "PIECES" in constants or constants["BLOCK_N"] == tile.n
    for param, error in errors(built, case):
        assert error <= TOLERANCE[case.dtype], param
    for old, new in mutations:
        worst = max(error for _, error in errors(broken(built, old, new), case))
        assert not worst <= TOLERANCE[case.dtype], new
