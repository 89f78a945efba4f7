"""The engine from Python: whole answers, streams, and many callers at once.

python examples/streaming.py plans/frozen/demo-cpu
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tokenspeed_plan.runtime import AsyncEngine, Engine, SamplingParams

PROMPTS = ("def add(a, b):", "import os\n", "class Queue:")


def whole(engine: Engine, params: SamplingParams) -> None:
    """Generate all answers in one batch, in the order of the prompts."""
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    completions = engine.generate(prompts, params)
    for prompt, done in zip(PROMPTS, completions, strict=True):
        print(f"{prompt!r} -> {done.text!r} ({done.finish_reason})")


def growing(engine: Engine, params: SamplingParams) -> None:
    """Print one answer as it grows. Closing the generator early would cancel the request."""
    for delta in engine.stream(engine.tokenizer.encode(PROMPTS[0]), params):
        print(delta.text, end="", flush=True)
    print()


async def together(engine: Engine, params: SamplingParams) -> None:
    """Three requests on one loop; the third is cancelled after five tokens."""
    async with AsyncEngine(engine) as served:
        first, second = (
            served.generate(engine.tokenizer.encode(prompt), params) for prompt in PROMPTS[:2]
        )
        async with served.stream(engine.tokenizer.encode(PROMPTS[2]), params) as answer:
            num_tokens = 0
            async for delta in answer:
                num_tokens += len(delta.token_ids)
                if num_tokens >= 5:
                    break  # leaving the block cancels
        for done in await asyncio.gather(first, second):
            print(f"{len(done.token_ids)} tokens, first after {done.ttft_s * 1e3:.0f} ms")
    assert engine.num_unfinished == 0


def main() -> None:
    """Load a plan and use it in three ways."""
    engine = Engine.load(Path(sys.argv[1]))
    params = SamplingParams(max_tokens=24, stop=("\n\n",))
    whole(engine, params)
    growing(engine, params)
    asyncio.run(together(engine, params))


if __name__ == "__main__":
    main()
