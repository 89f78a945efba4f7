"""The endpoints of the router: four of them by affinity, all others by load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, shutting_down, try_later
from tokenspeed_plan.runtime.serving.http.body import BodyMemory
from tokenspeed_plan.runtime.serving.http.callers import CheckHost, refuse_wrong_key
from tokenspeed_plan.runtime.serving.http.dialects import (
    Dialect,
    MessagesDialect,
    OwnDialect,
    ResponsesDialect,
)
from tokenspeed_plan.runtime.serving.http.waiting import client_leaves, unless
from tokenspeed_plan.runtime.serving.openai.bodies import (
    InvalidRequestError,
    drop_nulls,
    parse_body,
    parse_json,
)
from tokenspeed_plan.runtime.serving.openai.conversion import (
    RequestLimits,
    prompt_ids,
    split_prompts,
)
from tokenspeed_plan.runtime.serving.router.affinity import Affinity, RouteKey, page_digests
from tokenspeed_plan.runtime.serving.router.fleet import END_S, Fleet
from tokenspeed_plan.runtime.serving.router.fleet_metrics import FleetMetrics
from tokenspeed_plan.runtime.serving.router.proxy import (
    MAY_GO_ELSEWHERE,
    ReplicaLost,
    lost_error,
    relay,
    send,
)
from tokenspeed_plan.runtime.tokenizer import Tokenizer

SESSION_HEADERS = ("x-session-id", "session-id", "session_id", "x-session-affinity")
SESSION_FIELDS = ("prompt_cache_key", "user")
_BYTES_PER_TOKEN = 4  # about, of a prompt that is not tokenised
_CLIENT_LEFT = 499
_METHODS = ["GET", "HEAD", "POST"]
_OF_STREAMS = ("stream", "stream_options")


@dataclass(slots=True, eq=False)
class Router:
    """What the endpoints work with; its methods are those of a server's work.

    Attributes:
        api_key: what clients must send; None if they need nothing.
        own_host: a name of the server that clients without a key may use.
        page_size: of the prefix cache, in tokens.
        drops_billing: as the replicas have it.
        num_in_flight: requests whose body is there, until they are answered.
    """

    fleet: Fleet
    affinity: Affinity
    client: httpx.AsyncClient
    metrics: FleetMetrics
    tokenizer: Tokenizer
    limits: RequestLimits
    api_key: str | None
    own_host: str
    page_size: int
    drops_billing: bool
    bodies: BodyMemory
    workers: Executor
    num_in_flight: int = 0
    _draining: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._draining.is_set()

    @property
    def has_failed(self) -> bool:
        """Whether the replicas cannot be started."""
        return self.fleet.error is not None

    def note(self) -> None:
        """Called ten times a second; the replicas have tasks of their own."""

    def drain(self) -> None:
        """Take no more requests."""
        self._draining.set()

    async def stop(self) -> None:
        """End what is not answered: the replicas are told to, and say so in each stream."""
        await self.fleet.end_now()

    @property
    def end_s(self) -> float:
        """What the ends of the replicas may take."""
        return END_S

    def watch_connections(
        self, num_open: Callable[[], int], num_refused: Callable[[], int]
    ) -> None:
        """Told once how to count connections."""
        self.metrics.num_open, self.metrics.num_refused = num_open, num_refused

    def dialect(self, path: str) -> Dialect | None:
        """The API of a path with a prompt."""
        match path:
            case "/v1/completions" | "/v1/chat/completions":
                return OwnDialect(path)
            case "/v1/responses":
                return ResponsesDialect()
            case "/v1/messages":
                return MessagesDialect(self.drops_billing)
        return None

    def route_key(self, path: str, headers: Headers, raw: bytes) -> RouteKey:
        """What a request may have in common with earlier ones; nothing, where it is refused."""
        dialect = self.dialect(path)
        if dialect is None:
            return RouteKey()
        try:
            asked = drop_nulls(parse_json(raw, "body"))
            session = session_of(headers, asked)
            if session is not None:
                return RouteKey(session, len(raw) // _BYTES_PER_TOKEN)
            prompt = self._prompt(dialect, asked)
        except (ApiError, InvalidRequestError):
            return RouteKey()  # a replica says what is wrong with it
        return RouteKey(None, len(prompt), page_digests(prompt, self.page_size))

    def _prompt(self, dialect: Dialect, asked: dict[str, Any]) -> list[int]:
        """The tokens of a body's first prompt; what is asked of its answer is not looked at."""
        fields = dialect.fields(asked)
        body = parse_body(
            dialect.url, {name: fields[name] for name in fields if name not in _OF_STREAMS}
        )
        return prompt_ids(split_prompts(body)[0], self.tokenizer, self.limits)


