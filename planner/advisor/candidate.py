"""A deployment: its layout and its knobs; and which deployments the runtime can replay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.passes.limits import checkpoint_spacing
from tokenspeed_plan.planner.spec import MAX_DRAFTS
from tokenspeed_plan.plans.types import DType

# Pools of more GPUs are not searched: their networks were never measured. There may be replicas.
MAX_POOL_GPUS = 64


@dataclass(frozen=True, slots=True, order=True)
class Knobs:
    """What is chosen beside the layout.

    Attributes:
        prefill_chunk: tokens of a prompt that are computed at once.
        page_size: tokens in a page of keys and values.
        depth: drafts that a step verifies.
        kv_dtype: `fp8`, or `bf16` for keys and values in the dtype of the weights.
        checkpoint_tokens: tokens between two checkpoints of recurrent state in a prompt; None for
            one at the end of each chunk. In both cases the ends of prompts and answers, where the
            next turn starts, have checkpoints too. 0 keeps none at all: each turn computes its
            whole prompt.
    """

    prefill_chunk: int
    page_size: int
    depth: int = 0
    kv_dtype: DType = "bf16"
    checkpoint_tokens: int | None = None

    def with_chunk(self, tokens: int | None) -> Knobs:
        """The same with another prefill chunk, where one is given."""
        return replace(self, prefill_chunk=tokens) if tokens else self

    @property
    def spacing(self) -> int:
        """Tokens between two checkpoints of a prompt, 0 for none."""
        return checkpoint_spacing(self.checkpoint_tokens, self.prefill_chunk, self.page_size)

    def __str__(self) -> str:
        parts = [f"chunk {self.prefill_chunk}"]
        if self.depth:
            parts.append(f"{self.depth} drafts")
        if self.kv_dtype != "bf16":
            parts.append(f"{self.kv_dtype} kv")
        if self.checkpoint_tokens is not None:
            parts.append(f"checkpoints each {self.checkpoint_tokens}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One deployment: replicas of one pool, or of a decode pool with a prefill pool beside it."""

    layout: ParallelLayout
    knobs: Knobs
    prefill: ParallelLayout | None = None
    replicas: int = 1

    @property
    def num_gpus(self) -> int:
        """All GPUs of the deployment."""
        ranks = self.layout.num_ranks
        if self.prefill:
            ranks += self.prefill.num_ranks
        return self.replicas * ranks

    @property
    def layouts(self) -> str:
        """The pools and their layouts in words."""
        pools = str(self.layout)
        if self.prefill:
            pools = f"prefill {self.prefill}; decode {self.layout}"
        if self.replicas > 1:
            return f"{self.replicas} x ({pools})"
        return pools

    def __str__(self) -> str:
        return f"{self.layouts}; {self.knobs}"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a deployment may use.

    `tokenspeed plan` searches within what a plan can hold (`SUPPORTED`); `predict` and `sweep`
    search among everything that is modelled (`ALL`).

    Two pools that a search finds have at most `pool_gpus` each; a spec may state larger ones, which
    were measured on no GPUs yet. They are found by a search for rows of a batch only with
    `batch_pools`: such a run is priced from its first row to its last in one pool alone,
    so that a plan has two only where the spec states them. With `equal_chunks` a chunk may divide a
    prompt.
    """

    attention_dp: bool = False
    context_split: bool = False
    pools: bool = False
    pool_gpus: int = 1
    batch_pools: bool = False
    replicas: bool = False
    max_drafts: int = 0
    kv_dtypes: tuple[DType, ...] = ("bf16",)
    max_streams: int = 1
    equal_chunks: bool = True

    def missing(self, candidate: Candidate) -> list[str]:
        """What a deployment needs beyond these capabilities, in words."""
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


SUPPORTED = Capabilities(pools=True, max_drafts=MAX_DRAFTS, kv_dtypes=("bf16", "fp8"))
ALL = Capabilities(
    attention_dp=True,
    context_split=True,
    pools=True,
    pool_gpus=MAX_POOL_GPUS,
    batch_pools=True,
    replicas=True,
    max_drafts=MAX_DRAFTS,
    kv_dtypes=("bf16", "fp8"),
)
# Other engines keep a copy of a key head on each rank that shares it, and know no equal chunks.
OTHER_ENGINE = replace(ALL, context_split=False, equal_chunks=False)
