"""What is legal: layouts for a model, formats for a machine, and what a spec may state."""

from __future__ import annotations

from tokenspeed_plan.planner.layout import ParallelLayout, Split, check_fp8_blocks
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.models.quantization import QUANTISED, WITH_FP8
from tokenspeed_plan.planner.passes.limits import check_positions
from tokenspeed_plan.planner.spec import (
    AttentionSpec,
    DisaggregationSpec,
    MoeSpec,
    ParallelismSpec,
    Spec,
)
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.types import FORMATS, FP4_UNIT


def check_layout(layout: ParallelLayout, config: ModelConfig, weights: str = "bf16") -> None:
    """Refuse an illegal layout, with the model's own numbers, before any graph is built.

    Raises:
        SpecError: the layout does not divide the model.
    """
    for split in _splits(config):
        split.local_units(layout)
    if weights in WITH_FP8:
        _check_fp8(layout, config)
    elif weights == "nvfp4":
        _check_nvfp4(layout, config)


def _splits(config: ModelConfig) -> list[Split]:
    """Every dimension that ranks share out."""
    splits = [
        Split("attention", config.attention.num_qo_heads),
        Split("kv", config.attention.num_kv_heads),
        Split("vocab", config.vocab_size),
    ]
    if config.delta_net:
        splits.append(Split("attention", config.delta_net.num_k_heads))
        splits.append(Split("attention", config.delta_net.num_v_heads))
    dense_size = config.intermediate_size
    if config.moe:
        splits.append(Split("experts", config.moe.num_experts))
        splits.append(Split("expert_inner", config.moe.intermediate_size))
        dense_size = config.moe.shared_intermediate_size
    if dense_size:
        splits.append(Split("mlp", dense_size))
    return splits


def _check_fp8(layout: ParallelLayout, config: ModelConfig) -> None:
    """Each rank's part of a matrix must be whole blocks of the published FP8 checkpoints."""
    attention = config.attention
    heads = [(attention.num_qo_heads, attention.head_dim, "query heads")]
    if config.delta_net:
        delta = config.delta_net
        heads.append((delta.num_k_heads, delta.key_dim, "key heads"))
        heads.append((delta.num_v_heads, delta.value_dim, "value heads"))
    for count, size, what in heads:
        check_fp8_blocks(count * size, layout.attention_tp, f"{count} {what}")
    kv_heads = Split("kv", attention.num_kv_heads).local_units(layout)
    check_fp8_blocks(kv_heads * attention.head_dim, 1, f"{kv_heads} kv heads")
    if config.moe is None:
        check_fp8_blocks(config.intermediate_size, layout.num_ranks, "the FFN")
        return
    check_fp8_blocks(config.moe.intermediate_size, layout.moe_tp, "an expert")
    shared_size = config.moe.shared_intermediate_size
    if shared_size:
        check_fp8_blocks(shared_size, layout.num_ranks, "the shared expert")


def _check_nvfp4(layout: ParallelLayout, config: ModelConfig) -> None:
    """Each rank's part of a row of an NVFP4 matrix must be whole runs of elements."""
    size, ways, what = config.intermediate_size, layout.num_ranks, "the FFN"
    if config.moe:
        size, ways, what = config.moe.intermediate_size, layout.moe_tp, "an expert"
    if size % ways or size // ways % FP4_UNIT[1]:
        raise SpecError(
            f"{what} of {size} channels over {ways} GPUs is not whole runs of {FP4_UNIT[1]} "
            "NVFP4 elements",
            "use fewer ways of tensor parallelism, or expert parallelism",
        )


def check_formats(weights: str, hardware: HardwareSpec) -> None:
    """Refuse weights that the machine cannot multiply.

    Raises:
        SpecError: its tensor cores do not know the format.
    """
    rates = hardware.matrix_flops_per_s
    if weights not in QUANTISED or FORMATS["fp8"].dtype in rates:
        return  # NVFP4 is made plain before it is multiplied, also where tensor cores know it
    if hardware.sm == 0:
        return  # bodies in PyTorch read it anywhere
    words = sorted(("bf16", "fp8", "nvfp4"))
    known = ", ".join(word for word in words if FORMATS[word].dtype in rates)
    raise SpecError(
        f"{hardware.name} has no matrix rate for {weights} weights", f"it multiplies {known}"
    )


def matches(layout: ParallelLayout, asked: ParallelismSpec) -> bool:
    """Whether a layout has everything that a spec states."""
    stated: list[tuple[int | None, int]] = []
    if asked.attention:
        stated += [
            (asked.attention.tp, layout.attention_tp),
            (asked.attention.dp, layout.attention_dp),
            (asked.attention.context_split, layout.context_split),
        ]
    if asked.moe:
        given = asked.moe.model_fields_set
        if "tp" in given:
            stated.append((asked.moe.tp, layout.moe_tp))
        if "ep" in given:
            stated.append((asked.moe.ep, layout.moe_ep))
    return all(value is None or value == actual for value, actual in stated)


