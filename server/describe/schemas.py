"""JSON Schemas of the types in use (2020-12, as OpenAPI 3.1 and AsyncAPI 3 take it)."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from typing import Any, Final

import msgspec

from protocol.fields import Fields
from protocol.job import Record
from server.describe.answers import OF_RECORDS, JobMessage, Notification
from server.describe.model import Schema

REF: Final = "#/components/schemas/{name}"
# Of a record not all may have been asked for; of a deleted job there is no more than its ids.
_ALWAYS: Final = {Record: ("jobId", "status", "version"), JobMessage: ("type", "id", "jobId")}


def components(types: Iterable[type]) -> dict[str, Schema]:
    """The schemas of these types, and of those in them, by name."""
    _, found = msgspec.json.schema_components([*types, Fields, Record, Notification], ref_template=REF)
    for name, schema in found.items():
        if isinstance(schema.get("description"), str):
            schema["description"] = cleandoc(schema["description"])
        found[name] = _tidy(schema)
    for record, required in _ALWAYS.items():
        if record.__name__ in found:
            schema = found[record.__name__]
            schema["required"] = list(required)
            schema["properties"] |= OF_RECORDS
    if "PollAnswer" in found:
        either = [schema_of(JobMessage), schema_of(Notification)]
        found["PollAnswer"]["properties"]["updates"]["items"] = {"anyOf": either}
    found["Fields"]["description"] = (
        "One update. What it leaves out keeps its value; null clears it, where that is allowed. "
        "Texts may have 2048 bytes, result and metadata 65536 together."
    )
    return found


def schema_of(body: Any) -> Schema:
    """A schema as it is; a type by reference."""
    return body if isinstance(body, dict) else {"$ref": REF.format(name=body.__name__)}


def _tidy(schema: Any) -> Any:
    """Without what says nothing: a default of null, a title beside a type."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidied = {name: _tidy(value) for name, value in schema.items() if not (name == "default" and value is None)}
    tidied.pop("title", None) if "type" in tidied and isinstance(tidied["type"], str) else None
    return tidied
