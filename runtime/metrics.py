"""What an engine has done so far, counted where it happens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace


@dataclass(slots=True)
class Metrics:
    """Counters that only grow.

    `hit_tokens` were taken from the prefix cache, `computed_tokens` were not. `host_s` is the time of the steps that
    was spent neither in a replay nor waiting for its tokens. `copied_bytes` counts pages that were copied because a
    request goes on inside a page that others share; recurrent state is never copied.
    """

    steps: int = 0
    decode_steps: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    evicted_checkpoints: int = 0
    evicted_pages: int = 0
    copied_bytes: int = 0
    host_s: float = 0.0

    def copy(self) -> Metrics:
        """The counters as they are now."""
        return replace(self)

    def since(self, before: Metrics) -> Metrics:
        """What has been added since."""
        names = [field.name for field in fields(self)]
        return Metrics(**{name: getattr(self, name) - getattr(before, name) for name in names})

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that did not have to be computed."""
        return self.hit_tokens / max(self.hit_tokens + self.computed_tokens, 1)

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
            "host_us_per_step": self.host_us_per_step,
            "copied_bytes_per_step": self.copied_bytes_per_step,
        }
