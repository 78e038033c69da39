"""`make run` and the demo's workers, as a person starts them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import trio

from tests.integration.running import PYTHON, ROOT, STATUSWIRE, clean_environment, free_port, running

pytestmark = pytest.mark.slow

PATIENCE_S = 60
SECRET = "a-secret-of-thirty-two-bytes-or-more"
Update: TypeAlias = dict[str, Any]


@asynccontextmanager
async def started(*command: str, **environ: str) -> AsyncIterator[trio.Process]:
    """A process group, with its output as a pipe; nothing of it is left behind."""
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, cwd=ROOT, env=clean_environment(**environ), start_new_session=True
    )
    assert process.stdout is not None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            await process.stdout.aclose()


async def read_until(process: trio.Process, text: str) -> str:
    """What a process prints up to a text and the rest of its line."""
    assert process.stdout is not None
    said = ""
    while text not in said or not said.endswith("\n"):
        data = await process.stdout.receive_some()
        assert data, f"it ended without {text!r}: {said}"
        said += data.decode()
    return said


async def watch(url: str, enough: Callable[[list[Update]], bool], token: str = "") -> list[Update]:
    """Long-poll until enough was seen."""
    seen: list[Update] = []
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=40) as client:
        query: dict[str, str] = {"timeout": "20"}
        while not enough(seen):
            answer = (await client.get("/api/v2/jobs/poll", params=query)).raise_for_status().json()
            seen += answer["updates"]
            query["last_seen"] = answer["last_seen"]
    return seen


def kinds(updates: list[Update]) -> set[str]:
    """The kinds of jobs among these updates."""
    return {update["kind"] for update in updates if "kind" in update}


async def test_make_run_starts_both_and_ends_both(tmp_path: Path) -> None:
    arguments = f"ARGS=--port 0 --store sqlite:{tmp_path}/demo.db"
    with trio.fail_after(PATIENCE_S):
        async with started("make", "-s", "run", arguments, STATUSWIRE_SERVER_DRAIN="0.2") as make:
            said = await read_until(make, "Open ")
            url = said.split("Open ")[1].split()[0]
            assert url in said.splitlines()[0]
            await watch(url, lambda seen: kinds(seen) >= {"export", "report", "chapter"})
            make.terminate()
            assert make.stdout is not None
            async for _ in make.stdout:  # ends once the server and the demo have closed it
                pass
            await make.wait()
            async with httpx.AsyncClient() as client:
                with pytest.raises(httpx.ConnectError):
                    await client.get(f"{url}/health")


async def test_make_run_says_why_it_cannot(tmp_path: Path) -> None:
    done = await trio.run_process(
        ["make", "-s", "run", "ARGS=--store nonsense:"],
        cwd=ROOT,
        env=clean_environment(),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode != 0
    assert b"expected memory:, sqlite:PATH or redis:" in done.stderr
    assert b"Traceback" not in done.stderr


async def test_the_workers_show_what_there_is_to_see(tmp_path: Path) -> None:
    """Every end, a second attempt, a stalled worker, parents of parts, and work of unknown length."""

    def everything(seen: list[Update]) -> bool:
        statuses = {update.get("status") for update in seen}
        parents = {update["parentId"] for update in seen if "parentId" in update}
        return (
            {"queued", "processing", "completed", "failed", "stalled"} <= statuses
            and any(update.get("attempt") == 2 and update["status"] == "completed" for update in seen)
            and any(update["jobId"] in parents and update.get("progress") == 100 for update in seen)
            and any("estimatedTimeRemaining" in update for update in seen)
            and "index" in kinds(seen)
        )

    async with running(tmp_path) as server:
        demo = (str(PYTHON), "tools/demo.py", "--speed", "20", "--url", server.url)
        async with started(*demo):
            with trio.fail_after(PATIENCE_S):
                await watch(server.url, everything)


async def test_a_worker_stops_when_its_job_is_cancelled(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        demo = (str(PYTHON), "tools/demo.py", "--url", server.url)
        async with started(*demo):
            with trio.fail_after(PATIENCE_S):
                # A parent, whose parts have workers of their own.
                seen = await watch(server.url, lambda seen: any(update.get("kind") == "chapter" for update in seen))
                parent = next(update["parentId"] for update in seen if "parentId" in update)
                video = next(update["jobId"] for update in seen if update.get("kind") == "video")
                async with httpx.AsyncClient(base_url=server.url) as client:
                    for job_id in (parent, video):
                        assert (await client.post(f"/api/v2/jobs/{job_id}/cancel")).status_code == 202

                def all_cancelled(seen: list[Update]) -> bool:
                    latest = {update["jobId"]: update for update in seen}
                    parts = [update for update in latest.values() if update.get("parentId") == parent]
                    asked = {parent, video} & latest.keys()
                    return len(asked) == 2 and all(
                        update["status"] == "cancelled" for update in (latest[parent], latest[video], *parts)
                    )

                await watch(server.url, all_cancelled)


async def test_the_workers_wait_for_the_server_and_survive_its_restart(tmp_path: Path) -> None:
    port = str(free_port())
    async with started(str(PYTHON), "tools/demo.py", "--speed", "3", "--url", f"http://127.0.0.1:{port}"):
        with trio.fail_after(PATIENCE_S):
            async with running(tmp_path, "--port", port) as server:
                before = await watch(server.url, lambda seen: len(kinds(seen)) >= 6)
            old = {update["jobId"] for update in before if update.get("kind") in ("export", "video")}

            def go_on(seen: list[Update]) -> bool:
                """Jobs that were under way before the restart are worked on after it."""
                moved = [update for update in seen if update["jobId"] in old and update["status"] == "processing"]
                return len({update["version"] for update in moved}) >= 5

            async with running(tmp_path, "--port", port) as again:
                await watch(again.url, go_on)


async def test_the_workers_make_themselves_a_token(tmp_path: Path) -> None:
    secured = {"STATUSWIRE_AUTH_JWT_KEY": SECRET}
    async with running(tmp_path, environ=secured) as server:
        demo = (str(PYTHON), "tools/demo.py", "--url", server.url)
        async with started(*demo, **secured):
            done = await trio.run_process(
                [str(STATUSWIRE), "token", "--sub", "admin", "--admin"],
                capture_stdout=True,
                cwd=tmp_path,
                env=clean_environment(**secured),
            )
            with trio.fail_after(PATIENCE_S):
                await watch(server.url, lambda seen: len(kinds(seen)) >= 6, done.stdout.decode().strip())


async def test_without_a_key_the_workers_say_what_is_missing(tmp_path: Path) -> None:
    async with running(tmp_path, "--jwt-key", SECRET) as server:
        done = await trio.run_process(
            [str(PYTHON), "tools/demo.py", "--url", server.url],
            cwd=ROOT,
            env=clean_environment(),
            capture_stderr=True,
            check=False,
        )
    assert done.returncode == 1
    assert b"set STATUSWIRE_TOKEN" in done.stderr
    assert b"Traceback" not in done.stderr
