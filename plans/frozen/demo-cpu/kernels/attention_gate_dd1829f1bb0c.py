"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135)
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
    page = tl.load(page_table + c // PAGE, mask=ok, other=0).to(tl.int64)
    place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
    key = tl.load(kv_cache + place[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    value = tl.load(kv_cache + (place + PAGE * KV * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    return key, value


@triton.jit
def attention_gate(
    attention_q,  # input, fp32 [num_tokens, 256]
    attention_page_table,  # input, i32 [num_seqs, 80]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, fp32 [num_tokens, 256]
    attention_kv_cache,  # state, fp32 [1281, 2, 16, 2, 64]
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
    SCALE: tl.constexpr = 0.125

    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    ok_g = g < GROUP
    head = kv * GROUP + g
    out = (s * Q + head)[:, None] * D + d[None, :]
    length = tl.load(attention_context_lens + s)
    start = 0
    end = length
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
    tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
