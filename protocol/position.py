"""Where a reader stands in the log: ``<epoch>:<offset>``, opaque to clients, the same on every transport."""

from __future__ import annotations

import re
from typing import NamedTuple

_POSITION = re.compile(r"([a-z0-9]{1,32}):(0|[1-9][0-9]{0,17})", re.ASCII)
_UNIX_TIME = re.compile(r"[0-9]{1,18}", re.ASCII)
# 10^11 seconds is the year 5138 and 10^11 milliseconds is 1973: no ambiguity for any log that exists.
_MILLISECONDS_FROM = 100_000_000_000


class Position(NamedTuple):
    """A point in one incarnation (epoch) of the log: everything up to and including ``offset`` has been given."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"


class Since(NamedTuple):
    """A wall-clock point: ``last_seen`` given as unix time. In milliseconds."""

    unix_ms: int


def parse_cursor(text: str) -> Position | Since | None:
    """Read what a client sends as ``last_seen`` or ``Last-Event-ID``.

    A bare integer is a unix time in seconds or milliseconds. Returns None for anything malformed, which
    readers treat like a cursor that the log no longer knows.
    """
    match = _POSITION.fullmatch(text)
    if match:
        return Position(match[1], int(match[2]))
    if _UNIX_TIME.fullmatch(text):
        number = int(text)
        return Since(number if number >= _MILLISECONDS_FROM else number * 1000)
    return None