def check_possible(spec: Spec, config: ModelConfig) -> None:
    """Refuse a spec that states what the model or the GPUs cannot do, whoever runs it.

    Raises:
        SpecError: names the key, both values, and what to write.
    """
    check_positions(spec.workload, config)
    if spec.draft_vocab:
        _check_draft_vocab(spec.draft_vocab, spec.target.count, config)
    if spec.stated_depth and not config.num_mtp_layers:
        raise _nothing_drafts(config)
    if spec.serving and spec.serving.checkpoint_tokens == 0 and not config.has_state:
        raise SpecError(
            f"`serving.checkpoint_tokens` is 0, but `{config.name}` has no recurrent state: "
            "its prefix cache keeps pages, which need no checkpoints",
            "leave it out; `tokenspeed run --no-cache` computes every prompt from its beginning",
        )
    if spec.serving and spec.serving.checkpoint_tokens == 0 and spec.workload.shared_tokens:
        raise SpecError(
            f"`workload.shared_prompt_tokens` is {spec.workload.shared_tokens}, but with "
            "`serving.checkpoint_tokens` 0 each row computes and holds them",
            "leave one of the two out",
        )
    if spec.stored_state and not config.has_state:
        raise SpecError(
            f"`serving.state` is {spec.stored_state}, but `{config.name}` has no recurrent state",
            "leave it out",
        )
    if not isinstance(spec.disaggregation, str):
        _check_pools(spec.disaggregation, spec.target.count)


def _nothing_drafts(config: ModelConfig) -> SpecError:
    message = f"`{config.name}` has no MTP layer to draft with"
    if config.no_drafts_reason:
        message += f": {config.no_drafts_reason}"
    return SpecError(message, "set `speculation: off`")


def _check_pools(asked: DisaggregationSpec, count: int) -> None:
    total = asked.prefill + asked.decode
    if total != count:
        raise SpecError(
            f"`disaggregation` has {asked.prefill} + {asked.decode} = {total} GPUs, "
            f"the target has {count}",
            f"set `target.count` to {total}, or pools that add up to {count}",
        )


def check_stated(spec: Spec, config: ModelConfig) -> None:
    """Refuse a spec that states what cannot be done, or what a plan cannot hold.

    Raises:
        SpecError: names the key, both values, and what to write.
    """
    check_possible(spec, config)
    count = spec.target.count
    if not isinstance(spec.disaggregation, str):
        _check_planned_pools(spec)
        count = spec.disaggregation.decode
    if spec.parallelism == "auto":
        return
    if spec.parallelism.attention:
        _check_attention(spec.parallelism.attention, count)
    if spec.parallelism.moe:
        _check_moe(spec.parallelism.moe, count, config)


def _check_planned_pools(spec: Spec) -> None:
    if spec.serving and spec.serving.checkpoint_tokens == 0:
        raise SpecError(
            "`serving.checkpoint_tokens` is 0, and pools hand over checkpoints of the prefix cache",
            "leave it out, or set `disaggregation: off`",
        )


def _check_draft_vocab(draft_vocab: int, count: int, config: ModelConfig) -> None:
    if draft_vocab > config.vocab_size:
        raise SpecError(
            f"`speculation.draft_vocab` is {draft_vocab}, "
            f"`{config.name}` has {config.vocab_size} tokens",
            "leave it out to draft from all of them",
        )
    if draft_vocab % count:
        raise SpecError(
            f"`speculation.draft_vocab` is {draft_vocab}, which {count} GPUs cannot share",
            f"name a multiple of {count}",
        )


def _check_attention(asked: AttentionSpec, count: int) -> None:
    if asked.tp != count or asked.dp not in (None, 1):
        raise SpecError(
            f"`parallelism.attention.tp` is {asked.tp} on {count} GPUs, "
            "attention data parallelism is not planned yet",
            f"set it to {count}, or `target.count` to {asked.tp}; `tokenspeed predict` prices it",
        )
    if asked.context_split not in (None, 1):
        raise SpecError(
            "`parallelism.attention.context_split` is not planned yet",
            "`tokenspeed predict` prices it",
        )


def _check_moe(asked: MoeSpec, count: int, config: ModelConfig) -> None:
    given = asked.model_fields_set
    tp = asked.tp
    if "tp" not in given:
        tp = count // asked.ep if "ep" in given else count
    ep = asked.ep
    if "ep" not in given:
        ep = count // max(tp, 1)
    if config.moe is None and ep != 1:
        raise SpecError(
            f"`{config.name}` has no experts to spread over {ep} GPUs",
            "leave `parallelism.moe` out",
        )
    if tp * ep != count:
        raise SpecError(
            f"moe tp {tp} x ep {ep} is {tp * ep} GPUs, the target has {count}",
            "make their product the count",
        )


_NO_DELTA_SM = 120
_SPILLING_HEAD_DIM = 128  # in fp32, the smallest at which attention's kernels spill registers


def check_kernels(weights: str, config: ModelConfig, hardware: HardwareSpec) -> None:
    """Refuse early what is known to have no kernel that fits the GPU.

    The proof is the compiler's, after the search: these refusals save the minutes until then.

    Raises:
        SpecError: some kernel would not fit.
    """
    if hardware.sm == 0:
        return
    if weights == "fp32" and (config.has_state or config.attention.head_dim >= _SPILLING_HEAD_DIM):
        raise SpecError(
            f"`model.weights: fp32` has no kernels that fit {hardware.name}: "
            f"heads of `{config.name}` spill registers",
            "use `bf16`, or `target.gpu: cpu`",
        )
    if hardware.sm == _NO_DELTA_SM and config.has_state:
        raise SpecError(
            f"`{config.name}` has Gated DeltaNet layers, whose prefill kernel spills registers on "
            f"{hardware.name} (sm_{hardware.sm})",
            "name another GPU; `tokenspeed predict` and `plan --no-compile` need no kernels",
        )
