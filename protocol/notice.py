"""Notifications: an event with data for some clients, users, channels or everyone, beside any job.

A notification is an entry of the log like an update of a job, one for all of its targets: so it is replayed by
cursor, and a reader that several of them name gets it once. Its body is ``{"event","data","metadata","timestamp"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Final

import msgspec
from msgspec import Raw

from protocol.errors import invalid_field, invalid_parameter
from protocol.fields import MAX_PAYLOAD, encoded, is_id
from protocol.messages import NotifyMessage, decode_notify_message
from protocol.presence import PRESENCE, PresenceEvent, Target, TargetKind
from protocol.update import NOTIFICATION, Update, format_time
from protocol.watch import check_parameter_id, parse_list

MAX_TARGETS: Final = 1000
MAX_EVENT: Final = 128  # bytes of an event's name, in UTF-8
MAX_KEY: Final = 255
MAX_CHANNELS: Final = 1000  # joined by one connection
MAX_USERNAME: Final = 128  # bytes
# The longest list of ids is half of it.
MAX_NOTICE: Final = 256 * 1024
# The event stream's own; a page could not tell ours from an application's.
RESERVED_EVENTS: Final = frozenset(("connected", "heartbeat", "reset", "error"))

BROADCAST: Final = "broadcast"
_SINGULAR: Final[dict[TargetKind, TargetKind]] = {"users": "user", "channels": "channel"}

_NOTHING: Final = Raw(b"{}")


class _Body(msgspec.Struct, gc=False):
    event: str
    data: Raw
    metadata: Raw
    timestamp: str


class _EventData(msgspec.Struct, gc=False):
    data: Raw
    metadata: Raw
    timestamp: str


_encode = msgspec.json.Encoder().encode
_decode_body: Final = msgspec.json.Decoder(_Body).decode


class Notice(msgspec.Struct, frozen=True, gc=False):
    """A notification as it is accepted.

    Attributes:
        target: whom it is for.
        event: its name.
        data: JSON text.
        metadata: JSON text of an object, ``{}`` if none was given.
        store: keep it for those of its users who are not there.
    """

    target: Target
    event: str
    data: Raw
    metadata: Raw = _NOTHING
    store: bool = False

    def entry(self, offset: int, at_ms: int) -> Update:
        """Its entry in the log."""
        body = _encode(_Body(self.event, self.data, self.metadata, format_time(at_ms)))
        return notice_entry(offset, at_ms, self.event, targets_of(self.target), body)

    @property
    def signature(self) -> bytes:
        """What two sendings under one idempotency key must agree on."""
        return _encode(self)


def notice_entry(offset: int, at_ms: int, event: str, targets: tuple[str, ...], body: bytes) -> Update:
    """The entry of a notification whose body is at hand."""
    return Update(offset, at_ms, NOTIFICATION, "", "", event, "", 0, body, True, True, targets)


def decode_notice(body: bytes) -> tuple[Notice, str | None]:
    """Read ``{target, targetId | targetIds, event, data, metadata?, store?, eventId?}``.

    Returns:
        The notification, and the idempotency key in ``eventId``.

    Raises:
        ApiError: 400 ``malformed_json``, 422 ``invalid_field`` with the field's name.
    """
    message = decode_notify_message(body)
    return check_notice(message), check_key(message)


def check_notice(message: NotifyMessage) -> Notice:
    """The notification that a message asks for. Raises ApiError 422 with the field's name."""
    target = _target(message)
    event = message.event
    if not event or not event.isprintable() or event != event.strip() or len(event.encode()) > MAX_EVENT:
        raise invalid_field("event", f"must be 1 to {MAX_EVENT} bytes of text in one line, without space around it")
    if event in RESERVED_EVENTS:
        raise invalid_field("event", f"{event!r} is an event of the stream itself; choose another name")
    data = encoded("data", message.data)
    metadata = _NOTHING if message.metadata is None else encoded("metadata", message.metadata)
    size = len(data) + len(metadata)
    if size > MAX_PAYLOAD:
        raise invalid_field("data", f"data and metadata may have {MAX_PAYLOAD} bytes together, these have {size}")
    if message.store and target.kind not in ("user", "users"):
        raise invalid_field("store", f"only what is for users can be kept for them, not for target {target.kind!r}")
    return Notice(target, event, data, metadata, message.store)


def presence_notice(event: PresenceEvent) -> Notice:
    """What those hear who have joined the channel that tells who comes and goes: ``join`` or ``leave``."""
    data: dict[str, object] = {"userId": event.user, "count": event.count}
    if event.channel is not None:
        data["channel"] = event.channel
    return Notice(Target("channel", (event.listeners,)), event.kind, Raw(_encode(data)))


