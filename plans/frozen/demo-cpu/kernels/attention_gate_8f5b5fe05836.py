"""attention_gate

attention: y = softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135)

Grid: (sequence, key/value head, split of its keys). One program attends from all queries of the
sequence that share the head.
Q query heads, KV key/value heads, GROUP = Q / KV, D head_dim, PAGE tokens a page, PAGES entries of
a sequence's page table; tiles of BLOCK_G queries by BLOCK_C keys.
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
    page = tl.load(page_table + c // PAGE, mask=c < end, other=0).to(tl.int64)
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
def attention_gate(
    attention_q,  # input, fp32 [num_tokens, 256]
    attention_page_table,  # input, i32 [num_seqs, 80]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, fp32 [num_tokens, 256]
    attention_kv_cache,  # state, fp32 [1297, 2, 16, 2, 64]
    sigmoid_gate_y,  # output, fp32 [num_tokens, 256]
    num_tokens,  # i32
    num_seqs,  # i32
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
    tl.store(sigmoid_gate_y + out, result * tl.sigmoid(gate), mask=ok_g[:, None])
