"""Calls whose answers were lost: they may have been executed, and the logs tell; see ``redis_publisher``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from typing import Final

import msgspec
import trio

from protocol.resp import RedisError
from server.brokers.redis_calls import Call
from server.brokers.redis_client import Client, RedisClientError
from server.brokers.redis_keys import LOGS, Message, decode_message

log = logging.getLogger("statuswire.broker")

# Entries read from a log at a time.
_PAGE: Final = 1000

Then = Callable[[Message | None], object]
"""What is done once it is known: it is given what the call has written, None if it was not executed."""


class Doubts:
    """Finds out about calls in doubt. A connection that is lost under load leaves thousands: one reading is for all.

    Args:
        unknown: called with a call of which Redis does not say.
    """

    def __init__(self, unknown: Callable[[Call], object]) -> None:
        self._unknown = unknown
        self._asked: list[tuple[Call, int, Then]] = []
        self._wake = trio.Event()

    def add(self, call: Call, floor: int, then: Then) -> None:
        """Look for a call, above an offset that it cannot have been given; ``then`` must not raise."""
        self._asked.append((call, floor, then))
        self._wake.set()

    def take(self) -> list[Call]:
        """Those of which it is not known yet; they are not looked for any more."""
        calls = [call for call, _, _ in self._asked]
        self._asked.clear()
        return calls

    async def run(self, client: Client) -> None:
        """Look into the logs, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            asked = self._asked.copy()  # being cancelled takes nothing away
            floors: dict[int, int] = {}
            for call, floor, _ in asked:
                floors[call.shard] = min(floor, floors.get(call.shard, floor))
            found: dict[str, Message] | None = None
            try:
                found = await find_written(client, floors, {call.changes[0].rev for call, _, _ in asked})
            except (RedisClientError, RedisError) as error:
                log.info("whether calls were executed cannot be looked up yet: %s", error)
            except Exception:
                log.exception("whether calls were executed cannot be looked up")
            del self._asked[: len(asked)]
            for call, _, then in asked:
                if found is None:
                    self._unknown(call)
                else:
                    then(found.get(call.changes[0].rev))


async def find_written(client: Client, floors: Mapping[int, int], revs: Container[str]) -> dict[str, Message]:
    """Those of these tokens whose calls were executed, as far as the logs reach back, and what each has written.

    Args:
        floors: of each shard in question, an offset that is below any that the calls can have been given there.
        revs: the tokens.

    Raises:
        RedisClientError, RedisError: Redis does not say.
    """
    found: dict[str, Message] = {}
    for shard, floor in floors.items():
        start = f"({floor}-0"
        while True:
            page = await client.call("XRANGE", LOGS[shard], start, "+", "COUNT", _PAGE)
            for _, fields in page:
                try:
                    message = decode_message(fields[1])
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue  # somebody else's; what is looked for is ours
                found.update((write.rev, message) for write in message.writes if write.rev in revs)
            if len(page) < _PAGE:
                break
            start = "(" + page[-1][0].decode()
    return found
