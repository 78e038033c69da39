"""Who may send, look and disconnect, and what is shown of who is connected."""

from __future__ import annotations

from typing import Any

from tests.notifying import SENDER, notified, send
from tests.streams import clean_server, cursor, event_stream, poll, session, stream_at
from tests.support import ADMIN, InProcess, bearer, token, until


async def test_who_may_do_what(at: InProcess) -> None:
    async with notified(at, bearer("ann")) as (_, hello):
        client = f"/api/sse/clients/{hello.data['clientId']}"
        ann, bob, ops = bearer("ann"), bearer("bob"), bearer("op", capabilities=["ops"])
        message = {"target": "broadcast", "event": "e", "data": None}
        cases: list[tuple[str, str, object, Any, int]] = [
            ("POST", "/api/sse/message", message, ann, 403),
            ("POST", "/api/sse/message", message, ops, 403),
            ("POST", "/api/sse/message", message, {}, 401),
            ("POST", "/api/sse/message", message, SENDER, 200),
            ("POST", "/api/sse/message", message, ADMIN, 200),
            ("GET", "/api/sse/connections", None, ann, 403),
            ("GET", "/api/sse/connections", None, ops, 200),
            ("GET", "/api/sse/users/ann", None, ann, 200),
            ("GET", "/api/sse/users/ann", None, bob, 403),
            ("GET", "/api/sse/users/ann", None, ops, 200),
            ("GET", client, None, ann, 200),
            ("GET", client, None, ops, 200),
            ("DELETE", client, None, ann, 403),
            ("DELETE", "/api/sse/users/ann", None, ann, 403),
            ("GET", "/api/sse/users/a%20b", None, ops, 400),
            ("PUT", "/api/sse/message", message, ADMIN, 405),
            ("HEAD", "/api/sse", None, ann, 405),
        ]
        for method, path, body, headers, status in cases:
            async with at.connect() as http:
                answer = await http.request(method, path, body=body, headers=headers)
            assert answer.status == status, (method, path, headers)
        foreign = (await at.get(client, bob)).json
        assert foreign == {"clientId": hello.data["clientId"], "connected": False}
    for query, status in (("userId=bob", 403), ("userId=ann", 200), ("userId=a%20b", 400), ("username=%0A", 400)):
        async with stream_at(at, f"/api/sse?{query}", headers=bearer("ann")) as stream:
            assert stream.status == status, query
    async with stream_at(at, "/api/sse") as stream:
        assert stream.status == 401


async def test_an_admin_may_be_notified_for_another_user(at: InProcess) -> None:
    async with notified(at, ADMIN, userId="bob") as (stream, hello):
        assert hello.data["userId"] == "bob"
        sent = await send(at, "user", "bob")
        assert (await stream.event()).id == sent["id"]


async def test_in_open_mode_anyone_says_who_they_are() -> None:
    async with clean_server() as at, notified(at, userId="ann", username="Ann") as (stream, hello):
        assert hello.data["userId"] == "ann"
        assert (await send(at, "user", "ann", headers=()))["delivered"] == 1
        assert (await stream.event()).name == "note"
        user = (await at.get("/api/sse/users/ann")).json
        assert user == {"userId": "ann", "online": True, "connections": 1}
        await send(at, "user", "ann", headers=(), store=True)
        assert (await at.post("/api/sse/ack?userId=ann", {"id": cursor(at)}, ())).status == 204
        assert at.node.broker.inboxes.places == 0
        assert (await poll(at, userId="ann", channels="", last_seen=f"{at.node.broker.epoch}:0"))["updates"]


# Who is there


async def test_who_is_connected_and_ending_connections(at: InProcess) -> None:
    async with (
        notified(at, bearer("ann"), username="Ann", channels="news") as (stream, hello),
        session(at, token=token("ann")) as ws,
        event_stream(at, headers=bearer("bob")) as jobs,
    ):
        await jobs.event()
        listed = (await at.get("/api/sse/connections", ADMIN)).json
        assert listed["total"] == 2
        assert listed["next"] is None
        shown = {entry["clientId"]: entry for entry in listed["connections"]}
        assert len(shown) == 3
        mine = shown[hello.data["clientId"]]
        assert mine == {
            "clientId": hello.data["clientId"],
            "userId": "ann",
            "username": "Ann",
            "transport": "sse",
            "address": "127.0.0.1",
            "connectedAt": mine["connectedAt"],
            "notifications": True,
            "channels": ["news"],
        }
        page = (await at.get("/api/sse/connections?limit=1", ADMIN)).json
        assert len(page["connections"]) == 1
        rest = (await at.get(f"/api/sse/connections?after={page['next']}", ADMIN)).json
        assert {entry["clientId"] for entry in page["connections"] + rest["connections"]} == set(shown)
        user = (await at.get("/api/sse/users/ann", bearer("ann"))).json
        assert user == {"userId": "ann", "online": True, "connections": 2}

        client = f"/api/sse/clients/{hello.data['clientId']}"
        assert (await at.get(client, bearer("ann"))).json == mine | {"connected": True}
        assert (await at.ask("DELETE", client, headers=ADMIN)).status == 204
        event = await stream.event()
        assert (event.name, event.data["code"]) == ("error", "disconnected")
        assert await stream.rest() == []
        await until(lambda: hello.data["clientId"] not in at.node.presence.clients)
        assert (await at.get(client, bearer("ann"))).json == {"clientId": hello.data["clientId"], "connected": False}
        gone = await at.ask("DELETE", client, headers=ADMIN)
        assert (gone.status, gone.error) == (404, "client_not_found")

        assert (await at.ask("DELETE", "/api/sse/users/ann", headers=ADMIN)).json == {"disconnected": 1}
        assert (await ws.closed()).code == 1008
        assert (await at.get("/api/sse/users/ann", ADMIN)).json["online"] is False
