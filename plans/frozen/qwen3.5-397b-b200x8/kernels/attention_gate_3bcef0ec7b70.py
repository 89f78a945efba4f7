"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135) over pages, causal from the end of the context
"""

import triton
import triton.language as tl


@triton.jit
def _attend(
    query, top, total, acc, kv_cache, page_table, c0, end, position, kv, masked: tl.constexpr,
    BLOCK_C: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys and values into the running softmax (in powers of 2); all rows see all of it, or `masked`."""
    c = c0 + tl.arange(0, BLOCK_C)
    d = tl.arange(0, D)
    page = tl.load(page_table + c0 // PAGE).to(tl.int64)
    place = (((page * 2 * PAGE + c0 % PAGE) * KV + kv) * D) + tl.arange(0, BLOCK_C) * (KV * D)
    places = kv_cache + place[:, None] + d[None, :]
    if masked:
        key = tl.load(places, mask=(c < end)[:, None], other=0.0)
    else:
        key = tl.load(places)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if masked:
        score = tl.where(c[None, :] <= position[:, None], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weight, 1)
    if masked:
        value = tl.load(places + PAGE * KV * D, mask=(c < end)[:, None], other=0.0)
    else:
        value = tl.load(places + PAGE * KV * D)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_tokens, 1024]
    attention_page_table,  # input, i32 [num_seqs, 1014]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 1024]
    attention_kv_cache,  # state, bf16 [1015, 2, 64, 1, 256]
    sigmoid_gate_y,  # output, bf16 [num_tokens, 1024]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_M: tl.constexpr = 128
    D: tl.constexpr = 256
    GROUP: tl.constexpr = 4
    KV: tl.constexpr = 1
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1014
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 4
    SCALE: tl.constexpr = 0.09016844005556021
    STAGES: tl.constexpr = 2

    block, head, s = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)  # longest first
    begin = tl.load(attention_cu_seqlens + s)
    count = tl.load(attention_cu_seqlens + s + 1) - begin
    if block * BLOCK_M >= count:
        return
    kv = head // GROUP
    length = tl.load(attention_context_lens + s)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    ok_m = m < count
    start = length - count
    position = start + m
    out = ((begin + m) * Q + head)[:, None] * D + d[None, :]
    query = tl.load(attention_q + out, mask=ok_m[:, None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    seen = (length - count + block * BLOCK_M + 1) // BLOCK_C * BLOCK_C  # by every row
    end = tl.minimum(length - count + (block + 1) * BLOCK_M, length)
    for c0 in tl.range(0, seen, BLOCK_C, num_stages=STAGES):
        top, total, acc = _attend(
            query, top, total, acc, attention_kv_cache, attention_page_table + s * PAGES, c0, end, position, kv,
            False, BLOCK_C, PAGE, KV, D, SCALE, PRECISION,
        )
    for c0 in tl.range(seen, end, BLOCK_C, num_stages=1):
        top, total, acc = _attend(
            query, top, total, acc, attention_kv_cache, attention_page_table + s * PAGES, c0, end, position, kv,
            True, BLOCK_C, PAGE, KV, D, SCALE, PRECISION,
        )
    result = (acc * (1.0 / total)[:, None]).to(sigmoid_gate_y.dtype.element_ty)
    # Where the rows lie is found anew: kept through the loops it would spill.
    row = tl.load(attention_cu_seqlens + s) + block * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_row = (row < tl.load(attention_cu_seqlens + s + 1))[:, None]
    out = (row * Q + head)[:, None] * D + d[None, :]
    gate = tl.load(sigmoid_gate_g + out, mask=ok_row, other=0.0).to(tl.float32)
    tl.store(sigmoid_gate_y + out, result.to(tl.float32) * tl.sigmoid(gate), mask=ok_row)
