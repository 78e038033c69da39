"""What can be wrong, with the status or close code that says so.

An ``ApiError`` is the peer's mistake (4xx) or a passing condition of ours (503); anything else that is
raised is a bug and becomes a bare 500. Status codes are those of RFC 9110 section 15 and RFC 6585,
close codes those of RFC 6455 section 7.4.1 and, from 4000 on, our own.
"""

from __future__ import annotations

from enum import IntEnum


class CloseCode(IntEnum):
    """WebSocket close codes this server sends (RFC 6455 section 7.4)."""

    NORMAL = 1000
    GOING_AWAY = 1001  # drain; the reason carries a reconnect delay in milliseconds
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_PAYLOAD = 1007  # not UTF-8
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    TRY_LATER = 1013
    UNAUTHORIZED = 4401  # token missing, bad or expired
    AUTH_TIMEOUT = 4408
    RATE_LIMITED = 4429


class ApiError(Exception):
    """One answer that is not a success.

    Attributes:
        status: HTTP status code.
        code: machine-readable snake_case word, part of the outside contract.
        message: one helpful sentence for a person; names the field and the bad value where there is one.
        field: name of the offending field or parameter as the peer spells it, or None.
        retry_after: seconds for ``Retry-After``, or None.
        headers: further response headers, as (name, value) pairs.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.headers = headers

    def body(self, request_id: str | None = None) -> dict[str, dict[str, str]]:
        """The JSON answer: ``{"error": {"code", "message", "field"?, "requestId"?}}``."""
        error = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        if request_id is not None:
            error["requestId"] = request_id
        return {"error": error}


def invalid_field(field: str, message: str) -> ApiError:
    """422: a body field with a bad value."""
    return ApiError(422, "invalid_field", f"{field}: {message}", field=field)


def invalid_parameter(name: str, message: str) -> ApiError:
    """400: a query or path parameter with a bad value."""
    return ApiError(400, "invalid_parameter", f"{name}: {message}", field=name)


def job_not_found(job_id: str) -> ApiError:
    """404: no such job, or none that the caller may see; the two must look the same."""
    return ApiError(404, "job_not_found", f"there is no job {job_id!r} that you may see")
