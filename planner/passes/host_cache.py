"""The second tier of the prefix cache: how much of the host's memory, cut how, and when it pays.

Conversations that the GPU has no room for stay on the host. A turn that comes back has its keys and
its state copied, which takes the bytes over the rate of the link, in place of computing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed_plan.planner.ledger import AS_STATED, Ledger
from tokenspeed_plan.planner.machines.hardware import HardwareSpec
from tokenspeed_plan.planner.machines.target import HOST_STAGING_BYTES
from tokenspeed_plan.planner.passes.limits import ENDS_PER_CONVERSATION
from tokenspeed_plan.planner.passes.lower import LoweredProgram
from tokenspeed_plan.planner.spec import Spec, WorkloadSpec
from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.schema import ArenaName, Capacity, HostCache
from tokenspeed_plan.plans.types import GIB


@dataclass(frozen=True, slots=True)
class HostPrices:
    """What a conversation takes on the host of a rank, and what it saves.

    Attributes:
        page_size: tokens of a page.
        page_bytes, state_bytes: in all layers; no state where the model has none.
        bytes_per_s: of the link, in one direction.
        token_us: of computing a token of a prompt, in the largest program.
    """

    page_size: int
    page_bytes: int
    state_bytes: int
    bytes_per_s: float
    token_us: float

    @classmethod
    def of(
        cls, programs: Sequence[LoweredProgram], capacity: Capacity, hardware: HardwareSpec
    ) -> HostPrices:
        """Those of the programs of a pool."""
        return cls(
            capacity.page_size,
            slot_bytes(programs, "kv_cache"),
            slot_bytes(programs, "state"),
            hardware.host_bytes_per_s,
            token_us(programs),
        )

    @property
    def least_tokens(self) -> int:
        """Tokens from which on a copy takes less than computing them; whole pages, at least one.

        With n of them: state / rate + n * (page / page_size) / rate < n * token_us.
        """
        copied_us = self.page_bytes / self.page_size / self.bytes_per_s * 1e6
        gain_us = self.token_us - copied_us
        if gain_us <= 0:
            raise SpecError(
                f"a copy from the host takes {copied_us:.2f} us a token, computing it "
                f"{self.token_us:.2f} us",
                "leave `serving.host_cache_gib` out: it does not pay here",
            )
        tokens = self.state_bytes / self.bytes_per_s * 1e6 / gain_us
        return max(math.ceil(tokens / self.page_size), 1) * self.page_size

    def conversation_bytes(self, tokens: float) -> float:
        """A conversation of so many tokens, with the states where its last turns ended."""
        pages = math.ceil(tokens / self.page_size)
        return pages * self.page_bytes + ENDS_PER_CONVERSATION * self.state_bytes

    def copied_ms(self, tokens: float) -> float:
        """Copying what a turn begins with after so many tokens."""
        size_bytes = tokens / self.page_size * self.page_bytes + self.state_bytes
        return size_bytes / self.bytes_per_s * 1e3


def plan_host_cache(size_bytes: int, tokens: float, prices: HostPrices) -> HostCache:
    """Cut memory of the host into pages and states, for conversations of `tokens` tokens.

    Raises:
        SpecError: not one conversation fits, or copies do not pay.
    """
    each_bytes = prices.conversation_bytes(tokens)
    conversations = size_bytes / each_bytes
    if conversations < 1:
        raise SpecError(
            f"`serving.host_cache_gib` is {size_bytes / GIB:g}, a conversation of {tokens:.0f} "
            f"tokens takes {each_bytes / GIB:.2f} on each rank",
            "raise it, or leave it out",
        )
    num_states = 0
    if prices.state_bytes:
        num_states = int(conversations * ENDS_PER_CONVERSATION)
    num_pages = (size_bytes - num_states * prices.state_bytes) // prices.page_bytes
    return HostCache(
        num_pages=num_pages,
        num_states=num_states,
        page_bytes=prices.page_bytes,
        state_bytes=prices.state_bytes,
        staging_pages=min(max(HOST_STAGING_BYTES // prices.page_bytes, 1), num_pages),
        least_tokens=prices.least_tokens,
        bytes_per_s=prices.bytes_per_s,
    )


def choose_host_cache(
    ledger: Ledger, spec: Spec, workload: WorkloadSpec, prices: HostPrices, has_two_pools: bool
) -> HostCache | None:
    """What is kept on the host, if the spec wants that; recorded where turns come back.

    Raises:
        SpecError: as `plan_host_cache`, or the deployment has two pools.
    """
    size_bytes, cache = spec.host_cache_bytes, None
    if size_bytes and has_two_pools:
        raise SpecError(
            "`serving.host_cache_gib` is for one pool, this deployment has two",
            "write `disaggregation: off`, or leave it out",
        )
    if size_bytes:
        cache = plan_host_cache(size_bytes, workload.mean_conversation_tokens, prices)
    if size_bytes or workload.turns > 1:
        _record(ledger, workload, prices, cache)
    return cache


def _record(
    ledger: Ledger, workload: WorkloadSpec, prices: HostPrices, cache: HostCache | None
) -> None:
    """Write down what is kept on the host, or what that would take and save."""
    tokens = workload.mean_conversation_tokens
    each_bytes = prices.conversation_bytes(tokens)
    pays = (
        f"{tokens:.0f} tokens of a conversation come back in {prices.copied_ms(tokens):.3g} ms, "
        f"computing them takes {tokens * prices.token_us / 1e3:.3g}; it pays where more than "
        f"{workload.num_seqs} of them take turns"
    )
    if cache is None:
        ledger.record("host_cache", "off", f"no `serving.host_cache_gib`; {pays}")
        return
    size_bytes = cache.size_bytes
    value = f"{size_bytes / GIB:.4g} GiB on each rank, {size_bytes / each_bytes:.4g} conversations"
    reason = (
        f"{AS_STATED}; {cache.num_pages} pages and {cache.num_states} states; {pays}; copied from "
        f"{cache.least_tokens} tokens on"
    )
    ledger.record("host_cache", value, reason)


def token_us(programs: Sequence[LoweredProgram]) -> float:
    """Microseconds to compute a token of a prompt, in the largest program."""
    prompts = [each for each in programs if each.graph.phase == "prefill"]
    largest = max(prompts, key=lambda each: each.bucket)
    return largest.graph.time_us / largest.bucket


def slot_bytes(programs: Sequence[LoweredProgram], arena: ArenaName) -> int:
    """Bytes of a page or of a state slot, in all layers."""
    specs = {
        name: tensor.spec
        for program in programs
        for name, tensor in program.graph.tensors.items()
        if tensor.arena == arena
    }
    return sum(spec.size_bytes() // int(spec.shape[0]) for spec in specs.values())
