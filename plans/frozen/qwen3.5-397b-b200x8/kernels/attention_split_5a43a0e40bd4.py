"""attention_split

attention_split: attention over each of `num_splits` runs of blocks of BLOCK tokens, and the log of its sum of exponentials
Source: FlashAttention (arXiv:2205.14135), keys in splits (Flash-Decoding, Dao et al., 2023)
"""

import triton
import triton.language as tl


@triton.jit
def attention_split(
    q,  # input, bf16 [num_tokens, 1024]
    page_table,  # input, i32 [num_seqs, 1013]
    context_lens,  # input, i32 [num_seqs]
    cu_seqlens,  # input, i32 [num_seqs+1]
    kv_cache,  # state, bf16 [1013, 2, 64, 1, 256]
    partial,  # output, fp32 [num_tokens, 32768]
    lse,  # output, fp32 [num_tokens, 128]
    num_tokens,
    num_seqs,
):
    BLOCK_C: tl.constexpr = 64
    BLOCK_G: tl.constexpr = 16
    D: tl.constexpr = 256
    GROUP: tl.constexpr = 4
    KV: tl.constexpr = 1
    PAGE: tl.constexpr = 64
    PAGES: tl.constexpr = 1013
    PRECISION: tl.constexpr = 'tf32'
    Q: tl.constexpr = 4
    SCALE: tl.constexpr = 0.0625
    SPLITS: tl.constexpr = 32
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    head = kv * GROUP + g
    ok_g = g < GROUP
    query = tl.load(q + (s * Q + head)[:, None] * D + d[None, :], mask=ok_g[:, None], other=0.0)
    length = tl.load(context_lens + s)
    run = tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE
    start = split * run
    end = tl.minimum(start + run, length)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    for c0 in range(start, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        ok = c < end
        page = tl.load(page_table + s * PAGES + c // PAGE, mask=ok, other=0).to(tl.int64)
        place = ((page * 2 * PAGE + c % PAGE) * KV + kv) * D
        key = tl.load(kv_cache + place[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        score = tl.where(ok[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            kv_cache + (place + PAGE * KV * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0
        )
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    out = (s * SPLITS + split) * Q + head
    seen = total > 0.0
    result = acc / tl.where(seen, total, 1.0)[:, None]
    tl.store(partial + out[:, None] * D + d[None, :], result, mask=ok_g[:, None])
    tl.store(lse + out, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf")), mask=ok_g)
