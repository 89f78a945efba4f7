"""One request on its way to a replica and back, and what its client is told where that is lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tokenspeed_plan.runtime.serving.http.api_errors import ApiError, try_later

# Headers that are of one connection (RFC 9110, 7.6.1), and what each side writes anew.
_OF_A_CONNECTION = {
    "connection",
    "content-length",
    "date",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# What a client has shown to the router; a replica may want another key.
_OF_THE_ROUTER = _OF_A_CONNECTION | {"authorization", "x-api-key"}
_EVENTS = "text/event-stream"
_EVENT_END = b"\n\n"
MAY_GO_ELSEWHERE = (429, 503)  # a replica is full, drains or has failed: another one may answer


class ReplicaLost(Exception):
    """The replica ended before its answer began."""


async def send(
    client: httpx.AsyncClient, url: str, request: Request, body: bytes
) -> httpx.Response:
    """Send a request to a replica; returns its answer, of which the head is there.

    An answer that is no stream of events is there as a whole.

    Raises:
        ReplicaLost: there is no answer.
    """
    headers = [
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in _OF_THE_ROUTER
    ]
    target = f"{url}{request.url.path}"
    if request.url.query:
        target += f"?{request.url.query}"
    message = client.build_request(request.method, target, headers=headers, content=body)
    try:
        response = await client.send(message, stream=True)
        if not _is_events(response):
            await response.aread()
            await response.aclose()
    except httpx.TransportError as error:
        raise ReplicaLost from error
    return response


def relay(
    response: httpx.Response, path: str, replica: int, release: Callable[[], None]
) -> Response:
    """The answer of a replica for its client; `release` is called once it is sent, or cannot be."""
    headers = {
        name: value
        for name, value in response.headers.items()
        if name.lower() not in _OF_A_CONNECTION
    }
    if not _is_events(response):
        release()
        headers.pop("content-encoding", None)  # it was read
        return Response(response.content, response.status_code, headers)
    events = _whole_events(response, path, replica)
    return _Relay(events, response, headers, release)


class _Relay(StreamingResponse):
    """A stream that frees its replica however it ends, also where it never begins."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        response: httpx.Response,
        headers: dict[str, str],
        release: Callable[[], None],
    ) -> None:
        super().__init__(events, response.status_code, headers)
        self._response = response
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._response.aclose()


async def _whole_events(response: httpx.Response, path: str, replica: int) -> AsyncIterator[bytes]:
    """The events of a stream; where it breaks off, the last one says so.

    Events are passed on as wholes, so that what is said last can be read.
    """
    rest = b""
    try:
        async for chunk in response.aiter_raw():
            end = (rest + chunk).rfind(_EVENT_END)
            if end < 0:
                rest += chunk
                continue
            end += len(_EVENT_END)
            whole = (rest + chunk)[:end]
            rest = (rest + chunk)[end:]
            yield whole
    except httpx.TransportError:
        yield _last_event(path, replica)
        return
    if rest:
        yield rest


def _last_event(path: str, replica: int) -> bytes:
    """The event of an error, in the words of the API that has the path."""
    error = lost_error(replica)
    body: dict[str, Any] = error.body
    name = b""
    if path.startswith("/v1/messages"):
        name, body = b"event: error\n", error.anthropic_body
    elif path.startswith("/v1/responses"):
        name = b"event: error\n"
        body = {"type": "error", "code": error.code, "message": str(error), "param": None}
    return name + b"data: " + json.dumps(body, allow_nan=False).encode() + _EVENT_END


def lost_error(replica: int) -> ApiError:
    """What a client is told whose replica has ended."""
    return try_later(
        503, f"replica {replica} ended while it answered; send the request again", "replica_lost"
    )


def _is_events(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith(_EVENTS)
