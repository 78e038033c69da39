"""Long-poll and plain-poll requests (RFC 6202 section 2): parameters and body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from protocol.errors import invalid_parameter
from protocol.fields import is_id
from protocol.wire import json_list

_SECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{0,32})?([eE][+-]?[0-9]{1,3})?", re.ASCII)

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 60.0  # below the 60 s read timeout that reverse proxies ship with, when rounded by the network


def parse_timeout(query: Mapping[str, str]) -> float:
    """How long to wait for news, in seconds, at most 60; 0 is plain polling.

    Raises:
        ApiError: 400 if it is negative or not a number.
    """
    text = query.get("timeout")
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not _SECONDS.fullmatch(text):
        raise invalid_parameter("timeout", f"{text[:32]!r} is not a number of seconds from 0 to 60")
    return min(float(text), MAX_TIMEOUT_S)


def parse_client_id(query: Mapping[str, str]) -> str | None:
    """The name under which the server remembers this client's cursor.

    Raises:
        ApiError: 400 if it is not an id.
    """
    client_id = query.get("client_id")
    if client_id is not None and not is_id(client_id):
        raise invalid_parameter("client_id", "not an id: 1 to 128 characters of A-Z a-z 0-9 _ . : @ -")
    return client_id


def poll_body(
    messages: Iterable[bytes], *, last_seen: str, reset: bool, timed_out: bool, done: bool, live: bool = True
) -> Iterable[bytes]:
    """The answer of a poll, streamed: ``{"updates":[…],"last_seen","reset","timedOut","done"}``.

    Args:
        live: whether the server knows all that others know; if not, ``"live":false`` says so.
    """
    facts = {"last_seen": last_seen, "reset": reset, "timedOut": timed_out, "done": done}
    rest = msgspec.json.encode(facts if live else facts | {"live": False})
    return json_list(messages, b'{"updates":', b"," + rest[1:])
