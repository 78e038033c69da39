"""Idempotency keys that have served: a fast source would fill Redis with them before they expire."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import trio

from protocol.resp import RedisError
from server.brokers.redis_client import Client, RedisClientError

_EVERY_S: Final = 1.0
_AT_ONCE: Final = 500
# Beyond this many they stay until they expire by themselves: 10 MB.
_MAX: Final = 100_000


class Spent:
    """Takes keys away some time after they have served.

    Args:
        client: for commands.
        after_s: how long each is kept.
    """

    def __init__(self, client: Client, after_s: float) -> None:
        self._client = client
        self._after_s = after_s
        self._keys: deque[tuple[float, bytes]] = deque(maxlen=_MAX)

    def add(self, keys: Sequence[bytes]) -> None:
        """These have served."""
        due = trio.current_time() + self._after_s
        self._keys.extend((due, key) for key in keys)

    async def run(self) -> None:
        """Take them away, until cancelled."""
        while True:
            await trio.sleep(_EVERY_S)
            while due := self._take_due():
                try:
                    await self._client.call("UNLINK", *due)
                except (RedisClientError, RedisError):
                    break  # those expire by themselves

    def _take_due(self) -> list[bytes]:
        keys, now = self._keys, trio.current_time()
        due: list[bytes] = []
        while keys and keys[0][0] <= now and len(due) < _AT_ONCE:
            due.append(keys.popleft()[1])
        return due
