"""The client in Node, which has no pages, no sessions and (before version 22) no WebSockets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from tests.support import Spawned, spawned
from tests.web.tools import ROOT

pytestmark = pytest.mark.slow


async def run_node(at: Spawned, name: str, *flags: str) -> None:
    """Run a file of Node tests against a server."""
    done = await trio.run_process(
        ["node", *flags, "--test", f"tests/web/{name}"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "STATUSWIRE_URL": at.url},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()


async def test_the_client_in_node(tmp_path: Path) -> None:
    async with spawned(tmp_path, store={"url": "memory:"}) as at:
        await run_node(at, "client.test.mjs")
