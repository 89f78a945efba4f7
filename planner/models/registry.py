"""The model families: what a `model_type` says that the rest of a config does not."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Family:
    """Traits of a family.

    Attributes:
        title: its name in messages.
        is_moe: its feed-forward blocks are routed experts.
        has_shared_expert: beside them each token goes through one shared expert.
        has_fused_experts: published checkpoints have one tensor for all experts of a decoder layer.
        has_delta_net: some of its layers are Gated DeltaNet, not full attention.
        has_output_gate: attention's output is multiplied by the sigmoid of a gate.
        has_plain_norms: a norm multiplies by its weight `w`, not by `1 + w`.
        has_packed_projections: DeltaNet's input projections are packed by key head.
        normalizes_top_k: the shares of the chosen experts add up to 1 unless the config objects.
        rotary_share: the part of each head that is rotated where the config does not say it.
        is_wrapped: its text model is under `text_config`; the variants whose `model_type` ends in
            `_text` have nothing around it.
        has_two_prefixes: transformers reads tensors with and without the wrapper's name.
        renames_experts: transformers 5 saves `num_experts` as `num_local_experts`.
        default_mtp_layers: MTP layers of a config that names no number. Where there is a
            checkpoint, its tensors decide.
    """

    title: str
    is_moe: bool = False
    has_shared_expert: bool = False
    has_fused_experts: bool = False
    has_delta_net: bool = False
    has_output_gate: bool = False
    has_plain_norms: bool = False
    has_packed_projections: bool = False
    normalizes_top_k: bool = False
    rotary_share: float = 1.0
    is_wrapped: bool = False
    has_two_prefixes: bool = False
    renames_experts: bool = False
    default_mtp_layers: int = 0


_QWEN3 = Family("Qwen3", has_plain_norms=True)
_QWEN3_MOE = Family("Qwen3 MoE", is_moe=True, has_plain_norms=True, renames_experts=True)
_QWEN3_NEXT = Family(
    "Qwen3-Next",
    is_moe=True,
    has_shared_expert=True,
    has_delta_net=True,
    has_output_gate=True,
    has_packed_projections=True,
    normalizes_top_k=True,
    rotary_share=0.25,
    default_mtp_layers=1,
)
# Qwen3.6 has the same graph and the same `model_type`.
_QWEN3_5 = Family(
    "Qwen3.5",
    has_delta_net=True,
    has_output_gate=True,
    rotary_share=0.25,
    is_wrapped=True,
    has_two_prefixes=True,
)
_QWEN3_5_MOE = Family(
    "Qwen3.5 MoE",
    is_moe=True,
    has_shared_expert=True,
    has_fused_experts=True,
    has_delta_net=True,
    has_output_gate=True,
    normalizes_top_k=True,
    rotary_share=0.25,
    is_wrapped=True,
    has_two_prefixes=True,
)

FAMILIES = {
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": replace(_QWEN3_5, is_wrapped=False),
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_5_moe_text": replace(_QWEN3_5_MOE, is_wrapped=False),
}
