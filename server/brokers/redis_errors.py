"""What can go wrong between us and Redis, apart from the errors that Redis itself answers (``RedisError``)."""

from __future__ import annotations


class RedisClientError(Exception):
    """Base of all below."""


class RedisStartError(RedisClientError):
    """No usable connection can be made. The message says what to do.

    Attributes:
        passing: it may well be better soon (unreachable, loading, no master elected), so that trying again makes
            sense without changing anything.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class NotConnectedError(RedisClientError):
    """There is no connection just now; the command was not sent."""


class ConnectionLostError(RedisClientError):
    """The connection broke before the answer came.

    Attributes:
        sent: at least part of the command was handed to the kernel, so it may have been executed. When False it
            certainly was not.
    """

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(f"{reason}; the command {'may have been' if sent else 'was not'} executed")
        self.sent = sent


class OverloadedError(RedisClientError):
    """Too many commands wait for their answers; this one was not sent."""


class CrossSlotError(RedisClientError, ValueError):
    """The keys of one command belong to different hash slots, which a cluster cannot serve: a bug of the caller."""
