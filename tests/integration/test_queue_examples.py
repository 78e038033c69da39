"""`make example-celery` and the others: one command, and the dashboard shows jobs that move."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.integration.browser import NewPage
from tests.integration.pages import ROWS, STATE
from tests.support import ROOT, Address, until, until_so

pytestmark = pytest.mark.slow

PERCENT = "row.querySelector('.percent').textContent"
LISTENING = re.compile(r"listening on http://[^ ]*:(\d+)")


async def jobs_of(at: Address) -> list[dict[str, Any]]:
    try:
        answer = await at.get("/api/v2/jobs")
    except OSError:
        return []
    found: list[dict[str, Any]] = answer.json["jobs"]
    return found


@pytest.mark.parametrize("kind", ["celery", "bullmq", "rq"])
async def test_an_example_shows_jobs_with_progress_and_owners(
    kind: str, tmp_path: Path, new_page: NewPage, pictures: Path
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "tools" / "examples" / "live.py"), kind, "--port", "0"]
    with log.open("wb") as out:
        process = await trio.to_thread.run_sync(
            lambda: subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        )
    try:
        await until(lambda: process.poll() is not None or LISTENING.search(log.read_text()))
        found = LISTENING.search(log.read_text())
        assert found, log.read_text()
        at = Address(int(found[1]))

        async def moves() -> bool:
            assert process.poll() is None, log.read_text()
            return any(job["progress"] > 0 for job in await jobs_of(at))

        await until_so(moves, every=0.1)
        assert {job["userId"] for job in await jobs_of(at)} <= {"alice", "bob", "carol"}
        page = await new_page()
        await page.open(f"{at.url}/")
        await page.wait(f"{STATE} === 'live' && {ROWS}.some((row) => /[1-9]/.test({PERCENT}))")
        (pictures / f"example-{kind}.png").write_bytes(await page.screenshot())
        assert page.problems == []
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            await trio.to_thread.run_sync(lambda: process.wait(40))
            # A job in hand may be broken off, but its Redis is still there then.
            assert "ConnectionError" not in log.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
