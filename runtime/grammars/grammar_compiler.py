"""Forms of answers -> grammars, compiled off the engine's thread, in a process of their own."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from tokenspeed_plan.plans.canon import canonical, sha256
from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.plans.schema import Plan
from tokenspeed_plan.plans.text import printable_line
from tokenspeed_plan.plans.worker_process import WorkerFault, WorkerProcess
from tokenspeed_plan.runtime.grammars.matcher import Grammar
from tokenspeed_plan.runtime.grammars.xgrammar_matcher import XGrammar

if TYPE_CHECKING:
    from xgrammar import TokenizerInfo

Json = dict[str, Any]

MAX_CPU_S = 2.0  # of one form
MAX_WAIT_S = 5.0  # for others; meanwhile a thread of the server parses nothing else
MAX_FORM_CHARS = 1 << 18
MAX_CACHED_CHARS = 1 << 28  # of compiled grammars
# In a string of a stated length XGrammar takes control characters as they are, which JSON does not:
# such forms have a vocabulary without them.
_LENGTHS = ('"minLength"', '"maxLength"')
_CONTROLS = frozenset(range(0x20)) - frozenset(b"\n\r")
_HINT = "give a simpler schema"
_WORKER = "from tokenspeed_plan.runtime.grammars.grammar_worker import main; main()"


class CompilerBusy(RequestError):
    """Nothing is wrong with the form; it may be asked for again."""


class Tokens(Protocol):
    """The half of a tokenizer that knows its tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""

    def is_special(self, token_id: int) -> bool:
        """Whether an answer's text leaves the token out."""


class GrammarCompiler:
    """Compiles forms, XGrammar's structural tags, for one tokenizer; keeps what it has compiled.

    Its process starts with the first form, or with `warm_up`; the one that a form has ended is
    replaced by the next. Any thread may ask.

    Args:
        tokens: of the model.
        vocab_size: rows of its head.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokens: Tokens, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._stop_ids = list(stop_ids)
        self._lock = threading.Lock()
        self._infos: list[TokenizerInfo] = []  # with control characters, and without
        self._worker: WorkerProcess | None = None
        self._kept: OrderedDict[str, tuple[Grammar | str, int]] = OrderedDict()
        self._kept_chars = 0

    def warm_up(self) -> None:
        """Start what the first form would wait for."""
        with self._lock:
            self._started()

    def compile(self, form: Json) -> Grammar:
        """The grammar of a form.

        Raises:
            CompilerBusy: others are being compiled, which takes long.
            RequestError: there is none, or it takes too much to find it.
        """
        text = canonical(form)
        if len(text) > MAX_FORM_CHARS:
            raise RequestError(
                f"the schemas have {len(text)} characters, the most is {MAX_FORM_CHARS}", _HINT
            )
        if not self._lock.acquire(timeout=MAX_WAIT_S):
            raise CompilerBusy("other schemas are being compiled", "try again in a moment")
        try:
            found = self._found(sha256(text), form, any(word in text for word in _LENGTHS))
        finally:
            self._lock.release()
        if isinstance(found, str):
            raise RequestError(found, _HINT)
        return found

    def _found(self, key: str, form: Json, has_lengths: bool) -> Grammar | str:
        if key not in self._kept:
            self._keep(key, *self._compile(form, int(has_lengths)))
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def _keep(self, key: str, found: Grammar | str, size: int) -> None:
        """Note what became of a form, and forget those that were not asked for longest."""
        self._kept[key] = found, size
        self._kept_chars += size
        while self._kept_chars > MAX_CACHED_CHARS and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self._kept_chars -= freed

    def _compile(self, form: Json, vocabulary: int) -> tuple[Grammar | str, int]:
        """The grammar, or why there is none, and its size in characters."""
        from xgrammar import CompiledGrammar

        worker = self._started()
        try:
            text = worker.ask({"form": form, "vocabulary": vocabulary})["grammar"]
        except WorkerFault as error:
            reason = f"the schema cannot be enforced: {_reason(error)}"
            return reason, len(reason)
        info = self._infos[vocabulary]
        return XGrammar(CompiledGrammar.deserialize_json(text, info)), len(text)

    def _started(self) -> WorkerProcess:
        if not self._infos:
            texts = [
                b"" if self._tokens.is_special(token) else self._tokens.token_bytes(token)
                for token in range(self._vocab_size)
            ]
            plain = [b"" if _CONTROLS.intersection(text) else text for text in texts]
            self._infos = [self._tokenizer_info(texts), self._tokenizer_info(plain)]
        if self._worker is None or not self._worker.is_alive:
            tokens = [info.serialize_json() for info in self._infos]
            self._worker = WorkerProcess(["-c", _WORKER, str(MAX_CPU_S)], {"tokens": tokens})
        return self._worker

    def _tokenizer_info(self, texts: list[bytes]) -> TokenizerInfo:
        """The text of each token; no form allows one that has none, as special ones."""
        from xgrammar import TokenizerInfo, VocabType

        return TokenizerInfo(
            texts, VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=self._stop_ids
        )


def grammar_compiler(plan: Plan, tokens: Tokens) -> GrammarCompiler | None:
    """What compiles grammars for a plan; None where the plan takes none.

    Raises:
        RequestError: what it needs is not installed, or its model ends no answer.
    """
    if not plan.takes_grammars:
        return None
    if find_spec("xgrammar") is None:
        raise RequestError(
            "the plan takes grammars, which need `xgrammar`",
            "install the extra `grammar`: `pip install 'tokenspeed-plan[grammar]'`",
        )
    stop_ids = plan.model.eos_token_ids
    if not stop_ids:
        raise RequestError(
            "the plan takes grammars, but its model has no token that ends an answer",
            "plan it without `serving.grammar`",
        )
    return GrammarCompiler(tokens, plan.model.vocab_size, stop_ids)


def _reason(error: WorkerFault) -> str:
    """Why a form has no grammar."""
    if error.code is None:
        return f"{printable_line(str(error)):.300}"
    if error.code == -signal.SIGPROF:
        return "it takes too long to compile"
    if error.code == -signal.SIGSEGV:
        return "it is nested too deeply"
    return "it takes too much memory to compile"
