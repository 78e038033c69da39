"""The real server as a process of its own, the way a user starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

ROOT = Path(__file__).parents[2]
STATUSWIRE = ROOT / ".venv" / "bin" / "statuswire"
PYTHON = STATUSWIRE.with_name("python")


def clean_environment(**more: str) -> dict[str, str]:
    """Our own environment without what would configure a server behind a test's back."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")} | more


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@dataclass(frozen=True)
class Running:
    """A server that has said where it listens."""

    url: str
    process: trio.Process

    @property
    def port(self) -> int:
        """Its TCP port."""
        return httpx.URL(self.url).port or 80


@asynccontextmanager
async def running(directory: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Running]:
    """Run `statuswire serve` in ``directory`` on a free port, stop it with SIGTERM, and see that it ends well."""
    port = () if "--port" in arguments else ("--port", "0")
    process = await trio.lowlevel.open_process(
        [str(STATUSWIRE), "serve", *port, *arguments],
        stdout=subprocess.PIPE,
        cwd=directory,
        # Streams need not be closed over the five seconds that spread the clients of a busy server.
        env=clean_environment(**({"STATUSWIRE_SERVER_DRAIN": "0.2"} | dict(environ or {}))),
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(60):  # a loaded machine needs more than twenty seconds for it at times
            start_line = b""
            while not start_line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, "the server did not start"
                start_line += data
        match = re.search(r"https?://[^\s,]+", start_line.decode())
        assert match, start_line
        yield Running(match[0].rstrip("/"), process)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            with trio.move_on_after(20) as patience:
                await process.wait()
            if patience.cancelled_caught:
                process.kill()
                await process.wait()
            await process.stdout.aclose()
    assert process.returncode == 0, "the server did not end well"
