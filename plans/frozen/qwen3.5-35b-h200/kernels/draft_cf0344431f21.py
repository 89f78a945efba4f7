"""draft

draft: drafts = [earlier | argmax(logits)]
Source: a draft is the token with the largest logit

Grid: (sequence, part of the vocabulary). One program finds the best token of its part; the last of
a sequence to end appends it to the EARLIER drafts.
VOCAB logits a sequence, BLOCK at a time, PARTS parts of PART_SIZE; `s` counts sequences,
`v` tokens.
"""

import triton
import triton.language as tl


@triton.jit
def draft(
    logits,  # input, bf16 [num_seqs, 248320]
    earlier,  # input, i32 [num_seqs, 4]
    drafts,  # output, i32 [num_seqs, 5]
    bests,  # scratch, fp32 [num_seqs, 31]
    tokens,  # scratch, i32 [num_seqs, 31]
    counters,  # scratch, i32 [num_seqs, 1]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 8192
    BLOCK_P: tl.constexpr = 32
    EARLIER: tl.constexpr = 4
    PARTS: tl.constexpr = 31
    PART_SIZE: tl.constexpr = 8192
    VOCAB: tl.constexpr = 248320
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s = tl.program_id(0)
    row = logits + s.to(tl.int64) * VOCAB
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    part = tl.program_id(1)
    for v0 in range(part * PART_SIZE, tl.minimum(part * PART_SIZE + PART_SIZE, VOCAB), BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, 0)
        first = tl.min(tl.where(x == highest, v, VOCAB), 0)
        token = tl.where(highest > best, first, token)
        best = tl.where(highest > best, highest, best)  # never true of NaN
    tl.store(bests + s * PARTS + part, best)
    tl.store(tokens + s * PARTS + part, token)
    tl.debug_barrier()
    if tl.atomic_add(counters + s, 1, sem="acq_rel") < PARTS - 1:
        return
    # All parts of the vocabulary are there.
    tl.store(counters + s, 0)  # for the next launch
    p = tl.arange(0, BLOCK_P)
    found = tl.load(
        bests + s * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg"
    )
    names = tl.load(tokens + s * PARTS + p, mask=p < PARTS, other=VOCAB, cache_modifier=".cg")
    best = tl.max(found, 0)
    token = tl.min(tl.where(found == best, names, VOCAB), 0)
    # All loads come before all stores: a load would wait for an earlier store.
    known = ()
    for i in tl.static_range(EARLIER):
        known = known + (tl.load(earlier + s * EARLIER + i),)
    for i in tl.static_range(EARLIER):
        tl.store(drafts + s * (EARLIER + 1) + i, known[i])
    tl.store(drafts + s * (EARLIER + 1) + EARLIER, token)
