"""Webhooks in, over a real server: signed bodies become notifications, once each."""

from __future__ import annotations

import json
import re
import time
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from protocol.signatures import MAX_SKEW_S, sign
from server.routes import webhooks
from tests.redis_servers import RedisServer
from tests.streams import session
from tests.support import AUTH, ROOT, Address, Answer, bearer, request_bytes, server

SECRET: Final = "a secret that is shared"
EXAMPLES: Final = ROOT / "tools" / "webhooks" / "statuswire.toml"


def hook(**keys: object) -> dict[str, Any]:
    return {"webhooks.hook": {"secret": SECRET, "event": "happened", "target_id": "/user", **keys}}


async def post(
    at: Address, body: object, *, name: str = "hook", secret: str = SECRET, age: float = 0, **headers: str
) -> Answer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    now = int(time.time() - age)
    signed = {"X-Timestamp": str(now), "X-Signature-256": sign(secret, now, text), "Content-Type": "application/json"}
    signed |= {key.replace("_", "-"): value for key, value in headers.items()}
    return await at.ask("POST", f"/api/webhooks/{name}", text, signed)


async def test_a_signed_body_becomes_a_notification() -> None:
    async with server(auth=AUTH, **hook()) as at, session(at, headers=bearer("alice")) as ws:
        answer = await post(at, {"user": "alice", "amount": 4200})
        assert answer.status == 202
        assert answer.json == {"delivered": 1, "id": f"{at.node.history.epoch}:1"}
        message = await ws.receive()
        assert message == {
            "type": "notification",
            "id": answer.json["id"],
            "event": "happened",
            "data": {"user": "alice", "amount": 4200},
            "metadata": {},
            "timestamp": message["timestamp"],
        }


async def test_what_is_sent_again_is_known() -> None:
    async with server(**hook()) as at, session(at) as ws:
        now = int(time.time())
        body = b'{"user":"anonymous"}'
        headers = {"X-Timestamp": str(now), "X-Signature-256": sign(SECRET, now, body)}
        first = await at.ask("POST", "/api/webhooks/hook", body, headers)
        again = await at.ask("POST", "/api/webhooks/hook", body, headers)
        headers["X-Signature-256"] = headers["X-Signature-256"].upper().replace("SHA", "sha")
        spelled = await at.ask("POST", "/api/webhooks/hook", body, headers)
        assert (first.status, again.status, spelled.status) == (202, 409, 409)
        assert again.error == "replayed"
        assert (await ws.receive())["event"] == "happened"
        await ws.quiet()
        # The same words at another time are another event.
        later = {"X-Timestamp": str(now + 1), "X-Signature-256": sign(SECRET, now + 1, body)}
        assert (await at.ask("POST", "/api/webhooks/hook", body, later)).status == 202


async def test_what_is_sent_again_is_known_after_a_restart(tmp_path: Path) -> None:
    store = {"store": {"url": f"sqlite:{tmp_path / 'jobs.db'}"}}
    now, body = int(time.time()), b'{"user":"alice"}'
    headers = {"X-Timestamp": str(now), "X-Signature-256": sign(SECRET, now, body)}
    async with server(**store, **hook()) as at:
        assert (await at.ask("POST", "/api/webhooks/hook", body, headers)).status == 202
    async with server(**store, **hook()) as at:
        assert (await at.ask("POST", "/api/webhooks/hook", body, headers)).status == 409


async def test_what_is_sent_again_is_known_on_another_node(redis: RedisServer) -> None:
    store = {"store": {"url": redis.url}}
    now, body = int(time.time()), b'{"user":"anonymous"}'
    headers = {"X-Timestamp": str(now), "X-Signature-256": sign(SECRET, now, body)}
    async with server(**store, **hook()) as one, server(**store, **hook()) as two, session(two) as ws:
        assert (await one.ask("POST", "/api/webhooks/hook", body, headers)).status == 202
        assert (await two.ask("POST", "/api/webhooks/hook", body, headers)).status == 409
        assert (await ws.receive())["event"] == "happened"
        await ws.quiet()


async def test_a_bad_signature_changes_nothing() -> None:
    async with server(**hook()) as at, session(at) as ws:
        body = {"user": "anonymous"}
        for answer in (
            await post(at, body, secret=SECRET + "x"),
            await post(at, body, age=MAX_SKEW_S + 5),
            await post(at, body, age=-MAX_SKEW_S - 5),
            await post(at, body, X_Signature_256="sha256=00"),
            await post(at, body, X_Timestamp="0"),
            await at.post("/api/webhooks/hook", body),
        ):
            assert (answer.status, answer.error) == (401, "bad_signature")
        await ws.quiet()
        assert at.node.history.last == 0


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"X-Signature-256": None}, 401, "bad_signature"),
        ({"X-Timestamp": None}, 401, "bad_signature"),
        ({"X-Signature-256": "sha256=00"}, 401, "bad_signature"),
        ({"X-Timestamp": "soon"}, 401, "bad_signature"),
        ({"X-Timestamp": "1000000000"}, 401, "bad_signature"),
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ({"Content-Length": str(webhooks.MAX_BODY + 1)}, 413, "payload_too_large"),
    ],
    ids=str,
)
async def test_what_the_headers_tell_is_answered_before_the_body_comes(
    changed: dict[str, str | None], status: int, code: str
) -> None:
    async with server(**hook()) as at, at.connect() as http:
        now = int(time.time())
        headers = {
            "X-Timestamp": str(now),
            "X-Signature-256": sign(SECRET, now, b""),
            "Content-Type": "application/json",
            "Content-Length": str(webhooks.MAX_BODY),
            "Expect": "100-continue",
        } | changed
        given = {name: value for name, value in headers.items() if value is not None}
        await http.send(request_bytes("POST", "/api/webhooks/hook", headers=given))
        interim, _ = await http.head()
        assert interim == status, "nobody was asked to go on"
        refused = json.loads(await http.rest())
        assert refused["error"]["code"] == code


