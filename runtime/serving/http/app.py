"""The endpoints of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokenspeed_plan.plans.errors import EngineStopped, RequestFailed
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine
from tokenspeed_plan.runtime.serving.http.api_errors import (
    ApiError,
    shutting_down,
    try_later,
    unknown_model,
)
from tokenspeed_plan.runtime.serving.http.body import SMALL_BYTES, BodyMemory
from tokenspeed_plan.runtime.serving.http.callers import CheckHost, check_type, refuse_wrong_key
from tokenspeed_plan.runtime.serving.http.dialects import (
    Dialect,
    MessagesDialect,
    OwnDialect,
    ResponsesDialect,
)
from tokenspeed_plan.runtime.serving.http.event_stream import streamed
from tokenspeed_plan.runtime.serving.http.health import Progress
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter, Lease
from tokenspeed_plan.runtime.serving.http.parsing import ParsedRequest, parse
from tokenspeed_plan.runtime.serving.http.prometheus import CountResponses, Metrics
from tokenspeed_plan.runtime.serving.http.responses import Answer
from tokenspeed_plan.runtime.serving.http.token_counts import (
    count_tokens,
    detokenize,
    refused,
    tokenize,
)
from tokenspeed_plan.runtime.serving.http.trace_ids import EchoIds
from tokenspeed_plan.runtime.serving.http.waiting import client_leaves, unless
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.tokenizer import Tokenizer

# nginx's code for "client closed request"; it only shows in the metrics.
_CLIENT_LEFT = 499
_MANY_TOKENS = 4096
_T = TypeVar("_T")
Reader = Callable[[bytes, Tokenizer, RequestLimits], _T]  # understands a body


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints work with.

    Attributes:
        model: the name that clients use.
        created: when the model was loaded, in seconds since 1970.
        api_key: key that clients of /v1 must send; None if they need none.
        own_host: a name of the server that clients without a key may use, as loopback's names.
        stall_s: an engine that stands still for longer is not healthy.
        bodies: bounds the bodies that are coming.
        workers: the threads that parse bodies, tokenise prompts and write whole answers.
        slow_worker: the thread that does so where it takes long, so that others do not wait.
        drops_billing: leave a counter of Claude Code's out of its prompts.
    """

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: str
    limits: RequestLimits
    created: int
    api_key: str | None
    own_host: str
    stall_s: float
    bodies: BodyMemory
    workers: Executor
    slow_worker: Executor
    limiter: AdmissionLimiter
    metrics: Metrics
    progress: Progress
    drops_billing: bool = False

    def worker(self, takes_long: bool) -> Executor:
        """Where to do a piece of work."""
        if takes_long:
            return self.slow_worker
        return self.workers


def service_of(request: Request) -> Service:
    """The service of the app that got a request."""
    service: Service = request.app.state.service
    return service


async def check_key(request: Request) -> None:
    """Refuse a wrong API key; the comparison takes the same time for every key.

    Raises:
        ApiError: the key is wrong or missing.
    """
    key = service_of(request).api_key
    if key is None:
        return
    refuse_wrong_key(request.headers, key)


async def take_lease(request: Request) -> AsyncIterator[Lease]:
    """A lease until the response is sent, or cannot be."""
    service = service_of(request)
    with service.limiter.lease() as lease:
        try:
            yield lease
        finally:
            service.metrics.cancel(lease.num_unread)


AdmittedLease = Annotated[Lease, Depends(take_lease)]
_READ = ["GET", "HEAD"]
v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
keyed = APIRouter(dependencies=[Depends(check_key)])
public = APIRouter()


@v1.post("/completions")
async def completions(request: Request, lease: AdmittedLease) -> Response:
    """Continue a prompt."""
    return await _answer(request, OwnDialect("/v1/completions"), lease)


@v1.post("/chat/completions")
async def chat_completions(request: Request, lease: AdmittedLease) -> Response:
    """Continue a chat."""
    return await _answer(request, OwnDialect("/v1/chat/completions"), lease)


@v1.post("/responses")
async def responses(request: Request, lease: AdmittedLease) -> Response:
    """Continue a chat, in the words of OpenAI's Responses API."""
    return await _answer(request, ResponsesDialect(), lease)


@v1.post("/messages")
async def messages(request: Request, lease: AdmittedLease) -> Response:
    """Continue a chat, in the words of Anthropic's Messages API."""
    return await _answer(request, MessagesDialect(service_of(request).drops_billing), lease)


@v1.post("/messages/count_tokens")
async def count_message_tokens(request: Request, lease: AdmittedLease) -> Response:
    """How many tokens a message's prompt has."""
    dialect = MessagesDialect(service_of(request).drops_billing)

    def count(raw: bytes, tokenizer: Tokenizer, limits: RequestLimits) -> dict[str, Any]:
        return count_tokens(raw, dialect, tokenizer, limits)

    return await _count(request, lease, count)


@keyed.post("/tokenize")
async def tokenize_text(request: Request, lease: AdmittedLease) -> Response:
    """The tokens of a text or a chat."""
    return await _count(request, lease, tokenize)


@keyed.post("/detokenize")
async def detokenize_ids(request: Request, lease: AdmittedLease) -> Response:
    """The text of tokens."""
    return await _count(request, lease, detokenize)


@keyed.api_route("/tokenizer_info", methods=_READ)
async def tokenizer_info(request: Request) -> Response:
    """The class of the tokenizer, its special tokens and its chat template."""
    return JSONResponse(service_of(request).tokenizer.info)


