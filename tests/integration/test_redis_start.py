"""A server whose Redis cannot be used ends soon, and says what to do without the password; else it may have to warn."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import trio

from server.app import StartError
from tests.pacing import for_a_while
from tests.redis_nodes import publish
from tests.redis_servers import (
    RedisServer,
    free_ports,
    make_server,
    running_cluster,
    running_proxy,
    running_sentinels,
    running_server,
)
from tests.support import PATIENCE_S, ROOT, command, server, stop, write_config

pytestmark = pytest.mark.slow

SECRET = "pa55 w/rd?#@:%"
IN_URL = quote(SECRET, safe="")


async def refused(directory: Path, url: str, *words: str) -> None:
    """Run the command; it must fail with one line that has these words, and without the secret."""
    serve = [sys.executable, "-m", "server", "serve", "--port", "0", "--store", url]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")}
    began = time.monotonic()
    with trio.move_on_after(PATIENCE_S):
        done = await trio.run_process(
            serve,
            cwd=directory,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    took = time.monotonic() - began
    assert took < 3 * PATIENCE_S, f"{url} goes on"
    said = done.stderr.decode()
    assert done.returncode not in (0, -9), said
    assert not done.stdout
    assert said.startswith("statuswire: store.url"), said
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said, f"{url}: {said}"
    for piece in (SECRET, IN_URL, "pa55", "w%2Frd"):
        assert piece not in said


async def all_refused(directory: Path, cases: list[tuple[str, ...]]) -> None:
    """At the same time, since most of it is waiting."""
    async with trio.open_nursery() as nursery:
        for url, *words in cases:
            nursery.start_soon(refused, directory, url, *words)


async def test_where_redis_is_not(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    unheard = trio.socket.socket()
    await unheard.bind(("127.0.0.1", 0))
    unheard.listen(1)
    mute = unheard.getsockname()[1]
    with unheard:
        await all_refused(
            tmp_path,
            [
                (
                    f"redis://:{IN_URL}@127.0.0.1:{port}",
                    f"127.0.0.1:{port} cannot be reached ([Errno 111]",
                    "is it running",
                ),
                (f"redis://:{IN_URL}@redis.invalid", "redis.invalid:6379 cannot be reached", "host and port"),
                (f"redis+cluster://:{IN_URL}@127.0.0.1:{port}", "cannot be reached", "is it running"),
                (f"redis+sentinel://:{IN_URL}@127.0.0.1:{port}/main", "cannot be reached", "is it running"),
                (f"redis://:{IN_URL}@127.0.0.1:{mute}", "did not answer within 2 s", "firewall"),
                # What the password was not encoded for cuts the URL in the wrong places.
                (f"redis://:{SECRET}@127.0.0.1:{port}", "percent-encoded"),
                (f"redis://user:pa55[@127.0.0.1:{port}", "percent-encoded"),
                (f"redis://user:pa55/w@127.0.0.1:{port}/0", "percent-encoded"),
                (f"redis://user:pa55\u2100@127.0.0.1:{port}/0", "percent-encoded"),
                (f"redis://user:{IN_URL}@127.0.0.1:{port}/zero", "number of a database"),
                (f"redis://user:{IN_URL}@127.0.0.1:6379x", "is not host or host:port"),
            ],
        )


async def test_who_may_not(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        with redis.oracle() as oracle:
            everything = {"enabled": True, "passwords": [f"+{SECRET}"], "categories": ["+@all"]}
            oracle.acl_setuser("clerk", **everything, keys=["*"], commands=["-evalsha", "-eval"])
            oracle.acl_setuser("guest", **everything, keys=["other:*"])
            oracle.acl_setuser("blind", **everything, keys=["*"], commands=["-info"])
            oracle.config_set("requirepass", SECRET)
        at = f"127.0.0.1:{redis.port}"
        await all_refused(
            tmp_path,
            [
                (f"redis://{at}", "asks for a password", "redis://user:password@host"),
                (f"redis://:{IN_URL}x@{at}", "refuses the default user", "correct the URL"),
                (f"redis://nobody:{IN_URL}@{at}", "refuses user 'nobody'", "correct the URL"),
                (f"redis://blind:{IN_URL}@{at}", "ACL SETUSER blind +info"),
                (f"redis://clerk:{IN_URL}@{at}", "NOPERM", "ACL SETUSER clerk ", "~{statuswire}:*"),
                (f"redis://guest:{IN_URL}@{at}", "ACL SETUSER guest ", "~{statuswire}:*"),
                (f"redis://:{IN_URL}@{at}/99", "no database 99", "lower number"),
                (f"redis+cluster://:{IN_URL}@{at}", "not part of a cluster", "use redis://"),
                (f"redis+sentinel://{at}/main?sentinel_password={IN_URL}", "not a sentinel", "use redis://"),
            ],
        )


async def test_what_cannot_be_used(tmp_path: Path) -> None:
    with (
        running_server(tmp_path) as redis,
        running_server(tmp_path, "--replicaof", "127.0.0.1", str(redis.port)) as replica,
        running_server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_ports(1)[0])) as alone,
    ):
        async with running_proxy(redis.port) as old, running_proxy(alone.port) as old_cluster:
            old.replace = old_cluster.replace = (b"redis_version:7", b"redis_version:6")
            old.replace = (b"redis_version:7.0", b"redis_version:6.0")
            await all_refused(
                tmp_path,
                [
                    (f"redis://127.0.0.1:{old.port}", "is version 6.0", "6.2 or newer is needed"),
                    (f"redis+cluster://127.0.0.1:{old_cluster.port}", "is version 6.", "7.0 or newer is needed"),
                    (replica.url, f"is a replica of 127.0.0.1:{redis.port}", "put its master into the URL"),
                    (alone.url, "part of a cluster", "use redis+cluster://"),
                    (f"redis+cluster://127.0.0.1:{alone.port}", "has no slots", "redis-cli --cluster create"),
                ],
            )


async def test_sentinels_and_clusters(tmp_path: Path) -> None:
    with running_sentinels(tmp_path, count=1) as sentinels, running_cluster(tmp_path) as cluster:
        await all_refused(
            tmp_path,
            [
                (sentinels.url.replace("/main", "/other"), "knows no master 'other'"),
                (sentinels.sentinels[0].url, "is a sentinel", "use redis+sentinel://"),
                (sentinels.servers[0].url.replace("redis:", "redis+cluster:"), "not part of a cluster"),
                (cluster.masters[0].url, "part of a cluster", "use redis+cluster://"),
            ],
        )


async def test_a_redis_that_is_loading(tmp_path: Path) -> None:
    redis = make_server(tmp_path, "--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    try:
        redis.start()
        with redis.oracle() as oracle:
            pipeline = oracle.pipeline()
            for number in range(1000):
                pipeline.set(f"key-{number}", "x" * 200)
            pipeline.execute()
            oracle.save()
        redis.kill()
        redis.start(wait=False)  # for 20 seconds
        await refused(tmp_path, redis.url, "still loading", "wait until it is done")
    finally:
        redis.kill()


async def test_a_redis_that_comes_soon_is_waited_for(tmp_path: Path) -> None:
    redis = make_server(tmp_path)
    write_config(tmp_path, {"store": {"url": redis.url}})
    process = command(tmp_path)
    try:
        await for_a_while(1)  # it may be looking already
        redis.start()
        assert process.stdout is not None
        line = await trio.to_thread.run_sync(process.stdout.readline)
        assert b"http://" in line, (tmp_path / "server.log").read_text()
    finally:
        stop(process)
        redis.kill()


async def test_start_errors_say_what_to_do(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        with redis.oracle() as oracle:
            oracle.config_set("requirepass", "secret")
        redis.password = "secret"
        for url, words in [
            (redis.url, "password"),
            (f"redis://:wrong@127.0.0.1:{redis.port}", "password"),
            (f"redis://:secret@127.0.0.1:{redis.port}/99", "database"),
        ]:
            with pytest.raises(StartError, match=words):
                async with server(store={"url": url}):
                    pass
        with redis.oracle() as oracle:
            oracle.hset("{statuswire}:meta", mapping={"epoch": "e", "schema": 99, "shards": 16, "offset": 0, "at": 0})
        with pytest.raises(StartError, match="format 99"):
            async with server(store={"url": f"redis://:secret@127.0.0.1:{redis.port}"}):
                pass


async def test_a_redis_that_drops_keys_is_warned_of(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with redis.oracle() as oracle:
        oracle.config_set("maxmemory-policy", "allkeys-lru")
        async with server(store={"url": redis.url}) as one:
            await publish(one, "a", userId="u")
            assert "noeviction" not in caplog.text  # without a bound it drops nothing
        oracle.config_set("maxmemory", "1gb")
        async with server(store={"url": redis.url}) as one:
            await publish(one, "a", userId="u")
            assert "set its maxmemory-policy to noeviction" in caplog.text
