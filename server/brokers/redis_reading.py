"""Reading shards of the log from Redis; see ``redis_follower``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from protocol.update import Update
from server.brokers.redis_client import Client
from server.brokers.redis_keys import LOGS, META, Message, Stored, decode_message, stored_of, update_of

# Records decoded, or entries read, before others have a turn: some 3 ms.
_TURN: Final = 1000


async def read_log(client: Client, shard: int, first: int, last: int) -> tuple[list[Update], tuple[int, bytes | None]]:
    """The entries of a shard's messages from ``first`` to ``last``, both included.

    Returns:
        Besides, stamp and text of its newest message up to ``last``, which may be older than all those; 0 and None if
        it has none.
    """
    found: list[Update] = []
    start, data = f"{max(first, 1)}-0", None
    while True:
        page = await client.call("XRANGE", LOGS[shard], start, f"{last}-0", "COUNT", _TURN)
        for _, fields in page:
            data = fields[1]
            # What is kept are entries only: the collector has nothing to do with them.
            found += entries_of(decode_message(data))
        if len(page) < _TURN:
            break
        start = "(" + page[-1][0].decode()
    if data is None:
        page = await client.call("XREVRANGE", LOGS[shard], f"{last}-0", "-", "COUNT", 1)
        if not page:
            return found, (0, None)
        data = page[0][1][1]
    return found, (decode_message(data).stamp, data)


async def cut_of(client: Client, shards: Iterable[int]) -> int:
    """The offset up to which entries of these shards may have grown too old and gone."""
    cuts = await client.call("HMGET", META, *(f"cut:{shard}" for shard in shards))
    return max((int(cut) for cut in cuts if cut is not None), default=0)


async def decode_jobs(tables: Iterable[list[bytes]], offset: int) -> list[Stored]:
    """All jobs of some shards, as of ``offset``. The tables are used up: even to throw them away at once takes long."""
    loaded: list[Stored] = []
    for table in tables:
        while table:
            loaded += [stored_of(blob, offset) for blob in table[-_TURN:]]
            del table[-_TURN:]
            await trio.lowlevel.checkpoint()
    return loaded


def entries_of(message: Message) -> list[Update]:
    """The entries of the log that a message has."""
    updates: list[Update] = []
    for write in message.writes:
        if write.entry:
            updates.append(update_of(write, message.first + len(updates), message.at_ms))
    return updates
