"""Which deployments are tried: layouts, replicas, pools, and the values of each knob."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tokenspeed_plan.planner.advisor.candidate import MAX_POOL_GPUS, Capabilities, Knobs
from tokenspeed_plan.planner.advisor.legality import matches
from tokenspeed_plan.planner.advisor.numbers import ceil_div, powers_of_two
from tokenspeed_plan.planner.layout import ParallelLayout
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.models.config import ModelConfig
from tokenspeed_plan.planner.passes.limits import prefill_chunk
from tokenspeed_plan.planner.spec import ServingSpec, Spec
from tokenspeed_plan.plans.types import DType

DEPTHS = (0, 1, 2, 3, 4)  # drafts a step that are tried
CHUNK_DIVISORS = (1, 2, 4)  # of the machine's default prefill chunk
BATCH_CHUNK = 2  # times it, which may pay where prompts share a chunk


def layouts(num_gpus: int, config: ModelConfig, scope: Capabilities) -> Iterator[ParallelLayout]:
    """Every way to spread a model over so many GPUs, legal or not."""
    has_experts = config.moe is not None
    kv_heads = config.attention.num_kv_heads
    for attention_dp in _divisors(num_gpus, scope.attention_dp):
        attention_tp = num_gpus // attention_dp
        copies = max(attention_tp // kv_heads, 1)
        for split in _divisors(copies, scope.context_split):
            for moe_ep in _divisors(num_gpus, has_experts):
                moe_tp = num_gpus // moe_ep
                yield ParallelLayout(attention_tp, moe_tp, moe_ep, attention_dp, split, has_experts)


def _divisors(value: int, allowed: bool) -> list[int]:
    """The ways to cut `value` evenly; only 1 where no cut is allowed."""
    if not allowed:
        return [1]
    numbers = range(1, value + 1)
    return [number for number in numbers if value % number == 0]


@dataclass(frozen=True)
class SearchSpace:
    """What a spec leaves open, within the capabilities of a search."""

    spec: Spec
    config: ModelConfig
    hardware: HardwareSpec
    scope: Capabilities
    num_gpus: int

    @property
    def has_single_pool(self) -> bool:
        """Whether one pool may do prefill and decode."""
        stated = self.spec.disaggregation
        return isinstance(stated, str) or not self.scope.pools

    @property
    def has_two_pools(self) -> bool:
        """Whether a prefill pool and a decode pool may share the GPUs."""
        asked = self.spec.disaggregation
        if not self.scope.pools or asked == "off":
            return False
        is_open = asked == "auto" and self.spec.workload.is_batch_of_rows
        if is_open and not self.scope.batch_pools:
            return False
        return self.num_gpus > 1

    def pool_layouts(self) -> Iterator[ParallelLayout]:
        """Layouts of a single pool: on all GPUs, or on a part of them where there are replicas."""
        for count in self._pool_sizes():
            yield from self.layouts_of(count)

    def layouts_of(self, count: int) -> Iterator[ParallelLayout]:
        """Layouts of so many GPUs that have what the spec states, legal or not."""
        asked = self.spec.parallelism
        for layout in layouts(count, self.config, self.scope):
            if asked == "auto" or matches(layout, asked):
                yield layout

    def _pool_sizes(self) -> list[int]:
        if not self.scope.replicas:
            return [self.num_gpus]
        sizes = sorted({*powers_of_two(self.num_gpus), self.num_gpus})
        if self.spec.parallelism != "auto":
            return sizes
        return [size for size in sizes if size <= MAX_POOL_GPUS]

    def replicas(self, pool_size: int) -> list[int]:
        """Numbers of replicas of a pool: powers of two, and as many as there are GPUs for.

        More of them than users would stand idle.
        """
        if not self.scope.replicas:
            return [1]
        largest = self.num_gpus // pool_size
        numbers = sorted({*powers_of_two(largest), largest})
        workload = self.spec.workload
        enough = [number for number in numbers if number >= workload.num_seqs]
        if enough and workload.arrivals_per_s is None:
            return [number for number in numbers if number <= enough[0]]
        return numbers

    def pool_pairs(self) -> list[tuple[int, int]]:
        """GPUs of the prefill pool and of the decode pool: one of the two is a power of two."""
        asked = self.spec.disaggregation
        if not isinstance(asked, str):
            return [(asked.prefill, asked.decode)]
        num_gpus = min(self.num_gpus, MAX_POOL_GPUS)
        bits = num_gpus.bit_length()
        small = [1 << index for index in range(bits - 1)]
        few_prefill = [(size, num_gpus - size) for size in small]
        smallest = small[: max(bits - 2, 0)]
        few_decode = [(num_gpus - size, size) for size in smallest]
        most = self.scope.pool_gpus
        return [pair for pair in few_prefill + few_decode if max(pair) <= most]

    def default_knobs(self) -> Knobs:
        """The first value of each knob, or what the spec states."""
        return Knobs(
            self._chunks()[0],
            self.hardware.page_size,
            self.spec.stated_depth or 0,
            self._kv_dtypes()[0],
            self._serving.checkpoint_tokens,
        )

    def with_chunks(self, knobs: Knobs) -> list[Knobs]:
        """The knobs with each prefill chunk, the longest first."""
        chunks = sorted({*self._chunks(), *self._equal_parts()}, reverse=True)
        return [replace(knobs, prefill_chunk=chunk) for chunk in chunks]

    def with_depths(self, knobs: Knobs) -> list[Knobs]:
        """The knobs with each number of drafts; none where the spec states it or nothing drafts."""
        if self.spec.stated_depth is not None or not self.config.num_mtp_layers:
            return []
        return [replace(knobs, depth=depth) for depth in DEPTHS]

    def with_kv_dtypes(self, knobs: Knobs) -> list[Knobs]:
        """The knobs with each way to store keys and values."""
        return [replace(knobs, kv_dtype=dtype) for dtype in self._kv_dtypes()]

    @property
    def _serving(self) -> ServingSpec:
        return self.spec.serving or ServingSpec()

    def _chunks(self) -> list[int]:
        """Parts of the machine's default, for rows of a batch on a GPU twice it; longest first.

        None is longer than what waits to be computed.
        """
        workload = self.spec.workload
        stated = self._serving.prefill_chunk
        if stated:
            return [prefill_chunk(stated, workload)]
        default = self.hardware.prefill_chunk
        tried = [default // divisor for divisor in CHUNK_DIVISORS]
        if workload.is_batch_of_rows and self.hardware.sm:
            tried.append(BATCH_CHUNK * default)
        sizes = {prefill_chunk(chunk, workload) for chunk in tried}
        return sorted(sizes, reverse=True)

    def _equal_parts(self) -> set[int]:
        """Chunks of about the default and of twice it that divide the first prompt, in whole pages.

        Else its last step may have but a few tokens. Only where it is longer than a chunk, and
        always as long; rows of a batch share chunks.
        """
        lengths, page = self.spec.workload.prompts, self.hardware.page_size
        default = self.hardware.prefill_chunk
        is_open = self.scope.equal_chunks and self.hardware.sm and not self._serving.prefill_chunk
        is_shared = self.spec.workload.is_batch_of_rows or lengths.varies
        if not is_open or is_shared or lengths.longest <= default:
            return set()
        parts = {max(round(lengths.longest / each), 1) for each in (default, BATCH_CHUNK * default)}
        return {ceil_div(lengths.longest, count * page) * page for count in parts}

    def _kv_dtypes(self) -> list[DType]:
        """FP8 keys and values change answers a little, so `auto` must be written."""
        stated = self._serving.kv_dtype
        if stated == "auto":
            return list(self.scope.kv_dtypes)
        return [stated or "bf16"]
