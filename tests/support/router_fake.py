"""A router before fake replicas, as a process: python router_fake.py COUNT [KEY]."""

from __future__ import annotations

import sys
from pathlib import Path

from batch_fake import FakeTokenizer

from tokenspeed_plan.runtime.serving.http import ServerOptions, listen
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.serving.router import (
    Launch,
    RouterOptions,
    on_this_host,
    serve_replicas,
)

REPLICA = Path(__file__).with_name("fake_replica.py")
LIMITS = RequestLimits(max_seq_len=4096, default_max_tokens=8, vocab_size=256)


def main(count: int, key: str | None) -> None:
    environments = [{"REPLICA": str(index)} for index in range(count)]
    start = on_this_host([sys.executable, str(REPLICA), "fake"], environments)
    launch = Launch(count, start, 5.0, key)
    server = ServerOptions(api_key=key, drain_s=5.0)
    options = RouterOptions(server, launch, LIMITS, page_size=16, num_pages=256)
    with listen("127.0.0.1", 0) as listener:
        ready = f"ready at http://127.0.0.1:{listener.getsockname()[1]}/v1"
        serve_replicas(
            options,
            FakeTokenizer(),  # type: ignore[arg-type]
            listener,
            lambda: print(ready, file=sys.stderr, flush=True),
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
