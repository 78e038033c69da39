"""The Redis client against real servers, with redis-py as the oracle, and against what can befall a Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
import trustme

from protocol.resp import RedisError
from server.brokers.redis_client import (
    ConnectionLostError,
    NotConnectedError,
    Options,
    OverloadedError,
    RedisStartError,
    Script,
    make_client,
    open_client,
)
from server.brokers.redis_url import parse_redis_url
from tests.redis_servers import RedisServer, free_ports, make_server, running_proxy, running_server
from tests.redis_witness import refusal, witnessed
from tests.support import PATIENCE_S, until

pytestmark = pytest.mark.slow

INCREMENT = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which keeps its data."""
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


# URLs


@pytest.mark.parametrize(
    ("text", "shown", "addresses"),
    [
        ("redis://h", "redis://h:6379/0", [("h", 6379)]),
        ("redis://h:1/3", "redis://h:1/3", [("h", 1)]),
        ("redis://[::1]:7/", "redis://[::1]:7/0", [("::1", 7)]),
        ("redis://[::1]", "redis://[::1]:6379/0", [("::1", 6379)]),
        ("rediss://:p@h", "rediss://h:6379/0", [("h", 6379)]),
        ("redis+sentinel://a,b:2/main/4", "redis+sentinel://a:26379,b:2/main/4", [("a", 26379), ("b", 2)]),
        ("redis+cluster://u:p%40@a:1,b", "redis+cluster://a:1,b:6379", [("a", 1), ("b", 6379)]),
    ],
)
def test_urls(text: str, shown: str, addresses: list[tuple[str, int]]) -> None:
    url = parse_redis_url(text)
    assert str(url) == shown
    assert list(url.addresses) == addresses
    assert "p@" not in repr(url)


def test_credentials_are_percent_decoded() -> None:
    url = parse_redis_url("redis+sentinel://us%3Aer:p%40ss@h/main?sentinel_password=s%26")
    assert (url.username, url.password, url.sentinel_password) == ("us:er", "p@ss", "s&")
    assert parse_redis_url("redis://:x@h").username is None
    assert parse_redis_url("redis://h").password is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("http://h", "begins with one of"),
        ("redis://", "not host or host:port"),
        ("redis://h:x", "not host or host:port"),
        ("redis://h:70000", "not host or host:port"),
        ("redis://a,b", "redis+sentinel://"),
        ("redis://h/x", "number of a database"),
        ("redis://h/1/2", "number of a database"),
        ("redis+sentinel://h", "master's name"),
        ("redis+cluster://h/1", "database 0 only"),
        ("redis://h?timeout=3", "`timeout`"),
        ("redis://h?ca=x", "rediss"),
        ("rediss://h?ca=/nowhere", "/nowhere"),
        ("redis://h?sentinel_password=x", "redis+sentinel://"),
    ],
)
def test_bad_urls(text: str, hint: str) -> None:
    with pytest.raises(RedisStartError) as caught:
        make_client(text)
    assert hint in str(caught.value)


# Starting


async def test_start_errors_say_what_to_do(shared_redis: RedisServer, tmp_path: Path) -> None:
    assert "cannot be reached" in await refusal(f"redis://127.0.0.1:{free_ports(1)[0]}")
    assert "cannot be reached" in await refusal("redis://no-such-host.invalid")
    assert "cannot be reached" in await refusal(f"redis://{'long' * 20}.invalid")
    assert "has no database 99" in await refusal(f"{shared_redis.url}/99")
    assert "leave the password out" in await refusal(f"redis://:secret@127.0.0.1:{shared_redis.port}")
    assert "refuses user 'nobody'" in await refusal(f"redis://nobody:secret@127.0.0.1:{shared_redis.port}")
    assert "not part of a cluster" in await refusal(f"redis+cluster://127.0.0.1:{shared_redis.port}")
    assert "not a sentinel" in await refusal(f"redis+sentinel://127.0.0.1:{shared_redis.port}/main")
    assert "is it a TLS port" in await refusal(f"rediss://127.0.0.1:{shared_redis.port}")
    with running_server(tmp_path, "--replicaof", "127.0.0.1", str(shared_redis.port)) as replica:
        assert "replica of 127.0.0.1" in await refusal(replica.url)


