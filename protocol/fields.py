"""One update as it is published: every field typed, bounded and named when it is wrong.

Malformed JSON is 400, an update that is too large 413, a bad field 422. What comes out of ``decode_fields`` can
be merged and encoded without failing: no lone surrogates, no number that JSON cannot carry, no bottomless nesting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from protocol.errors import ApiError, invalid_field
from protocol.update import STATUSES

MAX_UPDATE: Final = 128 * 1024  # bytes of one update
MAX_TEXT: Final = 2 * 1024  # bytes of one text field, in UTF-8
MAX_PAYLOAD: Final = 64 * 1024  # bytes of result and metadata together, encoded
# Levels of objects and arrays in result and metadata. Generous for data, and far below the 1,000 or so where
# decoders (ours, and those of our readers) give up.
MAX_DEPTH: Final = 64
MAX_TTL: Final = 604_800.0  # seconds: a week
MAX_WEIGHT: Final = 1e9
MAX_REMAINING: Final = 1e9  # seconds: 31 years, so that the time of completion stays within the calendar

_ID = re.compile(r"[A-Za-z0-9_.:@-]{1,128}", re.ASCII)
_ID_RULE = "1 to 128 of letters, digits and _ . : @ -"

# Looked at by ``decode_fields``: msgspec looks a pattern up by name for each text, which was two fifths of decoding.
Id = Annotated[str, Meta(extra_json_schema={"pattern": r"^[A-Za-z0-9_.:@-]{1,128}$"})]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[datetime, Meta(tz=True)]


class Steps(msgspec.Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Counted work: ``{"done", "total", "current", "failed"}``, each optional; ``current`` names the step at hand."""

    done: Count | UnsetType = UNSET
    total: Count | UnsetType = UNSET
    current: Text | int | UnsetType | None = UNSET
    failed: Count | UnsetType = UNSET


