"""A view: the same jobs in other words, described by data.

A view names its paths, the words it has for fields and statuses, and how one update reads in them; there is one
module with one ``VIEW`` per view in ``protocol.views``, and nothing else knows any of them. Routes, event streams and
publishing follow from the description. Everything here is pure: times are those of the update or passed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, Raw

from protocol.errors import ApiError, invalid_field, invalid_parameter, job_not_found
from protocol.fields import FIELD_NAMES, MAX_UPDATE, Fields, check_json, decode_fields, is_id, malformed_json
from protocol.update import Job, Update

# What a browser is shown of an error: enough for a sentence or two.
MAX_ERROR: Final = 500  # characters

_LINES = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")

Does: TypeAlias = Literal["stream", "show", "head", "create", "update", "publish", "register", "health"]


class Call(NamedTuple):
    """One method of one path.

    Attributes:
        method: ``GET``, ``HEAD``, ``POST``, ``PUT`` or ``PATCH``.
        path: template; the variable ``View.variable`` names the job.
        does: ``stream`` an event stream; ``show`` the state, ``head`` the same in headers; ``create`` a job that must
            be new; ``update`` one that must be there; ``publish`` the same, or create one if ``userId`` is given;
            ``register`` a job that may be there, if its owner is the same; ``health`` of the server.
        sets: job fields that this call sets by itself; its body may then be left out.
    """

    method: str
    path: str
    does: Does
    sets: Mapping[str, object] = {}


class Message(NamedTuple):
    """JSON text, and the name of the event that carries it (None: unnamed)."""

    text: bytes
    event: str | None = None


class Control(NamedTuple):
    """A message of the server on its own account: ``type``, and these members, each with the fact that it shows.

    Facts are ``id`` (the job's id in the view's words), ``now``, ``clientId``, ``userId``, ``heartbeat`` (seconds),
    ``live`` (False while other servers may know more), ``code`` and ``message``; what is not known at the time is left
    out.
    """

    members: Mapping[str, str]
    event: str | None = None


def only_of_its_kind(job: Job | None, fields: Fields) -> Fields:
    """The rule all views share: a job of another kind does not exist here. Raises ApiError 404."""
    if job is not None and fields.kind is not UNSET and job.latest.kind != fields.kind:
        raise job_not_found(job.latest.job_id)
    return fields


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class View:
    """One view. Compared by identity.

    Attributes:
        name: of the view, unique.
        noun: what it calls a job.
        calls: what can be asked of it.
        variable: the path's variable that names the job, and the member that does so in messages.
        prefix: what a job's id has in front of it.
        kind: the kind of its jobs; ``{app}`` stands for the path's variable of this name; "" for jobs of any kind.
        controls: the server's own messages on event streams: ``connected``, ``heartbeat``, ``reset``, ``error``. One
            that is missing is not sent.
        unix_ms: times in controls are unix milliseconds, else RFC 3339.
        waits: an event stream may wait for a job that does not exist yet.
        render: one update in the view's words, of which only the last is behind the update's position; None: as
            records, which is what all transports but event streams send.
        state: a job's state in the view's words, a JSON object.
        shape: its type, for the API's description.
        headers: header name to the member of the state that it shows.
        fields: what may be published: the view's name to that of the job's field, or "" for what ``unpack`` takes.
        statuses: the view's words for a status to the job's.
        unpack: turns the values of ``fields`` that are "" into those of job fields; may look at and change all.
            Raises ApiError 422.
        details: the type of those values, and of others that are not as in jobs, for the API's description.
        settle: what an update comes to, given the state it meets (None: a new job). It is called when the update is
            decided, maybe several times, so it must depend on its arguments alone. Raises ApiError.
        not_found: code of the 404 for a job that is not there.
    """

    name: str
    noun: str
    calls: tuple[Call, ...]
    variable: str
    prefix: str = ""
    kind: str = ""
    controls: Mapping[str, Control]
    unix_ms: bool = False
    waits: bool = True
    render: Callable[[Update], Sequence[Message]] | None = None
    state: Callable[[Update], bytes]
    shape: type[msgspec.Struct] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    statuses: Mapping[str, str] = field(default_factory=dict)
    unpack: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    details: type[msgspec.Struct] | None = None
    settle: Callable[[Job | None, Fields], Fields] = only_of_its_kind
    not_found: str = "job_not_found"

    def id_of(self, job_id: str) -> str:
        """A job's id as the view shows it."""
        return job_id.removeprefix(self.prefix)


class Target(NamedTuple):
    """The job that a path names."""

    job_id: str
    kind: str


