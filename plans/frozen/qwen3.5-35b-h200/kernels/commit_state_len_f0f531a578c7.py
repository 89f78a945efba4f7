"""commit_state_len

commit_state_len: state_lens = context_lens - R: so far has `replay` brought the states
Source: how far the states are: up to the rows of this step
"""

import triton
import triton.language as tl


@triton.jit
def commit_state_len(
    context_lens,  # input, i32 [num_seqs]
    state_lens,  # state, i32 [num_seqs]
    num_tokens,
    num_seqs,
):
    BLOCK: tl.constexpr = 4
    ROWS: tl.constexpr = 4
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel may take its place on the machine
    tl.extra.cuda.gdc_wait()  # all before this one is done and visible

    s = tl.arange(0, BLOCK)
    ok = s < num_seqs
    tl.store(state_lens + s, tl.load(context_lens + s, mask=ok, other=0) - ROWS, mask=ok)
