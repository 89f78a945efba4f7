"""What can be asked for: layouts and knobs, which of them are legal, and what the runtime replays today."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenspeed_plan.planner.advisor.hardware import HardwareSpec
from tokenspeed_plan.planner.layout import ParallelLayout, Split, check_fp8_blocks
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import checkpoint_spacing
from tokenspeed_plan.planner.spec import MAX_DRAFTS
from tokenspeed_plan.plans.errors import SpecError

KvDtype = Literal["bf16", "fp8"]
DEPTHS = (0, 1, 2, 3, 4)  # that are chosen from
MIN_PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True, order=True)
class Knobs:
    """What is chosen beside the layout.

    `depth` drafts a step; a checkpoint of recurrent state each `checkpoint_tokens` of a prompt
    (None: where a chunk ends) beside those at the ends of prompts and answers, from which the next
    turn starts (0: nothing is kept, each turn computes its whole prompt).
    """

    prefill_chunk: int
    page_size: int
    depth: int = 0
    kv_dtype: KvDtype = "bf16"
    checkpoint_tokens: int | None = None

    @property
    def spacing(self) -> int:
        """Tokens between two checkpoints of a prompt, 0 for none."""
        return checkpoint_spacing(self.checkpoint_tokens, self.prefill_chunk, self.page_size)

    def __str__(self) -> str:
        parts = [f"chunk {self.prefill_chunk}"]
        parts += [f"{self.depth} drafts"] * bool(self.depth) + [f"{self.kv_dtype} kv"] * (
            self.kv_dtype != "bf16"
        )
        parts += [f"checkpoints each {self.checkpoint_tokens}"] * (
            self.checkpoint_tokens is not None
        )
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One deployment: `replicas` of a pool that does everything, or of a prefill pool beside a decode pool."""

    layout: ParallelLayout
    knobs: Knobs
    prefill: ParallelLayout | None = None
    replicas: int = 1

    @property
    def num_gpus(self) -> int:
        """All GPUs that work."""
        return self.replicas * (
            self.layout.num_ranks + (self.prefill.num_ranks if self.prefill else 0)
        )

    @property
    def layouts(self) -> str:
        """Pools and their layouts in words."""
        pools = (
            f"prefill {self.prefill}; decode {self.layout}" if self.prefill else str(self.layout)
        )
        return f"{self.replicas} x ({pools})" if self.replicas > 1 else pools

    def __str__(self) -> str:
        return f"{self.layouts}; {self.knobs}"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a frozen plan can hold today. The search for `tokenspeed plan` keeps to it; `predict` and `sweep` do not."""

    attention_dp: bool = False
    context_split: bool = False
    pools: bool = False
    replicas: bool = False
    max_drafts: int = 0
    kv_dtypes: tuple[KvDtype, ...] = ("bf16",)
    max_streams: int = 1

    def missing(self, candidate: Candidate) -> list[str]:
        """What a candidate needs that the runtime does not replay yet."""
        layout, knobs = candidate.layout, candidate.knobs
        needs = {
            "attention data parallelism": layout.attention_dp > 1 and not self.attention_dp,
            "context split": layout.context_split > 1 and not self.context_split,
            "prefill and decode pools": candidate.prefill is not None and not self.pools,
            "replicas": candidate.replicas > 1 and not self.replicas,
            "speculation": knobs.depth > self.max_drafts,
            f"{knobs.kv_dtype} KV cache": knobs.kv_dtype not in self.kv_dtypes,
        }
        return [need for need, is_missing in needs.items() if is_missing]


SUPPORTED = Capabilities(max_drafts=MAX_DRAFTS)
ALL_CAPABILITIES = Capabilities(True, True, True, True, MAX_DRAFTS, ("bf16", "fp8"))


def layouts(num_gpus: int, config: ModelConfig, scope: Capabilities) -> Iterator[ParallelLayout]:
    """Every way to spread a model over so many GPUs, legal or not."""
    for attention_dp in _divisors(num_gpus) if scope.attention_dp else (1,):
        attention_tp = num_gpus // attention_dp
        copies = max(attention_tp // config.attention.num_kv_heads, 1)
        for split in _divisors(copies) if scope.context_split else (1,):
            for moe_ep in _divisors(num_gpus) if config.moe else (1,):
                yield ParallelLayout(attention_tp, num_gpus // moe_ep, moe_ep, attention_dp, split)


def _divisors(value: int) -> list[int]:
    return [divisor for divisor in range(1, value + 1) if value % divisor == 0]


def check_layout(layout: ParallelLayout, config: ModelConfig, weights: str = "bf16") -> None:
    """Refuse before any graph is built, so that the message names the model's own numbers.

    Raises:
        SpecError: the layout does not divide the model.
    """
    splits = [
        Split("attention", config.attention.num_qo_heads),
        Split("kv", config.attention.num_kv_heads),
        Split("attention", config.delta_net.num_k_heads),
        Split("attention", config.delta_net.num_v_heads),
        Split("vocab", config.vocab_size),
    ]
    if config.moe:
        splits += [
            Split("experts", config.moe.num_experts),
            Split("expert_inner", config.moe.intermediate_size),
        ]
    splits.append(
        Split(
            "mlp", config.moe.shared_intermediate_size if config.moe else config.intermediate_size
        )
    )
    for split in splits:
        split.local_units(layout)
    if weights == "fp8":
        _check_fp8(layout, config)


def _check_fp8(layout: ParallelLayout, config: ModelConfig) -> None:
    """Each rank's part of an FFN must be whole blocks of the published FP8 checkpoints."""
    if config.moe is None:
        check_fp8_blocks(config.intermediate_size, layout.num_ranks, "the FFN")
        return
    check_fp8_blocks(config.moe.intermediate_size, layout.moe_tp, "an expert")
    check_fp8_blocks(config.moe.shared_intermediate_size, layout.num_ranks, "the shared expert")


def check_formats(weights: str, hardware: HardwareSpec) -> None:
    """Refuse weights that the machine cannot multiply.

    Raises:
        SpecError: its tensor cores do not know the format.
    """
    if weights in ("fp8", "nvfp4") and weights not in hardware.matrix_flops_per_s:
        known = ", ".join(sorted({"bf16", "fp8", "nvfp4"} & set(hardware.matrix_flops_per_s)))
        raise SpecError(
            f"{hardware.name} has no matrix rate for {weights} weights", f"it multiplies {known}"
        )
