"""Limits that are possible, and programs that serve all of them."""

from __future__ import annotations

from tokenspeed_plan.plans.schema import Limits, Plan, Pool, Program
from tokenspeed_plan.plans.types import Phase
from tokenspeed_plan.plans.validate.refusal import refuse

_MAY_BE_ZERO = {"num_checkpoints", "kept_inputs"}


def check_limits(plan: Plan, pool: Pool) -> None:
    """The limits of a pool fit together and its programs reach them.

    Raises:
        PlanError: naming the limit.
    """
    _check_sizes(pool.limits)
    _check_tokens(pool.limits)
    _check_drafts(pool.limits, pool.programs)
    _check_largest(pool, "prefill", pool.limits.max_tokens)
    if pool.role != "prefill":
        _check_largest(pool, "decode", pool.limits.max_seqs)
    for program in pool.programs:
        _check_bucket(pool.limits, program)


def _check_sizes(limits: Limits) -> None:
    for name, value in limits.model_dump().items():
        if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            raise refuse(f"the limit `{name}` is {value}, not positive")
    slots = 2 + limits.max_seqs * limits.state_slots_per_seq + limits.num_checkpoints
    if limits.num_state_slots != slots:
        raise refuse(
            f"{limits.num_state_slots} state slots for {limits.max_seqs} sequences"
            f" and {limits.num_checkpoints} checkpoints, {slots} are needed"
        )


def _check_tokens(limits: Limits) -> None:
    if limits.checkpoint_interval % limits.page_size != 0:
        raise refuse("checkpoints are not at the ends of pages")
    if limits.interleaved_tokens > limits.max_tokens:
        raise refuse("interleaved_tokens over max_tokens")
    if limits.gathered_tokens > limits.interleaved_tokens:
        raise refuse("gathered_tokens over interleaved_tokens")
    if limits.filled_tokens > limits.max_tokens:
        raise refuse("filled_tokens over max_tokens")
    if limits.num_pages * limits.page_size < limits.max_seq_len:
        raise refuse("a sequence of max_seq_len tokens does not fit the pages")
    if limits.default_max_tokens >= limits.max_seq_len:
        raise refuse("default_max_tokens over max_seq_len")


def _check_drafts(limits: Limits, programs: tuple[Program, ...]) -> None:
    slots = limits.state_slots_per_seq
    kept = limits.kept_inputs
    held = f"{slots} state slots a sequence, {kept} kept inputs"
    deepest = max((program.depth for program in programs), default=0)
    if deepest != limits.max_depth:
        raise refuse(f"{held} for {deepest} drafts")
    if kept and slots != 2:
        raise refuse(f"{held}: two slots are enough")


def _check_largest(pool: Pool, phase: Phase, limit: int) -> None:
    in_phase = [program for program in pool.programs if program.phase == phase]
    largest = max((program.bucket for program in in_phase), default=0)
    if largest != limit:
        raise refuse(f"the largest {phase} bucket is {largest}, the limit {limit}")


def _check_bucket(limits: Limits, program: Program) -> None:
    limit = limits.max_seqs
    if program.phase == "prefill":
        limit = limits.max_tokens
    what = f"program {program.name}"
    bucket = program.bucket
    seqs = program.max_seqs
    in_limits = 0 < bucket <= limit and 0 < seqs <= limits.max_seqs
    if not in_limits:
        raise refuse(f"{what} is over the limits")
    tokens = bucket * program.query_len
    if program.max_tokens != tokens:
        raise refuse(f"{what} has {program.max_tokens} tokens, not {tokens}")
    needed = min(bucket, limits.max_seqs)
    if seqs != needed:
        raise refuse(f"{what} has {seqs} sequences, not {needed}")
