"""Servers for the ways of reading: each must have forgotten all of its readers at the end of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.streams import clean_server
from tests.support import AUTH, InProcess


@pytest.fixture
async def server() -> AsyncIterator[InProcess]:
    """In open mode."""
    async with clean_server() as running:
        yield running


@pytest.fixture
async def guarded() -> AsyncIterator[InProcess]:
    """With tokens."""
    async with clean_server(auth=AUTH) as running:
        yield running
