"""The thread that does what waits for the disk."""

from __future__ import annotations

import weakref

from server.brokers.thread import StoreThread
from tests.support import until


class Large:
    """What a call is about."""

    def size(self) -> int:
        return 7


async def test_nothing_of_a_call_stays_behind() -> None:
    """A group may have 64 MiB, and the next one may be hours away."""
    thread, large = StoreThread(), Large()
    known = weakref.ref(large)
    assert await thread.run(large.size) == 7
    del large
    await until(lambda: known() is None)
    thread.stop()
