"""commit_state_len

commit_state_len: state_lens = context_lens - R
Source: how many tokens the recurrent states hold: all before those of this step

Grid: one program for all sequences.
QUERY_LEN tokens a sequence, BLOCK sequences at most (a power of two); `s` counts sequences.
"""

import triton
import triton.language as tl


@triton.jit
def commit_state_len(
    context_lens,  # input, i32 [num_seqs]
    state_lens,  # state, i32 [num_seqs]
    num_tokens,  # i32
    num_seqs,  # i32
):
    BLOCK: tl.constexpr = 4
    QUERY_LEN: tl.constexpr = 5
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start
    tl.extra.cuda.gdc_wait()  # results of earlier kernels are visible

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    tl.store(state_lens + s, tl.load(context_lens + s, mask=ok, other=0) - QUERY_LEN, mask=ok)
