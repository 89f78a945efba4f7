"""What an engine has done so far, counted where it happens."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Metrics:
    """Counters that only grow.

    `hit_tokens` were taken from the prefix cache, `computed_tokens` were not. `host_s` is the time
    of the steps that was spent neither in a replay nor waiting for its tokens. `copied_bytes`
    counts pages that were copied because a request goes on inside a page that others share;
    recurrent state is never copied.

    `decode_passes` counts each sequence of each decode step, `decode_tokens` their new tokens: more
    than one a pass where drafts are accepted. `lost_checkpoints` are ends of answers that were
    found only after the state there was gone. `failed_requests` ended with an error of their own.

    `host_hits` checkpoints were copied back from the host, each for a request, which so began
    `host_hit_tokens` further on than at what the device had. Bytes are those of one rank.
    """

    steps: int = 0
    decode_steps: int = 0
    decode_passes: int = 0
    decode_tokens: int = 0
    lost_checkpoints: int = 0
    failed_requests: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    evicted_checkpoints: int = 0
    evicted_pages: int = 0
    copied_bytes: int = 0
    host_hits: int = 0
    host_hit_tokens: int = 0
    host_stored_bytes: int = 0
    host_loaded_bytes: int = 0
    host_evicted_checkpoints: int = 0
    host_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that did not have to be computed."""
        return self.hit_tokens / max(self.hit_tokens + self.computed_tokens, 1)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a sequence in a decode step."""
        return self.decode_tokens / max(self.decode_passes, 1)

    @property
    def host_us_per_step(self) -> float:
        """Microseconds of host work in a step."""
        return self.host_s / max(self.steps, 1) * 1e6

    @property
    def copied_bytes_per_step(self) -> float:
        """Bytes of state copied in a step."""
        return self.copied_bytes / max(self.steps, 1)

    def as_dict(self) -> dict[str, float]:
        """All counters, and the rates made of them."""
        return asdict(self) | {
            "hit_rate": self.hit_rate,
            "tokens_per_pass": self.tokens_per_pass,
            "host_us_per_step": self.host_us_per_step,
            "copied_bytes_per_step": self.copied_bytes_per_step,
        }
