"""What is said of the calls of a view, and of its event streams: all of it from the view's own data."""

from __future__ import annotations

from typing import Any, Final

from protocol.fields import Fields
from protocol.view import Call, Control, View
from server.describe.answers import Spooled, Stats
from server.describe.messages import Channel, Said
from server.describe.model import EVENTS, JSON, Answer, Operation, Schema
from server.describe.operations import CURSOR_HEADER, KEY, LAST_SEEN
from server.describe.schemas import components

_FIELDS: Final[dict[str, Schema]] = components([Fields])["Fields"]["properties"]
_OUTCOME: Final[dict[str, Schema]] = {
    "id": {"type": "string"},
    "version": {"type": "integer"},
    "duplicate": {"const": True},
    "cancelRequested": {"const": True},
}
_SPOOLED: Final = Answer("the store is away: kept on disk, and passed on when it is back", Spooled)


def view_operation(view: View, call: Call) -> Operation:
    """What is said of one call of a view."""
    name = f"{view.name}{call.does.capitalize()}{_suffix(view, call)}"
    none = {404: f"there is no such {view.noun}, or none that one may see"}
    ended = {409: f"against the {view.noun}'s state"}
    state = Answer(f"the {view.noun}", _state(view))
    body = {JSON: _body(view, call)}
    match call.does:
        case "stream":
            answers = {
                200: Answer("see asyncapi.json", {"type": "string"}, EVENTS),
                204: Answer(f"the {view.noun} has ended, and the cursor is behind its end"),
            }
            return Operation(
                name, view.name, f"an event stream of one {view.noun}", answers, (LAST_SEEN, CURSOR_HEADER), errors=none
            )
        case "show":
            return Operation(name, view.name, f"one {view.noun}", {200: state}, errors=none)
        case "head":
            headers = tuple((header, f"its {member}") for header, member in view.headers.items())
            return Operation(
                name, view.name, f"one {view.noun} as headers", {200: Answer("its state", headers=headers)}, errors=none
            )
        case "create" | "register":
            made = {**_OUTCOME, view.noun: {"anyOf": [_state(view), {"type": "null"}]}}
            answers = {
                200: Answer("it was there before", _object(made, "id", "version", view.noun)),
                201: Answer("created", _object(made, "id", "version", view.noun), headers=(("Location", "its path"),)),
                202: _SPOOLED,
            }
            summary = f"create a {view.noun}" if call.does == "create" else f"make sure there is a {view.noun}"
            return Operation(
                name, view.name, summary, answers, (KEY,), body, optional=bool(call.sets),
                errors={404: "there is no such parent", 409: "it is there, or another's"},
            )  # fmt: skip
        case "update" | "publish":
            answers = {200: Answer("accepted", _object(_OUTCOME, "id", "version")), 202: _SPOOLED}
            return Operation(
                name, view.name, _sets(view, call), answers, (KEY,), body, optional=bool(call.sets), errors=none | ended
            )
        case "health":
            healthy = {"status": {"enum": ["healthy", "unhealthy"]}}
            stats = components([Stats])["Stats"]["properties"]
            return Operation(
                name, view.name, "whether the server works; with ops, the numbers of /api/v2/stats as well",
                {200: Answer("how it is", _object(healthy | stats, "status"))},
            )  # fmt: skip


def view_channels(view: View) -> dict[str, Channel]:
    """The event streams of a view."""
    found: dict[str, Channel] = {}
    for call in view.calls:
        if call.does == "stream":
            controls = [
                Said(f"{view.name}{name.capitalize()}", _control(name, control))
                for name, control in view.controls.items()
            ]
            state = Said(f"{view.name}Message", {"properties": {}, **_state(view)})
            text = f"Server-sent events of one {view.noun}, in the view's words"
            found[f"{view.name}{_suffix(view, call)}"] = Channel(call.path, text, (*controls, state))
    return found


def _control(name: str, control: Control) -> Schema:
    properties: Schema = {"type": {"enum": [name]}, **{member: {} for member in control.members}}
    text = "an unnamed event" if control.event is None else f"the event {control.event}"
    return {"type": "object", "properties": properties, "required": ["type"], "description": text}


def _suffix(view: View, call: Call) -> str:
    """What tells apart the calls of a view that do the same."""
    if sum(other.does == call.does for other in view.calls) == 1:
        return ""
    return call.method.capitalize() + "".join(
        part.capitalize() for part in call.path.split("/")[-1:] if not part.startswith("{")
    )


def _sets(view: View, call: Call) -> str:
    if not call.sets:
        return f"one update of a {view.noun}"
    return f"one update of a {view.noun}, with " + ", ".join(f"{name} {value}" for name, value in call.sets.items())


def _state(view: View) -> Schema:
    described = f"a {view.noun} in the view's words"
    return {"type": "object", "description": described} if view.shape is None else _inlined(view.shape)


def _body(view: View, call: Call) -> Schema:
    details = {} if view.details is None else _inlined(view.details)["properties"]
    own = {name: details.get(name) or _FIELDS.get(job_field, {}) for name, job_field in view.fields.items()}
    if view.statuses:
        own["status"] = {"enum": list(view.statuses)}
    return {"type": "object", "properties": {view.variable: {"type": "string"}, **own}, "additionalProperties": False}


def _inlined(type_: type) -> Schema:
    """A type's schema with those in it: two views may have the same name for something."""
    found = components([type_])

    def inline(schema: Any) -> Any:
        if isinstance(schema, list):
            return [inline(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return inline(found[schema["$ref"].rpartition("/")[2]])
        return {name: inline(value) for name, value in schema.items()}

    inlined: Schema = inline(found[type_.__name__])
    return inlined


def _object(properties: dict[str, Any], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}