async def test_a_body_without_a_length_is_read_up_to_the_bound() -> None:
    async with server(**hook()) as at, at.connect() as http:
        now = int(time.time())
        signed = {"X-Timestamp": str(now), "X-Signature-256": sign(SECRET, now, b""), "Transfer-Encoding": "chunked"}
        await http.send(request_bytes("POST", "/api/webhooks/hook", headers=signed))
        await http.send(b"%x\r\n%b" % (webhooks.MAX_BODY, b" " * webhooks.MAX_BODY) + b"\r\n1\r\n ")
        answer = await http.answer()
        assert (answer.status, answer.error) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_json"),
        (b"{", 400, "malformed_json"),
        (b'"\xff"', 400, "malformed_json"),
        (b"[" * 100_000, 400, "malformed_json"),
        ({"uzer": "alice"}, 422, "invalid_field"),
        ({"user": None}, 422, "invalid_field"),
        ({"user": True}, 422, "invalid_field"),
        ({"user": 1.5}, 422, "invalid_field"),
        ({"user": {}}, 422, "invalid_field"),
        ({"user": "a b"}, 422, "invalid_field"),
        ({"user": ["alice", "bob"]}, 422, "invalid_field"),
        ({"user": []}, 422, "invalid_field"),
        (b"[1]", 422, "invalid_field"),
        ({"user": "alice", "text": "x" * 70_000}, 422, "invalid_field"),
        (b" " * 300_000, 413, "payload_too_large"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_body_that_does_not_fit_is_refused(body: object, status: int, code: str) -> None:
    async with server(**hook()) as at:
        answer = await post(at, body)
        assert (answer.status, answer.error) == (status, code)
        assert at.node.history.last == 0


async def test_other_ways_of_asking_are_refused() -> None:
    async with server(auth=AUTH, **hook()) as at:
        assert (await post(at, {"user": "alice"}, name="other")).error == "webhook_not_found"
        answer = await at.get("/api/webhooks/hook")
        assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
        assert (await post(at, b"user=alice", Content_Type="application/x-www-form-urlencoded")).status == 415


async def test_numbers_are_ids_too_and_a_literal_id_needs_no_pointer() -> None:
    tables = hook(data="/what") | {
        "webhooks.room": {"secret": SECRET, "event": "news", "target": "channel", "target_id": "room-1"}
    }
    async with server(auth=AUTH, **tables) as at, session(at, headers=bearer("789")) as ws:
        await ws.ask("subscribe", channels=["room-1"])
        assert (await post(at, {"user": 789, "what": [1, {"a/b": None}]})).json["delivered"] == 1
        assert (await ws.receive())["data"] == [1, {"a/b": None}]
        assert (await post(at, {"any": "thing"}, name="room")).json["delivered"] == 1
        assert (await ws.receive())["event"] == "news"


async def test_new_secrets_come_with_a_reload() -> None:
    async with server(**hook()) as at:
        from tests.support import configure

        assert (await post(at, {"user": "alice"})).status == 202
        at.node.reload(configure(hook(secret=SECRET * 2)))
        assert (await post(at, {"user": "bob"})).status == 401
        assert (await post(at, {"user": "bob"}, secret=SECRET * 2)).status == 202


def examples() -> list[tuple[str, str]]:
    """Each table of the examples with the body above it."""
    text = EXAMPLES.read_text(encoding="utf-8")
    return re.findall(r"^# (\{.*\})\n\[webhooks\.([a-z-]+)\]$", text, re.MULTILINE)


@pytest.mark.parametrize(("body", "name"), examples(), ids=[name for _, name in examples()])
async def test_the_examples_work(body: str, name: str) -> None:
    tables = tomllib.loads(EXAMPLES.read_text(encoding="utf-8"))["webhooks"]
    config = {f"webhooks.{each}": table for each, table in tables.items()}
    assert len(examples()) == len(tables) == 7
    user = "789" if name == "user-account" else "user_1" if name == "profile-update" else "user_789"
    async with server(auth=AUTH, **config) as at, session(at, headers=bearer(user)) as ws:
        if name == "post-update":
            await ws.ask("subscribe", channels=["team-a", "team-b"])
        answer = await post(at, body.encode(), name=name, secret=tables[name]["secret"])
        assert (answer.status, answer.json["delivered"]) == (202, 1), answer
        message = await ws.receive()
        assert message["event"] == name.replace("-", "_")
        assert message["data"]