def target_of(view: View, params: Mapping[str, str]) -> Target:
    """Which job the variables of a path name.

    Raises:
        ApiError: 400 for one that is no id.
    """
    for name, value in params.items():
        if not is_id(value):
            raise invalid_parameter(name, f"{value[:128]!r} is not an id: 1 to 128 of A-Z a-z 0-9 _ . : @ -")
    job_id = view.prefix + params[view.variable]
    if not is_id(job_id):
        raise invalid_parameter(view.variable, f"may have {128 - len(view.prefix)} characters")
    return Target(job_id, view.kind.format_map(params))


def control(view: View, name: str, facts: Mapping[str, object]) -> Message | None:
    """One of the server's own messages, None if the view has no such thing."""
    found = view.controls.get(name)
    if found is None:
        return None
    message: dict[str, object] = {"type": name}
    for member, fact in found.members.items():
        value = facts.get(fact)
        if value is not None:
            message[member] = value
    return Message(msgspec.json.encode(message), found.event)


def read_update(view: View, target: Target, sets: Mapping[str, object], body: bytes) -> Fields:
    """One update in the view's words as the job's fields; the body may be empty if the call sets something itself.

    Raises:
        ApiError: 400 malformed, 413, 422 with the view's name of the field.
    """
    if len(body) > MAX_UPDATE:
        raise ApiError(413, "payload_too_large", f"one update may have {MAX_UPDATE} bytes: send less data")
    try:
        body.decode()  # what stays as it is until it is looked at is not looked through here
        given = msgspec.json.decode(body or (b"{}" if sets else b""), type=dict[str, Raw])
    except msgspec.ValidationError:
        check_json(body)
        raise ApiError(422, "invalid_update", f"the {view.noun}'s update must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise malformed_json(str(error)) from None
    shown = view.id_of(target.job_id)
    own = given.pop(view.variable, None)
    if own is not None and _text(own) != shown:
        raise invalid_field(view.variable, f"is not the {view.noun} of the path, {shown!r}")
    for name in given:
        if name not in view.fields:
            near = get_close_matches(name, view.fields, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; known are {', '.join(view.fields)}"
            name = name if len(name) <= 64 else name[:64] + "…"
            raise ApiError(422, "unknown_field", f"{name}: there is no such field{hint}", field=name)
    values: dict[str, Any] = dict(given)
    if view.statuses and "status" in values:
        status = view.statuses.get(_text(values["status"]) or "")
        if status is None:
            raise invalid_field("status", f"must be one of {', '.join(view.statuses)}")
        values["status"] = status
    if view.unpack is not None:
        values = view.unpack(values)
    update = {view.fields.get(name) or name: value for name, value in values.items()}
    if target.kind:
        update["kind"] = target.kind
    try:
        return decode_fields(msgspec.json.encode(update | dict(sets)))
    except ApiError as error:
        raise in_words(view, error) from None


def in_words(view: View, error: ApiError, job_id: str = "") -> ApiError:
    """A refusal with the view's names of the job and its fields."""
    if error.code == "job_not_found":
        shown = repr(view.id_of(job_id)) if job_id else "like this"
        return ApiError(404, view.not_found, f"there is no {view.noun} {shown} that you may see")
    if error.field is None:
        return error
    names = {job_name: name for name, job_name in view.fields.items()} | {"jobId": view.variable}
    first, dot, rest = error.field.partition(".")
    if first not in names or names[first] == first:
        return error
    name = names[first] + dot + rest
    message = name + error.message.removeprefix(error.field) if error.message.startswith(error.field) else error.message
    return ApiError(error.status, error.code, message, field=name, retry_after=error.retry_after, headers=error.headers)


def job_fields(renamed: Mapping[str, str]) -> dict[str, str]:
    """A ``View.fields`` that takes everything a job does, some of it under other names (the view's to the job's)."""
    own = {"jobId", "kind", *renamed.values()}
    return {name: name for name in FIELD_NAMES if name not in own} | dict(renamed)


def one_line(text: str) -> str:
    """An error as people who did not write the program may see it: one line of bounded length, no control characters.

    That is the first line; of a Python traceback the last one, which says what was wrong. Where it was is nobody's
    business outside.
    """
    lines = [line for part in _LINES.split(text) if (line := _CONTROLS.sub(" ", part).strip())]
    if not lines:
        return ""
    line = lines[-1] if lines[0].startswith("Traceback (most recent call last)") else lines[0]
    return line if len(line) <= MAX_ERROR else line[: MAX_ERROR - 1] + "…"


def encode_safe(value: object) -> bytes:
    """JSON text that stays harmless where it is pasted into a page: no ``<``, which inside a script could end it."""
    return msgspec.json.encode(value).replace(b"<", b"\\u003c")


def _text(raw: object) -> str | None:
    try:
        return msgspec.json.decode(raw, type=str) if isinstance(raw, Raw) else None
    except msgspec.DecodeError:
        return None
