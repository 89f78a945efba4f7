"""Errors of the API: every one is OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

_MESSAGES = "/v1/messages"
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is refused or failed.

    Attributes:
        status: HTTP status code.
        code: OpenAI's code for the fault, if there is one.
        param: the field of the body at fault.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": str(self),
                "type": self._type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error object of Anthropic's API."""
        kind = _ANTHROPIC.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "api_error"
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status >= 500:
            return "server_error"
        return "invalid_request_error"

    def response(self, path: str = "") -> JSONResponse:
        """The HTTP response, in the words of the API that has the path."""
        body = self.body
        if path.startswith(_MESSAGES):
            body = self.anthropic_body
        return JSONResponse(body, self.status, headers=self.headers)


def unknown_model(name: str, served: str) -> ApiError:
    """The request names a model other than the one that is served."""
    return ApiError(
        404,
        f"the model `{name:.80}` does not exist; this server has `{served}`",
        "model_not_found",
        "model",
    )


def try_later(status: int, message: str, code: str) -> ApiError:
    """The server cannot take the request now. OpenAI's clients retry by themselves."""
    return ApiError(status, message, code, headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    """The server takes no more requests."""
    return try_later(503, "the server is shutting down", "shutting_down")
