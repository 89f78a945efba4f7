"""sample

sample: next_tokens = argmax(logits), or a sample after top-k and top-p
Source: top-k and top-p (arXiv:1904.09751) by a search over ordered logits, without sorting;
SplitMix64 (Steele et al., OOPSLA 2014)

Grid: (row of logits, part of the vocabulary). One program finds the best token of its part; the
last of a row to end draws the token.
VOCAB logits a row, VALID of them tokens of the model, BLOCK at a time, PARTS parts of PART_SIZE;
`s` counts rows, `v` tokens. QUERY_LEN rows a sequence.
The order of tokens: the larger logit first, and among equals the smaller token.
"""

import triton
import triton.language as tl


@triton.jit
def _key(x):
    """An integer for each logit, larger for a larger one."""
    bits = x.to(tl.int16, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits).to(tl.int64) + 0x8000


@triton.jit
def _logit(key):
    """The logit of a key."""
    bits = key - 0x8000
    bits = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    return (bits << 16).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, best, temperature, COUNT: tl.constexpr):
    """What a logit counts: exp((x - best) / temperature), or one."""
    return tl.zeros_like(x) + 1.0 if COUNT else tl.exp((x - best) / temperature)


@triton.jit
def _masses(
    row,
    key,
    step,
    best,
    temperature,
    COUNT: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of the weights from `key` + 1, 2 and 3 `step` up."""
    one = tl.zeros([BLOCK], tl.float32)
    two = tl.zeros([BLOCK], tl.float32)
    three = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, VALID, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VALID, other=float("-inf"))
        above = _key(x) - key
        weight = tl.where(v < VALID, _weight(x.to(tl.float32), best, temperature, COUNT), 0.0)
        one += tl.where(above >= step, weight, 0.0)
        two += tl.where(above >= 2 * step, weight, 0.0)
        three += tl.where(above >= 3 * step, weight, 0.0)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _first_over(
    row,
    target,
    best,
    temperature,
    COUNT: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In order, the first token at which the sum of the weights is over `target`.

    Gives its key, itself, and the sum up to it.
    """
    # The largest key whose sum is over `target`, two bits at a time; `before`: the sum above it.
    key = tl.full([], 0, tl.int64)
    step = tl.full([], 1 << 14, tl.int64)
    before = tl.full([], 0.0, tl.float32)
    for _ in range(8):
        one, two, three = _masses(row, key, step, best, temperature, COUNT, VALID, BLOCK)
        before = tl.where(three > target, before, three)
        before = tl.where(two > target, before, two)
        before = tl.where(one > target, before, one)
        over = (one > target).to(tl.int64) + (two > target).to(tl.int64)
        key += (over + (three > target).to(tl.int64)) * step
        step = step // 4
    # Of the tokens with this key the first `count`.
    weight = tl.maximum(_weight(_logit(key), best, temperature, COUNT), 1e-37)
    count = (tl.minimum(tl.maximum((target - before) / weight, 0.0), 1e9) + 1.0).to(tl.int32)
    seen = tl.full([], 0, tl.int32)
    token = tl.full([], 0, tl.int32)
    for v0 in range(0, VALID, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VALID, other=float("-inf"))
        equal = ((_key(x) == key) & (v < VALID)).to(tl.int32)
        found = tl.sum(equal, 0)
        if (found > 0) & (seen < count):
            is_taken = (equal > 0) & (seen + tl.cumsum(equal, 0) <= count)
            token = tl.maximum(token, tl.max(tl.where(is_taken, v, 0), 0))
        seen += found
    return key, token, before + tl.minimum(count, seen).to(tl.float32) * weight


@triton.jit
def _mass(
    row,
    key,
    token,
    best,
    temperature,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the weights up to a token."""
    mass = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, VALID, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < VALID, other=float("-inf"))
        is_before = (_key(x) > key) | ((_key(x) == key) & (v <= token))
        weight = _weight(x.to(tl.float32), best, temperature, False)
        mass += tl.where(is_before & (v < VALID), weight, 0.0)
    return tl.sum(mass, 0)


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
        # those take the one where the running mass passes a uniform number.
        count = tl.load(top_k + s // QUERY_LEN)
        key, last = tl.full([], -1, tl.int64), tl.full([], VALID, tl.int32)
        if (count > 0) & (count < VALID):
            key, last, _ = _first_over(row, count - 0.5, best, temp, True, VALID, BLOCK)
        total = _mass(row, key, last, best, temp, VALID, BLOCK)
        mass = total
        share = tl.load(top_p + s // QUERY_LEN)
        if share < 1.0:
            # Slightly under `share`, so that rounding does not admit one token more.
            target = tl.maximum(share * mass * 0.9999999, 0.0)
            key, last, mass = _first_over(row, target, best, temp, False, VALID, BLOCK)
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
        key, drawn, _ = _first_over(row, target, best, temp, False, VALID, BLOCK)
        # Of NaN or infinity there is no distribution: take the best token.
        token = tl.where((total > 0.0) & (total < float("inf")), drawn, token)
    tl.store(next_tokens + s, token)
