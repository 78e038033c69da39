"""Idempotency keys that have served: a fast source would fill Redis with them before they expire."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import trio

from protocol.resp import RedisError
from server.brokers.redis_client import Client, RedisClientError
from server.brokers.redis_keys import idempotency_key

_EVERY_S: Final = 1.0
_AT_ONCE: Final = 500
# Beyond this many the oldest go early: 12 MB here, 30 MB in Redis.
MAX_SPENT: Final = 200_000


class Spent:
    """Takes keys away some time after they have served.

    Args:
        client: for commands.
        after_s: how long each is kept.
    """

    def __init__(self, client: Client, after_s: float) -> None:
        self._client = client
        self._after_s = after_s
        self._keys: deque[tuple[float, Sequence[bytes]]] = deque()
        self._count = 0

    def add(self, digests: Sequence[bytes]) -> None:
        """Keys with these digests have served."""
        if digests:
            self._keys.append((trio.current_time() + self._after_s, digests))
            self._count += len(digests)

    async def run(self) -> None:
        """Take them away, until cancelled."""
        while True:
            await trio.sleep(_EVERY_S)
            while due := self._take_due():
                try:
                    await self._client.call("UNLINK", *map(idempotency_key, due))
                except (RedisClientError, RedisError):
                    break  # those expire by themselves

    def _take_due(self) -> list[bytes]:
        now = trio.current_time()
        due: list[bytes] = []
        while self._keys and len(due) < _AT_ONCE and (self._keys[0][0] <= now or self._count > MAX_SPENT):
            digests = self._keys.popleft()[1]
            self._count -= len(digests)
            due += digests
        return due
