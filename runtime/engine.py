"""The engine: load a plan, add requests, step until they are answered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed_plan.plans.bundle import load_plan
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan, Program
from tokenspeed_plan.runtime.arenas import Arenas
from tokenspeed_plan.runtime.collectives import join
from tokenspeed_plan.runtime.executor import Executor
from tokenspeed_plan.runtime.inputs import fill_inputs, input_values
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.preflight import check_files, check_target, find_weights
from tokenspeed_plan.runtime.request import (
    Completion,
    FinishReason,
    NewToken,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from tokenspeed_plan.runtime.scheduler import Batch, Scheduler, Usage
from tokenspeed_plan.runtime.sequence import Sequence
from tokenspeed_plan.runtime.serving.streaming import Delta, stream
from tokenspeed_plan.runtime.tokenizer import Messages, Tokenizer
from tokenspeed_plan.runtime.triton_kernels import Backend, KernelBackend, load_kernels
from tokenspeed_plan.runtime.weights import load_weights


@dataclass(frozen=True, slots=True)
class _Flight:
    """A replay that was launched. `outputs` waits for it: tokens, how many drafts were right, and drafts.

    There are none in the middle of a prompt, so that its next step is prepared while this one is
    computed.
    """

    batch: Batch
    outputs: Callable[[], tuple[list[int], ...]] | None
    logits: Tensor


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a replay says for one sequence: tokens, their logits, and drafts of what comes after them."""

    token_ids: list[int]
    logits: Tensor
    drafts: list[int]


