"""Operations as they are kept in the spool."""

from __future__ import annotations

import secrets
from typing import Final, Literal

import msgspec
from msgspec import UNSET

from protocol.errors import ApiError
from protocol.fields import check_id, decode_fields
from server.brokers.base import Claim, Publish
from server.brokers.deciding import identify, new_target
from server.brokers.keys import digest_of
from server.brokers.redis_calls import Doubt


class Entry(msgspec.Struct, array_like=True, gc=False):
    """An operation on disk. ``fields`` is empty for a ``Claim``."""

    job_id: str | None
    create: Literal["must", "may", "never"]
    sub: str
    key: str
    new_id: str
    fields: bytes
    fingerprint: bytes
    doubt: Doubt | None
    view: str | None


encode_entry: Final = msgspec.msgpack.Encoder().encode
decode_entry: Final = msgspec.msgpack.Decoder(Entry).decode
_encode_fields: Final = msgspec.json.Encoder().encode


def with_id(operation: Publish | Claim) -> Publish | Claim:
    """A job that gets its id from us must get the same one in every try."""
    if (
        isinstance(operation, Publish)
        and operation.create == "must"
        and operation.job_id is None
        and operation.fields.job_id is UNSET
        and not operation.new_id
    ):
        try:
            _, key = identify(operation)
        except ApiError:
            return operation
        name = secrets.token_hex(10) if key is None else digest_of(operation.sub, key).hex()[:20]
        return msgspec.structs.replace(operation, new_id=f"job_{name}")
    return operation


def target_of(operation: Publish | Claim) -> str:
    """Whose the operation is: a job's id. Raises ApiError for what can be said without the store."""
    if isinstance(operation, Claim):
        return "-"
    job_id, _ = identify(operation)
    if operation.create == "must" and operation.fields.user_id is UNSET:
        check_id(operation.sub, "userId")
    return new_target(operation) if job_id is None else job_id


def entry_of(operation: Publish | Claim, doubt: Doubt | None) -> Entry:
    """What is kept of an operation; one without an idempotency key gets one. Raises ApiError as ``identify``."""
    if isinstance(operation, Claim):
        return Entry(None, "may", operation.sub, operation.key, "", b"", operation.fingerprint, doubt, None)
    _, key = identify(operation)
    if key is None:
        key = f"spool:{secrets.token_urlsafe(15)}"
    fields = _encode_fields(operation.fields)
    return Entry(
        operation.job_id, operation.create, operation.sub, key, operation.new_id, fields, b"", doubt, operation.view
    )


def operation_of(entry: Entry) -> Publish | Claim:
    """The opposite. Raises ApiError if it does not make sense any more."""
    if entry.fingerprint:
        return Claim(entry.sub, entry.key, entry.fingerprint)
    fields = decode_fields(entry.fields)
    return Publish(entry.job_id, fields, entry.create, entry.sub, entry.key, entry.view, entry.new_id, lasting=True)
