"""sample

sample: next_tokens = argmax(logits), or a sample after top-k and top-p
Source: top-k and top-p (arXiv:1904.09751) by bisection over ordered keys;
SplitMix64 (Steele et al., OOPSLA 2014)

Grid: (row of logits, part of the vocabulary). One program finds the best token of its part; the
last of a row to end draws the token.
VOCAB logits a row, VALID of them tokens of the model, BLOCK at a time, PARTS parts of PART_SIZE;
INDEX_BITS bits of a key hold the token; `s` counts rows, `v` tokens. QUERY_LEN rows a sequence.
"""

import triton
import triton.language as tl


@triton.jit
def _key(x, v, INDEX_BITS: tl.constexpr):
    """An integer for each logit: larger for a better one, and among equals for the first one."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return ordered * (1 << INDEX_BITS) + ((1 << INDEX_BITS) - 1 - v)


@triton.jit
def _mass(
    row,
    key,
    best,
    temperature,
    COUNT: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """The sum of exp((x - best) / temperature), or the count, of the tokens from `key` up."""
    mass = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, VALID, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VALID, other=float("-inf")).to(tl.float32)
        p = tl.full([BLOCK], 1.0, tl.float32) if COUNT else tl.exp((x - best) / temperature)
        mass += tl.where((_key(x, v, INDEX_BITS) >= key) & (v < VALID), p, 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _largest(
    row,
    target,
    best,
    temperature,
    COUNT: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """The largest key whose mass is over `target`: a position in sorted order, without sorting."""
    key = tl.full([], 0, tl.int64)
    bit = tl.full([], 1 << (INDEX_BITS + 31), tl.int64)
    for _ in range(INDEX_BITS + 32):
        reached = (
            _mass(row, key + bit, best, temperature, COUNT, VALID, BLOCK, INDEX_BITS) > target
        )
        key = tl.where(reached, key + bit, key)
        bit = bit // 2
    return key


@triton.jit
def _mix(x, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    """One round of SplitMix64."""
    return (x ^ (x >> SHIFT)) * FACTOR


@triton.jit
def _uniform(seed, rng_offset):
    """A number in [0, 1), the same for the same seed and offset."""
    x = (
        seed.to(tl.uint64, bitcast=True)
        + (rng_offset + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    )
    x = _mix(_mix(x, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    return ((x ^ (x >> 31)) >> 40).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def sample(
    logits,  # input, bf16 [num_tokens, 248320]
    temperature,  # input, fp32 [num_seqs]
    top_p,  # input, fp32 [num_seqs]
    top_k,  # input, i32 [num_seqs]
    seed,  # input, i64 [num_seqs]
    rng_offset,  # input, i64 [num_seqs]
    next_tokens,  # output, i32 [num_tokens]
    bests,  # scratch, fp32 [num_tokens, 31]
    tokens,  # scratch, i32 [num_tokens, 31]
    counters,  # scratch, i32 [num_tokens, 1]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 8192
    BLOCK_P: tl.constexpr = 32
    INDEX_BITS: tl.constexpr = 20
    PARTS: tl.constexpr = 31
    PART_SIZE: tl.constexpr = 8192
    QUERY_LEN: tl.constexpr = 5
    VALID: tl.constexpr = 248320
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
    temp = tl.load(temperature + s // QUERY_LEN)
    if temp > 0.0:
        # Keep the best `count` tokens, of those the first that hold `share` of the mass, and of
        # those take the one where the running mass passes a uniform number. Each limit is a key; a
        # larger key is a better token.
        floor = tl.full([], 0, tl.int64)
        count = tl.load(top_k + s // QUERY_LEN)
        if (count > 0) & (count < VALID):
            floor = _largest(row, count - 0.5, best, temp, True, VALID, BLOCK, INDEX_BITS)
        share = tl.load(top_p + s // QUERY_LEN)
        mass = _mass(row, floor, best, temp, False, VALID, BLOCK, INDEX_BITS)
        if share < 1.0:
            # Slightly under `share`, so that rounding does not admit one token more.
            target = tl.maximum(share * mass * 0.9999999, 0.0)
            floor = tl.maximum(
                floor, _largest(row, target, best, temp, False, VALID, BLOCK, INDEX_BITS)
            )
            mass = _mass(row, floor, best, temp, False, VALID, BLOCK, INDEX_BITS)
        target = (
            tl.minimum(
                _uniform(
                    tl.load(seed + s // QUERY_LEN),
                    tl.load(rng_offset + s // QUERY_LEN) + s % QUERY_LEN,
                ),
                0.9999999,
            )
            * mass
        )
        key = _largest(row, target, best, temp, False, VALID, BLOCK, INDEX_BITS)
        drawn = ((1 << INDEX_BITS) - 1 - key % (1 << INDEX_BITS)).to(tl.int32)
        # Of NaN or infinity there is no distribution: take the best token.
        token = tl.where((mass > 0.0) & (mass < float("inf")), drawn, token)
    tl.store(next_tokens + s, token)