async def test_passwords_and_users(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        with server.oracle() as oracle:
            oracle.acl_setuser("worker", enabled=True, passwords=["+w@rd"], categories=["+@all"], keys=["*"])
            oracle.acl_setuser("blind", enabled=True, passwords=["+x"], commands=["-info"])
            oracle.config_set("requirepass", "secret")
        at = f"127.0.0.1:{server.port}"
        assert "asks for a password" in await refusal(f"redis://{at}")
        assert "correct the URL" in await refusal(f"redis://:wrong@{at}")
        assert "ACL SETUSER blind +info" in await refusal(f"redis://blind:x@{at}")
        async with open_client(f"redis://:secret@{at}") as client:
            assert await client.call("ACL", "WHOAMI") == b"default"
        async with open_client(f"redis://worker:w%40rd@{at}/2") as client:
            assert await client.call("ACL", "WHOAMI") == b"worker"
            assert b"name=statuswire" in await client.call("CLIENT", "INFO")
            assert b" db=2 " in await client.call("CLIENT", "INFO")


async def test_what_is_not_redis(tmp_path: Path) -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, http, [listener])
        assert "not Redis" in await refusal(f"redis://127.0.0.1:{listener.socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()


async def test_old_and_silent_and_loading_servers(shared_redis: RedisServer) -> None:
    async with running_proxy(shared_redis.port) as proxy:
        at = f"redis://127.0.0.1:{proxy.port}"
        proxy.replace = (b"redis_version:7.0.15", b"redis_version:6.0.16")
        assert "version 6.0.16: 6.2 or newer" in await refusal(at)
        proxy.replace = (b"\r\nloading:0", b"\r\nloading:1")
        assert "still loading" in await refusal(at)
        proxy.replace = None
        proxy.stop_passing()
        assert "did not answer within 0.2 s" in await refusal(at, Options(start_patience_s=0, connect_timeout_s=0.2))


async def test_start_waits_for_what_passes(server: RedisServer) -> None:
    server.kill()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_client(server.url).start)
        await trio.testing.wait_all_tasks_blocked()
        server.start()


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(ca)
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    port = free_ports(1)[0]
    options = ("--port", "0", "--tls-port", str(port), "--tls-cert-file", cert, "--tls-key-file", key)
    server = make_server(tmp_path, *options, "--tls-ca-cert-file", ca, "--tls-auth-clients", "optional", port=port)
    server.tls = {"ssl": True, "ssl_ca_certs": ca}
    try:
        server.start()
        assert "add ?ca=FILE" in await refusal(f"rediss://127.0.0.1:{port}")
        assert "rediss://" in await refusal(f"redis://127.0.0.1:{port}")
        async with witnessed(f"rediss://127.0.0.1:{port}?ca={ca}&cert={cert}&key={key}") as witness:
            witness.client.subscribe(["news"])
            await witness.client.wait_subscribed(["news"])
            big = b"x" * 3_000_000
            assert await witness.client.call("SET", "a", big) == b"OK"
            assert await witness.client.call("GET", "a") == big
            assert await witness.client.call("PUBLISH", "news", big) == 1
            await until(lambda: witness.messages == [(b"news", big)])
    finally:
        server.kill()


# Commands


async def test_values_are_what_redis_py_sees(shared_redis: RedisServer) -> None:
    async with open_client(shared_redis.url) as client:
        with shared_redis.oracle() as oracle:
            assert await client.call("SET", "text", "grün") == b"OK"
            assert oracle.get("text") == "grün".encode()
            assert await client.call("RPUSH", b"list\0", 1, 2.5, b"\r\n") == oracle.llen(b"list\0") == 3
            assert await client.call("LRANGE", b"list\0", 0, -1) == oracle.lrange(b"list\0", 0, -1)
            assert await client.call("GET", "nothing") is None
            with pytest.raises(RedisError) as caught:
                await client.call("GET", b"list\0")
            assert caught.value.code == "WRONGTYPE"
            assert not caught.value.refused
            nested = await client.call("EVAL", "return {1, {'a', {err='MINE x'}}}", 0)
            assert nested[0] == 1
            assert nested[1][1].code == "MINE"


async def test_one_pass_is_one_write_and_replies_keep_order(shared_redis: RedisServer) -> None:
    async with running_proxy(shared_redis.port) as proxy, open_client(f"redis://127.0.0.1:{proxy.port}") as client:
        order: list[object] = []
        await client.call("DEL", "n")
        proxy.chunks.clear()
        replies = [client.send("INCR", "n") for _ in range(500)]
        assert client.pending == 500
        replies[0].when_settled(lambda reply: order.append(reply.outcome))
        replies[1].when_settled(lambda reply: order.append(reply.outcome))
        assert await replies[-1].wait() == 500
        assert [reply.result() for reply in replies] == list(range(1, 501))
        replies[2].when_settled(lambda reply: order.append(reply.outcome))
        assert order == [1, 2, 3]
        assert proxy.chunks == [500 * len(b"*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n")]
        assert client.pending == 0


