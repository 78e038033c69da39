"""``/openapi.json`` and ``/asyncapi.json``: well-formed, complete, and true of what goes over the wire."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from openapi_spec_validator import validate

from protocol.messages import ClientMessage
from protocol.notice_view import VIEW as NOTICES
from protocol.views import all_views
from protocol.views.jobs import VIEW as JOBS
from protocol.watch import ALL_TYPES, UPDATE_TYPES
from server.describe.messages import CHANNELS
from server.describe.operations import OPERATIONS
from server.routes import ROUTES
from tests.streams import event_stream, lose_log, put, remove, websocket
from tests.support import AUTH, ROOT, Address, bearer, in_seconds, server, token

DESCRIPTIONS = ("/openapi.json", "/asyncapi.json")
SAYING = {"say", "server_message"}


async def described(at: Address, target: str) -> Any:
    return (await at.get(target)).json


@pytest.mark.parametrize("auth", [{}, AUTH], ids=["open", "tokens"])
async def test_openapi_is_valid_and_has_every_route(auth: dict[str, str]) -> None:
    async with server(auth=auth) as at:
        document = await described(at, "/openapi.json")
    validate(document)
    assert document["openapi"].startswith("3.1.")
    assert {path: {method.upper() for method in methods} for path, methods in document["paths"].items()} == {
        path: set(methods) for path, methods in ROUTES.items()
    }
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)
    for path, methods in ROUTES.items():
        for method, route in methods.items():
            operation = document["paths"][path][method.lower()]
            signed = path.startswith("/api/webhooks/")
            assert ("401" in operation["responses"]) == (signed or (bool(auth) and not route.public)), path
            assert ("security" in operation) == (bool(auth) and route.public)
            named = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)
    assert ("securitySchemes" in document["components"]) == bool(auth)


def test_nothing_is_described_that_is_not_there() -> None:
    # Those of other views follow from their calls.
    own = {
        f"{method} {path}" for path, methods in ROUTES.items() for method in methods if not methods[method].view.calls
    }
    assert own == OPERATIONS.keys()


async def test_asyncapi_has_the_form_that_version_3_asks_for() -> None:
    async with server() as at:
        document = await described(at, "/asyncapi.json")
    assert document["asyncapi"] == "3.0.0"
    assert set(document["info"]) >= {"title", "version"}

    def resolved(reference: dict[str, str]) -> Any:
        assert set(reference) == {"$ref"}
        found = document
        for name in reference["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return found

    for channel in document["channels"].values():
        assert channel["address"].startswith("/")
        for reference in channel["messages"].values():
            schema = resolved(resolved(reference)["payload"])
            jsonschema.Draft202012Validator.check_schema(schema)
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = resolved(operation["channel"])
        prefix = operation["channel"]["$ref"] + "/messages/"
        assert operation["messages"]
        for reference in operation["messages"]:
            assert reference["$ref"].startswith(prefix)
            assert resolved(reference) in channel["messages"].values()


async def test_the_descriptions_are_public_tagged_and_know_the_base_path() -> None:
    async with server(auth=AUTH, server={"base_path": "/live"}) as at:
        for target in DESCRIPTIONS:
            answer = await at.get(f"/live{target}")
            assert answer.status == 200
            again = await at.get(f"/live{target}", {"If-None-Match": answer.headers["etag"]})
            assert (again.status, again.body) == (304, b"")
        assert (await described(at, "/live/openapi.json"))["servers"] == [{"url": "/live"}]
        assert (await described(at, "/live/asyncapi.json"))["channels"]["websocket"]["address"] == "/live/ws/jobs"


# --- messages -----------------------------------------------------------------------------------------------------


def types_of(document: Any, channel: str, verb: str) -> set[str]:
    """The values of ``type`` on one side of a channel."""
    found: set[str] = set()
    for reference in document["operations"][f"{channel}{verb}"]["messages"]:
        name = reference["$ref"].rpartition("/")[2]
        found |= set(document["components"]["schemas"][name]["properties"].get("type", {}).get("enum", ()))
    return found


async def test_every_message_of_a_client_is_described() -> None:
    async with server() as at:
        document = await described(at, "/asyncapi.json")
    wanted = {each.__struct_config__.tag for each in get_args(ClientMessage)}
    assert types_of(document, "websocket", "Hears") == wanted


def said(path: Path) -> Iterator[str]:
    """The types of the messages that this module makes, as far as they stand there as words."""
    for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(each, ast.Call) and each.args and isinstance(each.args[0], ast.Constant):
            name = each.func.attr if isinstance(each.func, ast.Attribute) else getattr(each.func, "id", "")
            if name in SAYING:
                yield str(each.args[0].value)
        elif isinstance(each, ast.Dict):
            for key, value in zip(each.keys, each.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant):
                    yield str(value.value)


async def test_every_message_that_the_server_makes_is_described() -> None:
    async with server() as at:
        document = await described(at, "/asyncapi.json")
    transports = ROOT / "server" / "transports"
    sources = [transports / "websocket.py", transports / "websocket_messages.py", ROOT / "server" / "publishing.py"]
    made = {"error", *ALL_TYPES}.union(*(said(source) for source in sources))
    assert len(made) > 10
    assert made <= types_of(document, "websocket", "Says")
    assert JOBS.controls.keys() | {"snapshot"} | UPDATE_TYPES == types_of(document, "stream", "Says")
    assert NOTICES.controls.keys() <= types_of(document, "notifications", "Says")
    views = [view for view in all_views().values() if view is not JOBS]
    assert len(views) >= 2
    for view in views:
        assert types_of(document, view.name, "Says") == view.controls.keys()


class Checker:
    """Validates messages against what is said of a channel; ``seen`` collects their types."""

    def __init__(self, document: Any, channel: str) -> None:
        self.seen: set[str] = set()
        self._of_type: dict[str, jsonschema.Draft202012Validator] = {}
        schemas = document["components"]["schemas"]
        for reference in document["operations"][f"{channel}Says"]["messages"]:
            schema = schemas[reference["$ref"].rpartition("/")[2]]
            if "type" not in schema["properties"]:
                continue
            whole = {**schema, "components": {"schemas": schemas}, "additionalProperties": False}
            for type_ in schema["properties"]["type"]["enum"]:
                assert type_ not in self._of_type, "two messages of one type"
                self._of_type[type_] = jsonschema.Draft202012Validator(whole)

    def check(self, message: Any) -> None:
        self.seen.add(message["type"])
        self._of_type[message["type"]].validate(message)

    @property
    def left(self) -> set[str]:
        """What has not been seen."""
        return self._of_type.keys() - self.seen


async def test_every_message_of_a_websocket_is_as_described() -> None:
    async with server(auth=AUTH, server={"heartbeat": 0.05}) as at:
        checker = Checker(await described(at, "/asyncapi.json"), "websocket")
        claims: dict[str, Any] = {"capabilities": ["publish", "notify"], "exp": in_seconds(600)}
        put(at, "a", steps={"done": 1, "current": "x"}, metadata={"m": [1]}, progress=1.5)
        async with websocket(at) as ws:
            await ws.send("auth", token=token("alice", **claims), ref="r")
            for message in (
                {"type": "auth", "token": token("alice", **claims), "ref": 1},
                {"type": "subscribe", "jobIds": ["a", "b", "!"], "ref": 2},
                {"type": "get", "jobIds": ["a"], "ref": 3},
                {
                    "type": "publish",
                    "updates": [{"jobId": "a", "progress": 9, "ttl": 60, "workerId": "w"}, {}],
                    "ref": 4,
                },
                {"type": "subscribe", "channels": ["c"], "ref": "c"},
                {"type": "notification", "target": "channel", "targetId": "c", "event": "e", "data": 1},
                {"type": "ping", "ref": 5},
                {"type": "ack", "id": "x:1"},
                {"type": "subscribe", "fields": ["progress"], "last_seen": "x:1"},
                {"type": "nonsense", "ref": 6},
            ):
                type_ = message.pop("type")
                await ws.send(str(type_), **message)
            answer: dict[str, Any] = {}
            while answer.get("ref") != 6:  # that to the last of them: all are in force
                answer = await ws.receive()
                checker.check(answer)
            for job_id, status in (("a", "completed"), ("b", "failed"), ("c", "cancelled")):
                put(at, job_id, status=status, result={"r": None}, error="e", stage="s", kind="k")
            remove(at, "a")
            while {"job_deleted", "pong", "heartbeat", "error", "notification"} - checker.seen:
                checker.check(await ws.receive())
            lose_log(at)
            await ws.send("unsubscribe", ref=7)
            while "unsubscribed" not in checker.seen:
                checker.check(await ws.receive())
        assert checker.left == set()


async def test_every_message_of_an_event_stream_is_as_described() -> None:
    async with server(auth=AUTH, server={"heartbeat": 0.05, "drain": 0}) as at:
        checker = Checker(await described(at, "/asyncapi.json"), "stream")
        put(at, "a", progress=1)
        async with event_stream(at, headers=bearer("alice"), last_seen="x:1") as es:
            for job_id, status in (("a", "completed"), ("b", "failed"), ("c", "cancelled")):
                put(at, job_id, status="queued")
                put(at, job_id, status=status)
            remove(at, "a")
            while {"job_deleted", "heartbeat"} - checker.seen:
                checker.check((await es.event()).data)
            at.node.start_drain()
            await at.node.drain_streams(0)
            for event in await es.rest():
                checker.check(event.data)
        assert checker.left == set()


async def test_every_error_is_of_one_form() -> None:
    async with server(auth=AUTH) as at:
        document = await described(at, "/openapi.json")
        schema = {**document["components"]["schemas"]["Error"], "components": document["components"]}
        for method, target, body, headers in (
            ("GET", "/nowhere", None, {}),
            ("GET", "/api/v2/jobs", None, {}),
            ("GET", "/metrics", None, bearer("alice")),
            ("POST", "/api/v2/jobs", {"progress": "x"}, bearer("w", capabilities=["publish"])),
        ):
            answer = await at.ask(method, target, body, headers)
            jsonschema.Draft202012Validator(schema).validate(answer.json)


def test_channels_are_routes() -> None:
    assert {channel.address for channel in CHANNELS.values()} <= ROUTES.keys()


async def test_every_status_there_is_comes_as_described() -> None:
    """One call for each status of an error, on a server that asks for tokens; the answer's status and form."""
    alice, jobs = bearer("alice"), "/api/v2/jobs"
    worker = [bearer(f"worker{number}", capabilities=["publish"]) for number in range(6)]
    plain = worker[5] | {"Content-Type": "text/plain"}
    calls: list[tuple[int, str, str, str, object, dict[str, str]]] = [
        (400, "GET", jobs, f"{jobs}?limit=x", None, alice),
        (401, "GET", jobs, jobs, None, {}),
        (403, "POST", jobs, jobs, {}, alice),
        (404, "GET", "/api/v2/jobs/{jobId}", f"{jobs}/none", None, alice),
        (409, "POST", jobs, jobs, {"jobId": "a", "userId": "alice"}, worker[0]),
        (411, "POST", jobs, jobs, None, worker[1]),
        (413, "POST", jobs, jobs, b"x" * 200_000, worker[2]),
        (415, "POST", jobs, jobs, b"x", plain),
        (422, "POST", jobs, jobs, {"progress": "x"}, worker[3]),
        (426, "GET", "/ws/jobs", "/ws/jobs", None, {}),
        (429, "POST", jobs, jobs, {}, worker[4]),
        (414, "GET", jobs, f"{jobs}?kind={'x' * 70_000}", None, alice),
        (431, "GET", jobs, jobs, None, alice | {"X-Long": "x" * 40_000}),
    ]
    async with server(auth=AUTH, limits={"publishes_per_second": 0.01}) as at:
        document = await described(at, "/openapi.json")
        schema = {**document["components"]["schemas"]["Error"], "components": document["components"]}
        put(at, "a")
        assert (await at.post(jobs, {}, worker[4])).status == 201
        for status, method, path, target, body, headers in calls:
            answer = await at.ask(method, target, body, headers)
            assert answer.status == status, (answer, target[:80])
            jsonschema.Draft202012Validator(schema).validate(answer.json)
            assert str(status) in document["paths"][path][method.lower()]["responses"], (status, path)
            assert ("retry-after" in answer.headers) == (status == 429)
        answer = await at.ask("PUT", jobs, {}, alice)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, POST, HEAD, OPTIONS")
        at.node.start_drain()
        answer = await at.get(jobs, alice)
        assert (answer.status, answer.error) == (503, "try_later")
        assert "retry-after" in answer.headers
