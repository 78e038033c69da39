"""The command ``watch``, and what a server tells it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.cli import main
from tests.server.commands.scripted import ScriptedServer, sse
from tests.support import PATIENCE_S


def job(job_id: str = "j", status: str = "processing", **fields: Any) -> dict[str, Any]:
    return {"jobId": job_id, "userId": "ann", "status": status, **fields}


def update(job_id: str = "j", status: str = "processing", **fields: Any) -> dict[str, Any]:
    kind = {"completed": "job_completed", "failed": "job_failed", "cancelled": "job_cancelled"}.get(status)
    return {"type": kind or "status_update", **job(job_id, status, **fields)}


def snapshot(*jobs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "snapshot", "jobs": list(jobs), **fields}


CONNECTED = sse({"type": "connected"}, retry=0)
HEARTBEAT = {"type": "heartbeat", "timestamp": "2026-01-31T12:00:00Z"}


def watch(server: ScriptedServer, *arguments: str) -> int:
    return main(["watch", "--url", server.url, *arguments])


def environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")} | extra


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "server", "watch", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


class Gate:
    """Holds a script until the test has looked."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self) -> None:
        self._event.wait(PATIENCE_S)

    def open(self) -> None:
        self._event.set()


@contextmanager
def on_gate() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.open()
