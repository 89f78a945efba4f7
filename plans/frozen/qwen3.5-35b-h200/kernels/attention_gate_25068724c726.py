"""attention_gate

attention: softmax(q k^T / sqrt(D)) v, causal
sigmoid_gate: y = x * sigmoid(g)
Source: FlashAttention (arXiv:2205.14135) over pages, causal from the end of the context
"""

import triton
import triton.language as tl


@triton.jit
def attention_gate(
    attention_q,  # input, bf16 [num_tokens, 4096]
    attention_page_table,  # input, i32 [num_seqs, 1013]
    attention_context_lens,  # input, i32 [num_seqs]
    attention_cu_seqlens,  # input, i32 [num_seqs+1]
    sigmoid_gate_g,  # input, bf16 [num_tokens, 4096]
    attention_kv_cache,  # state, bf16 [4053, 2, 64, 2, 256]
    sigmoid_gate_y,  # output, bf16 [num_tokens, 4096]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_M: tl.constexpr = 64
    D: tl.constexpr = 256
    GROUP: tl.constexpr = 8
    KV: tl.constexpr = 2
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1013
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 16
    SCALE: tl.constexpr = 0.0625

    block, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(attention_cu_seqlens + s)
    count = tl.load(attention_cu_seqlens + s + 1) - begin
    if block * BLOCK_M >= count:
        return
    kv = head // GROUP
    length = tl.load(attention_context_lens + s)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    ok_m = m < count
    position = length - count + m
    out = ((begin + m) * Q + head)[:, None] * D + d[None, :]
    query = tl.load(attention_q + out, mask=ok_m[:, None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    end = tl.minimum(length - count + (block + 1) * BLOCK_M, length)
    for c0 in range(0, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        ok = c < end
        page = tl.load(attention_page_table + s * PAGES + c // PAGE, mask=ok, other=0).to(tl.int64)
        place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
        key = tl.load(attention_kv_cache + place[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        score = tl.where((c[None, :] <= position[:, None]) & ok[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            attention_kv_cache + (place + PAGE * KV * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0
        )
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    gate = tl.load(sigmoid_gate_g + out, mask=ok_m[:, None], other=0.0).to(tl.float32)
    tl.store(sigmoid_gate_y + out, acc / total[:, None] * tl.sigmoid(gate), mask=ok_m[:, None])
