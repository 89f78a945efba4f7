"""attention_gate

attention: y = softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135);
keys in splits (Flash-Decoding, Dao et al., 2023), merged in two steps

Grid: (sequence, key/value head, split of its keys). One program attends from all queries of the
sequence that share the head to the keys of one split.
Q query heads, KV key/value heads, GROUP = Q / KV, D head_dim, PAGE tokens a page, PAGES entries of
a sequence's page table; tiles of BLOCK_G queries by BLOCK_C keys.
SPLITS at most, of MIN_SPLIT_TOKENS or more. First each of GROUPS groups of GROUP_SIZE splits is
merged, then the groups, BLOCK_S splits at once; BLOCK_H, BLOCK_GROUPS: queries and groups as powers
of two.
"""

import triton
import triton.language as tl


@triton.jit
def _key_pointers(
    kv_cache,
    page_table,
    c0,
    end,
    kv,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
):
    """Pointers to BLOCK_C keys, [BLOCK_C, D]; their values lie PAGE * KV * D further."""
    c = c0 + tl.arange(0, BLOCK_C)
    page = tl.load(page_table + c0 // PAGE, mask=c0 < end, other=0).to(tl.int64)
    offset = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
    return kv_cache + offset[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _attend(query, key, value, top, total, acc, ok, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """Add one block of keys and values to the running softmax, whose exponents are powers of 2."""
    score = tl.where(
        ok[None, :],
        tl.dot(query, tl.trans(key), input_precision=PRECISION),
        float("-inf"),
    )
    new_top = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return new_top, total * rescale + tl.sum(weight, 1), acc


@triton.jit
def _merge(
    partial,
    lse,
    base,
    count,
    heads,
    h,
    ok_h,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
):
    """Merge `count` partial results, each with the log2 of its sum of weights."""
    d = tl.arange(0, D)
    j = tl.arange(0, BLOCK_J)
    ok = ok_h[:, None] & (j < count)[None, :]
    logs = tl.load(
        lse + (base + j)[None, :] * heads + h[:, None],
        mask=ok,
        other=float("-inf"),
        cache_modifier=".cg",
    )
    top = tl.where(ok_h, tl.max(logs, 1), 0.0)
    total = tl.where(ok_h, tl.sum(tl.exp2(logs - top[:, None]), 1), 1.0)
    result = tl.zeros([BLOCK_H, D], tl.float32)
    # Tiles of [head, split, dimension]: a thread has all splits of its dimensions.
    for p0 in range(0, count, BLOCK_S):
        p = p0 + tl.arange(0, BLOCK_S)
        ok_p = ok_h[:, None] & (p < count)[None, :]
        row = (base + p)[None, :] * heads + h[:, None]
        share = tl.load(lse + row, mask=ok_p, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial + row[:, :, None] * D + d[None, None, :],
            mask=ok_p[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        share = tl.exp2(share - top[:, None])
        result += tl.sum(part.to(tl.float32) * share[:, :, None], 1)
    return result / total[:, None], top + tl.log2(total)


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_seqs, 4096]
    attention_page_table,  # input, i32 [num_seqs, 1014]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_seqs, 4096]
    attention_kv_cache,  # state, bf16 [4057, 2, 64, 2, 256]
    sigmoid_gate_y,  # output, bf16 [num_seqs, 4096]
    partial,  # scratch, bf16 [num_seqs, 65536]
    lse,  # scratch, fp32 [num_seqs, 256]
    group_partial,  # scratch, bf16 [num_seqs, 8192]
    group_lse,  # scratch, fp32 [num_seqs, 32]
    counters,  # scratch, i32 [num_seqs, 6]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_G: tl.constexpr = 16
    BLOCK_GROUPS: tl.constexpr = 2
    BLOCK_H: tl.constexpr = 8
    BLOCK_S: tl.constexpr = 8
    D: tl.constexpr = 256
    GROUP: tl.constexpr = 8
    GROUPS: tl.constexpr = 2
    GROUP_SIZE: tl.constexpr = 8
    KV: tl.constexpr = 2
    MIN_SPLIT_TOKENS: tl.constexpr = 64
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 16
    SCALE: tl.constexpr = 0.09016844005556021
    SPLITS: tl.constexpr = 16
    STAGES: tl.constexpr = 1
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(attention_context_lens + s)
    split_len = tl.maximum(tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE, MIN_SPLIT_TOKENS)
    num_splits = tl.cdiv(length, split_len)
    start = split * split_len
    end = tl.minimum(start + split_len, length)
    if start >= length:
        return
    pointers = _key_pointers(
        attention_kv_cache, attention_page_table + s * PAGES, start, end, kv, BLOCK_C, PAGE, KV, D
    )
    c = start + tl.arange(0, BLOCK_C)
    written = (c < end)[:, None]
    key = tl.load(pointers, mask=written, other=0.0)
    value = tl.load(pointers + PAGE * KV * D, mask=written, other=0.0)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    ok_g = g < GROUP
    out = (s * Q + kv * GROUP + g)[:, None] * D + d[None, :]
    query = tl.load(attention_q + out, mask=ok_g[:, None], other=0.0)
    gate = tl.load(sigmoid_gate_g + out, mask=ok_g[:, None], other=0.0).to(tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    top, total, acc = _attend(
        query, key, value, top, total, acc, c < end, SCALE, PRECISION
    )
    for c0 in tl.range(start + BLOCK_C, end, BLOCK_C, num_stages=STAGES):
        pointers = _key_pointers(
            attention_kv_cache, attention_page_table + s * PAGES, c0, end, kv, BLOCK_C, PAGE, KV, D
        )
        ok = c0 + tl.arange(0, BLOCK_C) < end
        key = tl.load(pointers, mask=ok[:, None], other=0.0)
        value = tl.load(pointers + PAGE * KV * D, mask=ok[:, None], other=0.0)
        top, total, acc = _attend(
            query, key, value, top, total, acc, ok, SCALE, PRECISION
        )
    result = acc / total[:, None]
    if num_splits == 1:
        tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
        return
    base = (s * KV + kv) * SPLITS
    tl.store(
        partial + ((base + split) * GROUP + g)[:, None] * D + d[None, :],
        result,
        mask=ok_g[:, None],
    )
    tl.store(lse + (base + split) * GROUP + g, top + tl.log2(total), mask=ok_g)
    # The last split of a group to end merges the group; the last group to end merges all groups.
    h = tl.arange(0, BLOCK_H)
    ok_h = h < GROUP
    group = split // GROUP_SIZE
    counter = counters + (s * KV + kv) * (GROUPS + 1)
    size = tl.minimum(GROUP_SIZE, num_splits - group * GROUP_SIZE)
    tl.debug_barrier()
    if tl.atomic_add(counter + group, 1, sem="acq_rel") < size - 1:
        return
    tl.store(counter + group, 0)  # for the next launch
    result, log = _merge(
        partial,
        lse,
        base + group * GROUP_SIZE,
        size,
        GROUP,
        h,
        ok_h,
        GROUP_SIZE,
        BLOCK_S,
        BLOCK_H,
        D,
    )
    if num_splits > GROUP_SIZE:
        base = (s * KV + kv) * GROUPS
        tl.store(
            group_partial + ((base + group) * GROUP + h)[:, None] * D + d[None, :],
            result,
            mask=ok_h[:, None],
        )
        tl.store(group_lse + (base + group) * GROUP + h, log, mask=ok_h)
        num_groups = tl.cdiv(num_splits, GROUP_SIZE)
        tl.debug_barrier()
        if tl.atomic_add(counter + GROUPS, 1, sem="acq_rel") < num_groups - 1:
            return
        tl.store(counter + GROUPS, 0)
        result, log = _merge(
            group_partial,
            group_lse,
            base,
            num_groups,
            GROUP,
            h,
            ok_h,
            BLOCK_GROUPS,
            BLOCK_S,
            BLOCK_H,
            D,
        )
    out = (s * Q + kv * GROUP + h)[:, None] * D + d[None, :]
    gate = tl.load(sigmoid_gate_g + out, mask=ok_h[:, None], other=0.0).to(tl.float32)
    tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_h[:, None])
