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


class Bull4(Source):
    """``kind = "bull4"``."""

    async def session(self, client: Client) -> None:
        """See ``Source``."""
        prefix, wanted = prefix_of(self.config), self.config.queues
        heard = Heard(self.config.url, [f"{escaped(prefix)}:{escaped(queue)}:*" for queue in wanted or ()] or
                      [f"{escaped(prefix)}:*"])  # fmt: skip
        watch = Watch(self.taker, self.config)
        async with heard.listening():
            await self._repair(client, await self._find(client))
            next_repair = trio.current_time() + _REPAIR_S
            self.well()
            while True:
                unnamed: dict[str, None] = {}
                sightings: list[Sighting] = []
                at_ms = round(time.time() * 1000)
                for channel, payload in await heard.take(_WAIT_S):
                    found = split_channel(prefix, channel)
                    if found is None:
                        continue
                    queue, event = found
                    if event == UNNAMED:
                        unnamed[queue] = None
                        continue
                    data = payload.decode("utf-8", "replace")
                    seen = read_message(queue, event, data, at_ms, results=self.config.results)
                    if seen is not None:
                        sightings.append(seen)
                await describe(client, self.taker, self.config, sightings)
                await count(client, self.config, sightings)
                await self.taker.take(sightings)
                if trio.current_time() >= next_repair:
                    next_repair = trio.current_time() + _REPAIR_S
                    unnamed.update(dict.fromkeys(one.queue for one in self.taker.open.values()))
                await self._repair(client, unnamed)
                await watch.look(client)

    async def _find(self, client: Client) -> list[str]:
        if self.config.queues:
            return list(self.config.queues)
        prefix = prefix_of(self.config)
        keys = await scan(client, f"{escaped(prefix)}:*:id", MAX_QUEUES, prefix)
        return [key[len(prefix) + 1 : -len(":id")] for key in keys][:MAX_QUEUES]

    async def _repair(self, client: Client, queues: list[str] | dict[str, None]) -> None:
        for queue in queues:
            await self.taker.take(await look(client, self.taker, self.config, queue, 0))
