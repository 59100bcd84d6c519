"""Which HTTP status an error has, and how each API says it."""

from __future__ import annotations

import logging
from typing import Any, Final

from nexus_ext.errors import (
    BackendUnavailable,
    DoesNotFit,
    FormatError,
    Interrupted,
    ModelNotFound,
    NexusError,
    OutOfMemory,
    ReadFailed,
    UsageError,
)
from nexus_ext.multiplexer.api import ContextTooLong, Overloaded

_log = logging.getLogger("nexus_ext.server")


class HttpError(NexusError):
    """Something that only HTTP knows of: a status with a sentence."""

    code = "http"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        hint: str = "",
        code: str = "invalid_request",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}


class TimeLimit(NexusError, TimeoutError):
    """A request took longer than the server allows."""

    code = "time_limit"


# The first class that fits decides: subclasses stand before their bases.
_STATUS: Final[tuple[tuple[type[NexusError], int], ...]] = (
    (ModelNotFound, 404),
    (ContextTooLong, 400),
    (Overloaded, 503),
    (DoesNotFit, 503),
    (OutOfMemory, 503),
    (Interrupted, 503),
    (TimeLimit, 504),
    (UsageError, 400),
    (FormatError, 500),
    (ReadFailed, 500),
    (BackendUnavailable, 500),
)

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def status_of(error: NexusError) -> int:
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def headers_of(error: NexusError) -> dict[str, str]:
    if isinstance(error, HttpError):
        return error.headers
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return {"Retry-After": "5"} if status_of(error) == 503 else {}


def as_nexus_error(error: BaseException) -> NexusError:
    """Return `error` as one of ours; what nobody foresaw is logged and told without its text."""
    if isinstance(error, NexusError):
        return error
    _log.error("a request failed with what nobody foresaw", exc_info=error)
    return HttpError(
        500, f"the server made a mistake ({type(error).__name__})", code="internal_error"
    )


def sentence(error: NexusError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def openai_error(error: NexusError) -> dict[str, Any]:
    code = "context_length_exceeded" if isinstance(error, ContextTooLong) else error.code
    return {
        "error": {
            "message": sentence(error),
            "type": _TYPES.get(status_of(error), "server_error"),
            "param": getattr(error, "param", None),
            "code": code,
        }
    }


def ollama_error(error: NexusError) -> dict[str, Any]:
    return {"error": sentence(error)}


def llama_cpp_error(error: NexusError) -> dict[str, Any]:
    status = status_of(error)
    kind = _TYPES.get(status, "server_error")
    return {"error": {"code": status, "message": sentence(error), "type": kind}}
