"""What a client is told when something is wrong: OpenAI's error object, always."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        code: the name of the fault for programs, where it has one.
        param: the field of the body that is at fault.
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
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def response(self) -> JSONResponse:
        """As HTTP."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def no_model(asked: str, served: str) -> ApiError:
    """A model that is not here."""
    return ApiError(
        404,
        f"the model `{asked:.80}` does not exist; here is `{served}`",
        "model_not_found",
        "model",
    )


def try_later(status: int, message: str, code: str) -> ApiError:
    """The server cannot take it now; OpenAI's clients try again by themselves."""
    return ApiError(status, message, code, headers={"Retry-After": "1"})
