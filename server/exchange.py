"""One request while it is answered, or while it waits for what it is to be answered with."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from protocol.request import Request
from server.answers import Response
from server.auth import Identity
from server.ids import new_id
from server.limits import client_address
from server.logs import log_event
from server.node import LOG
from server.origins import cors_headers

if TYPE_CHECKING:
    from server.connection import Connection

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:@-]{1,128}", re.ASCII)


class Disconnected(Exception):
    """The peer went away in the middle of a request: there is nobody to answer."""


class Exchange:
    """One request and what is known about it while it is answered.

    Attributes:
        connection: where it came in.
        request: its head.
        request_id: the client's ``X-Request-Id`` if it is usable, else one of ours.
        address: the client's address as far as our proxies vouch for it.
        identity: who asks; set once that is known.
        params: the variable segments of its path, by name.
        route: method and path in the table of routes, "" for what is not there.
    """

    __slots__ = ("address", "connection", "identity", "node", "params", "request", "request_id", "route")

    def __init__(self, connection: Connection, request: Request) -> None:
        self.connection = connection
        self.node = connection.node
        self.request = request
        given = request.headers.get("x-request-id")
        self.request_id = given if given and _REQUEST_ID.fullmatch(given) else new_id()
        self.address = client_address(connection.peer, request, connection.node.proxies)
        self.identity: Identity | None = None
        self.params: dict[str, str] = {}
        self.route = ("", "")

    @property
    def caller(self) -> Identity:
        """Who asks, on routes that need to know."""
        assert self.identity is not None
        return self.identity

    def headers(self) -> list[tuple[str, str]]:
        """The headers that every answer has."""
        return [
            ("Date", self.node.http_date()),
            ("X-Request-Id", self.request_id),
            *cors_headers(self.request, self.node.origins),
        ]

    def log(
        self,
        status: int,
        code: str | None = None,
        exc_info: BaseException | None = None,
        client_id: str | None = None,
    ) -> None:
        """Count an answer and log it: refusals always, others at debug level."""
        self.node.counters.request(self.route, status, code)
        level = logging.ERROR if status == 500 else logging.INFO if status >= 400 else logging.DEBUG
        if not LOG.isEnabledFor(level):  # before all these are looked up, for every request
            return
        log_event(
            LOG,
            level,
            "request",
            method=self.request.method,
            path=self.request.path,
            status=status,
            code=code,
            requestId=self.request_id,
            clientId=client_id,
            jobId=self.params.get("jobId"),
            user=self.identity.user if self.identity else None,
            address=self.address,
            exc_info=exc_info,
        )


class Deferred:
    """A request that waits for something to answer with. There is no task for it: whoever has news of it calls
    ``Connection.wake``. No abstract class, because every request is asked whether it is one: a Python call each.

    Attributes:
        exchange: the request.
        patience_s: for so long it waits.
        headers: those of its answer, if that is a 200; None if nothing can be said before the answer is known.
    """

    __slots__ = ()

    exchange: Exchange
    patience_s: float
    headers: ClassVar[Sequence[tuple[str, str]] | None]

    def answer(self, *, late: bool) -> Response:
        """What there is to say now; ``late`` if the time is over. Must not wait.

        Raises:
            ApiError: it is refused after all.
        """
        raise AssertionError("who waits must say what there is to say")

    def leave(self) -> None:
        """It waits no more: leave no trace. Must not wait nor raise."""
        raise AssertionError("who waits must say how it leaves")