def session_of(headers: Headers, body: dict[str, Any]) -> str | None:
    """The name of a request's conversation: from a header, or from what clients' bodies have."""
    for name in SESSION_HEADERS:
        if headers.get(name):
            return str(headers[name])
    metadata = body.get("metadata")
    names = [body.get(name) for name in SESSION_FIELDS]
    if isinstance(metadata, dict):
        names.append(metadata.get("user_id"))  # Anthropic's
    return next((name for name in names if isinstance(name, str) and name), None)


def make_router_app(router: Router, begin: Callable[[], None]) -> Starlette:
    """The router as an ASGI app; `begin` is called in its lifespan, in which the replicas live."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        begin()
        router.fleet.begin()
        try:
            yield
        finally:
            await router.fleet.end()
            await router.client.aclose()

    middleware = []
    if router.api_key is None:
        middleware.append(Middleware(CheckHost, own_host=router.own_host))
    app = Starlette(
        routes=[
            Route("/health", _health, methods=["GET", "HEAD"]),
            Route("/ready", _health, methods=["GET", "HEAD"]),
            Route("/metrics", _metrics, methods=["GET", "HEAD"]),
            Route("/{path:path}", _forward, methods=_METHODS),
        ],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={ApiError: _refuse, ClientDisconnect: _note_client_left},
    )
    app.state.router = router
    return app


async def _health(request: Request) -> Response:
    """Whether a replica takes requests."""
    router: Router = request.app.state.router
    _refuse_if_closed(router)
    up = router.fleet.up
    return JSONResponse({"status": "ok", "replicas": len(router.fleet.replicas), "up": len(up)})


def _refuse_if_closed(router: Router) -> None:
    """Refuse where no request would be answered.

    Raises:
        ApiError: why not.
    """
    if router.is_draining:
        raise shutting_down()
    if not router.fleet.up:
        raise try_later(503, "no replica is ready", "no_replica")


async def _metrics(request: Request) -> Response:
    """Metrics of the router and of all replicas."""
    router: Router = request.app.state.router
    return PlainTextResponse(await router.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _forward(request: Request) -> Response:
    """Pass a request on; to another replica where the first one does not begin to answer."""
    router: Router = request.app.state.router
    if router.api_key is not None:
        refuse_wrong_key(request.headers, router.api_key)
    _refuse_if_closed(router)
    with router.bodies.body() as body:
        raw = await body.read(request)
    router.num_in_flight += 1
    try:
        key = await asyncio.get_running_loop().run_in_executor(
            router.workers, router.route_key, request.url.path, request.headers, raw
        )
        return await _Attempts(router, request, raw, key).answer()
    finally:
        router.num_in_flight -= 1


class _Attempts:
    """A request at one replica, and at a second one where the first was lost, or is full."""

    def __init__(self, router: Router, request: Request, raw: bytes, key: RouteKey) -> None:
        self._router = router
        self._request = request
        self._raw = raw
        self._key = key
        self._tried: set[int] = set()

    async def answer(self) -> Response:
        """The answer for the client.

        Raises:
            ApiError: there is none.
        """
        replica = self._choose()
        response = await self._at(replica)
        if response is None:
            return Response(status_code=_CLIENT_LEFT)
        return response

    def _choose(self) -> int:
        """The next replica.

        Raises:
            ApiError: none is left.
        """
        up = [replica for replica in self._router.fleet.up if replica not in self._tried]
        if not up:
            raise try_later(503, "no replica is ready", "no_replica")
        return self._router.affinity.choose(self._key, up)

    async def _at(self, replica: int) -> Response | None:
        """The answer of a replica, or else of another one; None once the client has left."""
        router, path = self._router, self._request.url.path
        url = router.fleet.replicas[replica].url
        self._tried.add(replica)
        self._count(replica)
        router.affinity.note(self._key, replica)  # at once: others may come before it is answered
        is_last = len(self._tried) > 1 or not set(router.fleet.up) - self._tried
        release = _Release(router, replica)
        try:
            sent = send(router.client, str(url), self._request, self._raw)
            response = await unless(sent, client_leaves(self._request))
        except ReplicaLost:
            release()
            router.metrics.lost[replica] += 1
            if is_last:
                raise lost_error(replica) from None
            return await self._at(self._choose())
        except BaseException:
            release()
            raise
        if response is None:
            release()
            return None
        if response.status_code in MAY_GO_ELSEWHERE and not is_last:
            release()
            return await self._at(self._choose())
        return relay(response, path, replica, release)

    def _count(self, replica: int) -> None:
        known = self._router.affinity.known_tokens(self._key, replica) > 0
        reason = "known" if known else "new"
        self._router.metrics.routed[replica, reason] += 1


class _Release:
    """Counts a request at a replica until it is called, once."""

    def __init__(self, router: Router, replica: int) -> None:
        self._router = router
        self._replica = replica
        self._held = True
        router.num_in_flight += 1
        router.affinity.in_flight[replica] += 1

    def __call__(self) -> None:
        if self._held:
            self._held = False
            self._router.num_in_flight -= 1
            self._router.affinity.in_flight[self._replica] -= 1


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _note_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
