"""The engine: load a plan, add requests, step until they are answered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

from tokenspeed_plan.plans.errors import EngineStopped, RequestError
from tokenspeed_plan.plans.schema import Plan, PoolRole
from tokenspeed_plan.plans.signature import Signers
from tokenspeed_plan.plans.weight_digests import Depth
from tokenspeed_plan.runtime.execution.adjustments import TokenCounts
from tokenspeed_plan.runtime.execution.backend import BackendName
from tokenspeed_plan.runtime.execution.executor import Executor, Lead
from tokenspeed_plan.runtime.execution.kernels import Kernels
from tokenspeed_plan.runtime.execution.launch import Launch
from tokenspeed_plan.runtime.isolation import DEVICE_ERRORS, describe
from tokenspeed_plan.runtime.loading.engine_loader import load_bundle, load_parts
from tokenspeed_plan.runtime.loading.loading_report import Report, nobody
from tokenspeed_plan.runtime.metrics import Metrics
from tokenspeed_plan.runtime.output import OutputProcessor
from tokenspeed_plan.runtime.request import Completion, NewToken, Request, SamplingParams
from tokenspeed_plan.runtime.request_check import check_operators, check_request, stop_ids_of
from tokenspeed_plan.runtime.scheduling.scheduler import Scheduler, Usage
from tokenspeed_plan.runtime.scheduling.sequence import Sequence
from tokenspeed_plan.runtime.step_launcher import StepLauncher
from tokenspeed_plan.runtime.step_loop import StepLoop
from tokenspeed_plan.runtime.streaming import Delta, stream
from tokenspeed_plan.runtime.tokenizer import Tokenizer, WriteChat

DEFAULT_PARAMS = SamplingParams()  # greedy


class Engine:
    """One plan on one rank.

    Args:
        plan, executor: what to replay, and what replays it.
        tokenizer: for texts and stop strings.
        chunk: lowers the prefill chunk below the planned one, in tokens.
        cache: whether prompts may share prefixes; without it, each is computed from its beginning.

    Attributes:
        on_token: is told each token of a request that goes on, from inside `step`.
        loop: its steps, with the sequences that are not finished.

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
        self.on_token: Callable[[NewToken], object] | None = None
        self._chunk = chunk
        self._cache = cache
        self._ids = itertools.count()
        self._stop_ids = frozenset(stop_ids_of(plan))
        self._reset()
        self.time_startup("prepare_s", self.executor.prepare)

    def _reset(self) -> None:
        """Forget every request, and what was launched for them."""
        self.scheduler = Scheduler(self.plan, self._chunk, self._cache, mover=self.executor)
        launcher = StepLauncher(self.plan, self.executor, self.scheduler.metrics)
        self.loop = StepLoop(self.plan, launcher, self.scheduler, OutputProcessor(self.tokenizer))

    @classmethod
    def load(
        cls,
        bundle: Path,
        weights: Path | None = None,
        chat: WriteChat | Tokenizer | None = None,
        backend: BackendName | None = None,
        launch: Launch | None = None,
        lead: Lead | None = None,
        cache: bool = True,
        depth: Depth = "headers",
        signers: Signers | None = None,
        role: PoolRole | None = None,
        report: Report = nobody,
    ) -> Engine:
        """Read and check a bundle, then its weights, then allocate.

        Args:
            bundle: the folder of the plan.
            weights: the checkpoint; the plan's own by default.
            chat: writes messages as a prompt; or the tokenizer, where it is loaded already.
            backend: a GPU runs the bundle's kernels by default, a CPU the references.
            launch: a GPU launches CUDA graphs by default, a CPU step after step.
            lead: keeps other ranks in step; there is none by default.
            cache: see `Engine`.
            depth: how far the weights are compared with those that were planned.
            signers: one of them must have signed the plan; None takes any plan.
            role: of the pool to load; by default the one that answers.
            report: is told how far it is.

        Raises:
            PlanError: the bundle, this machine or the checkpoint does not fit.
        """
        rest = lead, depth, signers, role, report
        loaded = load_bundle(bundle, weights, chat, backend, launch, *rest)
        engine = cls(loaded.plan, loaded.executor, loaded.tokenizer, cache=cache)
        engine.startup_s = loaded.startup_s | engine.startup_s
        return engine

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        folder: Path,
        chat: WriteChat | None = None,
        chunk: int | None = None,
        kernels: Kernels | None = None,
        launch: Launch | None = None,
        lead: Lead | None = None,
        cache: bool = True,
        role: PoolRole | None = None,
    ) -> Engine:
        """From a plan that is checked already, with its weights in `folder`; see `load`.

        Raises:
            PlanError: this machine or the checkpoint does not fit.
        """
        loaded = load_parts(plan, folder, chat, kernels, launch, lead, role=role)
        return cls(loaded.plan, loaded.executor, loaded.tokenizer, chunk, cache)

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
        return self.scheduler.metrics

    @property
    def accept_counts(self) -> list[int]:
        """Query i of the decode steps so far: how many sequences reached it.

        The first number counts all sequences of all steps, number i those whose first i drafts were
        accepted. They are kept on the device, and reading them waits for it. Empty where the plan
        does not speculate.
        """
        if not self.plan.pool.limits.max_depth:
            return []
        return list(self.executor.buffer("accept_counts", 0, 0).tolist())

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.scheduler.num_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing: no request is left, and nothing is on its way."""
        elsewhere = self.loop.elsewhere
        return not self.num_unfinished and (elsewhere is None or not elsewhere.is_open)

    @property
    def has_step_in_flight(self) -> bool:
        """Whether a step was launched whose outputs are not read yet."""
        return self.loop.in_flight is not None

    @property
    def usage(self) -> Usage:
        """Requests, state slots and pages in use; zero where nothing is to be done or copied."""
        return self.scheduler.usage

    def check(self, request: Request) -> None:
        """Refuse what cannot be served.

        Raises:
            RequestError: the prompt is empty, has ids that the model does not have, or is longer
                than the plan serves; or a parameter means nothing.
        """
        check_request(request, self.vocab_size, self.max_seq_len)
        check_operators(request, self.plan)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: see `check`; or another one of that name is not finished.
        """
        self.check(request)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        if request.request_id in self.loop.sequences:
            raise RequestError(
                f"request `{request.request_id}` is not finished", "give each request its own id"
            )
        stop_ids = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            stop_ids |= self._stop_ids
        self.loop.add(_new_sequence(request, stop_ids))

    def cancel(self, request_id: str) -> bool:
        """Drop a request that waits or runs; False where there is none. It gets no completion."""
        return self.loop.cancel(request_id)

    def step(self) -> list[Completion]:
        """Launch a replay, and commit the one before it; returns the requests that finished.

        One that has failed is among them, with its `error`; the others go on.

        Raises:
            EngineStopped: the device has failed, and this engine with it.
        """
        try:
            return self.loop.step(self.on_token)
        except DEVICE_ERRORS as error:
            raise EngineStopped(
                f"the device has failed: {describe(error)}", "start again; answers so far are kept"
            ) from error

    def generate(
        self, prompts: Iterable[Seq[int]], params: SamplingParams = DEFAULT_PARAMS
    ) -> list[Completion]:
        """Continue all prompts (token ids); answers in their order, failed ones with an `error`."""
        requests = [Request(f"generate-{next(self._ids)}", tuple(ids), params) for ids in prompts]
        for request in requests:
            self.check(request)  # all of them before one is queued
        for request in requests:
            self._queue(request)
        done: dict[str, Completion] = {}
        try:
            while any(request.request_id not in done for request in requests):
                done |= {completion.request_id: completion for completion in self.step()}
        except EngineStopped:
            raise  # nothing can be launched any more
        except BaseException:
            self.loop.close()
            self._reset()
            raise
        return [done[request.request_id] for request in requests]

    def stream(
        self, prompt_ids: Seq[int], params: SamplingParams = DEFAULT_PARAMS
    ) -> Generator[Delta, None, None]:
        """Continue one prompt (token ids), and yield what each step adds, which may be nothing.

        Closing the generator cancels the request.

        Example:
            for delta in engine.stream(engine.tokenizer.encode("def add(a, b):")):
                print(delta.text, end="", flush=True)
        """
        return stream(self, Request("stream", tuple(prompt_ids), params))


def _new_sequence(request: Request, stop_ids: frozenset[int]) -> Sequence:
    """A request before its first step."""
    token_ids = list(request.prompt_ids)
    sequence = Sequence(request, time.perf_counter(), token_ids, stop_ids=stop_ids)
    if request.grammar is not None:
        sequence.matcher = request.grammar.matcher()
    if request.params.penalises:
        sequence.counts = TokenCounts(request.params, request.prompt_ids)
    return sequence
