"""For all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.integration.browser import NewPage
    from tests.redis_servers import RedisServer

# How long an example takes depends on what else the machine does, which is no property of what is tested.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell starts what it puts in the background with SIGINT ignored, and every child inherits that: here it must work,
# as commands are tested with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What the fixtures are made with is imported only where they are used: most tests need none of them.


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, empty, that keeps nothing on disk."""
    from tests.redis_servers import running_server

    with running_server(tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that no test breaks or takes for empty: it is much quicker to empty one than to start one."""
    from tests.redis_servers import running_server

    with running_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real browser for a module's tests: the address of its debugger."""
    from tests.integration.browser import started_chromium

    with started_chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def new_page(chromium: str) -> AsyncIterator[NewPage]:
    """Opens tabs in it, which are gone after the test."""
    from tests.integration.browser import using_browser

    async with using_browser(chromium) as opened:
        yield opened


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of ``-n auto``: more than there are cores, as most tests wait most of the time."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, then those with the most slow tests: no process has one left when the others are done."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path not in long, -slow[item.path]))