class Engine:
    """One plan on one rank.

    Attributes:
        on_token: is told each token of a request that goes on, from inside `step`.

    Example:
        engine = Engine.load(Path("plans/frozen/demo-cpu"))
        for completion in engine.generate([engine.tokenizer.encode("def add(a, b):")]):
            print(completion.text)
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        chunk: int | None = None,
        cache: bool = True,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.startup_s: dict[str, float] = {}
        self.executor = executor
        self._chunk, self._cache = chunk, cache
        self._scheduler = Scheduler(plan, chunk, cache)
        self.on_token: Callable[[NewToken], object] | None = None
        self._sequences: dict[str, Sequence] = {}
        self._ids = itertools.count()
        self._stop_ids = frozenset(plan.model.eos_token_ids)
        self._last: Batch | None = None
        self._flying: _Flight | None = None
        self._away_s = 0.0
        self.executor.prepare()

    @classmethod
    def load(
        cls,
        bundle: Path,
        weights: Path | None = None,
        chat: Callable[[Messages], str] | None = None,
        backend: Backend | None = None,
        executor: type[Executor] | None = None,
        cache: bool = True,
    ) -> Engine:
        """Read and check a bundle, then its weights, then allocate. `chat` writes messages as a prompt.

        Without a `backend`, a GPU runs the bundle's kernels and a CPU the references. Without
        `cache`, every prompt is computed from its beginning.

        Raises:
            PlanError: the bundle, this machine or the checkpoint does not fit.
        """
        begun = time.perf_counter()
        plan = load_plan(bundle)
        folder = find_weights(plan, bundle, weights)
        read = time.perf_counter()
        wanted = backend or ("reference" if plan.target.device == "cpu" else "kernels")
        kernels = load_kernels(plan, bundle) if wanted == "kernels" else None
        engine = cls.from_plan(plan, folder, chat, backend=kernels, executor=executor, cache=cache)
        engine.startup_s = {
            "read_plan_s": read - begun,
            "read_weights_s": time.perf_counter() - read,
        }
        return engine

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        folder: Path,
        chat: Callable[[Messages], str] | None = None,
        chunk: int | None = None,
        backend: KernelBackend | None = None,
        executor: type[Executor] | None = None,
        cache: bool = True,
    ) -> Engine:
        """From a plan that is checked already; `chunk` lowers the prefill chunk below the planned one."""
        check_target(plan)
        check_files(plan, folder)
        rank, collectives = join(plan)
        arenas, tensors = load_weights(
            plan, folder, lambda: Arenas(plan.pool.arenas, plan.target.device), rank
        )
        tokenizer = Tokenizer.load(folder, chat) if (folder / "tokenizer.json").is_file() else None
        chosen = executor or executor_of(plan)
        return cls(
            plan, chosen(plan, arenas, tensors, rank, collectives, backend), tokenizer, chunk, cache
        )

    def time_startup(self, name: str, work: Callable[[], object]) -> None:
        """Do a part of the start-up and note how long it took."""
        begun = time.perf_counter()
        work()
        self.startup_s[name] = time.perf_counter() - begun

    @property
    def max_seqs(self) -> int:
        """Sequences that run at once."""
        return self.plan.pool.limits.max_seqs

    @property
    def max_seq_len(self) -> int:
        """Prompt and generated tokens of one sequence."""
        return self.plan.pool.limits.max_seq_len

    @property
    def default_max_tokens(self) -> int:
        """Generated tokens where the request names no number."""
        return self.plan.pool.limits.default_max_tokens

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.plan.model.vocab_size

    @property
    def metrics(self) -> Metrics:
        """What it has done so far."""
        return self._scheduler.metrics

    @property
    def accept_counts(self) -> list[int]:
        """Passes of a sequence through a decode step, then those in which the first draft was right, the second too...

        They are kept on the device, and reading them waits for it. Empty where the plan does not
        speculate.
        """
        if not self.plan.pool.limits.max_depth:
            return []
        found: list[int] = self.executor.buffer("accept_counts", 0, 0).tolist()
        return found

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._scheduler.num_unfinished

    @property
    def usage(self) -> Usage:
        """Requests, rows and pages in use; all zero where nothing is left to do."""
        return self._scheduler.usage

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: see `check`; or another one of that name is not finished.
        """
        self.check(request)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        if request.request_id in self._sequences:
            raise RequestError(
                f"request `{request.request_id}` is not finished", "give each request its own id"
            )
        params = request.params
        stop_ids = (frozenset() if params.ignore_eos else self._stop_ids).union(
            params.stop_token_ids
        )
        sequence = Sequence(
            request, time.perf_counter(), list(request.prompt_ids), stop_ids=stop_ids
        )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none. It gets no completion."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.finish_reason = "cancelled"  # what is in flight for it is thrown away
        self._scheduler.cancel(sequence)
        return True

    def step(self) -> list[Completion]:
        """Launch a replay, and take over the one before it; returns the requests that are finished now."""
        begun, self._away_s = time.perf_counter(), 0.0
        finished = self._step()
        self.metrics.host_s += time.perf_counter() - begun - self._away_s
        return finished

    @contextmanager
    def _away(self) -> Iterator[None]:
        """A replay, or waiting for its tokens: no work of the host."""
        begun = time.perf_counter()
        yield
        self._away_s += time.perf_counter() - begun

    def _step(self) -> list[Completion]:
        finished: list[Completion] = []
        if self._flying is not None:
            flying = self._flying
            overlapped = self._scheduler.next_overlapped_batch(flying.batch)
            self._flying = self._launch(overlapped) if overlapped else None
            finished = self._commit(flying)
            if finished or overlapped:
                return finished
        batch = self._scheduler.schedule()
        if batch is not None:
            flying = self._launch(batch)
            if batch.program.captured:
                self._flying = flying
            else:
                finished = self._commit(flying)
        return finished

    def generate(
        self, prompts: Iterable[Seq[int]], params: SamplingParams = SamplingParams()
    ) -> list[Completion]:
        """Continue all prompts (token ids); answers in their order."""
        requests = [Request(f"generate-{next(self._ids)}", tuple(ids), params) for ids in prompts]
        for request in requests:
            self.check(request)  # all of them before one is queued
        for request in requests:
            self._queue(request)
        done: dict[str, Completion] = {}
        try:
            while any(request.request_id not in done for request in requests):
                done |= {completion.request_id: completion for completion in self.step()}
        except BaseException:
            self._drop_all()
            raise
        return [done[request.request_id] for request in requests]

    def _drop_all(self) -> None:
        """Forget every request, and what was launched for them."""
        self._scheduler = Scheduler(self.plan, self._chunk, self._cache)
        self._sequences.clear()
        self._last = self._flying = None

    def stream(
        self, prompt_ids: Seq[int], params: SamplingParams = SamplingParams()
    ) -> Generator[Delta, None, None]:
        """Continue one prompt (token ids): what each step brings, which may be nothing yet. Closing it cancels.

        Example:
            for delta in engine.stream(engine.tokenizer.encode("def add(a, b):")):
                print(delta.text, end="", flush=True)
        """
        return stream(self, Request("stream", tuple(prompt_ids), params))

    def check(self, request: Request) -> None:
        """Refuse what cannot be served.

        Raises:
            RequestError: empty, with ids that the model does not have, longer than the plan serves,
                or with parameters that mean nothing.
        """
        length, hint = (
            len(request.prompt_ids),
            "plan for longer conversations: raise `workload` in the spec",
        )
        if length == 0:
            raise RequestError(
                f"request `{request.request_id}` has an empty prompt", "give at least one token"
            )
        request.params.check(self.vocab_size)
        if length + request.params.max_tokens > self.max_seq_len:
            raise RequestError(
                f"{length} prompt tokens and {request.params.max_tokens} new ones are over the plan's limit of "
                f"{self.max_seq_len} (max_seq_len)",
                hint,
            )
        lowest, highest = min(request.prompt_ids), max(request.prompt_ids)
        worst = lowest if lowest < 0 else highest
        if not 0 <= worst < self.vocab_size:
            raise RequestError(
                f"token id {worst} is not in the vocabulary of {self.vocab_size}",
                "use the model's own tokenizer",
            )

    def _launch(self, batch: Batch) -> _Flight:
        """Start a replay; its inputs are there already where it follows the last one."""
        tokens, seqs = batch.run_tokens, batch.run_seqs

        def buffer(name: str) -> Tensor:
            return self.executor.buffer(name, tokens, seqs)

        for sequence in batch.sequences:
            if sequence.copy_from is not None:
                page = sequence.pages[sequence.num_computed // self.plan.pool.limits.page_size]
                self.metrics.copied_bytes += self.executor.copy_page(sequence.copy_from, page)
        if not batch.follows(self._last):
            values = input_values(batch, self.plan.pool.limits)
            with self._away():
                fill_inputs(batch, values, buffer, self.plan.pool.limits)
        self._last = batch
        with self._away():
            self.executor.run(batch.program, tokens, seqs)
        told = (
            None
            if batch.has_no_output
            else self.executor.fetch(*map(buffer, host_outputs(batch.program)))
        )
        return _Flight(batch, told, buffer(batch.program.logits))

    def _commit(self, flight: _Flight) -> list[Completion]:
        """Take over what was computed; finish what is done."""
        batch, finished = flight.batch, list[Completion]()
        self.metrics.steps += 1
        self.metrics.decode_steps += batch.program.phase == "decode"
        if flight.outputs is None:
            self._advance(batch)
            return finished
        with self._away():
            outputs = flight.outputs()
        now = time.perf_counter()
        for index, sequence in enumerate(batch.sequences):
            if not sequence.is_running:
                continue  # it had ended before this step was launched, which nobody knew
            said = _step_output(flight, outputs, index)
            news = self._take(sequence, said, batch, index)
            if news:
                sequence.first_token_s, sequence.last_token_s = sequence.first_token_s or now, now
            if sequence.finish_reason:
                # A step that was launched since has written over the state at an end in the middle
                # of a run, but not over that before the run.
                ends = len(news) == len(said.token_ids) or bool(self.plan.pool.limits.kept_inputs)
                self._scheduler.finish(sequence, ends or self._last is batch)
                del self._sequences[sequence.request.request_id]
                finished.append(self._completion(sequence))
            self._emit(sequence, news)
        return finished

    def _advance(self, batch: Batch) -> None:
        """Go on in all prompts of a batch."""
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            if sequence.is_running:
                sequence.drafts = []
                self._scheduler.advance(sequence, count)

    def _take(
        self, sequence: Sequence, said: StepOutput, batch: Batch, index: int
    ) -> list[NewToken]:
        """Bring a sequence to where the replay has left it, or to its end before that."""
        sequence.drafts = said.drafts
        if batch.program.phase == "prefill":
            self._scheduler.advance(sequence, batch.counts[index])
            return [] if sequence.num_left else self._append_tokens(sequence, said)
        news = self._append_tokens(sequence, said)
        self._scheduler.advance(sequence, len(news))
        self.metrics.decode_passes += 1
        self.metrics.decode_tokens += len(news)
        return news

    def _append_tokens(self, sequence: Sequence, said: StepOutput) -> list[NewToken]:
        """Add what was said, up to what ends it."""
        news: list[NewToken] = []
        for token, logits_V in zip(said.token_ids, said.logits, strict=False):
            sequence.token_ids.append(token)
            count, logprobs = sequence.request.params.num_logprobs, None
            if count is not None:
                logprobs = token_logprobs(logits_V, token, count)
                sequence.logprobs.append(logprobs)
            news.append(NewToken(sequence.request.request_id, token, logprobs))
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason:
                break
        return news

    def _emit(self, sequence: Sequence, news: list[NewToken]) -> None:
        """Each token but the last of all; who is told may cancel."""
        ended = sequence.state == "finished"
        for new in news[:-1] if ended else news:
            if self.on_token and (ended or sequence.is_running):
                self.on_token(new)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in sequence.stop_ids:
            return "stop"
        if sequence.request.params.stop and self._hit_stop(sequence):
            return "stop"
        return "length" if len(sequence.token_ids) == sequence.max_len else None

    def _hit_stop(self, sequence: Sequence) -> bool:
        """Whether a stop string ends in the last token: it spans at most as many tokens as it has bytes."""
        window = max(len(stop.encode()) for stop in sequence.request.params.stop) + 4
        tail = self._text(sequence.generated[-window:])
        return any(stop in tail for stop in sequence.request.params.stop)

    def _completion(self, sequence: Sequence) -> Completion:
        params, ids = sequence.request.params, sequence.generated
        text = self._text(ids[:-1] if ids[-1] in sequence.stop_ids else ids)
        cuts = [text.find(stop) for stop in params.stop if stop in text]
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=tuple(ids),
            text=text[: min(cuts)] if cuts else text,
            finish_reason=sequence.finish_reason or "length",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            ttft_s=sequence.first_token_s - sequence.added_s,
            decode_s=sequence.last_token_s - sequence.first_token_s,
            logprobs=tuple(sequence.logprobs),
        )

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer else ""


