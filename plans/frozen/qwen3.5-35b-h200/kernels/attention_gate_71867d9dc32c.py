"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135), keys in splits (Flash-Decoding, Dao et al., 2023), put together in two steps
"""

import triton
import triton.language as tl


@triton.jit
def _places(
    kv_cache, page_table, c0, end, kv, BLOCK_C: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr
):
    """Of the keys of BLOCK_C positions, [BLOCK_C, D]; their values lie a whole page further."""
    c = c0 + tl.arange(0, BLOCK_C)
    page = tl.load(page_table + c0 // PAGE, mask=c0 < end, other=0).to(tl.int64)
    place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
    return kv_cache + place[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _attend(query, key, value, top, total, acc, ok, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys and values into the running softmax (in powers of 2)."""
    score = tl.where(ok, tl.dot(query, tl.trans(key), input_precision=PRECISION), float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def _together(
    partial, lse, base, count, heads, h, ok_h, MOST: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """`count` partial results and their sums of weights (as powers of 2) as one."""
    d = tl.arange(0, D)
    j = tl.arange(0, MOST)
    ok = ok_h[:, None] & (j < count)[None, :]
    logs = tl.load(lse + (base + j)[None, :] * heads + h[:, None], mask=ok, other=float("-inf"), cache_modifier=".cg")
    top = tl.where(ok_h, tl.max(logs, 1), 0.0)
    total = tl.where(ok_h, tl.sum(tl.exp2(logs - top[:, None]), 1), 1.0)
    result = tl.zeros([HEADS, D], tl.float32)
    for p0 in range(0, count, BLOCK_P):  # [head, split, dimension]: a thread has all splits of its dimensions
        p = p0 + tl.arange(0, BLOCK_P)
        ok_p = ok_h[:, None] & (p < count)[None, :]
        row = (base + p)[None, :] * heads + h[:, None]
        share = tl.load(lse + row, mask=ok_p, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial + row[:, :, None] * D + d[None, None, :], mask=ok_p[:, :, None], other=0.0, cache_modifier=".cg"
        )
        share = tl.exp2(share - top[:, None])
        result += tl.sum(part.to(tl.float32) * share[:, :, None], 1)
    return result / total[:, None], top + tl.log2(total)


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_tokens, 4096]
    attention_page_table,  # input, i32 [num_seqs, 1014]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 4096]
    attention_kv_cache,  # state, bf16 [4057, 2, 64, 2, 256]
    sigmoid_gate_y,  # output, bf16 [num_tokens, 4096]
    partial,  # scratch, bf16 [num_seqs, 1081344]
    lse,  # scratch, fp32 [num_seqs, 4224]
    group_partial,  # scratch, bf16 [num_seqs, 147456]
    group_lse,  # scratch, fp32 [num_seqs, 576]
    counters,  # scratch, i32 [num_seqs, 20]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_G: tl.constexpr = 32
    BLOCK_P: tl.constexpr = 2
    BLOCK_T: tl.constexpr = 16
    D: tl.constexpr = 256
    FAN: tl.constexpr = 8
    GROUP: tl.constexpr = 8
    GROUPS: tl.constexpr = 9
    HEADS: tl.constexpr = 32
    KV: tl.constexpr = 2
    MIN_RUN: tl.constexpr = 128
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 16
    ROWS: tl.constexpr = 4
    SCALE: tl.constexpr = 0.09016844005556021
    SPLITS: tl.constexpr = 66
    STAGES: tl.constexpr = 3
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(attention_context_lens + s)
    run = tl.maximum(tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE, MIN_RUN)
    used = tl.cdiv(length, run)
    start = split * run
    end = tl.minimum(start + run, length)
    if start >= length:
        return
    places = _places(attention_kv_cache, attention_page_table + s * PAGES, start, end, kv, BLOCK_C, PAGE, KV, D)
    c = start + tl.arange(0, BLOCK_C)
    there = ((c < end) & (c < length - ROWS))[:, None]
    key = tl.load(places, mask=there, other=0.0)
    value = tl.load(places + PAGE * KV * D, mask=there, other=0.0)

    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    newest = ((c < end) & (c >= length - ROWS))[:, None]  # the kernel before this one wrote their keys and values
    key = tl.load(places, mask=newest, other=key)
    value = tl.load(places + PAGE * KV * D, mask=newest, other=value)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    ok_g = g < ROWS * GROUP
    out = ((s * ROWS + g // GROUP) * Q + kv * GROUP + g % GROUP)[:, None] * D + d[None, :]
    query = tl.load(attention_q + out, mask=ok_g[:, None], other=0.0)
    gate = tl.load(sigmoid_gate_g + out, mask=ok_g[:, None], other=0.0).to(tl.float32)
    seen = tl.minimum(length - (ROWS - 1) + g // GROUP, end)[:, None]
    top = tl.full([BLOCK_G], -1e30, tl.float32)  # finite: a row may see none of these keys
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    top, total, acc = _attend(query, key, value, top, total, acc, c[None, :] < seen, SCALE, PRECISION)
    for c0 in tl.range(start + BLOCK_C, end, BLOCK_C, num_stages=STAGES):
        places = _places(attention_kv_cache, attention_page_table + s * PAGES, c0, end, kv, BLOCK_C, PAGE, KV, D)
        c = c0 + tl.arange(0, BLOCK_C)
        ok = c < end
        key = tl.load(places, mask=ok[:, None], other=0.0)
        value = tl.load(places + PAGE * KV * D, mask=ok[:, None], other=0.0)
        top, total, acc = _attend(query, key, value, top, total, acc, c[None, :] < seen, SCALE, PRECISION)
    total = tl.where(total > 0.0, total, 1.0)
    result = acc / total[:, None]
    if used == 1:
        tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
        return
    base = (s * KV + kv) * SPLITS
    tl.store(partial + ((base + split) * (ROWS * GROUP) + g)[:, None] * D + d[None, :], result, mask=ok_g[:, None])
    tl.store(lse + (base + split) * (ROWS * GROUP) + g, top + tl.log2(total), mask=ok_g)
    # The last split of a team to end puts the team together; the last team to end, all groups.
    h = tl.arange(0, HEADS)
    ok_h = h < ROWS * GROUP
    team = split // FAN
    counter = counters + (s * KV + kv) * (GROUPS + 1)
    size = tl.minimum(FAN, used - team * FAN)
    tl.debug_barrier()
    if tl.atomic_add(counter + team, 1, sem="acq_rel") < size - 1:
        return
    tl.store(counter + team, 0)  # for the next launch
    result, log = _together(partial, lse, base + team * FAN, size, (ROWS * GROUP), h, ok_h, FAN, BLOCK_P, HEADS, D)
    if used > FAN:
        base = (s * KV + kv) * GROUPS
        tl.store(group_partial + ((base + team) * (ROWS * GROUP) + h)[:, None] * D + d[None, :], result, mask=ok_h[:, None])
        tl.store(group_lse + (base + team) * (ROWS * GROUP) + h, log, mask=ok_h)
        groups = tl.cdiv(used, FAN)
        tl.debug_barrier()
        if tl.atomic_add(counter + GROUPS, 1, sem="acq_rel") < groups - 1:
            return
        tl.store(counter + GROUPS, 0)
        result, log = _together(group_partial, group_lse, base, groups, (ROWS * GROUP), h, ok_h, BLOCK_T, BLOCK_P, HEADS, D)
    out = ((s * ROWS + h // GROUP) * Q + kv * GROUP + h % GROUP)[:, None] * D + d[None, :]
    gate = tl.load(sigmoid_gate_g + out, mask=ok_h[:, None], other=0.0).to(tl.float32)
    tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_h[:, None])
