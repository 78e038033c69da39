"""Which node takes in just now, and what it leaves behind in Redis for a while.

A lease is only for order and for economy: that nothing is accepted twice rests on idempotency keys, which hold
whoever takes an update in, and however late it notices that it is not its turn any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

from protocol.resp import RedisError
from server.brokers.redis_client import Client, RedisClientError, Script

# Taken off what Redis was asked for: its clock and ours do not run alike.
_MARGIN: Final = 0.1
_SPENT_EVERY_S: Final = 1.0
_AT_ONCE: Final = 500
# Keys to be taken away, beyond which they stay until they expire by themselves: 10 MB.
_MAX_SPENT: Final = 100_000

# KEYS: the lease. ARGV: who asks, milliseconds; then, if it holds it, a channel and what to say there after the time.
# Answers: 1 if it holds it, and the time (unix milliseconds).
_HOLD: Final = Script("""
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, tonumber(now)} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if ARGV[3] then redis.call('PUBLISH', ARGV[3], now .. ' ' .. ARGV[4]) end
return {1, tonumber(now)}
""")

# KEYS: the lease. ARGV: who gives it back.
_RELEASE: Final = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")


class Lease:
    """One node's view of a lease.

    Args:
        client: for commands.
        key: where it is.
        name: this node's.
        seconds: how long it is held without a word.
    """

    def __init__(self, client: Client, key: bytes, name: str, seconds: float) -> None:
        self._client = client
        self._key = key
        self._name = name
        self._seconds = seconds
        self._until = -1.0

    @property
    def held(self) -> bool:
        """Whether it is certainly this node's turn: never true on two nodes, unless Redis forgot something."""
        return trio.current_time() < self._until

    async def hold(self, *say: bytes | str) -> int:
        """Take it if it is free, keep it if it is ours. Returns Redis' time, unix milliseconds.

        Args:
            say: a channel and a text: published behind the time if it is held.

        Raises:
            RedisClientError, RedisError: Redis does not say.
        """
        began = trio.current_time()
        arguments = (self._name, round(self._seconds * 1000), *say)
        held, now_ms = await self._client.call_script(_HOLD, [self._key], arguments)
        self._until = began + self._seconds * (1 - _MARGIN) if held else -1.0
        return int(now_ms)

    def release(self) -> None:
        """Let another node have it at once, if Redis can be told."""
        self._until = -1.0
        with suppress(RedisClientError):
            self._client.send_script(_RELEASE, [self._key], [self._name])


class Spent:
    """Keys that have served: they are taken away before they expire, as a fast source would fill Redis with them.

    Args:
        client: for commands.
        after_s: how long each is kept.
    """

    def __init__(self, client: Client, after_s: float) -> None:
        self._client = client
        self._after_s = after_s
        self._keys: deque[tuple[float, bytes]] = deque(maxlen=_MAX_SPENT)

    def add(self, keys: Sequence[bytes]) -> None:
        """These have served."""
        due = trio.current_time() + self._after_s
        self._keys.extend((due, key) for key in keys)

    async def run(self) -> None:
        """Take them away, until cancelled."""
        while True:
            await trio.sleep(_SPENT_EVERY_S)
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
