"""What browsers are given is made from the sources beside it, and small."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from tests.web.tools import BUILT, WEB, WEB_TOOLS, web_tools

pytestmark = pytest.mark.slow

LIMITS = {"client.js": 8 * 1024}


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
