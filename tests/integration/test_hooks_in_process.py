"""APScheduler within a process: each run of a job is told of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import ROOT, InProcess, server, until, until_so

pytestmark = pytest.mark.slow

LONG_S = 90.0  # processes are started, of Python with much to import

SCRIPT = """
import asyncio, os, signal, sys, threading, time
from datetime import UTC, datetime, timedelta
from statuswire import flush
from statuswire.hooks import progress
from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED, EVENT_JOB_MISSED, EVENT_JOB_SUBMITTED
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from statuswire.hooks.apscheduler import AsyncIOExecutor, ProcessPoolExecutor, ThreadPoolExecutor

def ok(user_id, secret):
    progress(40, "half of it", stage="first")
    return {"rows": 5}

def bad(user_id, secret):
    raise ValueError("bad went\\nwrong")

def die(user_id, secret):
    os.kill(os.getpid(), signal.SIGKILL)

def hang(user_id, secret):
    progress(30)
    print("hangs", flush=True)
    time.sleep(600)

async def ok_async(user_id, secret):
    await asyncio.sleep(0)
    return ok(user_id, secret)

async def bad_async(user_id, secret):
    return bad(user_id, secret)

# A machine that is too slow for the time of a run shall run it all the same.
settings = {"timezone": "UTC", "job_defaults": {"misfire_grace_time": None}}
NEVER = datetime(2020, 1, 1, tzinfo=UTC)
OVER = EVENT_JOB_ERROR | EVENT_JOB_EXECUTED | EVENT_JOB_MISSED

def add(scheduler, *functions, **more):
    for function in functions:
        for user in ("alice", "bob"):
            kwargs = {"user_id": user, "secret": "not for everybody"}
            scheduler.add_job(function, "date", id=f"{function.__name__}-{user}", kwargs=kwargs, **more)

def wait_for(scheduler, count, events):
    seen = threading.Semaphore(0)
    scheduler.add_listener(lambda event: seen.release(), events)
    def wait():
        for _ in range(count):
            assert seen.acquire(timeout=60)
    return wait

def main(executor, *functions):
    scheduler = BackgroundScheduler(executors={"default": executor}, **settings)
    wait = wait_for(scheduler, 2 * len(functions) + 2, OVER)
    scheduler.start()
    add(scheduler, *functions)
    scheduler.add_job(ok, "date", id="late", run_date=NEVER, misfire_grace_time=1, args=["alice", "x"])
    scheduler.add_job(ok, "date", id="nobodys", kwargs={"user_id": None, "secret": "x"})
    wait()
    scheduler.shutdown()

def threads():
    main(ThreadPoolExecutor(4, results=True), ok, bad)

def processes():
    main(ProcessPoolExecutor(1, results=True), ok, bad)
    scheduler = BackgroundScheduler(executors={"default": ProcessPoolExecutor(1)}, **settings)
    # There is no event of a pool that broke; the shutdown waits for what was submitted.
    wait = wait_for(scheduler, 1, EVENT_JOB_SUBMITTED)
    scheduler.start()
    scheduler.add_job(die, "date", id="die", kwargs={"user_id": "alice", "secret": "x"})
    wait()
    scheduler.shutdown()

def loop():
    async def run():
        scheduler = AsyncIOScheduler(executors={"default": AsyncIOExecutor(results=True)}, **settings)
        wait = wait_for(scheduler, 6, OVER)
        scheduler.start()
        add(scheduler, ok, ok_async, bad_async)
        await asyncio.to_thread(wait)
        scheduler.shutdown()
    asyncio.run(run())

def killed():
    scheduler = BackgroundScheduler(executors={"default": ThreadPoolExecutor(4, ttl=1)}, **settings)
    scheduler.start()
    scheduler.add_job(hang, "date", id="hang", kwargs={"user_id": "alice", "secret": "x"})
    time.sleep(600)

if __name__ == "__main__":
    globals()[sys.argv[1]]()
    assert flush(20)
"""


@contextmanager
def running(at: InProcess, tmp_path: Path, what: str) -> Iterator[subprocess.Popen[bytes]]:
    script = tmp_path / "scheduled.py"
    script.write_text(SCRIPT)
    environment = {"PYTHONPATH": f"{ROOT}", "STATUSWIRE_URL": at.url, "STATUSWIRE_SPOOL_DIR": str(tmp_path / "spool")}
    command = [sys.executable, str(script), what]
    with subprocess.Popen(command, env=os.environ | environment, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def jobs(at: InProcess) -> dict[str, dict[str, Any]]:
    found = (await at.get("/api/v2/jobs?limit=1000")).json["jobs"]
    assert "not for everybody" not in str(found)
    assert "Traceback" not in str(found)
    return {job["jobId"].partition(":")[0]: job for job in found}


@pytest.mark.parametrize("what", ["threads", "processes", "loop"])
async def test_runs_of_jobs(tmp_path: Path, what: str) -> None:
    async with server() as at:
        with running(at, tmp_path, what) as process:
            await until(lambda: process.poll() is not None, within=LONG_S)
            assert process.returncode == 0
        found = await jobs(at)
        for user in ("alice", "bob"):
            for name in ("ok", "ok_async") if what == "loop" else ("ok",):
                job = found[f"{name}-{user}"]
                assert (job["status"], job["userId"], job["kind"]) == ("completed", user, name)
                assert (job["message"], job["stage"], job["result"]) == ("half of it", "first", {"rows": 5})
                assert job["metadata"]["source"] == "apscheduler"
            job = found[f"bad_async-{user}" if what == "loop" else f"bad-{user}"]
            assert (job["status"], job["error"]) == ("failed", "ValueError: bad went wrong")
        if what != "loop":
            assert (found["late"]["status"], found["late"]["message"]) == ("cancelled", "missed")
            assert found["late"]["userId"] == found["nobodys"]["userId"] == "queue:apscheduler"
        if what == "processes":
            assert found["die"]["status"] == "failed"
            assert "BrokenProcessPool" in found["die"]["error"]


async def test_a_scheduler_that_is_killed(tmp_path: Path) -> None:
    async with server() as at:
        with running(at, tmp_path, "killed") as process:
            assert process.stdout is not None
            assert await trio.to_thread.run_sync(process.stdout.readline) == b"hangs\n"
            await until(
                lambda: any(job.latest.status == "processing" for job in at.node.jobs._all_from(None)), within=LONG_S
            )
            process.send_signal(signal.SIGKILL)
        seen: list[str] = []

        async def failed() -> bool:
            status = (await jobs(at))["hang"]["status"]
            if status not in seen:
                seen.append(status)
            return "failed" in seen

        await until_so(failed, within=LONG_S, every=0.05)
        assert seen[-2:] == ["stalled", "failed"]
        assert (await jobs(at))["hang"]["error"] == "lost"
