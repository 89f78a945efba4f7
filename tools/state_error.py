"""What `serving.state: bf16` costs: the loss on held-out text, and where greedy answers part.

    python tools/state_error.py [SPEC] [--windows 8] [--length 1024] [--answer 256]

SPEC is of a model with weights (the demo model's by default), whose plan is made twice, with state
in fp32 and in bf16, for this computer's CPU. Held-out text goes through decode steps, a token a
step, so that the state is rounded after each; the loss is that of each next token. Then both
answer the first quarter of each window greedily, all at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from train_demo_model import encode_all, read_texts

from tokenspeed_plan.planner.compile import compile_plan, find_model
from tokenspeed_plan.planner.spec import load_spec
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.runtime import Engine, Request, SamplingParams
from tokenspeed_plan.runtime.execution.cpu_threads import limit_threads
from tokenspeed_plan.runtime.execution.inputs import write_inputs
from tokenspeed_plan.runtime.scheduling.batch import Batch
from tokenspeed_plan.runtime.scheduling.sequence import Sequence

SPEC = Path(__file__).parent.parent / "examples/demo/spec.yaml"
STATES = ("fp32", "bf16")


def plan_of(spec_path: Path, state: str, length: int, seqs: int) -> tuple[Plan, Path]:
    """The plan with state in a format, and the model's folder."""
    changes = [
        f"serving.state={state}",
        "speculation=off",
        "target.gpu=cpu",
        f"workload.first_turn_tokens={length}",
        f"workload.concurrency={seqs}",
    ]
    spec = load_spec(spec_path, changes)
    model = find_model(spec, spec_path)
    assert model.folder is not None, "the model has no weights"
    return compile_plan(spec, model), model.folder


def loss_of(plan: Plan, folder: Path, windows: list[list[int]]) -> tuple[float, Tensor]:
    """Nats of each next token on average, and the logits of all places, [places, windows, V].

    All windows go through decode steps side by side, whose tokens are those of the text.
    """
    executor = Engine.from_plan(plan, folder, cache=False).executor
    program = max((p for p in plan.pool.programs if p.phase == "decode"), key=lambda p: p.bucket)
    sequences = [sequence_of(plan, number, ids) for number, ids in enumerate(windows)]
    batch = Batch.of(program, sequences, (1,) * len(sequences))
    size = (batch.run_tokens, batch.run_seqs)
    logits = []
    for place in range(len(windows[0]) - 1):
        for sequence in sequences:
            sequence.num_computed = place
            sequence.state_slot = sequence.own_slots[0] if place else 0
        write_inputs(batch, lambda name: executor.buffer(name, *size), plan.pool.limits)
        executor.run(program, *size)
        logits.append(executor.buffer(program.logits, *size)[: len(windows)].clone())
    logits_TSV = torch.stack(logits)
    next_TS = torch.tensor(windows).T[1:]
    nats = torch.nn.functional.cross_entropy(logits_TSV.flatten(0, 1), next_TS.flatten())
    return nats.item(), logits_TSV


def sequence_of(plan: Plan, number: int, ids: list[int]) -> Sequence:
    """A window with pages and a state slot of its own."""
    pages = -(-len(ids) // plan.pool.limits.page_size)
    return Sequence(
        Request(str(number), tuple(ids), SamplingParams(max_tokens=1)),
        0.0,
        list(ids),
        pages=list(range(number * pages, (number + 1) * pages)),
        own_slots=[1 + number],
    )


def answers_of(
    plan: Plan, folder: Path, windows: list[list[int]], length: int
) -> list[tuple[int, ...]]:
    """Greedy answers after the first quarter of each window, all at once."""
    engine = Engine.from_plan(plan, folder, cache=False)
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    prompts = [ids[: len(ids) // 4] for ids in windows]
    return [tuple(done.token_ids) for done in engine.generate(prompts, params)]


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, nargs="?", default=SPEC)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=256)
    options = parser.parse_args()
    from tokenizers import Tokenizer

    plans = [plan_of(options.spec, state, options.length, options.windows) for state in STATES]
    folder = plans[0][1]
    limit_threads(plans[0][0])
    ids = encode_all(Tokenizer.from_file(str(folder / "tokenizer.json")), read_texts(held_out=True))
    step = max(len(ids) // options.windows, options.length)
    windows = [ids[at : at + options.length].tolist() for at in range(0, len(ids), step)]
    windows = [ids for ids in windows if len(ids) == options.length][: options.windows]
    found = [(*loss_of(plan, folder, windows), plan) for plan, _ in plans]
    (loss, whole_TSV, _), (narrow_loss, narrow_TSV, _) = found
    change = (torch.log_softmax(whole_TSV, -1) - torch.log_softmax(narrow_TSV, -1)).abs()
    top = (whole_TSV.argmax(-1) == narrow_TSV.argmax(-1)).float().mean().item()
    print(f"{len(windows)} windows of {options.length} held-out tokens, state rounded after each")
    print(
        f"loss {loss:.5f} nats with fp32 state, {narrow_loss:.5f} with bf16 "
        f"({narrow_loss - loss:+.5f})"
    )
    print(f"log probabilities differ by {change.mean():.2e} on average, {change.max():.2e} at most")
    print(f"the likeliest next token is the same at {top:.2%} of the places")
    both = [answers_of(plan, folder, windows, options.answer) for plan, _ in plans]
    same = [alike(*pair) for pair in zip(*both, strict=True)]
    whole = sum(count == options.answer for count in same)
    print(
        f"greedy answers of {options.answer} tokens: {whole} of {len(same)} are the same;", end=" "
    )
    print(f"the others part after {sorted(each for each in same if each < options.answer)} tokens")
    size = [plan.pool.memory_bytes_per_rank.state for plan, _ in plans]
    print(f"state: {size[0] / 1e6:.1f} MB and {size[1] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
