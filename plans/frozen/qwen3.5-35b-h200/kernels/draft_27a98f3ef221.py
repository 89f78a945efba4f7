"""draft

draft: drafts = [earlier | argmax(logits)]
Source: the draft is the best token of all; the programs of a sequence share the vocabulary out
"""

import triton
import triton.language as tl


@triton.jit
def draft(
    logits,  # input, bf16 [num_seqs, 248320]
    earlier,  # input, i32 [num_seqs, 3]
    drafts,  # output, i32 [num_seqs, 4]
    bests,  # scratch, fp32 [num_seqs, 31]
    tokens,  # scratch, i32 [num_seqs, 31]
    counters,  # scratch, i32 [num_seqs, 1]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 8192
    BLOCK_P: tl.constexpr = 32
    KNOWN: tl.constexpr = 3
    PARTS: tl.constexpr = 31
    RUN: tl.constexpr = 8192
    VOCAB: tl.constexpr = 248320

    s = tl.program_id(0)
    row = logits + s.to(tl.int64) * VOCAB
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    part = tl.program_id(1)
    for v0 in range(part * RUN, tl.minimum(part * RUN + RUN, VOCAB), BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.max(x, 0)
        first = tl.min(tl.where(x == higher, v, VOCAB), 0)
        token = tl.where(higher > best, first, token)
        best = tl.where(higher > best, higher, best)  # NaN is not
    tl.store(bests + s * PARTS + part, best)
    tl.store(tokens + s * PARTS + part, token)
    tl.debug_barrier()
    if tl.atomic_add(counters + s, 1, sem="acq_rel") < PARTS - 1:
        return
    tl.store(counters + s, 0)  # for the next launch; all parts of the vocabulary are there
    p = tl.arange(0, BLOCK_P)
    found = tl.load(bests + s * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
    names = tl.load(tokens + s * PARTS + p, mask=p < PARTS, other=VOCAB, cache_modifier=".cg")
    best = tl.max(found, 0)
    token = tl.min(tl.where(found == best, names, VOCAB), 0)
    # All loads, then all stores: a load waits for any store before it.
    known = ()
    for i in tl.static_range(KNOWN):
        known = known + (tl.load(earlier + s * KNOWN + i),)
    for i in tl.static_range(KNOWN):
        tl.store(drafts + s * (KNOWN + 1) + i, known[i])
    tl.store(drafts + s * (KNOWN + 1) + KNOWN, token)
