"""What is said of one call beside the table of routes, as data."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple, TypeAlias

Schema: TypeAlias = dict[str, Any]

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
TEXT: Final = "text/plain"

ID: Final[Schema] = {"type": "string", "pattern": "^[A-Za-z0-9_.:@-]{1,128}$"}


class Parameter(NamedTuple):
    """A query parameter or a header. Path variables are ids, and described by their path."""

    name: str
    text: str
    schema: Schema
    where: Literal["query", "header"] = "query"


class Answer(NamedTuple):
    """One way to be answered.

    Attributes:
        text: what it means.
        body: the type of the JSON, or a schema; None for no body.
        content_type: of the body.
        headers: those that this answer has, with what they say.
    """

    text: str
    body: Any = None
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Operation(NamedTuple):
    """One call.

    Attributes:
        id: names it, in camelCase.
        tag: what it belongs to.
        summary: one line.
        answers: by status; errors that any call can have are added by the builder.
        parameters: beside those of the path.
        body: content types that are taken, each with a type or a schema; empty for no body.
        optional: whether the body may be left out.
        errors: further statuses that are answered with an error, with what they mean.
        text: more than the summary.
    """

    id: str
    tag: str
    summary: str
    answers: dict[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: dict[str, Any] = {}  # noqa: RUF012  # never changed
    optional: bool = False
    errors: dict[int, str] = {}  # noqa: RUF012
    text: str = ""


def words(*values: str) -> Schema:
    """A comma list of these words."""
    one = "|".join(sorted(values))
    return {"type": "string", "pattern": f"^({one})(,({one}))*$"}