def executor_of(plan: Plan) -> type[Executor]:
    """What replays a plan on its kind of device."""
    if plan.target.device == "cpu":
        return Executor
    from tokenspeed_plan.runtime.graphs import GraphExecutor

    return GraphExecutor


def host_outputs(program: Program) -> tuple[str, ...]:
    """The outputs that the host reads after each replay."""
    accepted = ("accepted",) if program.query_len > 1 else ()
    return (program.tokens, *accepted, *((program.drafts,) if program.depth else ()))


def _step_output(flight: _Flight, outputs: tuple[list[int], ...], index: int) -> StepOutput:
    """The part of one sequence."""
    program, found = (
        flight.batch.program,
        dict(zip(host_outputs(flight.batch.program), outputs, strict=True)),
    )
    first = index * program.query_len
    end = first + 1 + (found["accepted"][index] if program.query_len > 1 else 0)
    size = program.depth + 1
    drafts = found[program.drafts][index * size + 1 : (index + 1) * size] if program.depth else []
    return StepOutput(found[program.tokens][first:end], flight.logits[first:end], drafts)


def token_logprobs(logits_V: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Logprobs of one row, over the whole vocabulary and before temperature."""
    logprobs_V = torch.log_softmax(logits_V.double(), -1)
    top = logprobs_V.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), tuple(pairs))
