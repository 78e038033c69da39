"""Real Dramatiq, Huey, Taskiq and arq on a real Redis: their hooks tell this server what becomes of jobs."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.integration.processes import Start, processes
from tests.redis_servers import RedisServer
from tests.support import ADMIN, AUTH, ROOT, InProcess, bearer, server, token, until_so

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "hooks"
LONG_S = 90.0
ARQ = "arq>=0.26"


@pytest.fixture(scope="session")
def arq() -> Path:
    """Where arq is, with the redis-py that it wants."""
    place = Path(sys.prefix) / "arq"
    place.mkdir(exist_ok=True)
    done = place / "installed.txt"
    with (place / "busy").open("w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)  # tests run side by side
        if not done.is_file() or done.read_text() != ARQ:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(place), ARQ]
            subprocess.run(command, check=True, timeout=300)
            done.write_text(ARQ)
    return place


@contextmanager
def workers(tmp_path: Path, redis: RedisServer, url: str, *packages: Path) -> Iterator[Start]:
    """Start programs of Python that find queue and server."""
    with processes(
        tmp_path,
        piped=True,
        grace_s=15.0,
        PYTHONPATH=":".join(map(str, (*packages, HERE, ROOT))),
        QUEUE_URL=f"{redis.url}/0",
        STATUSWIRE_URL=url,
        STATUSWIRE_TOKEN=token("worker", capabilities=["publish"]),
        STATUSWIRE_SPOOL_DIR=str(tmp_path / "spool"),
    ) as start:
        yield partial(start, sys.executable)


async def sent(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """The ids that a sender has printed."""
    out, _ = await trio.to_thread.run_sync(process.communicate)
    assert process.returncode == 0
    return dict(line.split() for line in out.decode().splitlines())


async def record(at: InProcess, job_id: str) -> dict[str, Any]:
    answer = await at.get(f"/api/v2/jobs/{job_id}", ADMIN)
    found: dict[str, Any] = answer.json if answer.status == 200 else {}
    return found


async def until_status(at: InProcess, job_id: str, *statuses: str) -> dict[str, Any]:
    """Wait until a job has one of these statuses; its record then."""
    found: dict[str, Any] = {}

    async def has_one() -> bool:
        nonlocal found
        found = await record(at, job_id)
        return found.get("status") in statuses

    with suppress(trio.TooSlowError):
        await until_so(has_one, within=LONG_S)
    assert found.get("status") in statuses, found
    return found


async def steps(at: InProcess, job_id: str) -> list[tuple[int, str]]:
    """Attempts and statuses that a job went through."""
    answer = await at.get(f"/api/v2/jobs/{job_id}/history", ADMIN)
    found: list[tuple[int, str]] = []
    for update in answer.json["updates"]:
        step = (update["attempt"], update["status"])
        if not found or found[-1] != step:
            found.append(step)
    return found


def in_order(found: list[tuple[int, str]]) -> bool:
    order = ("queued", "processing", "completed", "failed", "cancelled")
    return found == sorted(found, key=lambda step: (step[0], order.index(step[1])))


async def check_common(at: InProcess, ids: dict[str, str], source: str) -> None:
    """What is the same whatever the queue."""
    for user in ("alice", "bob"):
        for name in ("ok", "bad", "flaky", "asked"):
            assert (await record(at, ids[f"{name}-{user}"])).get("status"), "it is queued or more"
        done = await until_status(at, ids[f"ok-{user}"], "completed")
        assert (done["message"], done["stage"], done["result"]) == ("half of it", "first", {"rows": 5})
        assert (done["attempt"], done["kind"], done["userId"]) == (1, "ok", user)
        assert done["metadata"]["source"] == source
        went_wrong = await until_status(at, ids[f"bad-{user}"], "failed")
        assert (went_wrong["error"], went_wrong["attempt"]) == ("ValueError: bad went wrong", 1)
        again = await until_status(at, ids[f"flaky-{user}"], "completed")
        assert again["attempt"] == 2
        assert "message" not in again
        for name in ("ok", "bad", "flaky"):
            assert in_order(await steps(at, ids[f"{name}-{user}"])), name
        assert {attempt for attempt, _ in await steps(at, ids[f"flaky-{user}"])} == {1, 2}
        await until_status(at, ids[f"asked-{user}"], "processing")
        cancelled = await at.post(f"/api/v2/jobs/{ids[f'asked-{user}']}/cancel", {}, bearer(user))
        assert cancelled.status == 202
        stopped = await until_status(at, ids[f"asked-{user}"], "cancelled")
        assert "error" not in stopped
    nobodys = await until_status(at, ids["nobodys"], "completed")
    assert nobodys["userId"] == f"queue:{source}"
    answer = await at.get("/api/v2/jobs?limit=1000", ADMIN)
    everything = answer.body.decode()
    for secret in ("not for everybody", "Traceback", ".py"):
        assert secret not in everything
    for user in ("alice", "bob"):
        mine = (await at.get("/api/v2/jobs?limit=1000", bearer(user))).json["jobs"]
        assert {job["jobId"] for job in mine} == {
            name for label, name in ids.items() if label.endswith(f"-{user}") and await record(at, name)
        }


async def test_dramatiq(redis: RedisServer, tmp_path: Path) -> None:
    async with server(auth=AUTH) as at:
        with workers(tmp_path, redis, at.url) as start:
            ids = await sent(start(str(HERE / "dramatiq_jobs.py")))
            assert (await record(at, ids["ok-alice"]))["status"] == "queued"
            work = ("-m", "dramatiq", "dramatiq_jobs", "--processes", "1")
            start(*work, "--threads", "4", "--queues", "default")
            start(*work, "--threads", "1", "--queues", "fragile")
            await check_common(at, ids, "dramatiq")
            for user in ("alice", "bob"):
                assert (await until_status(at, ids[f"revoked-{user}"], "cancelled"))["message"] == "skipped"
            # Another worker gets what the dead one had, and nobody counts that.
            start(*work, "--threads", "1", "--queues", "fragile")
            found = await until_status(at, ids["die-alice"], "completed")
            assert found["attempt"] in (1, 2)


async def test_huey(redis: RedisServer, tmp_path: Path) -> None:
    async with server(auth=AUTH) as at:
        with workers(tmp_path, redis, at.url) as start:
            ids = await sent(start(str(HERE / "huey_jobs.py")))
            assert (await record(at, ids["ok-alice"]))["status"] == "queued"
            work = ("-m", "huey.bin.huey_consumer")
            start(*work, "huey_jobs.huey", "-w", "4", "-d", "0.02", "-m", "0.05")
            fragile = start(*work, "huey_jobs.fragile", "-d", "0.02", "-m", "0.05")
            await check_common(at, ids, "huey")
            for user in ("alice", "bob"):
                assert (await until_status(at, ids[f"revoked-{user}"], "cancelled"))["message"] == "revoked"
            stalled = await until_status(at, ids["die-alice"], "stalled", "failed")
            assert stalled["progress"] == 30
            assert (await until_status(at, ids["die-alice"], "failed"))["error"] == "lost"
            assert await trio.to_thread.run_sync(fragile.wait) == -signal.SIGKILL


async def test_taskiq(redis: RedisServer, tmp_path: Path) -> None:
    async with server(auth=AUTH) as at:
        with workers(tmp_path, redis, at.url) as start:
            ids = await sent(start(str(HERE / "taskiq_jobs.py")))
            assert (await record(at, ids["ok-alice"]))["status"] == "queued"
            work = ("-m", "taskiq", "worker", "taskiq_jobs:broker", "--workers", "1")
            start(*work)
            fragile = start(*work, QUEUE="fragile")
            await check_common(at, ids, "taskiq")
            for user in ("alice", "bob"):
                assert (await until_status(at, ids[f"revoked-{user}"], "failed"))["error"] == "TimeoutError"
            assert fragile.poll() is None
            assert (await until_status(at, ids["die-alice"], "failed"))["error"] == "lost"


async def test_arq(redis: RedisServer, tmp_path: Path, arq: Path) -> None:
    async with server(auth=AUTH) as at:
        with workers(tmp_path, redis, at.url, arq) as start:
            ids = await sent(start(str(HERE / "arq_jobs.py"), "send"))
            assert (await record(at, ids["ok-alice"]))["status"] == "queued"
            start("-m", "arq", "arq_jobs.WorkerSettings")
            fragile = start("-m", "arq", "arq_jobs.Fragile")
            await until_status(at, ids["revoked-bob"], "processing")
            abort = start(str(HERE / "arq_jobs.py"), "abort", ids["revoked-bob"])
            await check_common(at, ids, "arq")
            await trio.to_thread.run_sync(abort.wait)
            for user in ("alice", "bob"):
                found = await until_status(at, ids[f"revoked-{user}"], "cancelled")
                assert found["message"] == "aborted", json.dumps(found)
                found = await until_status(at, ids[f"late-{user}"], "failed")
                assert found["error"] == "TimeoutError"
                found = await until_status(at, ids[f"hopeless-{user}"], "failed")
                assert found["error"] == "JobExecutionFailed: max 2 retries exceeded"
                assert found["attempt"] == 3
            # Another worker gets what the dead one had, once the time for that is over.
            await trio.to_thread.run_sync(fragile.wait)
            with redis.oracle() as oracle:
                assert oracle.delete(f"arq:in-progress:{ids['die-alice']}") == 1
            start("-m", "arq", "arq_jobs.Fragile")
            assert (await until_status(at, ids["die-alice"], "completed"))["attempt"] == 2
