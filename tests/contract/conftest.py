"""Each store, empty, for the tests of this folder: brokers on it, and whole servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.harness import Rig, running
from tests.redis_servers import RedisServer
from tests.streams import clean_server
from tests.support import AUTH, InProcess

STORES = ["memory", "sqlite", "redis"]


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    with shared_redis.oracle() as oracle:
        oracle.flushall()
    return shared_redis.url


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A server's ``store.url``, of each store."""
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return url
    return "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'store.db'}"


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    """A store as ``harness.running`` takes it."""
    url: str = request.getfixturevalue("redis_url") if request.param == "redis" else request.param
    return url


@pytest.fixture
async def rig(store: str, tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(store, tmp_path / "test.db") as rig:
        yield rig


@pytest.fixture
async def at(store_url: str) -> AsyncIterator[InProcess]:
    """A server in open mode, over each store; it must have forgotten all of its readers at the end."""
    async with clean_server(store={"url": store_url}) as running:
        yield running


@pytest.fixture
async def guarded(store_url: str) -> AsyncIterator[InProcess]:
    """The same with tokens."""
    async with clean_server(store={"url": store_url}, auth=AUTH) as running:
        yield running