@v1.api_route("/models", methods=_READ)
async def models(request: Request) -> Response:
    """List the model, as both OpenAI's and Anthropic's clients read it."""
    card = _card(service_of(request))
    ends = {"first_id": card["id"], "last_id": card["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": [card]} | ends)


@v1.api_route("/models/{name:path}", methods=_READ)
async def model(request: Request, name: str) -> Response:
    """Describe the model."""
    service = service_of(request)
    if name != service.model:
        raise unknown_model(name, service.model)
    return JSONResponse(_card(service))


@public.api_route("/health", methods=_READ)
async def health(request: Request) -> Response:
    """Whether the server takes requests."""
    _check_health(service_of(request))
    return JSONResponse({"status": "ok"})


@public.api_route("/ready", methods=_READ)
async def ready(request: Request) -> Response:
    """Whether the server would take one more request now."""
    service = service_of(request)
    _check_health(service)
    service.limiter.check()
    return JSONResponse({"status": "ok"})


def _check_health(service: Service) -> None:
    """Refuse where no request would be answered.

    Raises:
        ApiError: why not.
    """
    if service.engine.error:
        raise try_later(503, "the engine has failed", "engine_stopped")
    if service.limiter.draining:
        raise shutting_down()
    fault = service.progress.fault(service.stall_s)
    if fault is not None:
        raise try_later(503, fault, "stalled")


@public.api_route("/metrics", methods=_READ)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return PlainTextResponse(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def make_app(service: Service) -> FastAPI:
    """The server as an ASGI app; the engine's thread runs during the app's lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.engine:
            yield

    # No OpenAPI page: FastAPI does not know the bodies, since `parsing` checks them.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(v1)
    app.include_router(keyed)
    app.include_router(public)
    if service.api_key is None:
        app.add_middleware(CheckHost, own_host=service.own_host)
    app.add_middleware(CountResponses, metrics=service.metrics)
    app.add_middleware(EchoIds)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientDisconnect, _note_client_left)
    app.add_exception_handler(Exception, _fail)
    return app


async def _answer(request: Request, dialect: Dialect, lease: Lease) -> Response:
    service = service_of(request)

    def understand(raw: bytes, tokenizer: Tokenizer, limits: RequestLimits) -> ParsedRequest:
        limits = replace(limits, caps_max_tokens=dialect.caps_max_tokens)
        return parse(raw, dialect.url, service.model, tokenizer, limits, dialect.fields)

    parsed = await _read(request, understand, lease)
    if parsed is None:
        return Response(status_code=_CLIENT_LEFT)
    stream = lease.submit(parsed.requests)
    answer = Answer(parsed, service.tokenizer, service.model, int(time.time()))
    if parsed.stream:
        return streamed(request, stream, dialect.writer(answer))
    try:
        completions = await unless(stream.completions(), client_leaves(request))
    except EngineStopped as error:
        raise try_later(503, error.message, "engine_stopped") from None
    except RequestFailed as error:
        raise ApiError(500, error.message, "request_failed") from None
    if completions is None:
        return Response(status_code=_CLIENT_LEFT)
    # An answer of many choices with log probabilities takes seconds to write.
    num_tokens = sum(len(completion.token_ids) for completion in completions)

    def write() -> Response:
        return JSONResponse(dialect.whole(answer, completions))

    worker = service.worker(num_tokens > _MANY_TOKENS)
    return await asyncio.get_running_loop().run_in_executor(worker, write)


async def _count(request: Request, lease: Lease, count: Reader[dict[str, Any]]) -> Response:
    """Answer a body that needs no engine."""
    model = service_of(request).model

    def counted(raw: bytes, tokenizer: Tokenizer, limits: RequestLimits) -> dict[str, Any]:
        return refused(lambda: count(raw, tokenizer, replace(limits, model=model)))

    found = await _read(request, counted, lease)
    if found is None:
        return Response(status_code=_CLIENT_LEFT)
    return JSONResponse(found)


async def _read(request: Request, reader: Reader[_T], lease: Lease) -> _T | None:
    """Read and parse a body; None if its client leaves while it is parsed.

    The lease begins when the body is there, so that slow bodies take no place from others.

    Raises:
        ApiError: what is wrong with it, or the server shuts down.
    """
    service, limiter = service_of(request), service_of(request).limiter
    with service.bodies.body() as body:
        raw = await unless(body.read(request), limiter.drain.wait())
        if raw is None:
            raise shutting_down()
        check_type(request.headers.get("content-type"), service.api_key is not None)
        lease.take()
        worker = service.worker(len(raw) > SMALL_BYTES)
        work = asyncio.get_running_loop().run_in_executor(
            worker, reader, raw, service.tokenizer, service.limits
        )
        parsed = await unless(work, client_leaves(request), limiter.stop.wait())
    if parsed is None and limiter.stop.is_set():
        raise shutting_down()
    return parsed


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "tokenspeed-plan",
        "max_model_len": service.limits.max_seq_len,
        "root": service.model,
        "parent": None,
        "type": "model",
        "display_name": service.model,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
    }


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """There is no such path, or it does not take this method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path:.80}"
    codes = {
        404: ("there is nothing at", "unknown_url"),
        405: ("the method is not allowed:", "method_not_allowed"),
    }
    text, code = codes.get(error.status_code, (error.detail, None))
    refusal = ApiError(error.status_code, f"{text} {place}", code, headers=error.headers)
    return refusal.response(request.url.path)


async def _note_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _fail(request: Request, error: Exception) -> Response:
    """An error of the server; its traceback is in the log."""
    return ApiError(
        500, "the server has failed to answer; its log says more", "internal_error"
    ).response(request.url.path)