def parse_channels(query: Mapping[str, str]) -> list[str] | None:
    """Read ``channels``, a comma list; None without it, and an empty one is one.

    Raises:
        ApiError: 400 for a name that is no id, or too many.
    """
    if not query.get("channels"):
        return [] if "channels" in query else None
    channels = list(dict.fromkeys(parse_list(query, "channels")))
    if len(channels) > MAX_CHANNELS:
        raise invalid_parameter("channels", f"{len(channels)} channels, at most {MAX_CHANNELS} can be joined")
    for channel in channels:
        check_parameter_id("channels", channel)
    return channels


def parse_username(query: Mapping[str, str]) -> str | None:
    """Read ``username``: what a user calls itself. Raises ApiError 400 if it is too long, or not one line of text."""
    name = query.get("username")
    if name and not (name.isprintable() and len(name.encode()) <= MAX_USERNAME):
        raise invalid_parameter("username", f"must be at most {MAX_USERNAME} bytes of text in one line")
    return name or None


def check_key(message: NotifyMessage) -> str | None:
    """The idempotency key in a message. Raises ApiError 422 for one that is empty or too long."""
    key = message.event_id
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise invalid_field("eventId", f"must be 1 to {MAX_KEY} characters")
    return key


def _target(message: NotifyMessage) -> Target:
    kind = message.target
    plural = kind in _SINGULAR
    wanted, other = ("targetIds", "targetId") if plural else ("targetId", "targetIds")
    ids = message.target_ids if plural else None if message.target_id is None else [message.target_id]
    unwanted = message.target_id if plural else message.target_ids
    if kind == BROADCAST:
        if ids is not None or unwanted is not None:
            raise invalid_field(wanted if ids is not None else other, "a broadcast is for everyone: leave it out")
        return Target(kind)
    if unwanted is not None:
        raise invalid_field(other, f"target {kind!r} takes {wanted}")
    if not ids:
        raise invalid_field(wanted, f"target {kind!r} needs {'at least one' if plural else 'it'}")
    ids = list(dict.fromkeys(ids))
    if len(ids) > MAX_TARGETS:
        raise invalid_field(wanted, f"{len(ids)} ids, at most {MAX_TARGETS} are allowed")
    for name in ids:
        if not is_id(name):
            raise invalid_field(wanted, f"{name[:128]!r} is not an id: 1 to 128 of letters, digits and _ . : @ -")
        if kind in ("channel", "channels") and name.startswith(PRESENCE):
            raise invalid_field(wanted, f"{name!r}: the server itself tells on such channels who is there")
    return Target(kind, tuple(ids))


# Targets in the log: ``client/<id>``, ``user/<id>``, ``channel/<name>`` or ``broadcast``; ``/`` cannot occur in ids.


def targets_of(target: Target) -> tuple[str, ...]:
    """A target as the log has it."""
    if target.kind == BROADCAST:
        return (BROADCAST,)
    kind = _SINGULAR.get(target.kind, target.kind)
    return tuple([f"{kind}/{name}" for name in target.ids])


def target_of(targets: tuple[str, ...]) -> Target:
    """The opposite of ``targets_of``: a plural kind for several, a singular one for one."""
    kind = targets[0].partition("/")[0]
    if kind == BROADCAST:
        return Target("broadcast")
    ids = tuple([target[len(kind) + 1 :] for target in targets])
    if kind == "client":
        return Target("client", ids)
    if kind == "user":
        return Target("user" if len(ids) == 1 else "users", ids)
    assert kind == "channel", kind
    return Target("channel" if len(ids) == 1 else "channels", ids)


def users_of(update: Update) -> list[str]:
    """The users that a notification is for by name."""
    return [target[5:] for target in update.targets or () if target.startswith("user/")]


def heard(client_id: str | None, user: str, channels: Iterable[str] = ()) -> set[str]:
    """The targets that reach a connection, which may have no name."""
    names = {BROADCAST, f"user/{user}", *(f"channel/{channel}" for channel in channels)}
    if client_id is not None:
        names.add(f"client/{client_id}")
    return names


def reaches(update: Update, names: Set[str]) -> bool:
    """Whether a notification is for one of these targets."""
    return not (update.targets is None or names.isdisjoint(update.targets))


def event_data(update: Update) -> bytes:
    """``{"data","metadata","timestamp"}``, what a named event of a stream carries."""
    body = _decode_body(update.body)
    return _encode(_EventData(body.data, body.metadata, body.timestamp))
