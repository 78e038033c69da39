"""Real BullMQ, Bull, Celery and RQ on a real Redis: what their workers do ends right here, for its owner alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.queueing import until_up
from tests.redis_servers import RedisServer, running_server
from tests.support import ADMIN, AUTH, Address, bearer, server, spawned

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "queues"
LONG_S = 40.0
COUNTS = {"ok": 20, "bad": 12, "flaky": 14, "removed": 4, "die": 2}
TOTAL = sum(COUNTS.values())


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    with running_server(directory, "--notify-keyspace-events", "Kgh") as running:
        yield running


@pytest.fixture(scope="session")
def modules() -> Path:
    """Where BullMQ and Bull are, installed as the lock file says."""
    place = Path(sys.prefix) / "queues"
    place.mkdir(exist_ok=True)
    lock = (HERE / "package-lock.json").read_bytes()
    done = place / "installed-lock.json"
    with (place / "busy").open("w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)  # tests run side by side
        if done.is_file() and done.read_bytes() == lock:
            return place / "node_modules"
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, place)
        # Not `npm ci`: it wants native variants for all systems in the lock file, of what is not even installed.
        command = ["npm", "install", "--no-save", "--omit=optional", "--silent", "--no-audit", "--ignore-scripts"]
        subprocess.run(command, cwd=place, check=True, timeout=300)
        done.write_bytes(lock)
    return place / "node_modules"


@contextmanager
def processes(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start processes; they end with the block, and with this one. What they say is in ``workers.log``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "workers.log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=os.environ | {"PYTHONPATH": str(HERE)} | environment,
                cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def records(at: Address) -> dict[str, dict[str, Any]]:
    """All jobs, as an admin sees them."""
    answer = await at.ask("GET", "/api/v2/jobs?limit=1000", headers=ADMIN)
    assert answer.status == 200, answer
    return {job["jobId"]: job for job in answer.json["jobs"]}


async def all_processing(at: Address, names: list[str]) -> bool:
    """Whether all of these are being worked on."""
    found = await records(at)
    return all(found.get(name, {}).get("status") == "processing" for name in names)


async def until_all_ended(at: Address, count: int) -> dict[str, dict[str, Any]]:
    """Wait until there are so many jobs, and all of them have ended."""
    found: dict[str, dict[str, Any]] = {}
    with trio.move_on_after(LONG_S):
        while True:
            found = await records(at)
            if len(found) >= count and all("endedAt" in job for job in found.values()):
                break
            await trio.sleep(0.1)
    ended = {name: job["status"] for name, job in found.items() if "endedAt" not in job}
    assert (len(found), ended) == (count, {})
    return found


async def check_rights(at: Address, found: dict[str, dict[str, Any]]) -> None:
    """Each user sees its own jobs, and nothing that jobs carry is in them."""
    text = json.dumps(found)
    for secret in ("private.mov", "not for everybody", "Traceback", ".py", ".cjs"):
        assert secret not in text
    for user in {job["userId"] for job in found.values() if not job["userId"].startswith("queue:")}:
        answer = await at.ask("GET", "/api/v2/jobs?limit=1000", headers=bearer(user))
        mine = {job["jobId"] for job in answer.json["jobs"]}
        assert mine == {name for name, job in found.items() if job["userId"] == user}


async def steps_of(at: Address, job_id: str) -> list[str]:
    """The statuses that a job went through."""
    answer = await at.ask("GET", f"/api/v2/jobs/{job_id}/history", headers=ADMIN)
    found: list[str] = []
    for update in answer.json["updates"]:
        if not found or found[-1] != update["status"]:
            found.append(update["status"])
    return found


def check(job: dict[str, Any], does: str) -> None:
    """Whether it ended as it should."""
    expected = {
        "ok": ("completed", 1), "bad": ("failed", 1), "flaky": ("completed", 2), "removed": ("cancelled", 1),
    }  # fmt: skip
    if does in expected:
        status, attempt = expected[does]
        assert job["status"] == status, job
        assert job["attempt"] >= attempt, job  # more where a machine was too slow to keep a lock
    if does == "ok":
        assert (job["progress"], job["message"]) == (100, "half of it"), job
    if does == "bad":
        assert job["error"].endswith("bad went wrong"), job


@asynccontextmanager
async def restarted(tmp_path: Path, tables: dict[str, Any], when: Callable[[], object]) -> AsyncIterator[list[Any]]:
    """A server that is killed once some jobs are there, and started again. Gives what runs at the end."""
    directory = tmp_path / "server"
    directory.mkdir()
    async with spawned(directory, **tables) as first:
        when()
        with trio.fail_after(LONG_S):
            while sum("endedAt" in job for job in (await records(first)).values()) < 10:  # noqa: ASYNC110
                await trio.sleep(0.01)
        first.signal(signal.SIGKILL)
        await first.exit_status()
    await trio.sleep(0.3)  # jobs go on meanwhile
    async with spawned(directory, **tables) as second:
        yield [second]


@pytest.mark.parametrize(("kind", "killed"), [("bullmq", False), ("bullmq", True), ("bull4", False)])
async def test_bullmq_and_bull(redis: RedisServer, modules: Path, tmp_path: Path, kind: str, killed: bool) -> None:
    tables: dict[str, Any] = {"auth": AUTH, "queues.v": {"kind": kind, "url": redis.url}}
    with processes(tmp_path) as start:
        script = ("node", str(HERE / "jobs.cjs"), kind, str(redis.port))
        work = partial(start, *script, NODE_PATH=str(modules))

        def begin() -> None:
            start(*script, "add", json.dumps(COUNTS), NODE_PATH=str(modules))
            work("video")

        async with trio.open_nursery() as nursery:
            # Workers that were killed come again, as supervisors see to it; those then keep out of harm's way.
            async def supervise() -> None:
                worker = work("fragile")
                while True:
                    await trio.sleep(0.2)
                    if worker.poll() is not None:
                        worker = start(*script, "fragile", NODE_PATH=str(modules), STEADY="1")

            if killed:
                async with restarted(tmp_path, tables, begin) as (at,):
                    nursery.start_soon(supervise)
                    found = await until_all_ended(at, TOTAL)
                    await check_rights(at, found)
            else:
                async with server(store={"url": "memory:"}, **tables) as one:
                    await until_up(one.node)
                    begin()
                    nursery.start_soon(supervise)
                    found = await until_all_ended(one, TOTAL)
                    await check_rights(one, found)
                    assert await steps_of(one, "video:ok-0") == ["queued", "processing", "completed"]
                    assert await steps_of(one, "video:flaky-0") == [
                        "queued", "processing", "queued", "processing", "completed",
                    ]  # fmt: skip
            nursery.cancel_scope.cancel()
    for name, job in found.items():
        does, _, number = name.partition(":")[2].partition("-")
        if not (killed and job["userId"] == "queue:v"):
            assert job["userId"] == f"user_{int(number) % 3}", job
        if does == "die":
            # The first one has killed its worker, and another one has worked it off; how often its lock ran out on the
            # way depends on how slow this machine is.
            assert job["status"] == "completed", job
            assert job["attempt"] >= (2 if number == "0" else 1), job
        else:
            check(job, does)


@pytest.mark.parametrize("events", [True, False])
async def test_celery(redis: RedisServer, tmp_path: Path, events: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_REDIS", redis.url)
    monkeypatch.syspath_prepend(str(HERE))
    sys.modules.pop("celery_tasks", None)
    import celery_tasks

    tables: dict[str, Any] = {"auth": AUTH, "queues.c": {"kind": "celery", "url": f"{redis.url}/1"}}
    command = (sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-c", "4", "-l", "warning")
    names: dict[str, tuple[str, str]] = {}

    def send() -> None:
        for does in ("ok", "bad", "flaky", "die", "slow"):
            for number in range({**COUNTS, "slow": 2}[does]):
                user = f"user_{number % 3}"
                sent = getattr(celery_tasks, does).delay("private.mov", user_id=user)
                names[sent.id] = (does, user)

    with processes(tmp_path) as start:
        async with server(store={"url": "memory:"}, **tables) as one:
            await until_up(one.node)
            start(*command, *(["-E"] if events else []), "--without-mingle", "--without-gossip", CELERY_REDIS=redis.url)
            await trio.to_thread.run_sync(send)
            slow = [name for name, (does, _) in names.items() if does == "slow"]
            with trio.fail_after(LONG_S):
                while not await all_processing(one, slow):  # noqa: ASYNC110
                    await trio.sleep(0.1)
            for name in slow:
                revoke = partial(celery_tasks.app.control.revoke, name, terminate=True)
                await trio.to_thread.run_sync(revoke)
            found = await until_all_ended(one, len(names))
            await check_rights(one, found)
            ok = next(name for name, (does, _) in names.items() if does == "ok")
            flaky = next(name for name, (does, _) in names.items() if does == "flaky")
            first = ["queued"] if events else []
            assert await steps_of(one, ok) == [*first, "processing", "completed"]
            assert await steps_of(one, flaky) == [*first, "processing", "queued", "processing", "completed"]
    celery_tasks.app.close()
    for name, (does, user) in names.items():
        job = found[name]
        assert (job["userId"], job["kind"]) == (user, f"celery_tasks.{does}"), job
        check(job, does)
        if does == "slow":
            assert job["status"] == "cancelled"
        if does == "die":
            assert (job["status"], job["error"].partition(":")[0]) == ("failed", "WorkerLostError")


@pytest.mark.parametrize("notices", [True, False])
async def test_rq(redis: RedisServer, tmp_path: Path, notices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rq import Queue, Retry

    monkeypatch.syspath_prepend(str(HERE))
    import rq_jobs

    tables: dict[str, Any] = {"auth": AUTH, "queues.r": {"kind": "rq", "url": redis.url, "poll": 0.1}}
    names: dict[str, tuple[str, str]] = {}
    with redis.oracle() as oracle, processes(tmp_path) as start:
        if not notices:
            oracle.config_set("notify-keyspace-events", "")
        queue = Queue("video", connection=oracle)

        def send() -> None:
            for does, count in {**COUNTS, "ok": 28, "flaky": 6}.items():
                for number in range(count):
                    user = f"user_{number % 3}"
                    job = queue.enqueue(
                        getattr(rq_jobs, "ok" if does == "removed" else does), "private.mov",
                        meta={"user_id": user}, retry=Retry(max=1) if does == "flaky" else None,
                    )  # fmt: skip
                    names[job.id] = (does, user)
                    if does == "removed":
                        job.cancel()

        async with server(store={"url": "memory:"}, **tables) as one:
            await until_up(one.node)
            await trio.to_thread.run_sync(send)
            for _ in range(2):
                start(
                    str(Path(sys.executable).with_name("rq")), "worker", "video", "--url", redis.url, "--quiet",
                )  # fmt: skip
            found = await until_all_ended(one, len(names))
            await check_rights(one, found)
            if notices:
                flaky = next(name for name, (does, _) in names.items() if does == "flaky")
                assert await steps_of(one, flaky) == ["queued", "processing", "queued", "processing", "completed"]
    for name, (does, user) in names.items():
        assert (found[name]["userId"], found[name]["kind"]) == (user, f"rq_jobs.{'ok' if does == 'removed' else does}")
        if does == "flaky" and not notices:
            # Where it is only looked at, a first attempt may be over before anybody looked.
            assert found[name]["status"] == "completed"
        else:
            check(found[name], does)
        if does == "die":
            assert found[name]["status"] == "failed"
            assert "terminated" in found[name]["error"]
