"""The messages of live connections, as types: what the server says, and on which channel."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from msgspec import UNSET, Struct, UnsetType

from protocol.job import Record
from protocol.messages import (
    Ack,
    AuthMessage,
    Get,
    NotifyMessage,
    PingMessage,
    PublishMessage,
    Subscribe,
    Unsubscribe,
)
from server.describe.answers import JobMessage, Notification, Rejection
from server.describe.model import Schema

Ref = str | int | UnsetType


class _Message(Struct, tag_field="type", rename="camel", kw_only=True):
    pass


class _Answer(_Message, kw_only=True):
    ref: Ref = UNSET


class Connected(_Answer, kw_only=True, tag="connected"):
    """The client is let in. ``id`` is the end of the log, ``heartbeat`` in seconds."""

    client_id: str
    user_id: str
    heartbeat: float
    id: str
    live: Literal[False] | UnsetType = UNSET


class Authenticated(_Answer, kw_only=True, tag="authenticated"):
    """A newer token was taken."""

    user_id: str
    expires_at: str | UnsetType = UNSET


class Subscribed(_Answer, kw_only=True, tag="subscribed"):
    """The snapshot of what is watched; a large one comes in parts, the last of which has the other members."""

    snapshot: list[Record]
    more: Literal[True] | UnsetType = UNSET
    job_ids: list[str] | UnsetType = UNSET
    channels: list[str] | UnsetType = UNSET
    denied: list[str] | UnsetType = UNSET
    id: str | UnsetType = UNSET
    recovered: bool | UnsetType = UNSET


class Unsubscribed(_Answer, kw_only=True, tag="unsubscribed"):
    """Nothing of it comes any more."""

    job_ids: list[str] | UnsetType = UNSET
    channels: list[str] | UnsetType = UNSET


class Jobs(_Answer, kw_only=True, tag="jobs"):
    """The records that ``get`` asked for, maybe in parts."""

    jobs: list[Record]
    more: Literal[True] | UnsetType = UNSET


class Published(_Answer, kw_only=True, tag="published"):
    """What became of the updates, or of a notification, which reached ``delivered`` live connections."""

    accepted: int
    duplicates: int
    rejected: list[Rejection]
    id: str
    cancel_requested: list[str] | UnsetType = UNSET
    spooled: Literal[True] | UnsetType = UNSET
    delivered: int | UnsetType = UNSET


class Pong(_Answer, kw_only=True, tag="pong"):
    """The answer to ``ping``."""

    timestamp: str


class Heartbeat(_Message, kw_only=True, tag="heartbeat"):
    """A sign of life, with the reader's cursor. ``live`` is there while the server is cut off from its store."""

    timestamp: str
    id: str
    live: Literal[False] | UnsetType = UNSET


class Reset(_Message, kw_only=True, tag="reset"):
    """The log was lost: everything that is watched again, maybe in parts."""

    snapshot: list[Record]
    more: Literal[True] | UnsetType = UNSET
    id: str | UnsetType = UNSET


class ErrorMessage(_Answer, kw_only=True, tag="error"):
    """A message that was not taken, or what the connection ends of."""

    code: str
    message: str
    field: str | UnsetType = UNSET


class StreamConnected(_Message, kw_only=True, tag="connected"):
    """The first event."""

    client_id: str
    user_id: str
    heartbeat: float
    timestamp: str
    live: Literal[False] | UnsetType = UNSET


class Snapshot(_Message, kw_only=True, tag="snapshot"):
    """What is watched; a large one comes in parts, all but the last with ``more`` and without ``id:``."""

    jobs: list[Record]
    more: Literal[True] | UnsetType = UNSET


class StreamHeartbeat(_Message, kw_only=True, tag="heartbeat"):
    """A sign of life; the event's ``id:`` is the reader's cursor."""

    timestamp: str
    live: Literal[False] | UnsetType = UNSET


class StreamReset(_Message, kw_only=True, tag="reset"):
    """The cursor is lost: a snapshot follows."""

    reason: str


class StreamError(_Message, kw_only=True, tag="error"):
    """Why the stream ends; with ``try_later``, ``retry:`` says when to come back."""

    code: str
    message: str


class NoticesConnected(_Message, kw_only=True, tag="connected"):
    """The event ``connected``, the first one."""

    client_id: str
    user_id: str
    username: str | UnsetType = UNSET
    channels: list[str]
    heartbeat: float
    timestamp: str
    live: Literal[False] | UnsetType = UNSET


class NoticesHeartbeat(_Message, kw_only=True, tag="heartbeat"):
    """The event ``heartbeat``; its ``id:`` is the reader's cursor."""

    timestamp: str
    live: Literal[False] | UnsetType = UNSET


class NoticesReset(_Message, kw_only=True, tag="reset"):
    """The event ``reset``: notifications that were not stored may be missing."""

    reason: str


class NoticesError(_Message, kw_only=True, tag="error"):
    """The event ``error``: why the stream ends."""

    code: str
    message: str


class NamedEvent(Struct):
    """A notification: the event has the name it was sent under."""

    data: Any
    metadata: dict[str, Any]
    timestamp: str


class Said(NamedTuple):
    """A message that is known by its form alone."""

    name: str
    schema: Schema


class Channel(NamedTuple):
    """One kind of live connection.

    Attributes:
        address: its path.
        text: what it is.
        says: what the server says.
        hears: what it is told.
    """

    address: str
    text: str
    says: tuple[type[Struct] | Said, ...]
    hears: tuple[type[Struct], ...] = ()


CHANNELS: Final[dict[str, Channel]] = {
    "websocket": Channel(
        "/ws/jobs",
        "JSON in text frames (RFC 6455), subprotocol statuswire.v1 (or statuswire.v1.lines: several "
        "messages in a frame, one a line); a ref comes back in the answer",
        (
            Connected, Authenticated, Subscribed, Unsubscribed, Jobs, Published, Pong, Heartbeat, Reset, ErrorMessage,
            JobMessage, Notification,
        ),
        (Subscribe, Unsubscribe, Get, PublishMessage, NotifyMessage, Ack, AuthMessage, PingMessage),
    ),
    "stream": Channel(
        "/api/v2/jobs/stream",
        "Server-sent events without names, one JSON text each; id: is the reader's cursor",
        (StreamConnected, Snapshot, StreamHeartbeat, StreamReset, StreamError, JobMessage),
    ),
    "notifications": Channel(
        "/api/sse",
        "Server-sent events with the names that notifications have; id: is the reader's cursor",
        (NoticesConnected, NoticesHeartbeat, NoticesReset, NoticesError, NamedEvent),
    ),
}  # fmt: skip
