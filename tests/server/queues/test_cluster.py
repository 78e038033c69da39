"""Queues in a Redis Cluster: BullMQ's and Bull's, whose keys share a hash tag."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.brokers.redis_topology import hash_slot
from tests.queueing import captured, put_stream, status, steps, until_status, until_up
from tests.redis_servers import Cluster, running_cluster
from tests.support import server, until

pytestmark = pytest.mark.slow

PREFIX = "{jobs}"
SLOT = hash_slot(PREFIX)
BULLMQ = captured("bullmq")["bullmq6"]
STREAM = BULLMQ["stream"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as running:
        yield running


def table(cluster: Cluster, kind: str) -> dict[str, Any]:
    return {"queues.src": {"kind": kind, "url": cluster.url, "prefix": PREFIX}}


async def test_bullmq_goes_on_when_its_slot_moves(cluster: Cluster) -> None:
    first = cluster.owner(SLOT)
    second = next(master for master in cluster.masters if master is not first)
    ends = {"video:1": "completed", "video:2": "failed", "video:job_123": "completed", "video:5": "cancelled"}
    async with server(store={"url": "memory:"}, **table(cluster, "bullmq")) as one:
        await until_up(one.node)
        with first.oracle() as oracle:
            oracle.hset(f"{PREFIX}:video:meta", mapping=BULLMQ["meta_hash"])
            for job in "12":
                oracle.hset(f"{PREFIX}:video:{job}", mapping=BULLMQ["job_hashes"]["transcode:completed"])
            put_stream(oracle, f"{PREFIX}:video:events", STREAM[:12])
            oracle.hset(f"{PREFIX}:mail:meta", mapping=BULLMQ["meta_hash"])
            put_stream(oracle, f"{PREFIX}:mail:events", STREAM[:6])
        assert (await until_status(one.node, "video:1", "completed"))["userId"] == "user_789"
        await until_status(one.node, "mail:1", "completed")
        cluster.move_slot(SLOT, second)
        with second.oracle() as oracle:
            put_stream(oracle, f"{PREFIX}:video:events", STREAM[12:])
        await until(lambda: all(status(one.node, name) == end for name, end in ends.items()))
        assert steps(one.node, "video:2") == ["queued", "processing", "queued", "processing", "failed"]


async def test_bull_is_heard_from_any_node(cluster: Cluster) -> None:
    bull4 = captured("bullmq")["bull4"]
    owner = cluster.owner(SLOT)
    async with server(store={"url": "memory:"}, **table(cluster, "bull4")) as one:
        with owner.oracle() as oracle:
            for job in "12":
                oracle.hset(f"{PREFIX}:report:{job}", mapping=bull4["job_hashes"]["added"])
        await until_up(one.node)
        # Where Bull's scripts run; who listens may do so at another node.
        with owner.oracle() as oracle:
            for message in bull4["messages"]:
                oracle.publish(PREFIX + message["channel"].removeprefix("bull"), message["data"])
        assert (await until_status(one.node, "report:1", "completed"))["message"] == "Encoding"
        assert (await until_status(one.node, "report:2", "failed"))["error"] == "boom"
