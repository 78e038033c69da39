"""A server with a spool: what is published while Redis is away is kept, and passed on once and in order."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from server.app import StartError
from server.brokers import redis_publisher
from server.brokers.spool_file import SpoolFile, left_by_others
from server.brokers.spooling import SpoolingBroker
from tests.pacing import for_a_while
from tests.redis_servers import Proxy, RedisServer, running_proxy, running_server
from tests.streams import session
from tests.support import PATIENCE_S, InProcess, request_bytes, server, spawned, until, until_answered

pytestmark = pytest.mark.slow

NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


@asynccontextmanager
async def spooling(url: str, directory: Path, **store: Any) -> AsyncIterator[InProcess]:
    table = {"url": url, "spool": True, "spool_path": str(directory / "spool"), **store}
    async with server(store=table) as running:
        yield running


def spool_of(at: InProcess) -> SpoolingBroker:
    spool = at.node.spool
    assert spool is not None
    return spool


async def outage(at: InProcess, proxy: Proxy) -> None:
    """From now on Redis cannot be reached, and the server knows."""
    proxy.stop_passing()
    proxy.cut()
    await until_answered(at, "/ready", 503)


async def passed_on(at: InProcess) -> None:
    await until(lambda: spool_of(at).pending == 0 and at.node.broker.available is None)


async def messages(at: InProcess, job_id: str) -> list[str]:
    """What was said of a job, version by version."""
    answer = await at.get(f"/api/v2/jobs/{job_id}/history")
    assert answer.status == 200, answer
    updates = answer.json["updates"]
    assert [update["version"] for update in updates] == list(range(1, len(updates) + 1))
    return [update["message"] for update in updates]


async def test_everything_published_meanwhile_is_kept_and_passed_on_in_order(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        spooling(f"redis://127.0.0.1:{proxy.port}", tmp_path) as at,
        session(at) as ws,
    ):
        await at.publish("a", userId="u", message="before")
        before = at.node.history.last
        await outage(at, proxy)

        single = await at.post("/api/v2/jobs/a/updates", {"message": "single"})
        assert (single.status, single.json) == (202, {"spooled": True, "jobId": "a"})
        assert single.headers["location"] == "/api/v2/jobs/a"
        made = await at.post("/api/v2/jobs", {"jobId": "b", "userId": "u", "message": "made"})
        assert (made.status, made.json) == (202, {"spooled": True, "jobId": "b"})
        unnamed = await at.post("/api/v2/jobs", {"userId": "u", "message": "unnamed"})
        assert unnamed.status == 202
        keyed = [
            await at.post("/api/v2/jobs", {"userId": "u", "message": "keyed"}, {"Idempotency-Key": "k"})
            for _ in range(2)
        ]
        assert keyed[0].json == keyed[1].json
        array = await at.post(
            "/api/v2/updates",
            [{"jobId": "a", "message": "array"}, {"jobId": "a", "nonsense": 1}, {"jobId": "b", "message": "array"}],
            {"Idempotency-Key": "batch"},
        )
        assert array.status == 202
        assert (array.json["spooled"], array.json["accepted"], array.json["duplicates"]) == (True, 2, 0)
        assert [(line["index"], line["code"]) for line in array.json["rejected"]] == [(1, "unknown_field")]
        lines = b'{"jobId":"a","message":"line"}\n{"jobId":"b","message":"line"}\n{"message":"whose?"}\n'
        ndjson = await at.post("/api/v2/updates", lines, NDJSON)
        assert (ndjson.status, ndjson.json["spooled"], ndjson.json["accepted"]) == (202, True, 2)
        assert [line["index"] for line in ndjson.json["rejected"]] == [2]
        told = await ws.ask("publish", ref=7, updates=[{"jobId": "a", "message": "socket"}])
        assert (told["type"], told["ref"], told["spooled"], told["accepted"]) == ("published", 7, True, 1)

        task = await at.post("/api/brand-monitor/progress/t", {"userId": "u", "stage": "s", "message": "task"})
        assert (task.status, task.json) == (202, {"spooled": True, "jobId": "t"})
        told = await at.ask("PATCH", "/api/brand-monitor/progress/t", {"message": "patched"})
        assert (told.status, told.json) == (202, {"spooled": True, "jobId": "t"})

        # What can be said at once is, and what cannot wait is not taken.
        assert (await at.post("/api/v2/jobs/a/updates", {"progress": 101})).status == 422
        assert (await at.post("/api/v2/jobs/a/updates", {"jobId": "c"})).status == 422
        assert (await at.post("/api/v2/jobs/b%20c/updates", {"message": "x"})).status == 400
        for refused in (
            await at.ask("DELETE", "/api/v2/jobs/a"),
            await at.ask("POST", "/api/v2/jobs/a/cancel", {}),
        ):
            assert (refused.status, refused.error) == (503, "store_unavailable")
            assert int(refused.headers["retry-after"]) > 0
        # Nothing is shown that Redis does not have.
        assert (await at.get("/api/v2/jobs/a")).status in (200, 503)
        assert at.node.history.last == before
        spool = spool_of(at)
        assert (spool.pending, spool.spooled, spool.replayed) == (13, 13, 0)
        assert spool.bytes > 0

        proxy.pass_again()
        await passed_on(at)
        assert await messages(at, "a") == ["before", "single", "array", "line", "socket"]
        assert await messages(at, "b") == ["made", "array", "line"]
        assert await messages(at, unnamed.json["jobId"]) == ["unnamed"]
        assert await messages(at, "t") == ["task", "patched"]
        assert (await at.get("/api/v2/jobs/t")).json["kind"] == "brand-monitor"
        assert await messages(at, keyed[0].json["jobId"]) == ["keyed"]
        assert (spool.replayed, spool.rejected, spool.bytes) == (13, 0, 0)
        again = await at.publish("a", message="after")
        assert again.json["version"] == 6
        # A repeated key finds what was passed on under it.
        repeated = await at.post("/api/v2/jobs", {"userId": "u", "message": "keyed"}, {"Idempotency-Key": "k"})
        assert (repeated.status, repeated.json["duplicate"]) == (200, True)
        assert repeated.json["job"]["jobId"] == keyed[0].json["jobId"]
        other = await at.post("/api/v2/updates", [{"jobId": "a"}], {"Idempotency-Key": "batch"})
        assert (other.status, other.error) == (422, "idempotency_key_reused")


async def test_a_refusal_is_dropped_and_counted(
    redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        spooling(f"redis://127.0.0.1:{proxy.port}", tmp_path) as at,
    ):
        await at.publish("ended", userId="u", status="completed", message="end")
        await outage(at, proxy)
        for job_id, fields in (
            ("ended", {"message": "too late"}),
            ("missing", {"message": "whose?"}),
            ("new", {"userId": "u", "message": "fine"}),
        ):
            assert (await at.post(f"/api/v2/jobs/{job_id}/updates", fields)).status == 202
        assert (await at.post("/api/v2/jobs", {"jobId": "ended"})).status == 202
        proxy.pass_again()
        await passed_on(at)
        assert await messages(at, "new") == ["fine"]
        assert await messages(at, "ended") == ["end"]
        spool = spool_of(at)
        assert (spool.replayed, spool.rejected) == (1, 3)
        for code in ("job_ended", "job_not_found", "job_exists"):
            assert code in caplog.text


async def test_a_spool_that_is_full_refuses(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        spooling(f"redis://127.0.0.1:{proxy.port}", tmp_path, spool_max_bytes=1000) as at,
    ):
        await at.publish("a", userId="u", message="0")
        await outage(at, proxy)
        kept = 0
        while (answer := await at.post("/api/v2/jobs/a/updates", {"message": f"{kept + 1}"})).status == 202:
            kept += 1
        assert (answer.status, answer.error) == (503, "store_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert kept > 2
        lines = [{"jobId": "a", "message": "m" * 1000}, {"jobId": "a", "message": "m" * 1000}]
        batch = await at.post("/api/v2/updates", lines)
        assert (batch.status, batch.error) == (503, "store_unavailable")
        proxy.pass_again()
        await passed_on(at)
        assert await messages(at, "a") == [str(number) for number in range(kept + 1)]


async def test_a_redis_that_is_full(redis: RedisServer, tmp_path: Path) -> None:
    async with spooling(redis.url, tmp_path) as at:
        await at.publish("a", userId="u", message="0")
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", 1)
            for number in range(1, 4):
                answer = await at.post("/api/v2/jobs/a/updates", {"message": str(number)})
                assert answer.status == 202
            assert (await at.get("/ready")).status == 503
            oracle.config_set("maxmemory", 0)
        await passed_on(at)
        assert await messages(at, "a") == ["0", "1", "2", "3"]
        await until_answered(at, "/ready", 200)
        assert (await at.publish("a", message="4")).json["version"] == 5


async def test_killed_after_the_answer(redis: RedisServer, tmp_path: Path) -> None:
    store = {"url": redis.url, "spool": True}
    async with spawned(tmp_path, store=store) as at:
        await at.publish("a", userId="u", message="0")
        redis.kill()
        await until_answered(at, "/ready", 503)
        for number in range(1, 6):
            assert (await at.post("/api/v2/jobs/a/updates", {"message": str(number)})).status == 202
        at.signal(signal.SIGKILL)
        await at.exit_status()
    await trio.to_thread.run_sync(redis.start)
    async with spawned(tmp_path, store=store) as at:
        await at.logged("all that waited for Redis has been passed on")
        history = (await at.get("/api/v2/jobs/a/history")).json["updates"]
        assert [update["message"] for update in history] == ["0", "1", "2", "3", "4", "5"]


async def test_what_waits_in_files_of_fewer_workers_is_passed_on(redis: RedisServer, tmp_path: Path) -> None:
    """Answered by the third of some workers; after that there are none, or fewer."""
    async with running_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        for path in ("spool.3", "spool.12"):
            async with spooling(url, tmp_path, spool_path=str(tmp_path / path)) as at:
                await at.publish(path, userId="u", message="0")
                await outage(at, proxy)
                for number in range(1, 4):
                    await at.post(f"/api/v2/jobs/{path}/updates", {"message": str(number)})
            proxy.pass_again()
        shutil.copy(tmp_path / "spool.3", tmp_path / "spool.4")  # as if it had been cut off half-way
        (tmp_path / "spool.5").write_text("no database")
        (tmp_path / "spool.old").write_text("not ours")
        async with spooling(url, tmp_path) as at:
            await passed_on(at)
            assert spool_of(at).replayed == 9
            for path in ("spool.3", "spool.12"):
                assert await messages(at, path) == ["0", "1", "2", "3"]
    base = str(tmp_path / "spool")
    assert left_by_others(base, None, 1) == [f"{base}.{number}" for number in (12, 3, 4, 5)]
    assert left_by_others(base, 1, 4) == [base, f"{base}.12", f"{base}.5"]
    assert left_by_others(base, 2, 4) == []
    assert left_by_others(str(tmp_path / "nowhere" / "spool"), 1, 4) == []


async def test_what_is_taken_over_half_way_is_in_nobodys_way(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with spooling(url, tmp_path, spool_path=str(tmp_path / "spool.3")) as at:
            await at.publish("a", userId="u", message="0")
            await outage(at, proxy)
            for number in range(1, 4):
                await at.post("/api/v2/jobs/a/updates", {"message": str(number)})
        proxy.pass_again()
        remove = SpoolFile.remove

        def cannot(file: SpoolFile, numbers: Sequence[int]) -> None:
            if file.path.endswith(".3"):
                raise sqlite3.OperationalError("disk I/O error")
            remove(file, numbers)

        monkeypatch.setattr(SpoolFile, "remove", cannot)
        async with spooling(url, tmp_path) as at:
            await passed_on(at)
            await outage(at, proxy)
            waits = await at.post("/api/v2/jobs/a/updates", {"message": "4"})
            assert waits.status == 202, waits
            proxy.pass_again()
            await passed_on(at)
            assert await messages(at, "a") == ["0", "1", "2", "3", "4"]


async def test_killed_half_way_through_passing_on(redis: RedisServer, tmp_path: Path) -> None:
    """The same entries again: what Redis has of them counts once."""
    copy = tmp_path / "copy"
    async with running_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with spooling(url, tmp_path) as at:
            await at.publish("a", userId="u", message="0")
            await outage(at, proxy)
            for number in range(1, 6):
                await at.post("/api/v2/jobs/a/updates", {"message": str(number)})
            await at.post("/api/v2/jobs", {"userId": "u", "message": "made"})
        shutil.copy(tmp_path / "spool", copy)  # closed: all of it is in the one file
        proxy.pass_again()
        async with spooling(url, tmp_path) as at:
            await passed_on(at)
            assert spool_of(at).replayed == 6
        shutil.copy(copy, tmp_path / "spool")
        async with spooling(url, tmp_path) as at:
            await passed_on(at)
            spool = spool_of(at)
            assert (spool.replayed, spool.rejected) == (6, 0)
            assert await messages(at, "a") == ["0", "1", "2", "3", "4", "5"]
            assert len((await at.get("/api/v2/jobs")).json["jobs"]) == 2
    with redis.oracle() as oracle:
        assert max(oracle.pttl(key) for key in oracle.keys("{statuswire}:key:*")) > 3_600_000


async def test_what_comes_while_others_wait_stays_behind_them(redis: RedisServer, tmp_path: Path) -> None:
    """With Redis back, and at the start: what an earlier process left comes first."""
    async with running_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        number = 1

        async def publish_some(at: InProcess) -> None:
            nonlocal number
            lines = b"".join(b'{"jobId":"a","message":"%d"}\n' % n for n in range(number, number + 500))
            number += 500
            assert (await at.post("/api/v2/updates", lines, NDJSON)).status == 202

        async def publish_until_taken(at: InProcess) -> None:
            nonlocal number
            status = 202
            while status == 202:
                answer = await at.post("/api/v2/jobs/a/updates", {"message": str(number)})
                status = answer.status
                number += 1
            assert status == 200

        async with spooling(url, tmp_path) as at:
            await at.publish("a", userId="u", message="0")
            await outage(at, proxy)
            await publish_some(at)
            proxy.pass_again()
            await publish_until_taken(at)
            await outage(at, proxy)
            await publish_some(at)
        proxy.pass_again()
        async with spooling(url, tmp_path) as at:
            await publish_until_taken(at)
            await passed_on(at)
            assert await messages(at, "a") == [str(n) for n in range(number)]


async def test_a_part_waits_for_its_parent(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        spooling(f"redis://127.0.0.1:{proxy.port}", tmp_path) as at,
    ):
        await at.publish("x", userId="u")
        await outage(at, proxy)
        await at.post("/api/v2/jobs", {"jobId": "p", "userId": "u", "autoComplete": True})
        for part in ("p1", "p2"):
            await at.post("/api/v2/jobs", {"jobId": part, "userId": "u", "parentId": "p"})
        for part in ("p1", "p2"):
            await at.post(f"/api/v2/jobs/{part}/updates", {"status": "completed"})
        proxy.pass_again()
        await passed_on(at)
        parent = (await at.get("/api/v2/jobs/p")).json
        assert (parent["status"], parent["steps"]) == ("completed", {"done": 2, "total": 2, "failed": 0})


async def test_any_outage_keeps_order_and_counts_once(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers publish as fast as they are answered, over HTTP and WebSocket, while all kinds of things befall Redis."""
    monkeypatch.setattr(redis_publisher, "PATIENCE_S", 0.3)  # so that many are given up with their outcome unknown
    dice = random.Random(7)
    statuses: set[int] = set()
    sent: dict[str, int] = {}
    stopping = trio.Event()

    async def one_by_one(at: InProcess, job_id: str) -> None:
        async with at.connect() as http:
            while not stopping.is_set():
                body = {"userId": "u", "message": str(sent[job_id])}
                answer = await http.request("POST", f"/api/v2/jobs/{job_id}/updates", body=body)
                assert answer.status in (200, 202), answer
                statuses.add(answer.status)
                sent[job_id] += 1

    async def pipelined(at: InProcess, job_id: str) -> None:
        """Several updates are under way at once, and still in order."""
        async with at.connect() as http:
            while not stopping.is_set():
                lines = b"".join(
                    json.dumps({"jobId": job_id, "userId": "u", "message": str(sent[job_id] + n)}).encode() + b"\n"
                    for n in range(7)
                )
                await http.send(request_bytes("POST", "/api/v2/updates", body=lines, headers=NDJSON))
                answer = await http.answer()
                assert answer.json["accepted"] == 7, answer
                statuses.add(answer.status)
                sent[job_id] += 7

    with trio.fail_after(PATIENCE_S * 2):
        async with (
            running_proxy(redis.port) as proxy,
            spooling(f"redis://127.0.0.1:{proxy.port}", tmp_path) as at,
        ):
            spool = spool_of(at)
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    job_id = f"job-{number}"
                    sent[job_id] = 0
                    nursery.start_soon(pipelined if number % 2 else one_by_one, at, job_id)
                for _ in range(12):
                    goal = sum(sent.values()) + 100
                    await until(lambda goal=goal: sum(sent.values()) >= goal)  # type: ignore[misc]
                    match dice.choice(("cut", "mute", "kill", "full")):
                        case "cut":
                            proxy.cut()
                        case "mute":
                            proxy.stop_passing()
                            await for_a_while(dice.uniform(0, 1))
                            proxy.cut()
                            await for_a_while(dice.uniform(0, 1))
                            proxy.pass_again()
                        case "full":
                            with redis.oracle() as oracle:
                                for _ in range(5):
                                    oracle.config_set("maxmemory", 1)
                                    await for_a_while(dice.uniform(0, 0.05))
                                    oracle.config_set("maxmemory", 0)
                                    await for_a_while(dice.uniform(0, 0.05))
                        case "kill":
                            redis.kill()
                            await for_a_while(dice.uniform(0, 1))
                            await trio.to_thread.run_sync(redis.start)
                stopping.set()
            await passed_on(at)
            for job_id, count in sent.items():
                assert await messages(at, job_id) == [str(number) for number in range(count)], job_id
            assert statuses == {200, 202}
            assert spool.rejected == 0


