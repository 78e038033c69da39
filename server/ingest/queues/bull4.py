"""Bull 4: what it publishes, which nothing keeps; so the hashes are looked at when something may be missing."""

from __future__ import annotations

import time
from typing import Final

import trio

from protocol.queues.bull4 import UNNAMED, read_message, split_channel
from protocol.queues.sighting import Sighting
from server.brokers.redis_client import Client
from server.ingest.queues.bull import Watch, count, describe, look, prefix_of
from server.ingest.queues.bullmq import MAX_QUEUES
from server.ingest.queues.source import Heard, Source, escaped, scan

_WAIT_S: Final = 0.5
# Not everything is published: that a job waits for its time is, but not which one.
_REPAIR_S: Final = 10.0
# Of what goes on being published meanwhile, not more than so much is waited for.
_ROUNDS: Final = 10


class Bull4(Source):
    """``kind = "bull4"``."""

    async def session(self, client: Client) -> None:
        """See ``Source``."""
        prefix, wanted = prefix_of(self.config), self.config.queues
        heard = Heard(self.config.url, [f"{escaped(prefix)}:{escaped(queue)}:*" for queue in wanted or ()] or
                      [f"{escaped(prefix)}:*"])  # fmt: skip
        watch = Watch(self.taker, self.config)
        async with heard.listening():
            for queue in await self._find(client):
                await self.taker.take(await look(client, self.taker, self.config, queue, 0))
            next_repair = trio.current_time() + _REPAIR_S
            self._unnamed: dict[str, None] = {}
            self.well()
            while True:
                await self._hear(client, heard, _WAIT_S)
                if trio.current_time() >= next_repair:
                    next_repair = trio.current_time() + _REPAIR_S
                    self._unnamed.update(dict.fromkeys(one.queue for one in self.taker.open.values()))
                queues, self._unnamed = self._unnamed, {}
                for queue in queues:
                    await self._repair(client, heard, queue)
                await watch.look(client)

    async def _hear(self, client: Client, heard: Heard, seconds: float) -> bool:
        """Take in what was published, and note where some job waits for its time. False if there was nothing."""
        sightings: list[Sighting] = []
        at_ms = round(time.time() * 1000)
        messages = await heard.take(seconds)
        for channel, payload in messages:
            found = split_channel(prefix_of(self.config), channel)
            if found is None:
                continue
            queue, event = found
            if event == UNNAMED:
                self._unnamed[queue] = None
                continue
            data = payload.decode("utf-8", "replace")
            seen = read_message(queue, event, data, at_ms, results=self.config.results)
            if seen is not None:
                sightings.append(seen)
        await describe(client, self.taker, self.config, sightings)
        await count(client, self.config, sightings)
        await self.taker.take(sightings)
        return bool(messages)

    async def _find(self, client: Client) -> list[str]:
        if self.config.queues:
            return list(self.config.queues)
        prefix = prefix_of(self.config)
        keys = await scan(client, f"{escaped(prefix)}:*:id", MAX_QUEUES, prefix)
        return [key[len(prefix) + 1 : -len(":id")] for key in keys][:MAX_QUEUES]

    async def _repair(self, client: Client, heard: Heard, queue: str) -> None:
        """Take in what the queue keeps. What was published before that was read comes first, as it is older."""
        found = await look(client, self.taker, self.config, queue, 0)
        for _ in range(_ROUNDS):
            if not await self._hear(client, heard, 0):
                break
        for seen in found:
            seen.unsure = True
        await self.taker.take(found)
