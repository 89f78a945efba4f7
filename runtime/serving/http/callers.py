"""Who may speak to a server without a key: programs of this machine, not the pages of its browser.

A page of any site can send a request to a loopback address. What it cannot do unasked is to send
JSON as such, or to name a host that is not its own.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenspeed_plan.plans.errors import RequestError
from tokenspeed_plan.runtime.serving.http.api_errors import ApiError

_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d*)?", re.IGNORECASE)
_JSON = "application/json"


def check_reach(listener: socket.socket, api_key: str | None) -> None:
    """Refuse an address that other machines reach, where clients need no key.

    Raises:
        RequestError: it is one.
    """
    address = listener.getsockname()[0]
    if api_key is None and not is_loopback(address):
        raise RequestError(
            f"without a key the server may listen on this machine alone, not on {address}",
            "give `--api-key KEY` (or TOKENSPEED_API_KEY), or `--host 127.0.0.1`",
        )


def check_type(content_type: str | None, has_key: bool) -> None:
    """Refuse a body that is not said to be JSON; with a key it may go without a type.

    Raises:
        ApiError: it is not.
    """
    if content_type is None and has_key:
        return
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != _JSON:
        found = f"`{media_type:.80}`" if media_type else "nothing"
        raise ApiError(
            415, f"the header Content-Type must be `{_JSON}`, it is {found}", "unsupported_type"
        )


def refuse_wrong_key(headers: Headers, key: str) -> None:
    """Refuse a wrong API key; the comparison takes the same time for every key.

    Raises:
        ApiError: the key is wrong or missing.
    """
    header = headers.get("authorization", "").encode("latin-1")
    own_header = headers.get("x-api-key", "").encode("latin-1")  # Anthropic's
    is_right = hmac.compare_digest(header, b"Bearer " + key.encode())
    if is_right | hmac.compare_digest(own_header, key.encode()):
        return
    message = "an API key is needed: `Authorization: Bearer KEY`, or `x-api-key: KEY`"
    if header or own_header:
        message = "the API key is wrong"
    raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class CheckHost:
    """Middleware that refuses requests to a host that is neither of this machine nor `own_host`."""

    def __init__(self, app: ASGIApp, own_host: str) -> None:
        self._app = app
        self._own_host = own_host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        app = self._app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            # A browser always sends one, so a request without it comes from none.
            if host is not None and not self._is_own(host):
                app = ApiError(403, f"`{host:.80}` is not this server", "wrong_host").response()
        await app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found["v6"] or found["name"]).lower().rstrip(".")
        is_local_name = name == "localhost" or name.endswith(".localhost")
        return is_local_name or name == self._own_host or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
