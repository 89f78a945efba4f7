"""The endpoints of the server."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
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
from tokenspeed_plan.runtime.serving.http.callers import CheckHost, check_type
from tokenspeed_plan.runtime.serving.http.health import Progress
from tokenspeed_plan.runtime.serving.http.limiter import AdmissionLimiter, Lease
from tokenspeed_plan.runtime.serving.http.parsing import ParsedRequest, parse
from tokenspeed_plan.runtime.serving.http.prometheus import CountResponses, Metrics
from tokenspeed_plan.runtime.serving.http.responses import Answer
from tokenspeed_plan.runtime.serving.openai.bodies import Url
from tokenspeed_plan.runtime.serving.openai.conversion import RequestLimits
from tokenspeed_plan.runtime.tokenizer import Tokenizer

# nginx's code for "client closed request"; it only shows in the metrics.
_CLIENT_LEFT = 499
# Proxies must pass on each event at once.
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_MANY_TOKENS = 4096
_T = TypeVar("_T")


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
    header = request.headers.get("authorization", "").encode("latin-1")
    if hmac.compare_digest(header, b"Bearer " + key.encode()):
        return
    message = "an API key is needed: `Authorization: Bearer KEY`"
    if header:
        message = "the API key is wrong"
    raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def take_lease(request: Request) -> AsyncIterator[Lease]:
    """A lease until the response is sent, or cannot be."""
    service = service_of(request)
    with service.limiter.lease() as lease:
        try:
            yield lease
        finally:
            service.metrics.cancel(lease.num_unread)


AdmittedLease = Annotated[Lease, Depends(take_lease)]
v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
public = APIRouter()


@v1.post("/completions")
async def completions(request: Request, lease: AdmittedLease) -> Response:
    """Continue a prompt."""
    return await _answer(request, "/v1/completions", lease)


@v1.post("/chat/completions")
async def chat_completions(request: Request, lease: AdmittedLease) -> Response:
    """Continue a chat."""
    return await _answer(request, "/v1/chat/completions", lease)


@v1.get("/models")
async def models(request: Request) -> Response:
    """List the model."""
    return JSONResponse({"object": "list", "data": [_card(service_of(request))]})


@v1.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe the model."""
    service = service_of(request)
    if name != service.model:
        raise unknown_model(name, service.model)
    return JSONResponse(_card(service))


@public.get("/health")
async def health(request: Request) -> Response:
    """Whether the server takes requests."""
    service = service_of(request)
    if service.engine.error:
        raise try_later(503, "the engine has failed", "engine_stopped")
    if service.limiter.draining:
        raise shutting_down()
    fault = service.progress.fault(service.stall_s)
    if fault is not None:
        raise try_later(503, fault, "stalled")
    return JSONResponse({"status": "ok"})


@public.get("/metrics")
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
    app.include_router(public)
    if service.api_key is None:
        app.add_middleware(CheckHost, own_host=service.own_host)
    app.add_middleware(CountResponses, metrics=service.metrics)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientDisconnect, _note_client_left)
    app.add_exception_handler(Exception, _fail)
    return app


async def _answer(request: Request, url: Url, lease: Lease) -> Response:
    service = service_of(request)
    parsed = await _read(request, url, lease)
    if parsed is None:
        return Response(status_code=_CLIENT_LEFT)
    stream = lease.submit(parsed.requests)
    answer = Answer(parsed, service.tokenizer, service.model, int(time.time()))
    if parsed.stream:
        events = answer.events(stream)
        return StreamingResponse(events, media_type="text/event-stream", headers=_EVENT_HEADERS)
    try:
        completions = await _unless(stream.completions(), _wait_for_disconnect(request))
    except EngineStopped as error:
        raise try_later(503, error.message, "engine_stopped") from None
    except RequestFailed as error:
        raise ApiError(500, error.message, "request_failed") from None
    if completions is None:
        return Response(status_code=_CLIENT_LEFT)
    # An answer of many choices with log probabilities takes seconds to write.
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return await asyncio.get_running_loop().run_in_executor(
        service.worker(num_tokens > _MANY_TOKENS), lambda: JSONResponse(answer.whole(completions))
    )


async def _read(request: Request, url: Url, lease: Lease) -> ParsedRequest | None:
    """Read and parse a body; None if its client leaves while it is parsed.

    The lease begins when the body is there, so that slow bodies take no place from others.

    Raises:
        ApiError: what is wrong with it, or the server shuts down.
    """
    service, limiter = service_of(request), service_of(request).limiter
    with service.bodies.body() as body:
        raw = await _unless(body.read(request), limiter.drain.wait())
        if raw is None:
            raise shutting_down()
        check_type(request.headers.get("content-type"), service.api_key is not None)
        lease.take()
        worker = service.worker(len(raw) > SMALL_BYTES)
        work = asyncio.get_running_loop().run_in_executor(
            worker, parse, raw, url, service.model, service.tokenizer, service.limits
        )
        parsed = await _unless(work, _wait_for_disconnect(request), limiter.stop.wait())
    if parsed is None and limiter.stop.is_set():
        raise shutting_down()
    return parsed


async def _unless(work: Awaitable[_T], *ends: Coroutine[Any, Any, object]) -> _T | None:
    """Result of the work; None if one of the others ends first, then the work is cancelled."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    result = asyncio.ensure_future(work)
    try:
        await asyncio.wait((result, *tasks), return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        return None
    finally:
        for task in (result, *tasks):
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "tokenspeed-plan",
        "max_model_len": service.limits.max_seq_len,
    }


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_route(request: Request, error: Exception) -> Response:
    """There is no such path, or it does not take this method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path:.80}"
    codes = {
        404: ("there is nothing at", "unknown_url"),
        405: ("the method is not allowed:", "method_not_allowed"),
    }
    text, code = codes.get(error.status_code, (error.detail, None))
    return ApiError(error.status_code, f"{text} {place}", code, headers=error.headers).response()


async def _note_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _fail(request: Request, error: Exception) -> Response:
    """An error of the server; its traceback is in the log."""
    return ApiError(
        500, "the server has failed to answer; its log says more", "internal_error"
    ).response()
