"""The client in Node, which has no pages, no sessions and (before version 22, by itself) no WebSockets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio

from tests.support import spawned
from tests.web.tools import ROOT

pytestmark = pytest.mark.slow


async def run_node(name: str, *flags: str, **environ: str) -> None:
    """Run a file of Node tests."""
    done = await trio.run_process(
        ["node", *flags, "--test", f"tests/web/{name}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()


async def test_the_client_in_node(tmp_path: Path) -> None:
    flag = "--experimental-websocket"  # unknown to Node 18, the one of Debian 12
    asked = ["node", "-p", f"process.allowedNodeEnvironmentFlags.has('{flag}')"]
    known = (await trio.run_process(asked, capture_stdout=True)).stdout.strip() == b"true"
    async with spawned(tmp_path, store={"url": "memory:"}) as at:
        await run_node("client.test.mjs", *[flag] * known, STATUSWIRE_URL=at.url)


async def test_the_client_and_servers_that_do_as_they_are_told() -> None:
    await run_node("pretended.test.mjs")
