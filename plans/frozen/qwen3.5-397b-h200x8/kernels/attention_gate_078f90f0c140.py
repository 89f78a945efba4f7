"""attention_gate

attention: y = softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135) over pages, causal from the end of the context

Grid: (block of queries, query head, sequence), the longest blocks first. One program attends from
BLOCK_M queries of one head to all keys that they see, BLOCK_C at a time.
Q query heads, KV key/value heads, GROUP = Q / KV, D head_dim, PAGE tokens a page, PAGES entries of
a sequence's page table; `m` counts queries, `c` positions of the context, `d` dimensions.
"""

import triton
import triton.language as tl


@triton.jit
def _attend(
    query,
    top,
    total,
    acc,
    kv_cache,
    page_table,
    c0,
    end,
    position,
    kv,
    masked: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of keys and values to the running softmax, whose exponents are powers of 2.

    Unless `masked`, every query sees every key of the block.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    d = tl.arange(0, D)
    page = tl.load(page_table + c0 // PAGE).to(tl.int64)
    offset = (((page * 2 * PAGE + c0 % PAGE) * KV + kv) * D) + tl.arange(0, BLOCK_C) * (KV * D)
    pointers = kv_cache + offset[:, None] + d[None, :]
    if masked:
        key = tl.load(pointers, mask=(c < end)[:, None], other=0.0)
    else:
        key = tl.load(pointers)
    key = key.to(tl.float16)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if masked:
        score = tl.where(c[None, :] <= position[:, None], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weight, 1)
    if masked:
        value = tl.load(pointers + PAGE * KV * D, mask=(c < end)[:, None], other=0.0)
    else:
        value = tl.load(pointers + PAGE * KV * D)
    value = value.to(tl.float16)
    acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_tokens, 1024]
    attention_page_table,  # input, i32 [num_seqs, 1014]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 1024]
    attention_kv_cache,  # state, fp8 [4057, 2, 64, 1, 256]
    sigmoid_gate_y,  # output, bf16 [num_tokens, 1024]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_C: tl.constexpr = 32
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

    # The last block of queries sees most keys, and starts first.
    block, head, s = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    query = tl.load(attention_q + out, mask=ok_m[:, None], other=0.0).to(tl.float16)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    seen = (length - count + block * BLOCK_M + 1) // BLOCK_C * BLOCK_C  # by every query
    end = tl.minimum(length - count + (block + 1) * BLOCK_M, length)
    for c0 in tl.range(0, seen, BLOCK_C, num_stages=STAGES):
        top, total, acc = _attend(
            query,
            top,
            total,
            acc,
            attention_kv_cache,
            attention_page_table + s * PAGES,
            c0,
            end,
            position,
            kv,
            False,
            BLOCK_C,
            PAGE,
            KV,
            D,
            SCALE,
            PRECISION,
        )
    for c0 in tl.range(seen, end, BLOCK_C, num_stages=1):
        top, total, acc = _attend(
            query,
            top,
            total,
            acc,
            attention_kv_cache,
            attention_page_table + s * PAGES,
            c0,
            end,
            position,
            kv,
            True,
            BLOCK_C,
            PAGE,
            KV,
            D,
            SCALE,
            PRECISION,
        )
    result = (acc * (1.0 / total)[:, None]).to(sigmoid_gate_y.dtype.element_ty)
    # Compute the offsets of the queries again: kept through the loops they would spill.
    row = tl.load(attention_cu_seqlens + s) + block * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_row = (row < tl.load(attention_cu_seqlens + s + 1))[:, None]
    out = (row * Q + head)[:, None] * D + d[None, :]
    gate = tl.load(sigmoid_gate_g + out, mask=ok_row, other=0.0).to(tl.float32)
    tl.store(sigmoid_gate_y + out, result.to(tl.float32) * tl.sigmoid(gate), mask=ok_row)
