"""Updates as Python says them and as they go over the wire: names, bounds, bytes.

What the server would refuse whole is made to fit where that is possible: a text that is too long must not keep a job
from ending.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, TypedDict

import msgspec

MAX_UPDATE: Final = 128 * 1024  # bytes, the server's own bound of one update
MAX_TEXT: Final = 2 * 1024  # bytes of UTF-8, likewise


class Fields(TypedDict, total=False):
    """Fields of an update, as keyword arguments, besides those that calls name; None is the same as left out."""

    kind: str | None
    status: str | None
    stage: str | None
    current_operation: str | None
    steps: tuple[int, int] | Mapping[str, Any] | None
    attempt: int | None
    worker_id: str | None
    estimated_time_remaining: float | None
    metadata: Mapping[str, Any] | None
    ttl: float | None
    parent_id: str | None
    weight: float | None
    auto_complete: bool | None
    reset: bool | None


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


_NAMED: Final = ("progress", "message", "result", "error")
WIRE_NAMES: Final[dict[str, str]] = {
    "user": "userId",
    **{name: _camel(name) for name in (*_NAMED, *Fields.__annotations__)},
}
_TEXTS: Final = ("kind", "stage", "message", "currentOperation", "error", "workerId")
# What a job's end cannot do without, when the rest of it was refused.
_BARE: Final = ("jobId", "userId", "parentId", "weight", "attempt", "status")

# What JSON has no form for is sent as Python prints it: better an odd result than none.
_encode = msgspec.json.Encoder(enc_hook=repr).encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def to_wire(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields under the names of the wire protocol, without those that are None.

    Raises:
        TypeError: for a name that no field has.
    """
    named: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        try:
            wire_name = WIRE_NAMES[name]
        except KeyError:
            near = get_close_matches(name, WIRE_NAMES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(WIRE_NAMES)}"
            raise TypeError(f"{name!r}: there is no such field{hint}") from None
        if wire_name in ("result", "metadata"):
            # Encoded at once: what the worker does to the object afterwards is not part of this update.
            value = frozen(value)
        named[wire_name] = value
    return named


def encode_update(job_id: str, fields: Mapping[str, Any]) -> bytes:
    """One update as JSON, made to fit the server's bounds; never fails."""
    fitting: dict[str, Any] = {"jobId": job_id}
    for name, value in fields.items():
        if value is None:  # clears the field
            pass
        elif name == "progress":
            value = _fit_progress(value)
            if value is None:
                continue
        elif name == "steps" and isinstance(value, tuple):
            value = {"done": value[0], "total": value[1]} if len(value) == 2 else list(value)
        elif name in _TEXTS:
            value = fit_text(value)
        fitting[name] = value
    try:
        return _encode(fitting)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return _encode({name: _plain(value) for name, value in fitting.items()})


def bare(body: bytes, why: str) -> bytes:
    """A job's end with nothing but its status, for one that is refused or too large; ``why`` becomes its message."""
    fields: dict[str, Any] = {name: value for name, value in _decode_object(body).items() if name in _BARE}
    fields["message"] = fit_text(why)
    return _encode(fields)


def renumbered(body: bytes, attempt: int) -> bytes:
    """An encoded update as one of another attempt."""
    fields: dict[str, Any] = _decode_object(body)
    return _encode(fields | {"attempt": attempt})


def stamped(body: bytes, **more: str | int) -> bytes:
    """An encoded update with further fields."""
    return body[:-1] + b"," + _encode(more)[1:]


def fit_text(value: object) -> str:
    """A text of no more bytes than the server takes, well-formed."""
    text = value if isinstance(value, str) else str(value)
    data = text[: MAX_TEXT + 1].encode("utf-8", "replace")
    if len(data) <= MAX_TEXT:
        return data.decode()
    return data[: MAX_TEXT - 3].decode("utf-8", "ignore") + "…"


def _fit_progress(value: Any) -> float | int | None:
    try:
        number = value if type(value) is int else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return round(min(max(number, 0), 100), 2) if number == number else None


def frozen(value: object) -> msgspec.Raw:
    """Any value as JSON, now; never fails."""
    try:
        return msgspec.Raw(_encode(value))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return msgspec.Raw(_encode(_plain(value)))


def _plain(value: object) -> object:
    """Something that can be encoded whatever it was."""
    try:
        _encode(value)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return fit_text(f"{type(value).__name__} that is no JSON")
    return value
