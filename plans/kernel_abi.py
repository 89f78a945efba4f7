"""The launch arguments of a kernel: which it must have after its tensors, and their values.

The planner writes them into `KernelSpec.params`; the validator, the kernel's text, the compiler's
signature and both launchers read them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from tokenspeed_plan.plans.errors import PlanError
from tokenspeed_plan.plans.ops import integer
from tokenspeed_plan.plans.peer_memory import peer_params
from tokenspeed_plan.plans.schema import KernelSpec, LaunchRole, Param
from tokenspeed_plan.plans.types import RankShift, TensorSpec

Table = TypeVar("Table")
_SCALAR = TensorSpec.of(shape=(), dtype="i32")


def rank_constants(kernel: KernelSpec) -> dict[str, RankShift]:
    """Constants that differ by rank, by name in sorted order."""
    found: dict[str, RankShift] = {}
    for part in kernel.parts:
        found |= part.rank_attrs
    return dict(sorted(found.items()))


def num_ranks(kernel: KernelSpec) -> int:
    """How many ranks meet in the kernel: 1 where it reduces nothing."""
    for part in kernel.parts:
        if part.kind == "all_reduce":
            return integer(part.attrs, "num_ranks")
    return 1


def launch_params(kernel: KernelSpec) -> tuple[Param, ...]:
    """What a launch of this kernel takes after its tensors, in the order of the ABI."""
    params = [_scalar(name, "rank_constant") for name in rank_constants(kernel)]
    ranks = num_ranks(kernel)
    if ranks > 1:
        table = TensorSpec.of(shape=(ranks,), dtype="i64")
        params.append(Param(name="peers", role="peer_table", tensor=table))
        params.append(_scalar("rank", "rank"))
        params.append(_scalar("program", "program"))
    return (*params, _scalar("num_tokens", "num_tokens"), _scalar("num_seqs", "num_seqs"))


def _scalar(name: str, role: LaunchRole) -> Param:
    return Param(name=name, role=role, tensor=_SCALAR)


def with_launch_params(kernel: KernelSpec, scratch: Iterable[Param] = ()) -> KernelSpec:
    """The kernel with `scratch` and peer memory after its tensors; launch parameters come last."""
    peers = peer_params(kernel, num_ranks(kernel))
    params = (*kernel.tensors, *scratch, *peers, *launch_params(kernel))
    return kernel.model_copy(update={"params": params})


def bind_launch(
    kernel: KernelSpec,
    rank: int,
    num_tokens: int,
    num_seqs: int,
    tables: Mapping[str, int | Table] | None = None,
) -> tuple[int | Table, ...]:
    """The values of the launch parameters, in their order.

    Args:
        kernel: what is launched.
        rank: of this process.
        num_tokens: of the batch.
        num_seqs: of the batch.
        tables: by role the table of peers, and the place of the program in its pool; a backend
            without peer memory has none.

    Raises:
        PlanError: the kernel needs a table that the backend does not have.
    """
    shifts = rank_constants(kernel)
    known: dict[str, int | Table] = {"rank": rank, "num_tokens": num_tokens, "num_seqs": num_seqs}
    known |= tables or {}
    values: list[int | Table] = []
    for param in kernel.launch_params:
        if param.role == "rank_constant":
            values.append(shifts[param.name].at(rank))
        elif param.role in known:
            values.append(known[param.role])
        else:
            raise PlanError(
                f"kernel `{kernel.name}` needs a {param.role}, and peers are not mapped here",
                "plan for one GPU, or run with `--backend reference`",
            )
    return tuple(values)