async def test_scripts_survive_a_flush(shared_redis: RedisServer) -> None:
    async with open_client(shared_redis.url) as client:
        await client.call("DEL", "n")
        assert await client.call_script(INCREMENT, ["n"], [1]) == 1  # unknown to the server until now
        await client.call("SCRIPT", "FLUSH")
        replies = [client.send_script(INCREMENT, ["n"], [1]) for _ in range(100)]
        assert await replies[-1].wait() == 101
        assert [reply.result() for reply in replies] == list(range(2, 102))
        with pytest.raises(RedisError, match="not an integer"):
            await client.call_script(INCREMENT, ["n"], ["x"])


async def test_scripts_are_loaded_on_each_connection(server: RedisServer) -> None:
    async with witnessed(server.url) as witness:
        await witness.client.call_script(INCREMENT, ["n"], [1])
        server.kill()
        server.start()
        await until(lambda: len(witness.ups) == 2)
        assert await witness.client.call("SCRIPT", "EXISTS", INCREMENT.sha) == [1]


async def test_bounds(shared_redis: RedisServer) -> None:
    async with open_client(shared_redis.url, options=Options(max_commands=10, max_bytes=1000)) as client:
        replies = [client.send("ECHO", n) for n in range(10)]
        with pytest.raises(OverloadedError):
            client.send("ECHO", "one too many")
        assert await replies[-1].wait() == b"9"
        with pytest.raises(OverloadedError):
            client.send("ECHO", "x" * 1000)
        assert await client.call("ECHO", "still well") == b"still well"


async def test_a_cancelled_caller_leaves_the_pipeline_intact(shared_redis: RedisServer) -> None:
    async with running_proxy(shared_redis.port) as proxy, open_client(f"redis://127.0.0.1:{proxy.port}") as client:
        proxy.stop_passing()
        with trio.move_on_after(0.02) as scope:
            await client.call("SET", "cancelled", "yes")
        assert scope.cancelled_caught
        reply = client.send("GET", "cancelled")
        proxy.pass_again()
        assert await reply.wait() == b"yes"
        assert client.pending == 0


