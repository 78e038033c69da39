"""Several servers on one Redis are one for notifications: whom they reach, what is stored, what is told of presence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.notifying import SENDER, notified, send
from tests.redis_nodes import nodes
from tests.redis_servers import RedisServer, running_cluster, running_server
from tests.streams import poll, session, websocket
from tests.support import ADMIN, AUTH, PATIENCE_S, InProcess, bearer, server, token, until, until_so

pytestmark = pytest.mark.slow


async def until_online(to: InProcess, user: str, count: int) -> None:
    """Wait until a node knows of so many connections of a user."""

    async def online() -> bool:
        connections: int = (await to.get(f"/api/sse/users/{user}", ADMIN)).json["connections"]
        return connections == count

    await until_so(online)


async def test_every_target_reaches_readers_of_the_other_node(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        notified(two, bearer("ann"), channels="news") as (stream, hello),
        session(two, token=token("ann")) as ws,
        session(one, token=token("bob")) as bob,
    ):
        await ws.subscribe(channels=["news"])
        await until_online(one, "ann", 2)
        cases: list[tuple[str, Any, int]] = [
            ("user", "ann", 2),
            ("users", ["ann", "bob", "carl"], 3),
            ("channel", "news", 2),
            ("channels", ["news", "sports"], 2),
            ("broadcast", None, 3),
            ("client", hello.data["clientId"], 1),
        ]
        for target, name, delivered in cases:
            before = f"{two.node.history.epoch}:{two.node.history.last}"
            answers: list[dict[str, Any]] = []

            async def wait(before: str, answers: list[dict[str, Any]]) -> None:
                answers.append(await poll(two, headers=bearer("ann"), channels="news", last_seen=before, timeout=20))

            async with trio.open_nursery() as nursery:
                if target != "client":
                    nursery.start_soon(wait, before, answers)
                    await until(lambda: two.node.polls)
                sent = await send(one, target, name, f"to.{target}")
                assert sent["delivered"] == delivered, target
                event = await stream.event()
                assert (event.name, event.id) == (f"to.{target}", sent["id"])
                if target != "client":
                    assert (await ws.receive())["id"] == sent["id"]
            if target != "client":
                assert [update["id"] for update in answers[0]["updates"]] == [sent["id"]]
            if target in ("users", "broadcast"):
                assert (await bob.receive())["id"] == sent["id"]
        await ws.quiet()
        await bob.quiet()


async def test_a_cursor_of_one_node_replays_on_the_other_and_on_one_that_starts_later(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two):
        async with notified(one, bearer("ann")) as (stream, hello):
            first = await send(two, "user", "ann", "first")
            assert (await stream.event()).id == first["id"]
        second = await send(one, "user", "ann", "second")
        third = await send(two, "broadcast", event="third")
        async with server(auth=AUTH, store={"url": redis.url}) as three:
            for at in (one, two, three):
                async with notified(at, bearer("ann") | {"Last-Event-ID": first["id"]}) as (stream, _):
                    events = [await stream.event(), await stream.event()]
                    assert [(event.name, event.data["data"]) for event in events] == [
                        ("second", {"n": 1}),
                        ("third", {"n": 1}),
                    ]
                    assert events[0].id == second["id"]
                async with session(at, token=token("ann")) as ws:
                    await ws.subscribe(jobIds=[], last_seen=first["id"])
                    assert [(await ws.receive())["id"] for _ in range(2)] == [second["id"], third["id"]]
        assert hello.id


async def test_what_is_stored_waits_on_every_node_until_it_is_acknowledged_on_any(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two):
        first = await send(one, "user", "ann", "first", store=True)
        second = await send(two, "users", ["ann", "bob"], "second", store=True)
        for at in (one, two):
            await until(lambda at=at: at.node.broker.inboxes.places == 3)
            async with websocket(at, token=token("ann")) as ws:
                await ws.receive()
                assert [(await ws.receive())["id"] for _ in range(2)] == [first["id"], second["id"]]
        async with session(two, token=token("ann")) as ws:
            assert [(await ws.receive())["event"] for _ in range(2)] == ["first", "second"]
            await ws.send("ack", id=first["id"])
            await ws.quiet()
        await until(lambda: one.node.broker.inboxes.places == 2)
        async with notified(one, bearer("ann")) as (stream, _):
            assert (await stream.event()).name == "second"
    # Nobody was there for a while.
    async with nodes(redis.url, auth=AUTH) as (one, two):
        async with notified(two, bearer("ann")) as (stream, _):
            event = await stream.event()
            assert (event.name, event.data["data"]) == ("second", {"n": 1})
        assert (await two.post("/api/sse/ack", {"id": second["id"]}, bearer("ann"))).status == 204
        assert (await one.post("/api/sse/ack", {"id": second["id"]}, bearer("bob"))).status == 204
        for at in (one, two):
            await until(lambda at=at: at.node.broker.inboxes.places == 0)
        with redis.oracle() as oracle:
            left = [key for key in oracle.keys("*") if b"inbox:" in key or b"notice:" in key or b"stored" in key]
            assert left == []


async def test_a_key_counts_once_over_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two), session(two, token=token("ann")) as ws:
        answers = []

        async def again(at: InProcess) -> None:
            answers.append(await send(at, "user", "ann", eventId="k"))

        async with trio.open_nursery() as nursery:
            for at in (one, two) * 5:
                nursery.start_soon(again, at)
        assert len({answer["id"] for answer in answers}) == 1
        assert sum("duplicate" not in answer for answer in answers) == 1
        assert (await ws.receive())["id"] == answers[0]["id"]
        await ws.quiet()


async def test_a_burst_from_both_nodes_comes_once_and_in_order_everywhere(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        session(one, token=token("ann")) as first,
        session(two, token=token("ann")) as second,
        notified(two, bearer("ann")) as (stream, _),
    ):

        async def burst(at: InProcess, job_id: str) -> None:
            for number in range(60):
                await send(at, "user", "ann", f"{job_id}.{number}")
                await at.publish(job_id, bearer("w", capabilities=["publish"]), userId="ann", progress=number)

        await first.subscribe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(burst, one, "a")
            nursery.start_soon(burst, two, "b")
        got = [await first.receive() for _ in range(240)]
        offsets = [int(message["id"].rpartition(":")[2]) for message in got]
        assert offsets == sorted(set(offsets))
        notices = [message["id"] for message in got if message["type"] == "notification"]
        assert len(notices) == 120
        assert [(await second.receive())["id"] for _ in range(120)] == notices
        assert [(await stream.event()).id for _ in range(120)] == notices


async def test_redis_goes_away_and_comes_back(tmp_path: Path) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        await go_away_and_come_back(redis)


async def go_away_and_come_back(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        notified(two, bearer("ann")) as (stream, _),
        session(one, token=token("ann")) as ws,
    ):
        before = await send(one, "user", "ann", store=True)
        assert (await stream.event()).id == before["id"]
        assert (await ws.receive())["id"] == before["id"]
        redis.kill()
        await until(lambda: one.node.broker.available is not None)
        message = {"target": "user", "targetId": "ann", "event": "lost", "data": 1}
        refused = await one.post("/api/sse/message", message, SENDER)
        assert (refused.status, refused.error) == (503, "store_unavailable")
        redis.start()
        await until(lambda: one.node.broker.available is None and two.node.broker.available is None)
        with trio.fail_after(PATIENCE_S):
            after = await send(two, "user", "ann", "after")
            while (event := await stream.event()).name != "after":
                assert event.name == "heartbeat"
            assert event.id == after["id"]
            while (got := await ws.receive())["type"] != "notification":
                pass
            assert got["id"] == after["id"]


async def test_lost_connections_cost_no_notification_and_double_none(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two), notified(two, bearer("ann")) as (stream, _):
        ids: list[str] = []
        cuts = 0
        done = False

        async def cut() -> None:
            """Whenever some have got through, while others are on their way."""
            nonlocal cuts
            while not done:
                cuts += 1
                with redis.oracle() as oracle:
                    oracle.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                enough = len(ids) + 20
                await until(lambda enough=enough: done or len(ids) >= enough)  # type: ignore[misc]

        async def some(start: int) -> None:
            for number in range(start, start + 40):
                message = {"target": "user", "targetId": "ann", "event": f"e{number}", "data": 1, "store": True}
                while True:
                    answer = await one.post("/api/sse/message", message, SENDER | {"Idempotency-Key": f"k{number}"})
                    if answer.status == 200:
                        break
                    assert answer.status == 503, answer
                    await until(lambda: one.node.broker.available is None)
                ids.append(answer.json["id"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            async with trio.open_nursery() as senders:
                for start in range(0, 200, 40):
                    senders.start_soon(some, start)
            done = True
        assert cuts >= 5
        assert len(set(ids)) == 200
        names = []
        while len(names) < 200:
            event = await stream.event()
            if event.name != "heartbeat":
                names.append(event.name)
        assert sorted(names) == sorted(f"e{number}" for number in range(200))
        assert len(two.node.broker.inboxes.of_user("ann")) == 200


async def test_a_store_that_lost_everything_resets_the_readers(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        notified(two, bearer("ann")) as (stream, _),
        session(one, token=token("ann")) as ws,
    ):
        await send(one, "user", "ann", store=True)
        await stream.event()
        await ws.receive()
        with redis.oracle() as oracle:
            oracle.flushall()
        with trio.fail_after(PATIENCE_S):
            while (event := await stream.event()).name != "reset":
                assert event.name == "heartbeat"
            while (got := await ws.receive())["type"] != "reset":
                assert got["type"] == "heartbeat"
        assert event.id == f"{two.node.history.epoch}:{two.node.history.last}"
        assert one.node.broker.inboxes.places == two.node.broker.inboxes.places == 0
        sent = await send(one, "user", "ann", "anew")
        assert (await stream.event()).id == sent["id"]
        assert (await ws.receive())["id"] == sent["id"]


async def test_who_joins_and_leaves_is_told_on_every_node(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        session(one, token=token("ann")) as ws,
        notified(two, bearer("op"), channels="presence:team") as (stream, _),
    ):
        await ws.subscribe(channels=["presence:team", "presence:user:ann"])
        async with session(two, token=token("bob")) as bob:
            await bob.subscribe(channels=["team"])
            with trio.fail_after(PATIENCE_S):
                joined = await ws.receive()
                assert (joined["type"], joined["event"]) == ("notification", "join")
                assert joined["data"] == {"userId": "bob", "channel": "team", "count": 1}
                event = await stream.event()
                assert (event.name, event.data["data"]) == ("join", joined["data"])
                assert event.id == joined["id"]
        with trio.fail_after(PATIENCE_S):
            left = await ws.receive()
            assert (left["event"], left["data"]) == ("leave", {"userId": "bob", "channel": "team", "count": 0})
            assert (await stream.event()).id == left["id"]


async def test_connections_are_found_and_ended_from_the_other_node(redis: RedisServer) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        notified(two, bearer("ann"), username="Ann") as (stream, hello),
    ):
        client = f"/api/sse/clients/{hello.data['clientId']}"
        await until_online(one, "ann", 1)
        found = (await one.get(client, bearer("ann"))).json
        assert (found["connected"], found["username"], found["transport"]) == (True, "Ann", "sse")
        listed = (await one.get("/api/sse/connections", ADMIN)).json
        assert [entry["clientId"] for entry in listed["connections"]] == [hello.data["clientId"]]
        assert listed["total"] == 1
        assert (await one.ask("DELETE", client, headers=ADMIN)).status == 204
        assert (await stream.event()).data["code"] == "disconnected"
        await until_online(one, "ann", 0)


async def test_on_a_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        async with (
            nodes(cluster.url, auth=AUTH) as (one, two),
            notified(two, bearer("ann"), channels="news") as (stream, _),
        ):
            sent = await send(one, "channel", "news", eventId="k")
            assert (await send(two, "channel", "news", eventId="k"))["id"] == sent["id"]
            assert (await stream.event()).id == sent["id"]
            stored = await send(one, "users", ["ann", "bob"], store=True)
            assert (await stream.event()).id == stored["id"]
            await until(lambda: two.node.broker.inboxes.places == 2)
            assert (await one.post("/api/sse/ack", {"id": stored["id"]}, bearer("ann"))).status == 204
            await until(lambda: two.node.broker.inboxes.places == 1)
        async with nodes(cluster.url, auth=AUTH) as (one, two), notified(two, bearer("bob")) as (stream, _):
            assert (await stream.event()).name == "note"
            assert one.node.broker.inboxes.of_user("ann") == []
