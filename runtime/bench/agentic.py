"""Conversations of agents: a long first turn, then short turns on top of the whole history."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime.engine import Engine
from tokenspeed_plan.runtime.request import Completion, Request, SamplingParams

DEFINITIONS = {
    "hit_rate": "prompt tokens that came from the prefix cache, over all prompt tokens",
    "ttft_ms": "from the request to its first token, the median of each turn",
    "tpot_ms": "time after the first token over tokens after the first, the median; without TTFT",
    "turn_time_ms": "from the request to its last token, the median of each turn",
    "tokens_per_pass": "tokens of a sequence in a decode step: over one if drafts are accepted",
    "accept_counts": "decode steps of a sequence, those that accepted the first draft, ...",
    "host_us_per_step": "time of a step that is neither a replay nor waiting for its tokens",
    "state_bytes_copied_per_step": "pages that a turn continues inside; no recurrent state",
}


@dataclass(frozen=True, slots=True)
class Conversations:
    """Random tokens, different in each conversation. All conversations run at once."""

    first_turn_tokens: int
    turn_tokens: int
    turns: int
    output_tokens: int
    conversations: int
    seed: int = 0

    @classmethod
    def of(cls, plan: Plan, **given: int | None) -> Conversations:
        """The conversations of the plan's spec, except for what is given."""
        stated = plan.spec.get("workload")
        workload = stated if isinstance(stated, dict) else {}
        facts = {
            name: _mean_length(workload.get(name, default), default)
            for name, default in _DEFAULTS.items()
        }
        facts["conversations"] = plan.pool.limits.max_seqs
        return cls(**facts | {name: value for name, value in given.items() if value is not None})


_DEFAULTS = {"first_turn_tokens": 2048, "turn_tokens": 0, "turns": 1, "output_tokens": 512}


def _mean_length(stated: Any, default: int) -> Any:
    """The tokens that a spec states, or the mean of those that vary."""
    if not isinstance(stated, dict):
        return stated
    mean = stated.get("mean")
    return round(mean) if isinstance(mean, float) else default


@dataclass(slots=True)
class _Conversation:
    """One of them: its tokens so far, and the completion of each turn."""

    token_ids: list[int]
    turns: list[Completion] = field(default_factory=list)


def simulate(engine: Engine, acceptance: Sequence[float]) -> None:
    """Accept each draft at random from now on; the tokens are then nonsense.

    Args:
        engine: drafts.
        acceptance: the chance that the i-th draft is accepted, from 0 to 1.

    Raises:
        RequestError: the plan does not make as many drafts, or a chance is not from 0 to 1.
    """
    depth = engine.plan.pool.limits.max_depth
    if not 0 < len(acceptance) <= depth or not all(0 <= chance <= 1 for chance in acceptance):
        given = ",".join(f"{chance:g}" for chance in acceptance)
        raise RequestError(
            f"an acceptance of {given} does not fit drafts of depth {depth}",
            "give a chance from 0 to 1 for each draft, in a plan that speculates",
        )
    forced = engine.executor.buffer("forced_accept", 0, 0)
    never = [-1.0] * forced.numel()  # 0 means that the draft itself decides
    chances = [chance or -1.0 for chance in acceptance]
    forced.copy_(torch.tensor((chances + never)[: forced.numel()]).view(forced.shape))


def agentic(
    engine: Engine, options: Conversations, acceptance: Sequence[float] = ()
) -> dict[str, Any]:
    """Run all conversations and measure them; `acceptance` is simulated, see `simulate`.

    Raises:
        RequestError: the plan cannot hold such a conversation, or `acceptance` does not fit it.
    """
    if acceptance:
        simulate(engine, acceptance)
    words = _words(engine.vocab_size, options.seed)
    params = SamplingParams(max_tokens=options.output_tokens, ignore_eos=True)
    engine.generate(
        [words(min(options.first_turn_tokens, engine.plan.pool.limits.max_tokens))],
        SamplingParams(max_tokens=2),
    )
    before, counts = asdict(engine.metrics), engine.accept_counts
    begun = time.perf_counter()
    talks = {
        str(i): _Conversation(words(options.first_turn_tokens))
        for i in range(options.conversations)
    }
    for name, talk in talks.items():
        engine.add(Request(name, tuple(talk.token_ids), params))
    while engine.num_unfinished:
        for done in engine.step():
            done.check()
            talk = talks[done.request_id]
            talk.turns.append(done)
            if len(talk.turns) < options.turns:
                talk.token_ids += [*done.token_ids, *words(options.turn_tokens)]
                engine.add(Request(done.request_id, tuple(talk.token_ids), params))
    spent = {name: value - before[name] for name, value in asdict(engine.metrics).items()}
    found = _figures(
        engine, options, list(talks.values()), spent, counts, time.perf_counter() - begun
    )
    return found | {"simulated_acceptance": list(acceptance)}


