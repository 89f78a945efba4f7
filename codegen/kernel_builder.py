"""Which rule tiles which kind of kernel, and the kernels that it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenspeed_plan.codegen.attention import attention_tiling as attention
from tokenspeed_plan.codegen.delta_net import delta_net_tiling as delta
from tokenspeed_plan.codegen.dense import dense_tiling as dense
from tokenspeed_plan.codegen.moe import moe_tiling as moe
from tokenspeed_plan.codegen.render import render, source_digest
from tokenspeed_plan.codegen.sampling import sampling_tiling as sampling
from tokenspeed_plan.codegen.speculation import speculation_tiling as speculation
from tokenspeed_plan.codegen.tiling import Machine, Tiling, Work
from tokenspeed_plan.codegen.tuned import Tile
from tokenspeed_plan.plans.canon import kernel_name
from tokenspeed_plan.plans.kernel_abi import with_launch_params
from tokenspeed_plan.plans.schema import KernelSpec, Launch, Param

Rule = Callable[[Work], list[Tiling]]
_LINEAR = (
    "linear",
    "norm_head",
    "head",
    "norm_linear_silu_mul",
    "norm_linear",
    "linear_silu_mul",
    "expert_sum_linear_add",
    "expert_sum_linear",
    "linear_add",
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, dense.linear),
    "grouped_up": moe.grouped,
    "grouped_down": moe.grouped,
    "qk_norm_rope_write": attention.qk_norm_rope_write,
    "k_norm_rope_write": attention.qk_norm_rope_write,
    "attention_gate": attention.attention,
    "attention_only": attention.attention,
    "delta_recompute": delta.delta_recompute,
    "delta_step": delta.delta_step,
    "conv_qk_norm": delta.conv_qk_norm,
    "gates_delta_chunk": delta.gates_delta_chunk,
    "delta_scan": delta.delta_scan,
    "gated_norm": delta.gated_norm,
    "gated_norm_quantise": delta.gated_norm_quantise,
    "topk": moe.topk,
    "moe_up": moe.moe_up,
    "moe_down": moe.moe_down,
    "moe_down_add": moe.moe_down,
    "expert_sort": moe.expert_sort,
    "expert_count": moe.expert_count,
    "expert_place": moe.expert_place,
    "expert_sum": moe.expert_sum,
    "expert_sum_add": moe.expert_sum,
    "embed": dense.embed,
    "embed_norm_concat": speculation.norm_concat,
    "norm_concat": speculation.norm_concat,
    "adjust": sampling.adjust,
    "mask": sampling.mask,
    "sample": sampling.sample,
    "sample_min_p": sampling.sample,
    "advance": sampling.advance,
    "accept": speculation.accept,
    "select_rows": speculation.take_rows,
    "last_rows": speculation.take_rows,
    "draft": speculation.draft,
    "draft_then_place": speculation.draft,
    "shift_tokens": speculation.shift_tokens,
    "commit_state_len": speculation.commit_state_len,
    "advance_rows": speculation.advance_rows,
    "quantise": dense.quantise,
    "norm_quantise": dense.add_norm,
    "add_norm_quantise": dense.add_norm,
    "add_norm": dense.add_norm,
    "rms_norm": dense.add_norm,
    "reduce_add_norm": dense.all_reduce,
    "reduce_norm": dense.all_reduce,
    "reduce": dense.all_reduce,
}
PDL_SM = 90  # programmatic dependent launch from Hopper on


@dataclass(frozen=True, slots=True)
class Built:
    """A kernel and its text, or None where only the reference implements it."""

    kernel: KernelSpec
    source: str | None


def build_kernel(
    kind: str,
    kernel: KernelSpec,
    rows: tuple[int, int],
    hardware: Machine,
    pdl: bool,
    tile: Tile | None = None,
) -> list[Built]:
    """The ways to build a kernel, best first.

    Where only the reference implements it, there is one, without a text.

    Args:
        kind: what it is called.
        kernel: its tensors and parts; scratch and launch parameters are added here.
        rows: tokens and sequences of the program, at most.
        hardware: the target.
        pdl: whether its neighbours are kernels too, so that it may overlap with them.
        tile: the only one to try.
    """
    tensors = [param for param in kernel.tensors if param.role not in ("scratch", "symmetric")]
    unlaunched = kernel.model_copy(update={"params": tuple(tensors)})
    num_tokens, num_seqs = rows
    work = Work(kind, unlaunched, num_tokens, num_seqs, hardware, tile)
    rule = RULES.get(kind)
    if rule is None or work.dtype == "fp64":
        return [Built(_named(kind, unlaunched), None)]
    overlaps = pdl and hardware.sm >= PDL_SM
    return [_built(work, tiling, overlaps) for tiling in rule(work)]


def _built(work: Work, tiling: Tiling, pdl: bool) -> Built:
    prefetches = pdl and tiling.prefetches
    prefetch: tuple[str, ...] = ()
    if prefetches:
        prefetch = tiling.prefetch
    launch = Launch(
        template=tiling.template,
        constants=dict(tiling.constants),
        grid=tiling.grid,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        pdl=pdl,
        prefetch=prefetch,
        trigger_after_wait=pdl and tiling.trigger_after_wait,
        source_sha256="",
    )
    scratch = tuple(
        Param(name=name, role="scratch", tensor=spec, access="update")
        for name, spec in tiling.scratch.items()
    )
    kernel = with_launch_params(work.kernel, scratch)
    options = dict(tiling.options)
    options["prefetches"] = prefetches
    options["num_rows"] = "num_tokens"
    if work.by_seqs:
        options["num_rows"] = "num_seqs"
    text = render(work.kind, kernel, launch, options)
    launch = launch.model_copy(update={"source_sha256": source_digest(text)})
    launched = kernel.model_copy(update={"launch": launch})
    return Built(_named(work.kind, launched), text)


def _named(kind: str, kernel: KernelSpec) -> KernelSpec:
    return kernel.model_copy(update={"name": kernel_name(kind, kernel)})
