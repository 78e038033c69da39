"""``concurrent.futures``: calls as jobs, in threads and in processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import trio

from statuswire import JobCancelled, default_client
from statuswire.hooks import current_job, progress
from statuswire.hooks.futures import JobExecutor, Submission
from tests.producer.workers import history, record, settled, worker
from tests.support import AUTH, PATIENCE_S, WORKER, InProcess, bearer, server, token, until


def export(name: str) -> dict[str, str]:
    progress(10, stage="begin")
    progress(50, "half", stage="middle")
    return {"name": name}


def fails() -> None:
    progress(20)
    raise ValueError("no\nsuch file")


def gives_up() -> None:
    raise JobCancelled


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unpicklable() -> object:
    return lambda: None


async def done(future: Future[Any]) -> BaseException | None:
    await trio.to_thread.run_sync(wait, [future])
    return None if future.cancelled() else future.exception()


async def ended(at: InProcess, job_id: str) -> dict[str, Any]:
    def over() -> bool:
        job = at.node.jobs.get(job_id)
        return job is not None and job.latest.ended

    await until(over)
    return await record(at, job_id)


async def steps(at: InProcess, job_id: str) -> list[str]:
    found: list[str] = []
    for update in await history(at, job_id):
        if not found or found[-1] != update["status"]:
            found.append(update["status"])
    return found


async def test_calls_in_threads() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        with ThreadPoolExecutor(1) as threads:
            pool = JobExecutor(threads, user="alice", results=True, client=client)
            go_on = threading.Event()
            good = pool.submit_as("export-1", lambda: (go_on.wait(PATIENCE_S), export("secret.pdf"))[1])
            waits = pool.submit(export, "never")
            await until(lambda: at.node.jobs.get(waits.job_id) is not None)
            assert (await record(at, waits.job_id))["status"] == "queued"
            await until(lambda: at.node.jobs.get("export-1").latest.status == "processing")
            assert waits.cancel()
            assert not good.cancel()
            go_on.set()
            assert await done(good) is None
            assert good.result() == {"name": "secret.pdf"}
            bad, left = pool.submit(fails), pool.submit(gives_up)
            assert isinstance(await done(bad), ValueError)
            assert isinstance(await done(left), JobCancelled)
            await settled(client)
            found = await record(at, "export-1")
            assert (found["status"], found["userId"], found["kind"]) == ("completed", "alice", "<lambda>")
            assert (found["stage"], found["message"], found["result"]) == ("middle", "half", {"name": "secret.pdf"})
            # What is overtaken before it was sent is not sent.
            assert await steps(at, "export-1") in (
                ["queued", "processing", "completed"], ["processing", "completed"],
            )  # fmt: skip
            assert (await record(at, waits.job_id))["status"] == "cancelled"
            assert (await record(at, bad.job_id))["error"] == "ValueError: no such file"
            assert (await record(at, left.job_id))["status"] == "cancelled"
            assert current_job() is None
            progress(10)  # outside of a job it does nothing


async def test_map_and_two_owners() -> None:
    def owner(call: Submission) -> object:
        return call.args[0]

    async with server(auth=AUTH) as at, worker(at.url, token=token("w", capabilities=["publish"])) as client:
        with ThreadPoolExecutor() as threads:
            pool = JobExecutor(threads, user=owner, client=client)
            got = await trio.to_thread.run_sync(lambda: list(pool.map(export, ["alice", "bob", "queue:alice", ""])))
            assert [one["name"] for one in got] == ["alice", "bob", "queue:alice", ""]
        await settled(client)
        for user in ("alice", "bob"):
            jobs = (await at.get("/api/v2/jobs", bearer(user))).json["jobs"]
            assert [(job["userId"], job["status"]) for job in jobs] == [(user, "completed")]
            assert "result" not in jobs[0]
        jobs = (await at.get("/api/v2/jobs?userId=queue:executor", bearer("root", admin=True))).json["jobs"]
        assert len(jobs) == 2, "what has no owner is seen by admins only"


async def test_somebody_cancels() -> None:
    def work() -> None:
        for _ in range(2000):
            progress(1)
            threading.Event().wait(0.01)

    async with server(auth=AUTH) as at, worker(at.url, token=WORKER["Authorization"][7:], interval=0) as client:
        with ThreadPoolExecutor() as threads:
            pool = JobExecutor(threads, user="alice", raise_on_cancel=True, ttl=1, client=client)
            future = pool.submit_as("a", work)
            await until(lambda: (job := at.node.jobs.get("a")) and job.latest.status == "processing")
            assert (await at.post("/api/v2/jobs/a/cancel", {}, bearer("alice"))).status == 202
            assert isinstance(await done(future), JobCancelled)
        await settled(client)
        assert (await record_as(at, "a", "alice"))["status"] == "cancelled"


async def record_as(at: InProcess, job_id: str, user: str) -> dict[str, Any]:
    answer = await at.get(f"/api/v2/jobs/{job_id}", bearer(user))
    found: dict[str, Any] = answer.json
    return found


async def test_without_a_server_calls_are_made_as_well() -> None:
    async with worker("http://127.0.0.1:9") as client:
        with ThreadPoolExecutor() as threads:
            pool = JobExecutor(threads, user="alice", client=client)
            assert await trio.to_thread.run_sync(lambda: list(pool.map(len, ["a", "bc"]))) == [1, 2]
            with pytest.raises(ValueError, match="no"):
                await trio.to_thread.run_sync(pool.submit(fails).result)


async def test_a_pool_that_is_closed() -> None:
    async with server() as at, worker(at.url) as client:
        pool = JobExecutor(ThreadPoolExecutor(), user="alice", client=client)
        pool.shutdown()
        with pytest.raises(RuntimeError):
            pool.submit_as("a", export, "x")
        await settled(client)
        assert (await record(at, "a"))["status"] == "cancelled"


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("STATUSWIRE_SPOOL_DIR", str(tmp_path))
    monkeypatch.delenv("STATUSWIRE_TOKEN", raising=False)
    monkeypatch.setattr("statuswire.client._default", None)
    yield
    default_client().close(0)


@pytest.mark.slow
@pytest.mark.usefixtures("_environment")
async def test_calls_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as at:
        monkeypatch.setenv("STATUSWIRE_URL", at.url)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            pool = JobExecutor(processes, user="alice", ttl=5, results=True)
            good, bad = pool.submit(export, "a"), pool.submit(fails)
            assert await done(good) is None
            assert isinstance(await done(bad), ValueError)
            found = await ended(at, good.job_id)
            assert (found["status"], found["stage"], found["result"]) == ("completed", "middle", {"name": "a"})
            assert await steps(at, good.job_id) in (["queued", "processing", "completed"], ["queued", "completed"])
            assert (await ended(at, bad.job_id))["error"] == "ValueError: no such file"
            odd = pool.submit(export, lambda: None)
            assert await done(odd) is not None
            assert "pickle" in (await ended(at, odd.job_id))["error"].lower()
            killed = pool.submit(dies)
            assert isinstance(await done(killed), BrokenProcessPool)
            assert "BrokenProcessPool" in (await ended(at, killed.job_id))["error"]
