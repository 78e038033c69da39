"""Messages beside updates: what a WebSocket client may say, and what the server says on its own account.

Client messages are typed structs told apart by ``type``; a wrong one becomes an ``ApiError`` that names the
field. Server messages are built here as JSON text; transports frame them through ``protocol.wire``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from protocol.errors import ApiError, invalid_field
from protocol.fields import is_id
from protocol.presence import TargetKind
from protocol.update import STATUSES
from protocol.watch import ALL_TYPES, ANY, RECORD_FIELDS, Filter

Ref: TypeAlias = str | int | None

# Of a filter, in characters, all together: each of a connection's subscriptions keeps its own.
MAX_KINDS = 4096
MAX_MIN_INTERVAL_MS = 60_000
# A snapshot in one message would have no bound; parts of this size also let live traffic in between.
SNAPSHOT_PART_BYTES = 256 * 1024


class _ClientMessage(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, rename="camel", kw_only=True):
    ref: Ref = None


class Subscribe(_ClientMessage, tag="subscribe"):
    """Watch jobs, a user's jobs, or (as admin) all; with ``last_seen`` what was missed comes first.

    ``channels`` are joined for notifications; alone they ask for no jobs.
    """

    job_ids: list[str] | None = None
    user_id: str | None = None
    all: bool = False
    channels: list[str] | None = None
    types: str | list[str] | None = None
    kind: str | list[str] | None = None
    status: str | list[str] | None = None
    fields: str | list[str] | None = None
    last_seen: str | int | None = msgspec.field(default=None, name="last_seen")
    min_interval: int | float | None = None


class Unsubscribe(_ClientMessage, tag="unsubscribe"):
    """Stop watching what is named; without names, everything."""

    job_ids: list[str] | None = None
    user_id: str | None = None
    all: bool = False
    channels: list[str] | None = None


class Get(_ClientMessage, tag="get"):
    """Ask for the records of some jobs, once."""

    job_ids: list[str]


class PublishMessage(_ClientMessage, tag="publish"):
    """Updates, each checked by itself."""

    updates: list[msgspec.Raw]


class NotifyMessage(_ClientMessage, tag="notification", kw_only=True):
    """A notification to be sent; ``protocol.notice`` checks it. HTTP takes the same, without ``type``."""

    target: TargetKind
    target_id: str | None = None
    target_ids: list[str] | None = None
    event: str
    data: Any
    metadata: dict[str, Any] | None = None
    store: bool = False
    event_id: str | None = None


class Ack(_ClientMessage, tag="ack"):
    """Everything up to this cursor has arrived: stored notifications up to it need not come again."""

    id: str


class AuthMessage(_ClientMessage, tag="auth"):
    """A token: the first one, or a newer one for the same user."""

    token: str


class PingMessage(_ClientMessage, tag="ping"):
    """Answered by ``pong``: for clients that cannot send protocol pings, browsers above all."""


ClientMessage: TypeAlias = (
    Subscribe | Unsubscribe | Get | PublishMessage | NotifyMessage | Ack | AuthMessage | PingMessage
)

_DECODER: Final[msgspec.json.Decoder[ClientMessage]] = msgspec.json.Decoder(ClientMessage)
_NOTIFY_DECODER: Final = msgspec.json.Decoder(NotifyMessage)
_ACK_DECODER: Final = msgspec.json.Decoder(Ack)
_Message = TypeVar("_Message")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


def decode_client_message(text: str | bytes) -> ClientMessage:
    """Read one client message.

    Raises:
        ApiError: 400 ``malformed_json``, 422 ``invalid_field`` with the field's name.
    """
    return _decode(_DECODER, text)


def decode_notify_message(text: bytes) -> NotifyMessage:
    """Read a notification that stands by itself, as a request's body.

    Raises:
        ApiError: as ``decode_client_message``.
    """
    return _decode(_NOTIFY_DECODER, text)


def decode_ack(text: bytes) -> Ack:
    """Read an acknowledgement that stands by itself, as a request's body.

    Raises:
        ApiError: as ``decode_client_message``.
    """
    return _decode(_ACK_DECODER, text)


def _decode(decoder: msgspec.json.Decoder[_Message], text: str | bytes) -> _Message:
    try:
        try:
            return decoder.decode(text)
        except msgspec.ValidationError as error:
            msgspec.json.decode(text, type=msgspec.Raw)  # broken further on, it is no JSON, whatever comes before
            raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ApiError(400, "malformed_json", f"the message is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "malformed_json", "the message is nested too deeply") from None


def _explain(complaint: str) -> ApiError:
    match = _PATH.search(complaint)
    field = match[1] if match and match[1] else None
    if field is None and (unknown := re.search(r"unknown field `([^`]*)`", complaint)):
        field = unknown[1]
    if field is None and "missing required field" in complaint:
        field = complaint.split("`")[1]
    message = _PATH.sub("", complaint)
    return ApiError(422, "invalid_field", f"{field}: {message}" if field else message, field=field)


class _Ref(msgspec.Struct):
    ref: Ref = None


_REF_DECODER: Final = msgspec.json.Decoder(_Ref)


def ref_of(text: str | bytes) -> Ref:
    """The ``ref`` of a message that is not taken, as far as it can be read: the refusal shall have it."""
    try:
        return _REF_DECODER.decode(text).ref
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def subscribe_filter(message: Subscribe) -> Filter:
    """The filter of a ``subscribe``.

    Raises:
        ApiError: 422 for an unknown type or status, or too many kinds.
    """
    if message.types is None and message.status is None and message.kind is None:
        return ANY
    types = _known("types", _many(message.types), ALL_TYPES)
    statuses = _known("status", _many(message.status), frozenset(STATUSES))
    kinds = _many(message.kind)
    if kinds is not None and sum(map(len, kinds)) > MAX_KINDS:
        raise invalid_field("kind", f"these are more than {MAX_KINDS} characters")
    return Filter(types, None if kinds is None else frozenset(kinds), statuses)


def subscribe_fields(message: Subscribe) -> frozenset[str] | None:
    """The record fields a ``subscribe`` asks for, None for all.

    Raises:
        ApiError: 422 for a name that no record has.
    """
    return _known("fields", _many(message.fields), RECORD_FIELDS)


def min_interval_s(message: Subscribe) -> float | None:
    """The wanted pause between updates of a job, in seconds; None if the message says nothing of it.

    Raises:
        ApiError: 422 if it is negative or above a minute.
    """
    if message.min_interval is None:
        return None
    if not 0 <= message.min_interval <= MAX_MIN_INTERVAL_MS:
        raise invalid_field("minInterval", f"{message.min_interval} is not 0 to {MAX_MIN_INTERVAL_MS} milliseconds")
    return message.min_interval / 1000


def split_ids(
    job_ids: Iterable[str], room: int, watched: Callable[[str], bool] = lambda job_id: False
) -> tuple[list[str], list[str]]:
    """Tell ids that can be watched from those denied: malformed ones, and those beyond ``room``.

    Args:
        job_ids: as the client sent them; a repeated one counts once.
        room: how many more jobs the connection may watch.
        watched: whether it watches a job already; such a job takes no room.
    """
    good: list[str] = []
    denied: list[str] = []
    for job_id in dict.fromkeys(job_ids):
        if not is_id(job_id):
            denied.append(job_id[:128])
        elif watched(job_id):
            good.append(job_id)
        elif room > 0:
            room -= 1
            good.append(job_id)
        else:
            denied.append(job_id)
    return good, denied


def server_message(type_: str, **fields: Any) -> bytes:
    """JSON text of ``{"type":…, …fields}``; fields that are None are left out, and names are sent as they are."""
    message: dict[str, Any] = {"type": type_}
    for name, value in fields.items():
        if value is not None:
            message[name] = value
    return msgspec.json.encode(message)


def whole(seconds: float) -> int | float:
    """A whole number as int, so that 30.0 is shown as 30."""
    return int(seconds) if seconds == int(seconds) else seconds


def error_message(error: ApiError, ref: Ref = None) -> bytes:
    """``{"type":"error","code","message","field"?,"ref"?}``."""
    return server_message("error", code=error.code, message=error.message, field=error.field, ref=ref)


def snapshot_parts(records: Iterable[bytes], list_name: str, head: bytes, last: bytes) -> Iterable[tuple[bytes, bool]]:
    """Cut a snapshot into messages of bounded size.

    Args:
        records: JSON texts of the records. One that is empty is none, and is passed on as an empty message: where
            finding records takes its time, others can have a turn there.
        list_name: the member they are listed under, ``jobs`` or ``snapshot``.
        head: members every part has, as JSON object text such as ``{"type":"snapshot"}``.
        last: further members of the last part, as JSON object text; ``{}`` for none.

    Yields:
        (message, is_last). All parts but the last carry ``"more":true``.
    """
    start = head[:-1] + b',"%b":[' % list_name.encode()
    part: list[bytes] = []
    size = 0
    for record in records:
        if not record:
            yield b"", False
            continue
        if part and size + len(record) > SNAPSHOT_PART_BYTES:
            yield start + b",".join(part) + b'],"more":true}', False
            part, size = [], 0
        part.append(record)
        size += len(record)
    tail = b"}" if last == b"{}" else b"," + last[1:]
    yield start + b",".join(part) + b"]" + tail, True


def _many(value: str | list[str] | None) -> list[str] | None:
    return value.split(",") if isinstance(value, str) else value


def _known(name: str, words: Iterable[str] | None, known: frozenset[str]) -> frozenset[str] | None:
    if words is None:
        return None
    wanted = frozenset(words)
    if unknown := sorted(wanted - known):
        raise invalid_field(name, f"{unknown[0]!r} is not one of {', '.join(sorted(known))}")
    return wanted
