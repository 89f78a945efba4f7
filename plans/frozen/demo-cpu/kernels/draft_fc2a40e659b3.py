"""draft

draft: drafts = [earlier | argmax(logits)]
Source: the draft is the best token of all; the programs of a sequence share the vocabulary out
"""

import triton
import triton.language as tl


@triton.jit
def draft(
    logits,  # input, fp32 [num_seqs, 2048]
    earlier,  # input, i32 [num_seqs]
    drafts,  # output, i32 [num_seqs, 2]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 2048
    KNOWN: tl.constexpr = 1
    VOCAB: tl.constexpr = 2048

    s = tl.program_id(0)
    row = logits + s.to(tl.int64) * VOCAB
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    for v0 in range(0, VOCAB, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.max(x, 0)
        first = tl.min(tl.where(x == higher, v, VOCAB), 0)
        token = tl.where(higher > best, first, token)
        best = tl.where(higher > best, higher, best)  # NaN is not
    for i in tl.static_range(KNOWN):
        tl.store(drafts + s * (KNOWN + 1) + i, tl.load(earlier + s * KNOWN + i))
    tl.store(drafts + s * (KNOWN + 1) + KNOWN, token)
