"""Redis dies, freezes, fills up, is cut off or replaced under load: nothing is lost, and nodes say how it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing

from server.transports import live
from tests.redis_nodes import nodes, publish, under_load
from tests.redis_servers import RedisServer, running_cluster, running_proxy, running_sentinels, running_server
from tests.streams import Stream, event_stream, poll, session, stream_at, websocket
from tests.support import InProcess, server, until, until_answered

pytestmark = pytest.mark.slow

Mishap: TypeAlias = Callable[[RedisServer, Sequence[InProcess]], Awaitable[None]]


def all_away(running: Sequence[InProcess]) -> bool:
    """Whether every node says that it cannot keep anything."""
    return all(at.node.broker.available is not None for at in running)


async def killed(redis: RedisServer, _: Sequence[InProcess]) -> None:
    await trio.to_thread.run_sync(redis.kill)
    await trio.to_thread.run_sync(redis.start)


async def frozen(redis: RedisServer, running: Sequence[InProcess]) -> None:
    redis.freeze()
    await until(lambda: all_away(running))
    redis.thaw()


async def full(redis: RedisServer, running: Sequence[InProcess]) -> None:
    with redis.oracle() as oracle:
        oracle.config_set("maxmemory", "1mb")
        await until(lambda: all_away(running))
        oracle.config_set("maxmemory", "0")


async def scripts_flushed(redis: RedisServer, _: Sequence[InProcess]) -> None:
    with redis.oracle() as oracle:
        oracle.script_flush()


async def subscriptions_cut(redis: RedisServer, _: Sequence[InProcess]) -> None:
    with redis.oracle() as oracle:
        oracle.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def connections_cut(redis: RedisServer, _: Sequence[InProcess]) -> None:
    with redis.oracle() as oracle:
        oracle.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@pytest.mark.parametrize(
    "mishap",
    [killed, frozen, full, scripts_flushed, subscriptions_cut, connections_cut],
)
async def test_nothing_is_lost(tmp_path: Path, mishap: Mishap) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        async with nodes(redis.url) as running, under_load(running) as (_, more):
            for _ in range(1 if mishap is frozen else 3):
                await mishap(redis, running)
                await more()


async def test_a_dead_network(redis: RedisServer) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        nodes(f"redis://127.0.0.1:{proxy.port}") as running,
        under_load(running) as (_, more),
    ):
        proxy.cut()
        await more()
        proxy.stop_passing()
        await until_answered(running[0], "/ready", 503)
        refused = await running[0].post("/api/v2/jobs", {"jobId": "x"})
        assert (refused.status, refused.error) == (503, "store_unavailable")
        assert "retry-after" in refused.headers
        assert (await running[0].get("/api/v2/jobs/job-1")).status == 200  # what is known can be read
        proxy.pass_again()
        await until_answered(running[0], "/ready", 200)
        await more()


async def test_a_node_that_is_cut_off_says_so(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers stay, know that others may know more, and need not wait for a heartbeat to know that it is over."""
    beat = 3.0
    monkeypatch.setattr(live, "NOT_LIVE_BEAT_S", 0.2)
    async with (
        running_proxy(redis.port) as proxy,
        server(store={"url": redis.url}) as one,
        server(store={"url": f"redis://127.0.0.1:{proxy.port}"}, server={"heartbeat": beat}) as two,
        session(two) as ws,
        event_stream(two, jobIds="a") as events,
        stream_at(two, "/api/sse") as notices,
        stream_at(two, "/api/export/progress/a") as task,
    ):
        readers: list[Callable[[], Awaitable[dict[str, Any]]]] = [ws.receive]

        def reads(stream: Stream) -> None:
            async def receive() -> dict[str, Any]:
                event = await stream.event()
                return event.data

            readers.append(receive)

        for stream in (events, notices, task):
            reads(stream)

        async def until_beat(*, says: bool | None) -> None:
            """Of each reader, until one says so; those of another kind before it come from before it changed."""
            for receive in readers:
                while (message := await receive())["type"] != "heartbeat" or message.get("live") is not says:
                    assert message["type"] != "connected" or "live" not in message

        await ws.subscribe(jobIds=["a"])
        await publish(one, "a", userId="anonymous", kind="export")
        await until_beat(says=None)
        assert "live" not in await poll(two, jobIds="a")
        proxy.stop_passing()
        proxy.cut()
        await until_answered(two, "/ready", 503)
        await publish(one, "a", progress=50)
        await until_beat(says=False)
        with trio.fail_after(2 * beat):  # five usual ones would take twice that
            for _ in range(5):
                await until_beat(says=False)
        assert (await poll(two, jobIds="a"))["live"] is False
        async with websocket(two) as late, event_stream(two, jobIds="a") as later:
            assert (await late.receive())["live"] is False
            assert (await later.event()).data["live"] is False
        proxy.pass_again()
        assert (await events.updates("a", 2))[-1].data["progress"] == 50
        await until_beat(says=None)
        assert "live" not in await poll(two, jobIds="a")
        assert len(two.node.streams) == 4  # whoever was there has stayed


async def test_a_full_redis(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        await publish(one, "a", userId="u")
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", "1mb")
        refused = await one.post("/api/v2/jobs/a/updates", {"progress": 1})
        assert (refused.status, refused.error) == (503, "store_unavailable")
        not_ready = await one.get("/ready")
        assert not_ready.status == 503
        assert "OOM" in not_ready.json["reason"]
        assert (await two.get("/api/v2/jobs/a")).json["version"] == 1
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", "0")
        await until_answered(one, "/ready", 200)  # without anybody having to try
        assert (await one.post("/api/v2/jobs/a/updates", {"progress": 1})).status == 200


async def test_sentinels_replace_a_master_under_load(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as sentinels:
        async with nodes(sentinels.url) as running:
            async with under_load(running) as (watchers, more):
                old = sentinels.master()
                await trio.to_thread.run_sync(old.kill)
                await until(lambda: sentinels.master() is not old)
                await more()
            epochs = {at.node.history.epoch for at in running}
            assert len(epochs) == 1
            # What the replica had not got was lost by Redis: then, and only then, everybody is told.
            assert len({watcher.resets > 0 for watcher in watchers}) == 1


async def test_a_cluster_loses_a_master_under_load(tmp_path: Path) -> None:
    with running_cluster(tmp_path, replicas=True) as cluster:
        with cluster.masters[0].oracle() as oracle:
            slot = int(oracle.execute_command("CLUSTER", "KEYSLOT", "{statuswire}"))
        async with nodes(cluster.url) as running:
            async with under_load(running) as (_, more):
                owner = cluster.owner(slot)
                await trio.to_thread.run_sync(owner.kill)
                with cluster.replicas[cluster.masters.index(owner)].oracle() as heir:
                    await until(lambda: heir.info("replication")["role"] == "master")
                await more()
            assert running[0].node.history.epoch == running[1].node.history.epoch
