"""Reading shards of the log from Redis; see ``redis_follower``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import trio

from protocol.update import Update
from server.brokers.redis_client import Client
from server.brokers.redis_keys import LOGS, META, Message, Stored, decode_message, stored_of, update_of

# Records decoded, or entries read, before others have a turn: some 3 ms.
_TURN: Final = 1000


async def read_log(client: Client, shard: int, first: int, last: int) -> list[tuple[Message, bytes]]:
    """The messages of a shard from ``first`` to ``last``, both included, and as they are in the stream."""
    found: list[tuple[Message, bytes]] = []
    start = f"{max(first, 1)}-0"
    while True:
        page = await client.call("XRANGE", LOGS[shard], start, f"{last}-0", "COUNT", _TURN)
        found += [(decode_message(fields[1]), fields[1]) for _, fields in page]
        if len(page) < _TURN:
            return found
        start = "(" + page[-1][0].decode()


async def newest_of(
    client: Client, shard: int, read: Sequence[tuple[Message, bytes]], last: int
) -> tuple[int, bytes | None]:
    """Stamp and text of a shard's newest message up to ``last``, which may be older than all that was read of it.

    Returns:
        0 and None if it has none.
    """
    if read:
        message, data = read[-1]
        return message.stamp, data
    page = await client.call("XREVRANGE", LOGS[shard], f"{last}-0", "-", "COUNT", 1)
    if page:
        data = page[0][1][1]
        return decode_message(data).stamp, data
    return 0, None


async def cut_of(client: Client, shards: Iterable[int]) -> int:
    """The offset up to which entries of these shards may have grown too old and gone."""
    cuts = await client.call("HMGET", META, *(f"cut:{shard}" for shard in shards))
    return max((int(cut) for cut in cuts if cut is not None), default=0)


async def decode_jobs(tables: Sequence[Sequence[bytes]], offset: int) -> list[Stored]:
    """All jobs of some shards, as of ``offset``."""
    loaded: list[Stored] = []
    for table in tables:
        for start in range(0, len(table), _TURN):
            loaded += [stored_of(blob, offset) for blob in table[start : start + _TURN]]
            await trio.lowlevel.checkpoint()
    return loaded


def entries_of(message: Message) -> list[Update]:
    """The entries of the log that a message has."""
    updates: list[Update] = []
    for write in message.writes:
        if write.entry:
            updates.append(update_of(write, message.first + len(updates), message.at_ms))
    return updates
