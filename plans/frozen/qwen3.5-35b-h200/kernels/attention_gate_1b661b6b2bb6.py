"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135), keys in splits (Flash-Decoding, Dao et al., 2023); the last split to end puts them together
"""

import triton
import triton.language as tl


@triton.jit
def _load_block(
    kv_cache, page_table, c0, end, kv, d, BLOCK_C: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr
):
    """Keys and values [BLOCK_C, D] of the positions from `c0` on."""
    c = c0 + tl.arange(0, BLOCK_C)
    ok = c < end
    page = tl.load(page_table + c0 // PAGE, mask=c0 < end, other=0).to(tl.int64)
    place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
    key = tl.load(kv_cache + place[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    value = tl.load(kv_cache + (place + PAGE * KV * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    return key, value


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_tokens, 4096]
    attention_page_table,  # input, i32 [num_seqs, 1013]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 4096]
    attention_kv_cache,  # state, bf16 [4053, 2, 64, 2, 256]
    sigmoid_gate_y,  # output, bf16 [num_tokens, 4096]
    partial,  # scratch, bf16 [num_seqs, 262144]
    lse,  # scratch, fp32 [num_seqs, 1024]
    tickets,  # scratch, i32 [num_seqs, 2]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_E: tl.constexpr = 2048
    BLOCK_G: tl.constexpr = 16
    BLOCK_J: tl.constexpr = 4
    D: tl.constexpr = 256
    GROUP: tl.constexpr = 8
    KV: tl.constexpr = 2
    MIN_RUN: tl.constexpr = 128
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1013
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 16
    SCALE: tl.constexpr = 0.0625
    SPLITS: tl.constexpr = 64
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    ok_g = g < GROUP
    head = kv * GROUP + g
    out = (s * Q + head)[:, None] * D + d[None, :]
    length = tl.load(attention_context_lens + s)
    run = tl.maximum(tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE, MIN_RUN)
    used = tl.cdiv(length, run)
    start = split * run
    end = tl.minimum(start + run, length)
    if start >= length:
        return
    key, value = _load_block(attention_kv_cache, attention_page_table + s * PAGES, start, end, kv, d, BLOCK_C, PAGE, KV, D)
    query = tl.load(attention_q + out, mask=ok_g[:, None], other=0.0)
    gate = tl.load(sigmoid_gate_g + out, mask=ok_g[:, None], other=0.0).to(tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    for c0 in range(start, end, BLOCK_C):
        next_key, next_value = _load_block(attention_kv_cache, attention_page_table + s * PAGES, c0 + BLOCK_C, end, kv, d, BLOCK_C, PAGE, KV, D)  # on their way while this block is used
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        score = tl.where((c0 + tl.arange(0, BLOCK_C) < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
        key, value = next_key, next_value
    result = acc / total[:, None]
    if used == 1:
        tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
        return
    base = (s * KV + kv) * SPLITS
    tl.store(partial + ((base + split) * GROUP + g)[:, None] * D + d[None, :], result, mask=ok_g[:, None])
    tl.store(lse + (base + split) * GROUP + g, top + tl.log(total), mask=ok_g)
    tl.debug_barrier()
    if tl.atomic_add(tickets + s * KV + kv, 1, sem="acq_rel") < used - 1:
        return
    tl.store(tickets + s * KV + kv, 0)  # for the next launch
    j = tl.arange(0, SPLITS)
    place = lse + (base + j)[:, None] * GROUP + g[None, :]
    ok = (j < used)[:, None] & ok_g[None, :]
    share = tl.load(place, mask=ok, other=float("-inf"), cache_modifier=".cg")
    share = tl.exp(share - tl.where(ok_g, tl.max(share, 0), 0.0)[None, :])
    tl.store(place, share / tl.where(ok_g, tl.sum(share, 0), 1.0)[None, :], mask=ok)
    tl.debug_barrier()
    e = tl.arange(0, BLOCK_E)  # all dimensions of all heads in a row
    ok_e = e < GROUP * D
    gate_e = tl.load(sigmoid_gate_g + (s * Q + kv * GROUP) * D + e, mask=ok_e, other=0.0).to(tl.float32)
    sum_e = tl.zeros([BLOCK_E], tl.float32)
    for j0 in range(0, used, BLOCK_J):
        row = j0 + tl.arange(0, BLOCK_J)
        ok_je = (row < used)[:, None] & ok_e[None, :]
        row = ((base + row) * GROUP)[:, None]
        part = tl.load(partial + row * D + e[None, :], mask=ok_je, other=0.0, cache_modifier=".cg").to(tl.float32)
        share_je = tl.load(lse + row + (e // D)[None, :], mask=ok_je, other=0.0, cache_modifier=".cg")
        sum_e += tl.sum(part * share_je, 0)
    tl.store(sigmoid_gate_y + (s * Q + kv * GROUP) * D + e, sum_e * tl.sigmoid(gate_e), mask=ok_e)
