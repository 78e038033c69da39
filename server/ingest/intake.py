"""What all ways of taking updates in share: reading one leniently, publishing several, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import trio
from msgspec import UNSET

from protocol.errors import ApiError
from protocol.fields import FIELD_NAMES, STEP_NAMES, Fields, decode_fields
from server.brokers.base import Publish, Result
from server.logs import log_event
from server.node import Node

# Who publishes what comes this way: no id, so that its keys are no user's.
SUB: Final = "(redis)"
# Some milliseconds of deciding at a time.
AT_ONCE: Final = 200
# At most one line in so many seconds says what was refused.
COMPLAIN_EVERY_S: Final = 10.0
_SHOWN: Final = 200  # characters of a message in a log line

_LOG: Final = logging.getLogger("statuswire.ingest")
_decode = msgspec.json.Decoder().decode


class TurnLostError(Exception):
    """Another node takes the source in by now: what was read or heard here is the past."""


@dataclass(slots=True)
class Counters:
    """Plain counts of one source on this node.

    Attributes:
        received: updates that this node took up.
        accepted, duplicates: what became of them.
        rejected: refused for good: malformed, or against the rules.
        dead: set aside in the dead-letter stream (``rejected`` counts most of them too).
        dropped: lost, because they could not be accepted in time or the buffer was full.
        trimmed: updates of which unknown fields were left out.
    """

    received: int = 0
    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    dead: int = 0
    dropped: int = 0
    trimmed: int = 0


@dataclass(slots=True)
class Item:
    """One update on its way.

    Attributes:
        data: as it came.
        fields: as it was read.
        key: its idempotency key, None to take its ``eventId``.
        sub: the scope of that key.
        trimmed: fields were left out.
        outcome: once published.
    """

    data: bytes
    fields: Fields
    key: str | None = None
    sub: str = SUB
    trimmed: bool = False
    outcome: Result | None = None


def read_item(data: bytes) -> Item:
    """Read one update of a publisher that may know nothing of this server.

    Fields that there are not, and a ``timestamp`` in another form, are left out: they are no reason to lose what
    the update says. Everything else is as strict as over HTTP.

    Raises:
        ApiError: see ``decode_fields``.
    """
    try:
        return Item(data, decode_fields(data))
    except ApiError as error:
        if not _may_be_left_out(error):
            raise
        refusal = error
    try:
        document = _decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise refusal from None
    kept: dict[str, Any] = {name: value for name, value in document.items() if name in FIELD_NAMES}
    if isinstance(steps := kept.get("steps"), dict):
        kept["steps"] = {name: value for name, value in steps.items() if name in STEP_NAMES}
    try:
        return Item(data, decode_fields(kept), trimmed=True)
    except ApiError as error:
        if error.field != "timestamp":
            raise
    del kept["timestamp"]
    return Item(data, decode_fields(kept), trimmed=True)


def _may_be_left_out(error: ApiError) -> bool:
    return error.code == "unknown_field" or error.field == "timestamp"


async def publish(node: Node, items: Sequence[Item], is_turn: Callable[[], bool] = lambda: True) -> None:
    """Publish and wait until each has its ``outcome``. Being cancelled takes nothing back.

    Raises:
        TurnLostError: it is not this node's turn any more; what has no outcome then was not published.
    """
    # Past the spool: what Redis has already is not to be moved to a local disk.
    broker = node.broker if node.shared is None else node.shared
    for start in range(0, len(items), AT_ONCE):
        part = items[start : start + AT_ONCE]
        await node.hub.wait_room()
        # Somebody else may have gone on from there while this node was waiting, or frozen.
        if not is_turn():
            raise TurnLostError("it is another server's turn")
        submission = broker.submit([Publish(None, item.fields, "may", item.sub, item.key) for item in part])
        with suppress(ApiError):  # every result says so
            await submission.wait_kept()
        for item, result in zip(part, submission.results, strict=True):
            item.outcome = result


def postponed(items: Iterable[Item]) -> set[int]:
    """Which of these, published together, have to be published again: by ``id()``.

    Those that were refused because of what will pass, and, so that they stay in order, the refused ones behind
    them that are about the same job or a part of it.
    """
    again: set[int] = set()
    jobs: set[object] = set()
    for item in items:
        if isinstance(item.outcome, ApiError):
            fields = item.fields
            parent = fields.parent_id
            if item.outcome.status == 503 or fields.job_id in jobs or (parent is not UNSET and parent in jobs):
                again.add(id(item))
                jobs.add(fields.job_id)
    return again


class Complaints:
    """Logs refusals, now and then one with the number of those in between; never what was sent.

    Args:
        source: where they came from.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._next = -1.0
        self._unsaid = 0

    def add(self, event: str, reason: str, **where: str) -> None:
        """One more."""
        now = trio.current_time()
        if now < self._next:
            self._unsaid += 1
            return
        self._next = now + COMPLAIN_EVERY_S
        shown = reason if len(reason) <= _SHOWN else reason[:_SHOWN] + "…"
        more = self._unsaid or None
        self._unsaid = 0
        log_event(_LOG, logging.WARNING, event, source=self._source, reason=shown, more=more, exc_info=None, **where)

    def refused(self, error: ApiError, **where: str) -> None:
        """One that was refused for good."""
        self.add("ingest_refused", f"{error.code}: {error.message}", **where)
