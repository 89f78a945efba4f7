"""embed_norm_concat

embed: y = table[token_ids]; a token that another rank holds gives 0
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
rms_norm: y = x / sqrt(mean(x^2) + eps) * (1 + w)
concat: y = [x | r]
Source: RMSNorm (arXiv:1910.07467) of a token's embedding and of the hidden state that gave it,
concatenated

Grid: (sequence, half). One program normalises one half of the result.
H hidden size, BLOCK_H the same as a power of two; `n` counts dimensions.
VOCAB rows of the embedding.
"""

import triton
import triton.language as tl


@triton.jit
def embed_norm_concat(
    embed_token_ids,  # input, i32 [num_seqs, 4]
    rms_norm_x,  # input, bf16 [num_seqs, 2048]
    embed_table,  # weight, bf16 [248320, 2048]
    rms_norm_w,  # weight, bf16 [2048]
    rms_norm_w2,  # weight, bf16 [2048]
    concat_y,  # output, bf16 [num_seqs, 4096]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK_H: tl.constexpr = 2048
    H: tl.constexpr = 2048
    VOCAB: tl.constexpr = 248320

    t, half = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, BLOCK_H)
    ok = n < H
    if half == 0:
        token = tl.load(embed_token_ids + t * 4 + 3)
        ok_token = ok & (token >= 0) & (token < VOCAB)
        x = tl.load(
            embed_table + token.to(tl.int64) * H + n, mask=ok_token, other=0.0
        ).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / H + 1e-06)
        x *= 1.0 + tl.load(rms_norm_w + n, mask=ok, other=0.0).to(tl.float32)
    else:
        x = tl.load(rms_norm_x + t * H + n, mask=ok, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / H + 1e-06)
        x *= 1.0 + tl.load(rms_norm_w2 + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(concat_y + (2 * t + half) * H + n, x, mask=ok)
