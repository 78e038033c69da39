"""What is on its way to the server, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from statuswire.fields import stamped
from statuswire.spool import Place

# The server remembers keys for five minutes at least. An end that is sent later says instead what it is newer than.
KEY_LIFE_US: Final = 4 * 60 * 1_000_000


class Refusal(NamedTuple):
    """Why one update was not taken."""

    code: str
    message: str


class Answer(NamedTuple):
    """What the server said to a batch.

    Attributes:
        rejected: refusals by index.
        duplicates: how many were known already.
        cancels: ids of jobs that somebody wants cancelled.
    """

    rejected: Mapping[int, Refusal]
    duplicates: int
    cancels: Iterable[str]


class State:
    """What this process knows of one attempt of a job.

    Attributes:
        identity: fields that create the job; with every update until one was accepted. Not for longer, so that a job
            that was deleted is not made again.
        ordered: whether its news carries ``seq``. That of handles does: what is sent late then cannot undo what is
            newer. Single updates come from anywhere, by clocks that may differ.
        renew_s: seconds after which its lease is renewed, None for never.
        heard: when the server last took something, monotonic seconds.
        holders: open handles.
        attempt: which attempt this is, as it is sent; None for the first, without saying so.
        climbs: how often it may still become the next attempt, because that one was over. More than 0 where a queue may
            give a job to a worker again without saying that it did.
        ended: whether an end of it is on its way, or was.
    """

    __slots__ = (
        "accepted",
        "attempt",
        "cancel_requested",
        "climbs",
        "ended",
        "heard",
        "holders",
        "identity",
        "job_id",
        "key",
        "ordered",
        "refused",
        "renew_s",
        "ttl",
    )

    def __init__(self, job_id: str, attempt: int | None, identity: dict[str, Any], now: float, ordered: bool) -> None:
        self.job_id = job_id
        self.key = (job_id, attempt)
        self.identity = identity
        self.accepted = False
        self.cancel_requested = False
        self.refused: Refusal | None = None
        self.ordered = ordered
        self.ttl: float | None = None
        self.renew_s: float | None = None
        self.heard = now
        self.holders = 0
        self.attempt = attempt
        self.climbs = 0
        self.ended = False


class Item:
    """One update on its way.

    Attributes:
        fields: of news, in the words of the wire protocol.
        body: of an end, unless ``place`` says where it is kept.
        event_id: of an end.
        at_us: of an end, when it was said; its place among other updates, too.
        attempt: of its job, when it was last sent.
        unsure: it was sent without an answer, so it may have been taken.
    """

    __slots__ = (
        "at_us",
        "attempt",
        "bared",
        "body",
        "error",
        "event_id",
        "fields",
        "place",
        "seq",
        "settled",
        "state",
        "ticket",
        "tries",
        "unsure",
    )

    def __init__(self, ticket: int, state: State, fields: dict[str, Any]) -> None:
        self.ticket = ticket
        self.state = state
        self.fields = fields
        self.event_id = ""
        self.at_us = 0
        self.body: bytes | None = None
        self.place: Place | None = None
        self.seq = 0
        self.tries = 0
        self.bared = False
        self.attempt = state.attempt
        self.settled = False
        self.unsure = False
        self.error: Refusal | None = None

    @property
    def is_end(self) -> bool:
        """Whether it must arrive."""
        return bool(self.event_id)


class Notice:
    """One notification on its way."""

    __slots__ = ("body", "key", "ticket")

    def __init__(self, ticket: int, key: str, body: bytes) -> None:
        self.ticket = ticket
        self.key = key
        self.body = body


class Outcome(NamedTuple):
    """What an answer settled.

    Attributes:
        done: items that need no more care.
        refused: those among them that were not taken, with the reason.
        unfit: ends to be sent again with nothing but the status.
    """

    done: list[Item]
    refused: list[tuple[Item, Refusal]]
    unfit: list[tuple[Item, Refusal]]


def sendable(item: Item, body: bytes, now_us: int) -> bytes:
    """An update's body as it is sent: marked, so that it counts once."""
    if not item.is_end:
        return stamped(body, seq=item.seq) if item.seq else body
    event_id = f"{item.event_id}-bare" if item.bared else item.event_id
    if now_us - item.at_us > KEY_LIFE_US:
        # Another attempt may have begun meanwhile, and been reported on: this end must not end that one.
        return stamped(body, eventId=f"{event_id}-late", seq=item.at_us)
    return stamped(body, eventId=event_id)
