"""Names of requests: what a client sends comes back, so that its logs and ours can be joined."""

from __future__ import annotations

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NAME = re.compile(r"[\x21-\x7e]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class EchoIds:
    """Middleware that gives each response the `x-request-id` and `traceparent` of its request.

    A request without an id gets one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        name, trace = asked.get("x-request-id", ""), asked.get("traceparent", "")
        if not _NAME.fullmatch(name):
            name = f"req_{uuid4().hex}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = name
                if _TRACE.fullmatch(trace):
                    headers["traceparent"] = trace
            await send(message)

        await self._app(scope, receive, named)
