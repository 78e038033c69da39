"""What has happened so far, as plain numbers: whoever does a thing adds to them, whoever asks reads them.

Nothing is computed here before somebody asks. On the hot path it costs an integer addition for every sixteen
deliveries (``Hub._send``) and one look at the clock for every flush.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from time import time
from typing import Final

# Upper bounds of the delivery time's buckets, in milliseconds. An update's time of acceptance has whole milliseconds.
DELAY_MS: Final = (
    1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0,
    100.0, 150.0, 200.0, 300.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 30_000.0,
)  # fmt: skip
# Recent flushes are those that make up this many samples, the older ones counting half, a quarter and so on.
RECENT_SAMPLES: Final = 1024
# Ends of live connections that are somebody's fault: a broken or stalled socket, a peer that fell too far behind or
# gave no sign of life, broken frames.
ERRORS: Final = ("broken", "overflow", "stale", "protocol")


class Delays:
    """How long updates took from being accepted to being written to their readers, in milliseconds, in buckets.

    Attributes:
        counts: since the start, one more than ``DELAY_MS``: the last has what took longer.
        recent: the same of recent flushes, for quantiles.
        sum_ms: of all.
    """

    __slots__ = ("_samples", "counts", "recent", "sum_ms")

    def __init__(self) -> None:
        self.counts = [0] * (len(DELAY_MS) + 1)
        self.recent = [0.0] * (len(DELAY_MS) + 1)
        self.sum_ms = 0.0
        self._samples = 0

    def add(self, accepted_ms: int) -> None:
        """Something that was accepted then (unix milliseconds) has been given to the last of its readers now."""
        # On average an acceptance was half a millisecond after the whole one it is known by.
        delay_ms = max(0.0, time() * 1000 - accepted_ms - 0.5)
        bucket = bisect_left(DELAY_MS, delay_ms)
        self.counts[bucket] += 1
        self.recent[bucket] += 1
        self.sum_ms += delay_ms
        self._samples += 1
        if self._samples >= RECENT_SAMPLES:
            self._samples = 0
            self.recent = [count / 2 for count in self.recent]


class Counters:
    """Everything that is counted on one node. Dicts have every key from the start, except those of ``requests``.

    Attributes:
        sockets: accepted.
        refused: sockets that were told to come later, by code; ``unheard`` were closed without a word,
            with ``tls_failed`` and ``proxy_failed`` the beginning went wrong.
        opened: live connections by transport; ``poll`` counts polls.
        closed: live connections (without polls) by reason.
        failed: connections that ended with an exception of ours.
        lived_s: what all live connections have lasted: add ``now`` for each that is live.
        requests: answered, by method and path of the table ("" for others) and status.
        errors: refusals by code, in answers and in WebSocket messages.
        messages: received over WebSocket.
        updates: published, by source and outcome.
        notices: notifications that were sent here, by outcome.
        shown: updates that were kept and shown here, whoever published them.
        delivered: updates given to readers as they came.
        replayed: updates given to readers that came back.
        polled: updates given in answers to polls.
        conflated: updates that were replaced by newer ones before a slow reader could take them.
        begun: how readings began.
        logs_lost: new epochs of the log.
        delays: from acceptance to delivery.
        loop_late_s: how late the loop was, in each of the last seconds.
    """

    __slots__ = (
        "begun", "closed", "conflated", "delays", "delivered", "errors", "failed", "lived_s", "logs_lost",
        "loop_late_s", "messages", "notices", "opened", "polled", "refused", "replayed", "requests", "shown", "sockets",
        "updates",
    )  # fmt: skip

    def __init__(self) -> None:
        self.sockets = 0
        self.refused = dict.fromkeys(
            ("too_many_connections", "rate_limited", "unheard", "tls_failed", "proxy_failed"), 0
        )
        self.opened = dict.fromkeys(("websocket", "sse", "poll"), 0)
        self.closed = dict.fromkeys(
            ("closed", "finished", "drain", "disconnected", "expired", "unauthorized", "auth_timeout", "rate_limited",
             "policy", "try_later", *ERRORS), 0,
        )  # fmt: skip
        self.failed = 0
        self.lived_s = 0.0
        self.requests: dict[tuple[str, str, int], int] = {}
        self.errors: dict[str, int] = {}
        self.messages = 0
        self.updates = {
            (source, outcome): 0
            for source in ("http", "websocket")
            for outcome in ("accepted", "duplicate", "rejected")
        }
        self.notices = dict.fromkeys(("accepted", "duplicate", "rejected"), 0)
        self.shown = 0
        self.delivered = 0
        self.replayed = 0
        self.polled = 0
        self.conflated = 0
        self.begun = dict.fromkeys(("snapshot", "resume", "reset"), 0)
        self.logs_lost = 0
        self.delays = Delays()
        self.loop_late_s: deque[float] = deque((0.0,), maxlen=60)

    def publishes(self, source: str, accepted: int, duplicates: int, rejected: int) -> None:
        """What became of published updates that came from ``source``."""
        updates = self.updates
        if accepted:
            key = source, "accepted"
            updates[key] = updates.get(key, 0) + accepted
        if duplicates or rejected:
            for outcome, count in (("duplicate", duplicates), ("rejected", rejected)):
                if count:
                    updates[source, outcome] = updates.get((source, outcome), 0) + count

    def request(self, route: tuple[str, str], status: int, code: str | None) -> None:
        """A request was answered. Method and path are the table's, so that there are not more keys than routes."""
        key = *route, status
        self.requests[key] = self.requests.get(key, 0) + 1
        if code is not None:
            self.error(code)

    def error(self, code: str) -> None:
        """Something was refused with this code."""
        self.errors[code] = self.errors.get(code, 0) + 1

    def begin(self, *, resumed: bool, lost: bool) -> None:
        """A reader began: with a cursor that the log reaches, with one that it does not, or without."""
        self.begun["resume" if resumed else "reset" if lost else "snapshot"] += 1

    def open(self, transport: str, now: float) -> None:
        """A live connection began; ``now`` in monotonic seconds."""
        self.opened[transport] += 1
        self.lived_s -= now

    def close(self, reason: str, now: float) -> None:
        """A live connection ended."""
        self.closed[reason] = self.closed.get(reason, 0) + 1
        self.lived_s += now

    @property
    def connection_errors(self) -> int:
        """Connections that ended otherwise than they should."""
        return self.failed + sum(self.closed[reason] for reason in ERRORS)
