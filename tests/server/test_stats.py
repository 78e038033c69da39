"""``/api/v2/stats`` of a real server, field by field: connections, deliveries, why they ended, the store."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import trio

from tests.server.figures import OPS, STATS, scrape, stats, value
from tests.streams import event_stream, lose_log, narrow, poll, put, reset_connection, running_out, session, websocket
from tests.support import AUTH, bearer, server, token, until


async def test_every_field_of_a_fresh_server() -> None:
    async with server() as at:
        assert (await stats(at)).keys() == {
            "totalConnections", "activeConnections", "byTransport", "connectionHealth", "averageConnectionTime",
            "connectionErrors", "connectionsClosed", "connectionsRefused", "sockets", "messagesDelivered", "delivered",
            "conflated", "deliveryLatencyMs", "readings", "published", "shown", "requests", "errors", "process",
            "jobs", "history", "broker", "draining", "uptime", "version",
        }  # fmt: skip
        seen = await stats(at)
        assert (seen["totalConnections"], seen["activeConnections"], seen["averageConnectionTime"]) == (0, 0, 0)
        assert seen["byTransport"] == {"websocket": 0, "sse": 0, "poll": 0}
        assert seen["connectionHealth"] == {"healthy": 0, "unhealthy": 0, "stale": 0}
        assert (seen["connectionErrors"], seen["messagesDelivered"]) == (0, 0)
        assert seen["deliveryLatencyMs"] == {"p50": 0, "p99": 0}
        assert seen["requests"] == {"2xx": 1}
        assert seen["broker"] == {
            "store": "memory", "available": True, "epoch": at.node.broker.epoch, "offset": 0, "logsLost": 0,
            "waiting": 0, "waitingBytes": 0,
        }  # fmt: skip
        assert seen["draining"] is False
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", seen["version"])
        process = seen["process"]
        assert process["cpuSeconds"] > 0
        assert process["memoryBytes"] > 10_000_000
        assert process["openFiles"] > 3
        assert process["tasks"] > 3
        assert process["loopLagMs"] >= 0


@pytest.mark.parametrize("store", ["memory:", "sqlite:"])
async def test_connections_updates_and_jobs_are_counted(store: str, tmp_path: Path) -> None:
    url = store if store == "memory:" else f"sqlite:{tmp_path / 'jobs.db'}"
    async with server(store={"url": url}) as at:
        async with session(at) as ws, event_stream(at, jobIds="a") as es, trio.open_nursery() as nursery:
            await ws.subscribe(jobIds=["a"])
            await es.until("snapshot")
            waiting = {"last_seen": f"{at.node.history.epoch}:0", "jobIds": "other", "timeout": 60}
            nursery.start_soon(lambda: poll(at, **waiting))
            await until(lambda: at.node.polls)
            seen = await stats(at)
            assert seen["byTransport"] == {"websocket": 1, "sse": 1, "poll": 1}
            assert (seen["activeConnections"], seen["totalConnections"]) == (3, 3)
            assert seen["connectionHealth"] == {"healthy": 3, "unhealthy": 0, "stale": 0}
            assert seen["sockets"] == 4

            await at.publish("a", userId="alice", progress=5)
            await at.publish("a", seq=1, status="processing")
            await at.publish("a", seq=1)
            assert (await at.post("/api/v2/jobs/a/updates", {"progress": 500})).status == 422
            assert (await at.post("/api/v2/jobs/none/updates", {"progress": 5})).status == 404
            answer = await at.post("/api/v2/updates", [{"jobId": "a", "progress": 9}, {"jobId": "a", "seq": 1}, {}])
            assert answer.status == 200
            published = await ws.ask(
                "publish", updates=[{"jobId": "b", "userId": "bob", "status": "failed"}, {"no": 1}]
            )
            while published["type"] != "published":
                published = await ws.receive()
            await es.updates("a", 3)
            seen = await stats(at)
            assert seen["published"] == {
                "http": {"accepted": 3, "duplicate": 2, "rejected": 3},
                "websocket": {"accepted": 1, "duplicate": 0, "rejected": 1},
            }
            assert seen["shown"] == seen["history"]["updates"] == seen["broker"]["offset"] == 4
            assert seen["history"]["bytes"] == at.node.history.bytes > 0
            assert seen["messagesDelivered"] == seen["delivered"]["live"] == 6
            assert 0 < seen["deliveryLatencyMs"]["p50"] <= seen["deliveryLatencyMs"]["p99"]
            assert seen["jobs"]["total"] == 2
            assert {status: count for status, count in seen["jobs"]["byStatus"].items() if count} == {
                "processing": 1, "failed": 1,
            }  # fmt: skip
            assert seen["requests"]["4xx"] == 2
            assert seen["errors"] == {"invalid_field": 1, "job_not_found": 1}
            assert seen["broker"]["store"] == store.rstrip(":")
            await at.publish("other", userId="alice")
        await until(lambda: not at.node.streams)
        seen = await stats(at)
        assert (seen["activeConnections"], seen["totalConnections"]) == (0, 3)
        assert seen["connectionsClosed"]["closed"] == 2
        assert seen["averageConnectionTime"] > 0
        assert seen["delivered"]["poll"] == 1
        assert seen["readings"] == {"snapshot": 2, "resume": 1, "reset": 0}


async def test_notifications_alone_have_a_delivery_time_too() -> None:
    async with server() as at, websocket(at) as ws:
        await ws.receive()
        await at.post("/api/sse/message", {"target": "broadcast", "event": "e", "data": 1})
        assert (await ws.receive())["type"] == "notification"
        assert sum(at.node.counters.delays.counts) == 1


async def test_what_is_delivered_is_what_readers_get() -> None:
    """Written directly, joined from several channels, filtered, spaced out, replayed: all count, once a reader."""
    async with server() as at, session(at) as direct, session(at) as several, session(at) as picky, session(at) as lazy:
        await direct.subscribe(jobIds=["a"])
        await several.subscribe(jobIds=["a"])
        await several.subscribe(all=True)
        await picky.subscribe(jobIds=["a"], types=["job_completed"])
        await lazy.subscribe(jobIds=["a"], minInterval=20)
        for progress in range(1, 40):
            put(at, "a", progress=progress)
        put(at, "a", status="completed")
        got = 0
        for ws in (direct, several, picky, lazy):
            got += len(await ws.updates("a", 40))
        assert (await stats(at))["delivered"] == {"live": got, "replay": 0, "poll": 0}
        assert 82 <= got < 160
        assert (await stats(at))["conflated"] == 160 - 39 - got
        async with event_stream(at, last_seen=f"{at.node.history.epoch}:30") as es:
            await es.updates("a", 40)
        assert (await stats(at))["delivered"]["replay"] == 10
        await poll(at, last_seen=f"{at.node.history.epoch}:35")
        assert (await stats(at))["delivered"]["poll"] == 5
        await poll(at, last_seen="elsewhere:1")
        assert (await stats(at))["readings"] == {"snapshot": 5, "resume": 2, "reset": 1}


async def test_a_slow_reader_shows() -> None:
    async with server(limits={"backlog": 200_000}) as at:
        async with session(at, receive_buffer=1) as ws:
            await ws.subscribe(all=True)
            narrow(at)
            await until(lambda: put(at, "j", message="x" * 1500) and at.node.counters.conflated > 0)
        async with session(at, receive_buffer=1) as ws:
            await ws.subscribe(all=True)
            narrow(at)
            names = (f"k{number}" for number in itertools.count())
            counters = at.node.counters
            await until(
                lambda: put(at, next(names), message="x" * 1500, status="failed") and counters.closed["overflow"]
            )
            assert (await stats(at))["connectionErrors"] >= 1


async def test_why_connections_ended(tmp_path: Path) -> None:
    async with server(auth=AUTH, limits={"connections_per_user": 1}, server={"drain": 0}) as at:
        counters = at.node.counters
        worker = bearer("w", capabilities=["publish"])
        await at.publish("a", worker, userId="alice")

        async def ended(reason: str) -> None:
            await until(lambda: counters.closed[reason] == 1 and not at.node.streams)

        async with websocket(at, token="x.y.z") as ws:
            assert (await ws.closed()).code == 4401
        await ended("unauthorized")
        async with session(at, token=token("bob")), websocket(at, token=token("bob")) as second:
            assert (await second.closed()).code == 4429
        await until(lambda: counters.closed["rate_limited"] == 1 and counters.closed["closed"] == 1)
        async with session(at, token=token("carol")) as ws:
            for _ in range(10):
                await ws.send_text("nonsense")
            assert (await ws.closed()).code == 1008
        await ended("policy")
        async with session(at, token=token("dave")) as ws:
            await ws.http.send(b"\xff" * 64)
            await ws.closed()
        await ended("protocol")
        with running_out() as exp:
            async with session(at, token=token("erin", exp=exp)) as ws:
                assert (await ws.closed()).code == 4401
        await ended("expired")
        async with event_stream(at, jobIds="a", headers=bearer("alice")) as es:
            await es.until("snapshot")
            await at.publish("a", worker, status="completed")
            await es.rest()
        await ended("finished")
        async with session(at, token=token("finn")):
            assert await at.node.presence.disconnect_user("finn") == 1
            await ended("disconnected")
        async with session(at, token=token("gert")) as ws:
            reset_connection(ws.http)
            await until(lambda: not at.node.streams)
        seen = await stats(at, OPS)
        assert seen["connectionErrors"] == 1 + seen["connectionsClosed"]["broken"]
        assert sum(seen["connectionsClosed"].values()) == seen["totalConnections"] == 9
        assert seen["errors"]["malformed_json"] == 10
        async with session(at, token=token("hal")) as ws:
            at.node.start_drain()
            await at.node.drain_streams(0)
            assert (await ws.closed()).code == 1001
        await ended("drain")


async def test_health_goes_by_the_last_sign_of_life() -> None:
    async with server() as at, session(at), session(at), session(at), event_stream(at) as es:
        await es.until("snapshot")
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (29, 36, 119, 121), strict=True):
            stream.heard_at = now - silent_s
        seen = await stats(at)
        assert seen["connectionHealth"] == {"healthy": 1, "unhealthy": 2, "stale": 1}
        assert value(await scrape(at), "statuswire_connections_health", health="unhealthy") == 2


async def test_patience_is_configured() -> None:
    patience = {"check_interval": 0.05, "unhealthy_after": 60, "stale_after": 300}
    async with server(health=patience) as at, session(at), session(at) as unlucky, session(at):
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (61, 301, 69), strict=True):
            stream.heard_at = now - silent_s
        assert (await unlucky.closed()).code == 1008
        assert (await stats(at))["connectionHealth"] == {"healthy": 1, "unhealthy": 1, "stale": 0}


async def test_a_slow_heartbeat_makes_nobody_unhealthy() -> None:
    async with server(server={"heartbeat": 90}) as at, session(at), session(at):
        now = trio.current_time()
        for stream, silent_s in zip(at.node.streams, (89, 300), strict=True):
            stream.heard_at = now - silent_s
        assert (await stats(at))["connectionHealth"] == {"healthy": 1, "unhealthy": 1, "stale": 0}


async def test_a_lost_log_and_a_store_that_is_away_show() -> None:
    async with server() as at:
        lose_log(at)
        at.node.broker._away = "the disk is full"  # type: ignore[attr-defined]
        broker = (await stats(at))["broker"]
        assert (broker["logsLost"], broker["available"], broker["reason"]) == (1, False, "the disk is full")
        families = await scrape(at)
        assert value(families, "statuswire_store_up") == value(families, "statuswire_ready") == 0
        assert value(families, "statuswire_logs_lost_total") == 1


async def test_sockets_that_were_turned_away() -> None:
    async with server(server={"max_connections": 1}) as at, at.connect() as held:
        assert (await held.request("GET", "/health")).status == 200
        for _ in range(2):
            assert (await at.get("/api/v2/jobs")).status == 503
        seen = (await held.request("GET", STATS)).json
        refused = seen["connectionsRefused"]
        assert refused == dict.fromkeys(refused, 0) | {"too_many_connections": 2}
    async with server(limits={"connects_per_second": 1}) as at, at.connect() as held:
        assert (await held.request("GET", "/health")).status == 200
        assert (await at.get("/api/v2/jobs")).status == 429
        seen = (await held.request("GET", STATS)).json
        assert (seen["connectionsRefused"]["rate_limited"], seen["errors"]) == (1, {"rate_limited": 1})
