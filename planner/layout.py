"""How dimensions are cut over the ranks, and which cuts are legal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.types import RankShift

Axis = Literal["attention", "kv", "mlp", "vocab", "experts", "expert_inner"]


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Ranks are numbered `ep_rank * moe_tp + moe_tp_rank`.

    Attention tensor parallelism spans `attention_tp` neighbours, and each of the `attention_dp`
    groups has its own sequences. `context_split` ranks that would hold copies of a KV head divide
    its tokens among them instead.
    """

    attention_tp: int
    moe_tp: int
    moe_ep: int
    attention_dp: int = 1
    context_split: int = 1
    has_experts: bool = field(default=True, compare=False)  # for its words alone

    @property
    def num_ranks(self) -> int:
        """GPUs in the pool."""
        return self.attention_tp * self.attention_dp

    def ways(self, axis: Axis) -> int:
        """Into how many parts an axis is cut."""
        match axis:
            case "experts":
                return self.moe_ep
            case "expert_inner":
                return self.moe_tp
            case "attention" | "kv":
                return self.attention_tp
            case "mlp" | "vocab":
                return self.num_ranks

    def __str__(self) -> str:
        attention = f"attention tp {self.attention_tp}"
        if self.attention_dp > 1:
            attention += f" x dp {self.attention_dp}"
        if self.context_split > 1:
            attention += f" / context {self.context_split}"
        if not self.has_experts:
            return f"{attention}, ffn tp {self.num_ranks}"
        return f"{attention}, moe tp {self.moe_tp} x ep {self.moe_ep}"


@dataclass(frozen=True, slots=True)
class Split:
    """A dimension of `units` equal blocks (heads, channels, experts), shared out along `axis`."""

    axis: Axis
    units: int

    def local_units(self, layout: ParallelLayout) -> int:
        """Blocks on one rank. KV heads are copied where there are more ranks than heads.

        Raises:
            SpecError: the blocks cannot be shared out evenly.
        """
        ways = layout.ways(self.axis)
        if self.units % ways == 0:
            return self.units // ways
        if self.axis == "kv" and ways % self.units == 0:
            return 1
        raise SpecError(
            f"{self.units} {_WHAT[self.axis]} cannot be cut over {ways} GPUs", _HINTS[self.axis]
        )

    def local(self, size: int, layout: ParallelLayout) -> int:
        """The part of a dimension of `size` on one rank."""
        unit_size = size // self.units
        return unit_size * self.local_units(layout)

    def shift(self, size: int, layout: ParallelLayout) -> RankShift:
        """Where a rank's part starts."""
        ways = layout.ways(self.axis)
        step = self.local(size, layout)
        if self.axis == "kv" and ways > self.units:
            copies = ways // self.units
            return RankShift(div=copies, mod=self.units, step=step)
        neighbours = 1
        if self.axis == "experts":
            neighbours = layout.moe_tp
        return RankShift(div=neighbours, mod=ways, step=step)


_WHAT: dict[Axis, str] = {
    "attention": "heads",
    "kv": "kv heads",
    "mlp": "FFN channels",
    "vocab": "vocabulary rows",
    "experts": "experts",
    "expert_inner": "channels of an expert",
}
_COUNT_HINT = "choose a `target.count` that divides the heads of the model"
_MOE_HINT = "choose another `parallelism.moe`"
_HINTS: dict[Axis, str] = {
    "attention": _COUNT_HINT,
    "kv": _COUNT_HINT,
    "mlp": _COUNT_HINT,
    "vocab": _COUNT_HINT,
    "experts": _MOE_HINT,
    "expert_inner": _MOE_HINT,
}


def check_fp8_blocks(inner_size: int, ways: int, what: str, block: int = 128) -> None:
    """Block-scaled FP8 weights can only be cut at multiples of their block.

    Raises:
        SpecError: a part would not be whole blocks.
    """
    if inner_size % ways or inner_size // ways % block:
        raise SpecError(
            f"{what} of {inner_size} channels over {ways} GPUs "
            f"is not whole {block}-wide FP8 blocks",
            "use fewer ways of tensor parallelism, or expert parallelism",
        )
