"""Resolve every `auto`, and keep the reason."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed_plan.planner.graph import OpGraph
from tokenspeed_plan.planner.hardware import HardwareSpec
from tokenspeed_plan.planner.layout import ParallelLayout, Split, check_fp8_blocks
from tokenspeed_plan.planner.model_config import ModelConfig
from tokenspeed_plan.planner.spec import ParallelismSpec, Spec, SpeculationSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Decision
from tokenspeed_plan.plans.types import DType


def weight_dtype(spec: Spec) -> DType:
    """The dtype of weights and activations.

    Raises:
        SpecError: a valid word whose kernels do not exist yet.
    """
    word = spec.model.weights
    if word in ("fp8", "nvfp4"):
        raise SpecError(f"`model.weights: {word}` is not planned yet", "use `bf16` or `fp32`")
    return "bf16" if word == "bf16" else "fp32"


def resolve(spec: Spec, config: ModelConfig, hardware: HardwareSpec) -> tuple[ParallelLayout, tuple[Decision, ...]]:
    """The layout, and all decisions with their reasons.

    Raises:
        SpecError: the layout is illegal for this model or not planned yet.
    """
    layout, parallelism = _layout(spec, config)
    _check_legal(layout, config)
    if spec.model.weights == "fp8":
        _check_fp8(layout, config)
    chunk = hardware.prefill_chunk
    return layout, (
        parallelism,
        _speculation(spec, config, hardware),
        _later("disaggregation", "off", spec.disaggregation != "off", "prefill and decode pools are not built yet"),
        Decision(name="page_size", value=str(hardware.page_size), reason=f"default of {hardware.name}"),
        Decision(name="prefill_chunk", value=str(chunk), reason=f"default of {hardware.name}, at most one sequence"),
        _STATE_DTYPE,
        _later("objective", spec.objective.minimize, True, "recorded; one layout is planned, none is searched for yet"),
    )


def speculation_depth(spec: Spec) -> int:
    """Drafts of every decode bucket."""
    return spec.speculation.depth if isinstance(spec.speculation, SpeculationSpec) else 0


def _speculation(spec: Spec, config: ModelConfig, hardware: HardwareSpec) -> Decision:
    depth = speculation_depth(spec)
    if depth == 0:
        return _later("speculation", "off", spec.speculation != "off", "depths are not chosen by cost yet")
    if config.num_mtp_layers == 0:
        raise SpecError(f"`{config.name}` has no MTP layer to draft with", "set `speculation: off`")
    if hardware.sm:
        raise SpecError(
            f"kernels for `speculation.depth: {depth}` on {hardware.name} are not there yet", "set `speculation: off`"
        )
    return Decision(name="speculation", value=f"depth {depth}", reason="as the spec says")


_STATE_DTYPE = Decision(
    name="state_dtype",
    value="fp32",
    reason="bf16 state costs 60 to 90 times the error of a bf16 KV cache",
    runner_up="bf16, half the bytes",
)


def streams(graphs: Sequence[OpGraph]) -> Decision:
    """How many streams each program got, and what that is worth."""
    most = max(graph.num_streams for graph in graphs)
    compared = (graph for graph in graphs if graph.runner_up_us is not None)
    times = [f"{g.phase} {g.time_us:.1f} us, with other streams {g.runner_up_us:.1f}" for g in compared]
    if most == 1:
        reason = "no branch shortens a program by 1 %" if times else "kernels run one after the other"
    else:
        reason = f"{sum(graph.num_streams > 1 for graph in graphs)} of {len(graphs)} programs get shorter"
    return Decision(name="streams", value=str(most), reason=": ".join([reason, *times[-1:]]))


def _later(name: str, value: str, asked: bool, reason: str) -> Decision:
    return Decision(name=name, value=value, reason=reason if asked else "as the spec says")


def _layout(spec: Spec, config: ModelConfig) -> tuple[ParallelLayout, Decision]:
    count = spec.target.count
    if spec.parallelism == "auto":
        layout, reason, second = _auto(count, config)
    else:
        layout, reason, second = _by_hand(spec.parallelism, count, config), "as the spec says", None
    value = f"attention tp {layout.attention_tp}, moe tp {layout.moe_tp} x ep {layout.moe_ep}"
    return layout, Decision(name="parallelism", value=value, reason=reason, runner_up=second)


def _auto(count: int, config: ModelConfig) -> tuple[ParallelLayout, str, str | None]:
    if count == 1:
        return ParallelLayout(1, 1, 1), "one GPU", None
    if config.moe is None:
        return ParallelLayout(count, count, 1), "tensor parallelism reads each weight once over all GPUs", None
    if config.moe.intermediate_size % count == 0:
        return (
            ParallelLayout(count, count, 1),
            "every GPU reads an equal part of each expert that is hit",
            f"moe ep {count}: at batch 1 few GPUs would read whole experts",
        )
    return ParallelLayout(count, 1, count), f"{config.moe.intermediate_size} channels do not divide by {count}", None


def _by_hand(asked: ParallelismSpec, count: int, config: ModelConfig) -> ParallelLayout:
    attention = asked.attention.tp if asked.attention else count
    if attention != count:
        raise SpecError(
            f"`parallelism.attention.tp` is {attention} on {count} GPUs, attention data parallelism is not planned yet",
            f"set it to {count}, or `target.count` to {attention}",
        )
    if asked.moe is None:
        return _auto(count, config)[0]
    given = asked.moe.model_fields_set
    tp = asked.moe.tp if "tp" in given else count // asked.moe.ep if "ep" in given else count
    ep = asked.moe.ep if "ep" in given else count // max(tp, 1)
    if config.moe is None and ep != 1:
        raise SpecError(f"`{config.name}` has no experts to spread over {ep} GPUs", "leave `parallelism.moe` out")
    if tp * ep != count:
        raise SpecError(
            f"moe tp {tp} x ep {ep} is {tp * ep} GPUs, the target has {count}", "make their product the count"
        )
    return ParallelLayout(attention, tp, ep)


def _check_legal(layout: ParallelLayout, config: ModelConfig) -> None:
    """Refuse before any graph is built, so that the message names the model's own numbers."""
    splits = [
        Split("attention", config.attention.num_qo_heads),
        Split("kv", config.attention.num_kv_heads),
        Split("attention", config.delta_net.num_k_heads),
        Split("attention", config.delta_net.num_v_heads),
        Split("vocab", config.vocab_size),
    ]
    if config.moe:
        splits += [Split("experts", config.moe.num_experts), Split("expert_inner", config.moe.intermediate_size)]
    splits.append(Split("mlp", config.moe.shared_intermediate_size if config.moe else config.intermediate_size))
    for split in splits:
        split.local_units(layout)


def _check_fp8(layout: ParallelLayout, config: ModelConfig) -> None:
    """Each rank's part of an FFN must be whole blocks of the published FP8 checkpoints."""
    if config.moe is None:
        check_fp8_blocks(config.intermediate_size, layout.num_ranks, "the FFN")
        return
    check_fp8_blocks(config.moe.intermediate_size, layout.moe_tp, "an expert")
    check_fp8_blocks(config.moe.shared_intermediate_size, layout.num_ranks, "the shared expert")
