"""Memory that peers write: the slots of all-reduces inside kernels, and the words that end a wait.

A row of an all-reduce is pushed: each rank writes its part into a slot of every peer, and polls its
own slots until the parts of all peers are there. A slot is empty while it is 0, and no element of a
part is sent as 0 (+0 is sent as -0), so the data is its own flag, whatever its value. Behind the
data is a header, which says which program sent it.

Each row has `GENERATIONS` sets of slots and a running number of its calls: call k uses generation
k mod 3 and empties the one of call k - 1, which it has read. Three suffice, without a meeting:

- A rank that pushes in call k has read the parts that every peer pushed in call k - 1.
- A peer pushed them after it had ended its call k - 2 (calls of a stream run one after the other).
- In call k - 2 it emptied the generation of its call k - 3, which is the one of call k.

With two, the generation of call k would be emptied in call k - 1, perhaps after the push. Rows are
independent of each other, and all programs count the same rows, so this holds from program to
program and from replay to replay, however many rows each of them has.
"""

from __future__ import annotations

from tokenspeed_plan.plans.schema import KernelSpec, Param
from tokenspeed_plan.plans.types import DTYPE_BITS, TensorSpec

PEER_SLOTS = "peer_slots"  # i32 [num_tokens, GENERATIONS, ranks, words of a slot]
PEER_COUNTS = "peer_counts"  # i32 [num_tokens], the running number of each row; only its rank's
PEER_SIGNALS = "peer_signals"  # i32 [NUM_SIGNALS]
GENERATIONS = 3
HEADER_WORDS = 4  # the first says who sent the slot; 16 bytes keep the next slot aligned
MAX_PUSH_PROGRAMS = 256  # of a launch; all of them run at once, since they wait for their peers
COUNT_LIMIT = GENERATIONS << 20  # where the running number begins again, a multiple of generations

STOP = 0  # signal: not 0 ends every wait; set by the runtime, or by a rank that gave up
ERROR = 1  # signal: why this rank gave up, 0 for no reason of its own
NUM_SIGNALS = 8
PEER_SHIFT = 1 << 16  # of an error: (peer + 1) * PEER_SHIFT + number of its program + 1


def slot_words(columns: int, bits: int) -> int:
    """Words of 32 bits of a slot: a row of so many elements, and its header."""
    return columns * bits // 32 + HEADER_WORDS


def peer_params(kernel: KernelSpec, num_ranks: int) -> tuple[Param, ...]:
    """The tensors in peer memory that a kernel with an all-reduce takes, after its other ones.

    A call gives it the buffers of the same names.
    """
    reduced = kernel.reduced_operand
    if reduced is None:
        return ()
    by_name = {param.name: param.tensor for param in kernel.params}
    return tuple(
        Param(name=name, role="symmetric", tensor=spec, access="update")
        for name, spec in peer_specs(by_name[reduced], num_ranks).items()
    )


def peer_specs(reduced: TensorSpec, num_ranks: int) -> dict[str, TensorSpec]:
    """The buffers in peer memory that all-reduces of such tensors need, by name."""
    columns = reduced.bind(0, 0)[-1]
    words = slot_words(columns, DTYPE_BITS[reduced.dtype])
    return {
        PEER_SLOTS: TensorSpec.of(("num_tokens", GENERATIONS, num_ranks, words), "i32"),
        PEER_COUNTS: TensorSpec.of(("num_tokens",), "i32"),
        PEER_SIGNALS: TensorSpec.of((NUM_SIGNALS,), "i32"),
    }


def explain(stop: int, error: int) -> str:
    """What the signals of a rank say, empty where they say nothing.

    Args:
        stop: the word `STOP`.
        error: the word `ERROR`.
    """
    if not stop and not error:
        return ""
    peer, program = error // PEER_SHIFT - 1, error % PEER_SHIFT - 1
    if not error:
        return "another rank gave up, or was told to"
    if program < 0:
        return f"rank {peer} sent nothing"
    return f"rank {peer} replays program {program} of the plan, this rank another one"
