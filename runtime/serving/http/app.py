"""The endpoints."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokenspeed_plan.plans.errors import EngineStopped
from tokenspeed_plan.runtime.serving.async_engine import AsyncEngine
from tokenspeed_plan.runtime.serving.http.admission import AdmissionLimiter, Lease
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, no_model, try_later
from tokenspeed_plan.runtime.serving.http.parsing import parse
from tokenspeed_plan.runtime.serving.http.prometheus import CountResponses, Metrics
from tokenspeed_plan.runtime.serving.http.responses import Answer
from tokenspeed_plan.runtime.serving.openai.requests import RowLimits, Tokenizer, Url

_CLIENT_LEFT = 499  # nginx's word for a response that nobody waits for; it is only counted
_EVENTS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}  # proxies shall pass each event on at once
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints work with. `created` is the second in which the model was loaded."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: str
    limits: RowLimits
    created: int
    api_key: str | None
    max_body_bytes: int
    body_timeout_s: float
    gate: AdmissionLimiter
    metrics: Metrics


def service_of(request: Request) -> Service:
    """The service that an app was made for."""
    service: Service = request.app.state.service
    return service


async def check_key(request: Request) -> None:
    """Refuse who has not the key, and tell nothing by how long that takes."""
    key = service_of(request).api_key
    given = request.headers.get("authorization", "").encode("latin-1")
    if key is not None and not hmac.compare_digest(given, b"Bearer " + key.encode()):
        message = (
            "the API key is wrong" if given else "an API key is needed: `Authorization: Bearer KEY`"
        )
        raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def take_lease(request: Request) -> AsyncIterator[Lease]:
    """A place in flight until the response is sent, or cannot be."""
    service = service_of(request)
    with service.gate.ticket() as ticket:
        try:
            yield ticket
        finally:
            service.metrics.cancel(ticket.num_unread)


Held = Annotated[Lease, Depends(take_lease)]
v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
public = APIRouter()


@v1.post("/completions")
async def completions(request: Request, ticket: Held) -> Response:
    """Continue a prompt."""
    return await _answer(request, "/v1/completions", ticket)


@v1.post("/chat/completions")
async def chat_completions(request: Request, ticket: Held) -> Response:
    """Continue a chat."""
    return await _answer(request, "/v1/chat/completions", ticket)


@v1.get("/models")
async def models(request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_card(service_of(request))]})


@v1.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """The one model, by its name."""
    service = service_of(request)
    if name != service.model:
        raise no_model(name, service.model)
    return JSONResponse(_card(service))


@public.get("/health")
async def health(request: Request) -> Response:
    """Whether it takes requests."""
    service = service_of(request)
    if service.engine.error:
        raise try_later(503, "the engine has failed", "engine_stopped")
    if service.gate.draining:
        raise try_later(503, "the server is shutting down", "shutting_down")
    return JSONResponse({"status": "ok"})


@public.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return PlainTextResponse(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def make_app(service: Service) -> FastAPI:
    """The server as an ASGI app; the engine's thread runs as long as the app's lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.engine:
            yield

    # No page of FastAPI's: it would not know the backend, which are checked as those of batch files
    # are.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(v1)
    app.include_router(public)
    app.add_middleware(CountResponses, metrics=service.metrics)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientDisconnect, _note_gone)
    app.add_exception_handler(Exception, _fail)
    return app


async def _answer(request: Request, url: Url, ticket: Lease) -> Response:
    service = service_of(request)
    raw = await _read_body(request, service.max_body_bytes, service.body_timeout_s)
    asked = await run_in_threadpool(
        parse, raw, url, service.model, service.tokenizer, service.limits
    )
    stream = ticket.submit(asked.requests)
    answer = Answer(asked, service.tokenizer, service.model, int(time.time()))
    if asked.stream:
        return StreamingResponse(
            answer.events(stream), media_type="text/event-stream", headers=_EVENTS
        )
    try:
        done = await _unless_gone(request, stream.completions())
    except EngineStopped as error:
        raise try_later(503, error.message, "engine_stopped") from None
    return JSONResponse(answer.whole(done)) if done else Response(status_code=_CLIENT_LEFT)


async def _read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The body, of which no more is kept than is allowed."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise ApiError(
                        413, f"the body is larger than {limit_bytes} bytes", "request_too_large"
                    )
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {timeout_s:g} s", "request_timeout"
        ) from None
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What the work gives; None, and the work is cancelled, if the client leaves first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


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
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path:.80}"
    codes = {
        404: ("there is nothing at", "unknown_url"),
        405: ("the method is not allowed:", "method_not_allowed"),
    }
    text, code = codes.get(error.status_code, (error.detail, None))
    return ApiError(error.status_code, f"{text} {where}", code, headers=error.headers).response()


async def _note_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of ours; the log has it."""
    return ApiError(
        500, "the server has failed to answer; its log says more", "internal_error"
    ).response()