def _words(vocab_size: int, seed: int) -> Callable[[int], list[int]]:
    random = torch.Generator().manual_seed(seed)
    return lambda count: torch.randint(0, vocab_size, (count,), generator=random).tolist()


def _figures(
    engine: Engine,
    options: Conversations,
    talks: list[_Conversation],
    spent: dict[str, float],
    counts: list[int],
    wall_s: float,
) -> dict[str, Any]:
    turns = list(zip(*(talk.turns for talk in talks), strict=True))
    every = [done for turn in turns for done in turn]
    rests = [done.decode_s / (len(done.token_ids) - 1) for done in every if len(done.token_ids) > 1]
    prompts = sum(done.num_prompt_tokens for done in every)
    generated = sum(len(done.token_ids) for done in every)
    return {
        "model": engine.plan.model.name,
        "plan": engine.plan.digest,
        "workload": asdict(options),
        "hit_rate": sum(done.num_cached_tokens for done in every) / prompts,
        "ttft_ms": [_median_ms([done.ttft_s for done in turn]) for turn in turns],
        "turn_time_ms": [
            _median_ms([done.ttft_s + done.decode_s for done in turn]) for turn in turns
        ],
        "tpot_ms": _median_ms(rests),
        "tokens_per_s_user": generated / len(talks) / wall_s,
        "tokens_per_s": generated / wall_s,
        "wall_s": wall_s,
        "tokens_per_pass": spent["decode_tokens"] / max(spent["decode_passes"], 1),
        "accept_counts": [now - was for now, was in zip(engine.accept_counts, counts, strict=True)],
        "host_us_per_step": spent["host_s"] / spent["steps"] * 1e6,
        "state_bytes_copied_per_step": spent["copied_bytes"] / spent["steps"],
        **{
            name: spent[name]
            for name in ("steps", "decode_steps", "preemptions", "evicted_checkpoints")
        },
        "definitions": DEFINITIONS,
    }


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3) if seconds else 0.0


def as_text(found: dict[str, Any]) -> str:
    """The figures as text."""
    workload = found["workload"]
    copied_bytes = found["state_bytes_copied_per_step"]
    return "\n".join(
        (
            f"{workload['conversations']} conversations of {workload['turns']} turns: "
            f"{workload['first_turn_tokens']} tokens, then {workload['turn_tokens']} a turn, "
            f"{workload['output_tokens']} out",
            f"  cache: {found['hit_rate']:.1%} of the prompts' tokens, "
            f"{found['evicted_checkpoints']:.0f} evictions, {found['preemptions']:.0f} preemptions",
            f"  TTFT: {_turns_ms(found['ttft_ms'])}",
            f"  TPOT {found['tpot_ms']:.3f} ms; "
            f"a turn {found['turn_time_ms'][-1]:.1f} ms (the last)",
            f"  {found['tokens_per_s_user']:.1f} tokens/s a user, "
            f"{found['tokens_per_s']:.1f} in all; {found['tokens_per_pass']:.2f} a pass"
            f"{_accepted(found)}",
            f"  host {found['host_us_per_step']:.0f} us a step; "
            f"{copied_bytes:.0f} bytes copied a step (pages; recurrent state never)",
        )
    )


def _turns_ms(ttft_ms: list[float]) -> str:
    """The times of the first, the second and the last turn, as far as there are so many."""
    named = [("first turn", ttft_ms[0])]
    if len(ttft_ms) > 1:
        named.append(("second", ttft_ms[1]))
    if len(ttft_ms) > 2:
        named.append(("last", ttft_ms[-1]))
    return ", ".join(f"{name} {ms:.1f} ms" for name, ms in named)


def _accepted(found: dict[str, Any]) -> str:
    """How often each draft was accepted."""
    passes, *accepted = found["accept_counts"] or [0]
    if not accepted:
        return ""
    shares = ", ".join(f"{count / max(passes, 1):.0%}" for count in accepted)
    text = f", drafts accepted: {shares}"
    if found["simulated_acceptance"]:
        text += " (simulated: the tokens are nonsense)"
    return text