async def test_a_failing_callback_harms_nobody(shared_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[bytes] = []

    def hear(channel: bytes, payload: bytes) -> None:
        heard.append(payload)
        raise ValueError(payload)

    async with open_client(shared_redis.url, on_message=hear) as client:
        client.subscribe(["c"])
        await client.wait_subscribed(["c"])
        client.send("PUBLISH", "c", "1").when_settled(lambda reply: 1 / 0)
        await client.call("PUBLISH", "c", "2")
        await until(lambda: heard == [b"1", b"2"])
        assert client.away is None
    assert "ZeroDivisionError" in caplog.text


# Subscriptions


async def test_subscriptions(shared_redis: RedisServer) -> None:
    async with witnessed(shared_redis.url) as witness:
        client = witness.client
        names = [f"c{n}" for n in range(1200)]
        client.subscribe(names)
        await client.wait_subscribed(names)
        assert sum(map(len, witness.subscribed)) == 1200
        client.unsubscribe(names[1:])
        client.subscribe(["c1"])
        await client.wait_subscribed(["c1"])
        for n in range(100):
            client.send("PUBLISH", f"c{n % 3}", n)
        await until(lambda: len(witness.messages) == 67)
        assert witness.messages == [(b"c%d" % (n % 3), b"%d" % n) for n in range(100) if n % 3 < 2]
        client.unsubscribe(["c0", "c1"])
        with shared_redis.oracle() as oracle:
            await until(lambda: oracle.pubsub_channels() == [])
        assert client.subscribed == set()


async def test_a_subscriber_that_hears_nothing_stays_connected(shared_redis: RedisServer) -> None:
    async with witnessed(shared_redis.url, Options(ping_every_s=0.05, silence_s=1.0)) as witness:
        witness.client.subscribe(["quiet"])
        await witness.client.wait_subscribed(["quiet"])
        with shared_redis.oracle() as oracle:
            before = oracle.info("commandstats")["cmdstat_ping"]["calls"]
            await until(lambda: oracle.info("commandstats")["cmdstat_ping"]["calls"] >= before + 24)
        assert (len(witness.ups), witness.downs, witness.lost) == (1, [], [])


# What can befall a Redis


async def test_kill_and_restart(server: RedisServer) -> None:
    async with witnessed(server.url) as witness:
        client = witness.client
        client.subscribe(["news"])
        await client.wait_subscribed(["news"])
        assert await client.call("SET", "kept", 1) == b"OK"
        server.kill()
        await until(lambda: client.away and not client.subscribed)
        with pytest.raises(NotConnectedError):
            client.send("GET", "kept")
        with pytest.raises(NotConnectedError):
            await client.call("GET", "kept", patience=0.05)
        server.start()
        assert await client.call("GET", "kept", patience=PATIENCE_S) == b"1"
        await client.wait_subscribed(["news"])
        await client.call("PUBLISH", "news", "again")
        await until(lambda: witness.messages == [(b"news", b"again")])
        assert len(witness.ups) == 2
        assert (witness.ups[1].role, witness.ups[1].version[0] >= 6) == ("master", True)
        assert witness.lost == [frozenset({b"news"})]
        assert len(witness.downs) == 1


async def test_frozen(server: RedisServer) -> None:
    """Sent commands may have been executed, and here they were; it is noticed within 3 s, load or not."""
    async with witnessed(server.url) as witness:
        client = witness.client
        client.subscribe(["news"])
        await client.wait_subscribed(["news"])
        server.freeze()
        reply = client.send("SET", "doubt", 1)
        took = await until(lambda: client.away and not client.subscribed)
        assert took < 10  # on a machine that has other things to do
        assert isinstance(reply.outcome, ConnectionLostError)
        assert reply.outcome.sent
        assert "silent" in witness.downs[0]
        server.thaw()
        assert await client.call("GET", "doubt", patience=PATIENCE_S) == b"1"
        await client.wait_subscribed(["news"])


async def test_dead_link(server: RedisServer) -> None:
    options = Options(ping_every_s=0.2, silence_s=0.4, connect_timeout_s=0.3)
    async with (
        running_proxy(server.port) as proxy,
        witnessed(f"redis://127.0.0.1:{proxy.port}", options) as witness,
    ):
        proxy.stop_passing()
        await until(lambda: len(witness.downs) == 1)  # idle: the ping found out
        proxy.pass_again()
        await until(lambda: len(witness.ups) == 2)
        assert await witness.client.call("PING") == b"PONG"


async def test_unsent_commands_are_known_to_be(server: RedisServer) -> None:
    async with running_proxy(server.port) as proxy, open_client(f"redis://127.0.0.1:{proxy.port}") as client:
        sent = client.send("SET", "a", 1)
        await sent.wait()
        proxy.stop_passing()
        # More than the buffers of kernel and proxy take: the rest stays here.
        replies = [client.send("SET", f"k{n}", b"x" * 1_000_000) for n in range(30)]
        await until(lambda: proxy.chunks[-1] > 1000)
        proxy.cut()
        await until(lambda: all(reply.settled for reply in replies))
        outcomes = [reply.outcome for reply in replies]
        flags = [outcome.sent for outcome in outcomes if isinstance(outcome, ConnectionLostError)]
        assert len(flags) == 30
        assert flags[0]
        assert not flags[-1]
        assert flags == sorted(flags, reverse=True)
        with server.oracle() as oracle:
            assert not any(oracle.exists(f"k{n}") for n, was_sent in enumerate(flags) if not was_sent)


async def test_client_kill_under_load_loses_no_answer(server: RedisServer) -> None:
    async with witnessed(server.url) as witness:
        client = witness.client
        done = [0, 0]

        def count(reply: object) -> None:
            done[0] += 1

        async with trio.open_nursery() as nursery:

            async def load() -> None:
                while len(witness.ups) < 4:
                    try:
                        for _ in range(100):
                            client.send("INCR", "n").when_settled(count)
                            done[1] += 1
                    except NotConnectedError:
                        await client.wait_up()
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(load)
            with server.oracle() as oracle:
                for n in range(3):
                    await until(lambda n=n: len(witness.ups) == n + 1)  # type: ignore[misc]
                    oracle.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: done[0] == done[1])
        assert client.pending == 0


async def test_closing_fails_whoever_waits(shared_redis: RedisServer) -> None:
    async with running_proxy(shared_redis.port) as proxy:
        async with open_client(f"redis://127.0.0.1:{proxy.port}") as client:
            proxy.stop_passing()
            reply = client.send("GET", "a")
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionLostError, match="client was closed"):
            await reply.wait()
        with pytest.raises(NotConnectedError):
            client.send("GET", "a")


async def test_full_redis_is_an_answer(tmp_path: Path) -> None:
    with running_server(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as server:
        async with open_client(server.url) as client:
            replies = [client.send("SET", n, "x" * 100_000) for n in range(100)]
            with pytest.raises(RedisError) as caught:
                await replies[-1].wait()
            assert (caught.value.code, caught.value.refused) == ("OOM", True)
            assert client.away is None


async def test_nothing_is_left_behind(shared_redis: RedisServer) -> None:
    async with witnessed(shared_redis.url) as witness:
        client = witness.client
        for _ in range(3):
            client.subscribe(f"c{n}" for n in range(100))
            client.unsubscribe(f"c{n}" for n in range(100))
            await client.call("ECHO", "x" * 1000)
        link = client._subscription
        assert link is not None
        await until(lambda: not link._unanswered)
        assert (link.wanted, link._asked, link.confirmed, link._fresh, client.subscribed) == (set(),) * 5
        assert (client.pending, client._link._held) == (0, 0)
