"""Workers for the tests: clients of the package, and processes that use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from statuswire import Client
from tests.support import PATIENCE_S, ROOT, Address

PRELUDE = "import os, signal, sys, time; from statuswire import *; from statuswire import flush\n"


@asynccontextmanager
async def worker(url: str, spool: Path | str = "", **options: Any) -> AsyncIterator[Client]:
    """A client within this process, without a spool unless one is named."""
    client = Client(url, spool_dir=spool, **options)
    try:
        yield client
    finally:
        # What a test leaves behind on purpose is not waited for.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(client.close, 0)


async def settled(client: Client) -> None:
    """Wait until everything was answered."""
    assert await trio.to_thread.run_sync(client.flush, PATIENCE_S)


async def record(at: Address, job_id: str) -> dict[str, Any]:
    """A job as the server has it."""
    answer = await at.get(f"/api/v2/jobs/{job_id}")
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.json
    return found


async def history(at: Address, job_id: str) -> list[dict[str, Any]]:
    """All that was accepted of a job."""
    answer = await at.get(f"/api/v2/jobs/{job_id}/history")
    assert answer.status == 200, answer
    updates: list[dict[str, Any]] = answer.json["updates"]
    return updates


def start(script: str, url: str, spool: Path) -> subprocess.Popen[bytes]:
    """A process that runs a script in which everything of ``statuswire`` has its name."""
    environ = {
        "PYTHONPATH": str(ROOT),
        "STATUSWIRE_URL": url,
        "STATUSWIRE_SPOOL_DIR": str(spool),
        "PATH": "/usr/bin:/bin",
    }
    return subprocess.Popen(
        # Newer Pythons warn of every fork of a process with threads, which is what some of these are about.
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", PRELUDE + script],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def run(script: str, url: str, spool: Path, *, status: int = 0) -> str:
    """Run such a process to its end, which must be this; what it printed."""
    with start(script, url, spool) as process:
        try:
            out, err = await trio.to_thread.run_sync(process.communicate, None, PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == status, err.decode()
    return out.decode() + err.decode()


def journals(spool: Path) -> list[Path]:
    """What is on disk."""
    return sorted(spool.glob("**/*.journal"))


async def delivered(url: str, spool: Path, *, trust: Path | None = None) -> None:
    """What a process that has ended could not send in its last two seconds is sent by the next one.

    Args:
        trust: the certificate of an authority, if TLS is spoken there.
    """
    trusting = "" if trust is None else f"os.environ['SSL_CERT_FILE'] = {str(trust)!r}; "
    if journals(spool):
        await run(f"{trusting}assert flush({PATIENCE_S})", url, spool)
