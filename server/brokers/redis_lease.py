"""Whose turn it is, of several nodes.

A lease is only for order and for economy: that nothing is done twice must rest on something else, as a node may notice
late that it is not its turn any more.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from server.brokers.redis_client import Client, RedisClientError, Script

# Taken off what Redis was asked for: its clock and ours do not run alike.
_MARGIN: Final = 0.1

# KEYS: the lease. ARGV: who asks, milliseconds; then, if it holds it, a channel and what to say there after the time.
# Answers: 1 if it holds it, and the time (unix milliseconds).
_HOLD: Final = Script("""
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, tonumber(now)} end
if holder then -- a full Redis lets this be done, but no SET
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
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
