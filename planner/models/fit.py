"""A config made to fit the tensors of its checkpoint, as transformers does when it loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from tokenspeed_plan.planner.graph import Weight
from tokenspeed_plan.planner.models.builder import BuildContext
from tokenspeed_plan.planner.models.checkpoint import check_sources, missing_source
from tokenspeed_plan.planner.models.config import FLAT_PREFIX, WRAPPED_PREFIX, ModelConfig
from tokenspeed_plan.planner.models.decoder import build
from tokenspeed_plan.planner.models.mtp import MTP_PREFIX
from tokenspeed_plan.planner.models.quantization import header_encoding
from tokenspeed_plan.planner.models.tensor_header import TensorHeader
from tokenspeed_plan.plans.encodings import Encoding
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import Capacity

_HEAD = "lm_head.weight"
_TABLE = "embed_tokens.weight"
# The weights of a graph do not depend on its sizes; these are the least that draft.
_SMALL = Capacity(
    max_seqs=1,
    max_seq_len=16,
    max_tokens=16,
    page_size=16,
    num_pages=2,
    state_slots_per_seq=3,
    num_state_slots=5,
    default_max_tokens=1,
    checkpoint_interval=16,
    min_checkpoint_tokens=16,
    num_checkpoints=0,
)


def fit_to_tensors(
    config: ModelConfig,
    headers: Mapping[str, TensorHeader],
    fused_experts: Callable[[str], bool],
) -> ModelConfig:
    """The config with what the tensors decide: names, an own head, and whether anything drafts.

    Raises:
        SpecError: a tensor of the model is missing, or is not what the config says.
    """
    config = replace(config, prefix=_prefix(config, headers))
    if _HEAD in headers:
        # transformers ties nothing where both are there and differ; equal ones are the same tied.
        config = replace(config, tie_word_embeddings=False)
    target, drafts = _weights(config, headers, fused_experts)
    check_sources(target, headers, config.quantization)
    if not config.num_mtp_layers:
        return config
    missing = missing_source(drafts, headers)
    if missing is None:
        check_sources(drafts, headers, config.quantization)
        return config
    reason = f"the checkpoint has no tensor `{missing}`, which drafts need"
    return replace(config, num_mtp_layers=0, no_drafts_reason=reason)


def _prefix(config: ModelConfig, headers: Mapping[str, TensorHeader]) -> str:
    """What the names of the tensors begin with.

    Checkpoints of Qwen3.5 have either prefix; those of the other families have none where they were
    saved without a head.
    """
    allowed = [config.prefix, ""]
    if config.has_two_prefixes:
        allowed = [WRAPPED_PREFIX, FLAT_PREFIX]
    found = [prefix for prefix in allowed if f"{prefix}{_TABLE}" in headers]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(
            f"the checkpoint of `{config.name}` has both `{found[0]}{_TABLE}` and "
            f"`{found[1]}{_TABLE}`",
            "keep the tensors of one model",
        )
    tables = sorted(name for name in headers if name.endswith(_TABLE))
    raise SpecError(
        f"the checkpoint of `{config.name}` has no tensor `{allowed[0]}{_TABLE}`, "
        f"its tables are {tables[:3]}",
        "name the tensors as the published checkpoint does",
    )


def stored_encoding(headers: Mapping[str, TensorHeader], name: str) -> Encoding | None:
    """How a matrix of the checkpoint is encoded; of experts, that of the first."""
    return header_encoding(name.replace("{expert}", "0"), headers)


def _weights(
    config: ModelConfig,
    headers: Mapping[str, TensorHeader],
    fused_experts: Callable[[str], bool],
) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """The weights of the model, and those of its MTP layer."""
    depth = min(config.num_mtp_layers, 1)
    context = BuildContext(
        config,
        "bf16",
        _SMALL,
        config.vocab_size,
        fused_experts,
        encoding=partial(stored_encoding, headers),
    )
    weights = build(context, "prefill", depth).weights
    target, drafts = {}, {}
    for name, weight in weights.items():
        if weight.sources[0].name.startswith(MTP_PREFIX):
            drafts[name] = weight
        else:
            target[name] = weight
    return target, drafts
