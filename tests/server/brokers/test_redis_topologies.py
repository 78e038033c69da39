"""The Redis client behind sentinels and in a cluster: failovers, moved slots, hash slots against redis-py's."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis.crc
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from server.brokers.redis_client import CrossSlotError, Script
from server.brokers.redis_cluster import ClusterClient
from server.brokers.redis_topology import hash_slot, keys_of
from server.brokers.redis_url import Address
from tests.redis_servers import running_cluster, running_sentinels
from tests.redis_witness import refusal, witnessed
from tests.support import until

INCREMENT = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


# Sentinel


@pytest.mark.slow
async def test_sentinel_failover(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as redis_:
        assert "knows no master 'other'" in await refusal(redis_.url.replace("/main", "/other"))
        assert "is a sentinel" in await refusal(redis_.sentinels[0].url)
        async with witnessed(redis_.url) as witness:
            client = witness.client
            client.subscribe(["news"])
            await client.wait_subscribed(["news"])
            assert await client.call("SET", "a", 1) == b"OK"
            assert await client.call("WAIT", 1, 5000) == 1
            old = redis_.master()
            redis_.sentinels[0].kill()  # the one that was asked first
            old.kill()
            await until(lambda: len(witness.ups) == 2)
            assert witness.ups[1].address.port != old.port
            assert witness.ups[1].role == "master"
            assert await client.call("GET", "a") == b"1"
            await client.wait_subscribed(["news"])
            await client.call("PUBLISH", "news", "from the new one")
            await until(lambda: witness.messages == [(b"news", b"from the new one")])


@pytest.mark.slow
async def test_sentinel_failover_of_a_living_master(tmp_path: Path) -> None:
    """The old master still answers for a while: sentinels say that there is a new one."""
    with running_sentinels(tmp_path, count=1) as redis_:
        async with witnessed(redis_.url) as witness:
            old = redis_.master()
            await until(lambda: redis_.fail_over(old))
            await until(lambda: witness.ups[-1].address.port != old.port)
            assert await witness.client.call("SET", "a", 1, patience=3) == b"OK"


# Cluster


@given(st.binary(max_size=30) | st.sampled_from([b"{a}b", b"a{b}", b"{}a", b"{{a}}", b"a}{b}", b"{a"]))
def test_hash_slots_are_those_of_redis_py(key: bytes) -> None:
    assert hash_slot(key) == redis.crc.key_slot(key)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (("GET", "a"), ("a",)),
        ((b"del", "a", "b"), ("a", "b")),
        (("PING",), ()),
        (("EVALSHA", "f" * 40, 2, "a", "b", "c"), ("a", "b")),
        (("XREAD", "COUNT", 1, "STREAMS", "a", "b", "0", "0"), ("a", "b")),
        (("XREADGROUP", "GROUP", "g", "c", b"streams", "a", ">"), ("a",)),
        (("XGROUP", "CREATE", "a", "g", "$"), ("a",)),
        (("SPUBLISH", "a", "x"), ("a",)),
    ],
)
def test_keys_of_commands(command: tuple[str, ...], keys: tuple[str, ...]) -> None:
    assert tuple(keys_of(command)) == keys


@pytest.mark.slow
async def test_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        assert "use redis+cluster://" in await refusal(cluster.masters[0].url)
        seed = f"redis+cluster://127.0.0.1:{cluster.masters[0].port}"
        async with witnessed(seed) as witness:
            client = witness.client
            assert isinstance(client, ClusterClient)
            assert {node.address.port for node in witness.ups} == {server.port for server in cluster.masters}
            keys = [f"k{n}" for n in range(50)]
            for reply in [client.send_script(INCREMENT, [key], [2]) for key in keys]:
                assert await reply.wait() == 2
            client.subscribe(keys)
            await client.wait_subscribed(keys)
            for key in keys:
                client.send("SPUBLISH", key, "x")
            await until(lambda: {channel for channel, _ in witness.messages} == {key.encode() for key in keys})
            with pytest.raises(CrossSlotError):
                client.send_script(INCREMENT, ["a", "b"], [])
            assert await client.call("MGET", "{t}a", "{t}b") == [None, None]
            client.unsubscribe(keys)

            # ASK: a key that the importing node has already.
            slot = hash_slot("moving")
            source = cluster.owner(slot)
            target = next(server for server in cluster.masters if server is not source)
            client.subscribe(["moving"])
            await client.wait_subscribed(["moving"])
            cluster.begin_move(slot, target)
            assert await client.call("SET", "moving", 1) == b"OK"
            assert await client.call("GET", "moving") == b"1"
            # TRYAGAIN: one of two keys is there, until it is not any more.
            multi = client.send("MGET", "moving", "{moving}2")
            await trio.lowlevel.checkpoint()
            assert await client.call("SET", "{moving}2", 2) == b"OK"
            assert await multi.wait() in ([b"1", b"2"], [b"1", None])
            # MOVED, for commands and for channels, to a node that is not connected yet.
            client._links.pop(Address("127.0.0.1", target.port)).retire()
            cluster.move_slot(slot, target)
            assert await client.call("GET", "moving") == b"1"
            assert client._owners[slot] == Address("127.0.0.1", target.port)
            await until(lambda: witness.lost == [frozenset({b"moving"})])
            await client.wait_subscribed(["moving"])
            assert await client.call("SPUBLISH", "moving", "news") == 1
            await until(lambda: witness.messages[-1] == (b"moving", b"news"))
            assert client.pending == 0


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["kill", "freeze"])
async def test_cluster_promotes_a_replica(tmp_path: Path, blow: str) -> None:
    with running_cluster(tmp_path, "--cluster-require-full-coverage", "no", replicas=True) as cluster:
        async with witnessed(cluster.url) as witness:
            client = witness.client
            slot = hash_slot("key")
            victim = cluster.owner(slot)
            other = next(key for key in ("a", "b", "c", "d", "e") if cluster.owner(hash_slot(key)) is not victim)
            client.subscribe(["key", other])
            await client.wait_subscribed(["key", other])
            assert await client.call("SET", "key", 1) == b"OK"
            assert await client.call("WAIT", 1, 5000, key="key") == 1
            getattr(victim, blow)()
            await until(lambda: witness.downs)
            assert await client.call("SET", other, 1) == b"OK"  # the other masters go on
            await client.wait_up()
            assert await client.call("GET", "key") == b"1"
            await client.wait_subscribed(["key", other])
            await client.call("SPUBLISH", "key", "new")
            await until(lambda: witness.messages == [(b"key", b"new")])


@pytest.mark.slow
async def test_cluster_errors(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        with cluster.masters[0].oracle() as oracle:
            oracle.execute_command("CLUSTER", "DELSLOTS", 0)
        assert "slot 0" in await refusal(f"redis+cluster://127.0.0.1:{cluster.masters[0].port}")
