"""OpenAPI 3.1, from the table of routes and what ``operations`` says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from server.describe.answers import Error
from server.describe.model import ID, Answer, Operation, Schema
from server.describe.operations import UNAVAILABLE
from server.describe.schemas import components, schema_of
from server.describe.views import view_operation

if TYPE_CHECKING:
    from server.routes import Route

# What any call can be answered with.
ALWAYS: Final = {
    400: "malformed, or a parameter is wrong",
    403: "not allowed, or not from this page or host",
    408: "the request stopped coming",
    414: "the target is too long",
    429: "too fast, or too much at a time",
    431: "the head is too large",
    500: "our fault; the log has it under the requestId",
    503: UNAVAILABLE,
}
WITHOUT_TOKEN: Final = "no token, or a bad one"
WITH_BODY: Final = {
    411: "there is no body, or nothing says how long it is",
    413: "the body is too large",
    415: "the body is of another type, or compressed",
    422: "a field is wrong, and named",
}
RETRY: Final = (("Retry-After", "seconds"),)
TOKENS: Final[dict[str, Schema]] = {
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    "query": {"type": "apiKey", "in": "query", "name": "access_token"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": "statuswire_token"},
}


def openapi(
    routes: Mapping[str, Mapping[str, Route]],
    operations: Mapping[str, Operation],
    *,
    version: str,
    base_path: str,
    is_open: bool,
) -> dict[str, Any]:
    """The description of a server with these routes.

    Args:
        routes: the table.
        operations: what is said of each, by ``GET /path``.
        version: the server's.
        base_path: in front of every path.
        is_open: it asks for no tokens.

    Raises:
        KeyError: a route that nothing is said of.
    """
    paths: dict[str, Any] = {}
    types: dict[type[Struct], None] = {Error: None}
    for path, methods in routes.items():
        paths[path] = {}
        for method, route in methods.items():
            operation = _said_of(f"{method} {path}", route, operations)
            types |= dict.fromkeys(_types(operation))
            paths[path][method.lower()] = _operation(path, route, operation, is_open)
    schemas = components(types)
    for each in types:
        if each.__struct_config__.tag is not None:  # a message of the WebSocket, which needs no type where it is alone
            schemas[each.__name__]["required"].remove("type")
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "statuswire",
            "version": version,
            "summary": "Live job status over WebSocket, SSE, long-poll and plain polling",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": base_path or "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if not is_open:
        document["components"]["securitySchemes"] = TOKENS
        document["security"] = [{name: []} for name in TOKENS]
    return document


def _said_of(key: str, route: Route, operations: Mapping[str, Operation]) -> Operation:
    for call in route.view.calls:
        if f"{call.method} {call.path}" == key:
            return view_operation(route.view, call)
    return operations[key]


def _types(operation: Operation) -> Iterable[type[Struct]]:
    bodies = [*operation.body.values(), *(answer.body for answer in operation.answers.values())]
    return [body for body in bodies if isinstance(body, type)]


def _operation(path: str, route: Route, operation: Operation, is_open: bool) -> Schema:
    errors = {**ALWAYS, **(WITH_BODY if operation.body else {}), **operation.errors}
    if not (route.public or is_open):
        errors[401] = WITHOUT_TOKEN
    if route.capability and not is_open:
        errors[403] = f"without the capability {route.capability!r}; or not from this page or host"
    answers = {
        status: Answer(text, Error, headers=RETRY if status in (429, 503) else ()) for status, text in errors.items()
    }
    answers |= operation.answers
    variables = [{"name": name, "in": "path", "required": True, "schema": ID} for name in re.findall(r"{(\w+)}", path)]
    parameters = [
        {"name": each.name, "in": each.where, "description": each.text, "schema": each.schema}
        for each in operation.parameters
    ]
    described: Schema = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": variables + parameters,
        "responses": {str(status): _answer(answers[status]) for status in sorted(answers)},
    }
    if operation.text:
        described["description"] = operation.text
    if operation.body:
        described["requestBody"] = {
            "required": not operation.optional,
            "content": {kind: {"schema": schema_of(body)} for kind, body in operation.body.items()},
        }
    if route.public and not is_open:
        described["security"] = []
    return described


def _answer(answer: Answer) -> Schema:
    described: Schema = {"description": answer.text}
    if answer.headers:
        described["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers
        }
    if answer.body is not None:
        described["content"] = {answer.content_type: {"schema": schema_of(answer.body)}}
    return described
