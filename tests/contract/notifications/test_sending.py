"""Sending notifications over HTTP and WebSocket: once each, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.notifying import SENDER, post, send
from tests.streams import clean_server, session
from tests.support import InProcess, server, token


async def test_sending_over_websocket(at: InProcess) -> None:
    async with (
        session(at, token=token("app", capabilities=["notify"])) as ws,
        session(at, token=token("ann")) as ann,
    ):
        answer = await ws.ask("notification", target="user", targetId="ann", event="e", data=[1], ref=7)
        received = await ann.receive()
        assert received["data"] == [1]
        assert answer == {
            "type": "published",
            "accepted": 1,
            "duplicates": 0,
            "rejected": [],
            "delivered": 1,
            "id": received["id"],
            "ref": 7,
        }
        refused = await ann.ask("notification", target="user", targetId="app", event="e", data=1, ref=8)
        assert (refused["code"], refused["ref"]) == ("forbidden", 8)
        wrong = await ws.ask("notification", target="user", event="e", data=1, ref=9)
        assert (wrong["code"], wrong["field"], wrong["ref"]) == ("invalid_field", "targetId", 9)


async def test_an_idempotency_key_sends_once(at: InProcess) -> None:
    key = {**SENDER, "Idempotency-Key": "k"}
    async with session(at, token=token("ann")) as ws:
        first = await send(at, "user", "ann", headers=key)
        again = await send(at, "user", "ann", headers=key)
        assert again == {"delivered": 1, "id": first["id"], "duplicate": True}
        other = await post(at, "user", "ann", "another", headers=key)
        assert (other.status, other.error) == (422, "idempotency_key_reused")
        assert (await ws.receive())["id"] == first["id"]
        in_body = await send(at, "user", "ann", eventId="e-1")
        assert (await send(at, "user", "ann", eventId="e-1"))["duplicate"] is True
        assert (await ws.receive())["id"] == in_body["id"]
        await ws.quiet()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "target"),
        ({"target": "everyone"}, "target"),
        ({"target": "user"}, "targetId"),
        ({"target": "user", "targetIds": ["a"]}, "targetIds"),
        ({"target": "users", "targetId": "a"}, "targetId"),
        ({"target": "users", "targetIds": []}, "targetIds"),
        ({"target": "users", "targetIds": ["a", "b c"]}, "targetIds"),
        ({"target": "users", "targetIds": [f"u{n}" for n in range(1001)]}, "targetIds"),
        ({"target": "users", "targetIds": "a"}, "targetIds"),
        ({"target": "channel", "targetId": "presence:x"}, "targetId"),
        ({"target": "channel", "targetId": "a/b"}, "targetId"),
        ({"target": "broadcast", "targetId": "a"}, "targetId"),
        ({"target": "broadcast", "targetIds": ["a"]}, "targetIds"),
        ({"target": "broadcast", "event": ""}, "event"),
        ({"target": "broadcast", "event": "a\nb"}, "event"),
        ({"target": "broadcast", "event": "x" * 129}, "event"),
        ({"target": "broadcast", "event": "connected"}, "event"),
        ({"target": "broadcast", "event": 5}, "event"),
        ({"target": "broadcast", "data": "x" * 65536}, "data"),
        ({"target": "broadcast", "metadata": []}, "metadata"),
        ({"target": "broadcast", "metadata": {"x": "y" * 65536}}, "data"),
        ({"target": "broadcast", "store": True}, "store"),
        ({"target": "channel", "targetId": "a", "store": True}, "store"),
        ({"target": "broadcast", "store": 1}, "store"),
        ({"target": "broadcast", "sotre": True}, "sotre"),
        ({"target": "broadcast", "eventId": ""}, "eventId"),
    ],
    ids=repr,
)
async def test_bad_ones_are_refused_with_the_field_and_change_nothing(message: dict[str, Any], field: str) -> None:
    async with server() as at:
        given = {"event": "e", "data": 1} | message if message else {"event": "e", "data": 1}
        refused = await at.post("/api/sse/message", given)
        assert (refused.status, refused.error, refused.json["error"]["field"]) == (422, "invalid_field", field)
        assert at.node.history.last == 0


async def test_what_is_no_notification_at_all() -> None:
    async with server() as at:
        for body, status in (
            (b"{", 400),
            (b"[]", 422),
            (b'"x"', 422),
            (b'{"data":' + b"[" * 5000, 400),
            (b" " * 300_000, 413),
        ):
            answer = await at.ask("POST", "/api/sse/message", body, {"Content-Type": "application/json"})
            assert answer.status == status, body[:10]
        deep = json.loads("[" * 65 + "]" * 65)
        answer = await at.post("/api/sse/message", {"target": "broadcast", "event": "e", "data": deep})
        assert (answer.status, answer.json["error"]["field"]) == (422, "data")
        answer = await at.ask("POST", "/api/sse/message", b"{}", {"Content-Type": "text/plain"})
        assert answer.status == 415
        assert (await at.post("/api/sse/message", {"target": "broadcast", "event": "e"})).json["error"][
            "field"
        ] == "data"


async def test_sending_is_limited_like_publishing() -> None:
    async with clean_server(limits={"publishes_per_second": 1}) as at:
        await send(at, "broadcast", headers=())
        refused = await post(at, "broadcast", headers=())
        assert (refused.status, refused.error) == (429, "rate_limited")
