"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135)
"""

import triton
import triton.language as tl


@triton.jit
def _places(
    kv_cache, page_table, c0, end, kv, BLOCK_C: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr
):
    """Of the keys of BLOCK_C positions, [BLOCK_C, D]; their values lie a whole page further."""
    c = c0 + tl.arange(0, BLOCK_C)
    page = tl.load(page_table + c // PAGE, mask=c < end, other=0).to(tl.int64)
    place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
    return kv_cache + place[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _attend(query, key, value, top, total, acc, ok, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys and values into the running softmax (in powers of 2)."""
    score = tl.where(ok[None, :], tl.dot(query, tl.trans(key), input_precision=PRECISION), float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def attention_gate(
    attention_q,  # input, fp32 [num_tokens, 256]
    attention_page_table,  # input, i32 [num_seqs, 80]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, fp32 [num_tokens, 256]
    attention_kv_cache,  # state, fp32 [1297, 2, 16, 2, 64]
    sigmoid_gate_y,  # output, fp32 [num_tokens, 256]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_G: tl.constexpr = 16
    D: tl.constexpr = 64
    GROUP: tl.constexpr = 2
    KV: tl.constexpr = 2
    PAGE: tl.constexpr = 16
    PAGES: tl.constexpr = 80
    PRECISION: tl.constexpr = 'ieee'
    Q: tl.constexpr = 4
    SCALE: tl.constexpr = 0.18033688011112042
    STAGES: tl.constexpr = 1

    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(attention_context_lens + s)
    start = 0
    end = length
    places = _places(attention_kv_cache, attention_page_table + s * PAGES, start, end, kv, BLOCK_C, PAGE, KV, D)
    c = start + tl.arange(0, BLOCK_C)
    there = ((c < end))[:, None]
    key = tl.load(places, mask=there, other=0.0)
    value = tl.load(places + PAGE * KV * D, mask=there, other=0.0)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    ok_g = g < GROUP
    out = (s * Q + kv * GROUP + g)[:, None] * D + d[None, :]
    query = tl.load(attention_q + out, mask=ok_g[:, None], other=0.0)
    gate = tl.load(sigmoid_gate_g + out, mask=ok_g[:, None], other=0.0).to(tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    top, total, acc = _attend(query, key, value, top, total, acc, c < end, SCALE, PRECISION)
    for c0 in tl.range(start + BLOCK_C, end, BLOCK_C, num_stages=STAGES):
        places = _places(attention_kv_cache, attention_page_table + s * PAGES, c0, end, kv, BLOCK_C, PAGE, KV, D)
        ok = c0 + tl.arange(0, BLOCK_C) < end
        key = tl.load(places, mask=ok[:, None], other=0.0)
        value = tl.load(places + PAGE * KV * D, mask=ok[:, None], other=0.0)
        top, total, acc = _attend(query, key, value, top, total, acc, ok, SCALE, PRECISION)
    result = acc / total[:, None]
    tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
