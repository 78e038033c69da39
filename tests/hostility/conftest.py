"""What readers felt, as a table for ``docs/limits.md``: ``HOSTILITY_REPORT`` names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostility.siege import REPORTS


@pytest.fixture(scope="session", autouse=True)
def report() -> Iterator[None]:
    """Written at the end, with what was measured until then."""
    yield
    if path := os.environ.get("HOSTILITY_REPORT"):
        head = "| attack | connects | p99 before, ms | p99 meanwhile, ms | memory, MiB | over after, s |"
        rows = [head, "|" + " --- |" * 6, *(report.row() for report in REPORTS)]
        Path(path).write_text("\n".join(rows) + "\n", encoding="utf-8")
