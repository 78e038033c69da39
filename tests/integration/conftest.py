"""What the tests of whole servers and their pages begin with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.pictures import directory_of_pictures
from tests.integration.running import Running, running


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    """A server as a process of its own that keeps nothing."""
    async with running(tmp_path, "--store", "memory:") as started:
        yield started


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures of pages go."""
    return directory_of_pictures(tmp_path / "screenshots")
