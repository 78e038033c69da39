"""What the tests of the browser's side share: packages from npm, and the files they are about."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEB = ROOT / "server" / "web"
WEB_TOOLS = ROOT / ".venv" / "web"
BUILT = {"client.js", "client.cjs", "client.iife.js", "share.js", "react.js", "job-progress.js"}


@cache
def web_tools() -> Path:
    """Where the packages are; they are installed if they are not there yet."""
    subprocess.run(["make", "--silent", WEB_TOOLS.relative_to(ROOT) / ".done"], check=True, cwd=ROOT)
    return WEB_TOOLS / "node_modules"
