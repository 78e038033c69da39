"""What browsers are given is made from the sources beside it, and small."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from tests.web.tools import BUILT, ROOT, WEB, WEB_TOOLS, web_tools

pytestmark = pytest.mark.slow

LIMITS = {
    **dict.fromkeys(("client.js", "client.cjs", "client.iife.js"), 6 * 1024),
    "share.js": 1280,
    "react.js": 1024,
    "job-progress.js": 1536,
}


def test_what_is_committed_is_what_the_sources_make(tmp_path: Path) -> None:
    web_tools()
    subprocess.run(["node", "tools/web/build.mjs", str(WEB_TOOLS), str(tmp_path)], check=True, cwd=WEB.parents[1])
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made.keys() == BUILT
    for name, text in made.items():
        assert text == (WEB / name).read_bytes(), f"{name} is out of date: run `make web`"


@pytest.mark.parametrize("name", LIMITS)
def test_it_stays_small(name: str) -> None:
    assert len(gzip.compress((WEB / name).read_bytes(), 9)) <= LIMITS[name]


def test_the_types_are_true_of_the_sources_and_serve_their_users() -> None:
    tools = web_tools()
    done = subprocess.run(
        [tools / ".bin" / "tsc", "--project", "tests/web"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