# Files that cannot be used


async def test_one_file_belongs_to_one_server(redis: RedisServer, tmp_path: Path) -> None:
    async with spooling(redis.url, tmp_path):
        with pytest.raises(StartError, match=r"store\.spool_path: .* is in use by another server"):
            async with spooling(redis.url, tmp_path):
                pass  # pragma: no cover


async def test_damaged_and_foreign_files(redis: RedisServer, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.write_bytes(b"no database, for sure" * 1000)
    with pytest.raises(StartError, match=r"store\.spool_path: .* is damaged or no database .* move the file away"):
        async with spooling(redis.url, tmp_path):
            pass  # pragma: no cover
    assert spool.read_bytes().startswith(b"no database")
    spool.unlink()
    with sqlite3.connect(spool) as db:
        db.execute("CREATE TABLE foreign_things (x)")
    db.close()
    with pytest.raises(StartError, match="a database of another kind"):
        async with spooling(redis.url, tmp_path):
            pass  # pragma: no cover
    with pytest.raises(StartError, match="does not exist; create it"):
        async with spooling(redis.url, tmp_path / "nowhere"):
            pass  # pragma: no cover


async def test_an_entry_that_cannot_be_read_is_dropped(redis: RedisServer, tmp_path: Path) -> None:
    async with running_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with spooling(url, tmp_path) as at:
            await at.publish("a", userId="u", message="0")
            await outage(at, proxy)
            for number in (1, 2, 3):
                await at.post("/api/v2/jobs/a/updates", {"message": str(number)})
        with sqlite3.connect(tmp_path / "spool") as db:
            (first,) = db.execute("SELECT min(seq) FROM waiting").fetchone()
            db.execute("UPDATE waiting SET data = x'c1' WHERE seq = ?", (first,))
            db.execute(
                "UPDATE waiting SET data = x'99a1ffa36d6179a177a16ba0c4027b7dc400c0c0' WHERE seq = ?", (first + 1,)
            )
        db.close()
        proxy.pass_again()
        async with spooling(url, tmp_path) as at:
            await passed_on(at)
            assert (spool_of(at).replayed, spool_of(at).rejected) == (1, 2)
            assert await messages(at, "a") == ["0", "3"]