class Fields(msgspec.Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """One update as published. UNSET is left out (keeps its value); None clears, where clearing is allowed.

    ``steps``, ``result`` and ``metadata`` are held encoded (``Raw``) once they have been checked.
    """

    job_id: Id | UnsetType = UNSET
    user_id: Id | UnsetType = UNSET
    kind: Text | UnsetType | None = UNSET
    status: Literal["queued", "processing", "stalled", "completed", "failed", "cancelled"] | UnsetType = UNSET
    progress: Annotated[float, Meta(ge=0, le=100)] | UnsetType = UNSET
    stage: Text | UnsetType | None = UNSET
    message: Text | UnsetType | None = UNSET
    current_operation: Text | UnsetType | None = UNSET
    steps: Steps | UnsetType | None = UNSET
    attempt: Annotated[int, Meta(ge=1, le=2**63 - 1)] | UnsetType = UNSET
    estimated_time_remaining: Annotated[float, Meta(ge=0, le=MAX_REMAINING)] | UnsetType | None = UNSET
    estimated_completion_time: Moment | UnsetType | None = UNSET
    worker_id: Text | UnsetType | None = UNSET
    result: Any = UNSET
    error: Text | UnsetType | None = UNSET
    metadata: dict[str, Any] | UnsetType | None = UNSET
    timestamp: Moment | UnsetType = UNSET
    seq: Count | UnsetType = UNSET
    ttl: Annotated[float, Meta(gt=0, le=MAX_TTL)] | UnsetType | None = UNSET
    event_id: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | UnsetType = UNSET
    reset: bool | UnsetType = UNSET
    parent_id: Id | UnsetType = UNSET
    weight: Annotated[float, Meta(gt=0, le=MAX_WEIGHT)] | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


FIELD_NAMES: Final = tuple(field.encode_name for field in msgspec.structs.fields(Fields))
STEP_NAMES: Final = tuple(field.encode_name for field in msgspec.structs.fields(Steps))
_NAME_OF = {field.name: field.encode_name for field in msgspec.structs.fields(Fields)}
# In a record, but nobody's to publish.
SERVER_FIELDS: Final = frozenset(
    ("version", "createdAt", "startedAt", "endedAt", "cancelRequested", "id", "type", "epoch", "offset", "duplicate")
)
_TEXTS = ("kind", "stage", "message", "current_operation", "worker_id", "error", "event_id")

_decoder = msgspec.json.Decoder(Fields)
_encode = msgspec.json.Encoder().encode
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$\.(\w+)`)?", re.DOTALL)
_AT_FIELD = re.compile(r"(.*?) - at `\$\.([\w.]+)[^`]*`", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]*)`(.*)", re.DOTALL)
_WORDS = {
    "object": "an object",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "datetime": "an RFC 3339 time",
    "null": "null",
}
_UNIX_START = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def is_id(text: str) -> bool:
    """Whether this is a well-formed job, user or channel id."""
    return _ID.fullmatch(text) is not None


# Publishers name the same ids over and over, and finding one here costs a third of a match. Not for readers: the time
# it takes would tell them which ids are in use. Only for short texts, as it holds them.
_is_known_id = lru_cache(maxsize=4096)(is_id)


def check_id(text: str, name: str) -> str:
    """Return the id. Raises ApiError 422 naming the field ``name``."""
    if not is_id(text):
        raise invalid_field(name, f"must be {_ID_RULE}")
    return text


def decode_fields(data: bytes | bytearray | memoryview | Raw | Mapping[str, object]) -> Fields:
    """Read and check one update.

    Args:
        data: the JSON text, a ``Raw`` slice of a decoded batch, or a JSON object already decoded by msgspec.

    Raises:
        ApiError: 400 ``malformed_json``, 413 ``payload_too_large``, 422 ``invalid_field`` or ``unknown_field``
            (``field`` names it), 422 ``invalid_update`` if it is no object at all.
    """
    try:
        if type(data) is bytes:  # nearly always, and far cheaper to ask for than a mapping
            text: bytes | bytearray | memoryview | Raw = data
            size = len(data)
        else:
            text = _encode(data) if isinstance(data, Mapping) else data
            size = memoryview(text).nbytes
        if size > MAX_UPDATE:
            raise ApiError(
                413, "payload_too_large", f"one update may have {MAX_UPDATE} bytes, this one has {size}: send less data"
            )
        fields = _decoder.decode(text)
    except msgspec.ValidationError as error:
        check_json(data)
        raise _explain(error) from None
    except RecursionError:
        raise malformed_json(f"nested deeper than {MAX_DEPTH} levels") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise malformed_json(str(error)) from None
    small = size <= MAX_TEXT
    known = _is_known_id if small else is_id
    if fields.job_id is not UNSET and not known(fields.job_id):
        raise invalid_field("jobId", f"must be {_ID_RULE}")
    if fields.user_id is not UNSET and not known(fields.user_id):
        raise invalid_field("userId", f"must be {_ID_RULE}")
    if fields.parent_id is not UNSET and not known(fields.parent_id):
        raise invalid_field("parentId", f"must be {_ID_RULE}")
    if not small:  # a text in JSON is never shorter than in UTF-8, so a small update needs no look
        _check_texts(fields)
    if fields.timestamp is not UNSET:
        time_ms(fields.timestamp, "timestamp")
    if isinstance(fields.estimated_completion_time, datetime):
        time_ms(fields.estimated_completion_time, "estimatedCompletionTime")
    payload = 0
    if fields.result is not UNSET and fields.result is not None:
        fields.result = encoded("result", fields.result)
        payload += len(fields.result)
    if fields.metadata is not UNSET and fields.metadata is not None:
        raw = encoded("metadata", fields.metadata)
        fields.metadata = raw  # type: ignore[assignment]
        payload += len(raw)
    if payload > MAX_PAYLOAD:
        field = "metadata" if fields.result is UNSET or fields.result is None else "result"
        raise invalid_field(field, f"result and metadata may have {MAX_PAYLOAD} bytes together, these have {payload}")
    return fields


_Checked = TypeVar("_Checked", bound=msgspec.Struct)


def decode_checked(
    data: bytes, decoder: msgspec.json.Decoder[_Checked], known: Iterable[str], inside: Iterable[str] = ()
) -> _Checked:
    """Read JSON text as another struct, with refusals in the same words as those of ``decode_fields``.

    Args:
        known: the names of its fields, for hints; ``inside``: those of structs in it.
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        check_json(data)
        raise _explain(error, known, inside) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise malformed_json(str(error)) from None


def check_json(data: bytes | bytearray | memoryview | Raw | Mapping[str, object]) -> None:
    """Raise ApiError 400 for a text that is no JSON: its fields are read while it is, so a wrong one in front of the
    place where it breaks is found first."""
    if isinstance(data, Mapping):
        return
    try:
        msgspec.json.decode(data, type=Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise malformed_json(str(error)) from None


def malformed_json(detail: str) -> ApiError:
    """400: this is no JSON (RFC 8259), or none that we take."""
    return ApiError(400, "malformed_json", f"the body is not well-formed JSON: {detail}")


def time_ms(moment: datetime, field: str) -> int:
    """A time with zone as unix milliseconds. Raises ApiError 422 for one outside the years 1 to 9999 in UTC."""
    try:
        utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except OverflowError:
        raise invalid_field(field, "is outside of the calendar") from None
    return (utc - _UNIX_START) // _MILLISECOND


def _check_texts(fields: Fields) -> None:
    for attribute in _TEXTS:
        _check_text(_NAME_OF[attribute], getattr(fields, attribute))
    if isinstance(fields.steps, Steps):
        _check_text("steps.current", fields.steps.current)


def _check_text(name: str, value: object) -> None:
    if isinstance(value, str) and len(value.encode()) > MAX_TEXT:
        raise invalid_field(name, f"may have {MAX_TEXT} bytes of UTF-8, this has {len(value.encode())}")


def encoded(name: str, value: object) -> Raw:
    """Check what may be any JSON, and encode it once. Raises ApiError 422 naming it if it is nested too deeply."""
    try:
        data = _encode(value)
    except RecursionError:
        raise _too_deep(name) from None
    # There is no level without a bracket: counting them settles nearly every update without a walk.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise _too_deep(name)
    return Raw(data)


def _too_deep(name: str) -> ApiError:
    return invalid_field(name, f"is nested deeper than {MAX_DEPTH} levels")


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        level = [item for item in deeper if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _explain(
    error: msgspec.ValidationError, known: Iterable[str] = FIELD_NAMES, inside: Iterable[str] = STEP_NAMES
) -> ApiError:
    """Say in the words of the contract which field is wrong and why."""
    text = str(error)
    unknown = _UNKNOWN.fullmatch(text)
    if unknown:
        return _unknown_field(unknown[1], unknown[2], known if unknown[2] is None else inside)
    found = _AT_FIELD.fullmatch(text)
    if not found:
        if text.startswith("Expected `object`"):
            return ApiError(422, "invalid_update", "an update must be a JSON object")
        return malformed_json(text)
    reason, field = found[1], found[2]
    if field == "status" and reason.startswith("Invalid enum value"):
        return invalid_field(field, f"must be one of {', '.join(STATUSES)}")
    if reason == "Invalid RFC3339 encoded datetime":
        return invalid_field(field, "expected an RFC 3339 time such as 2025-01-31T12:00:00Z")
    expected = _EXPECTED.fullmatch(reason)
    if expected:
        words = " or ".join(_WORDS.get(word, word) for word in expected[1].split(" | "))
        return invalid_field(field, f"expected {words}{expected[2].replace('`', '')}")
    return invalid_field(field, reason[:1].lower() + reason[1:])


def _unknown_field(name: str, inside: str | None, known: Iterable[str]) -> ApiError:
    shown = name if len(name) <= 64 else name[:64] + "…"
    field = shown if inside is None else f"{inside}.{shown}"
    if inside is None and name in SERVER_FIELDS:
        return ApiError(422, "unknown_field", f"{field}: is set by the server, leave it out", field=field)
    near = get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
    return ApiError(422, "unknown_field", f"{field}: there is no such field{hint}", field=field)
