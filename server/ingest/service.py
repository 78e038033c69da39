"""Everything that takes updates in without HTTP, as one service of a node."""

from __future__ import annotations

import os
import re
import secrets
import socket
from typing import Final, NamedTuple

import trio

from server.brokers.redis_client import parse_redis_url
from server.ingest.intake import Counters
from server.ingest.redis_channels import RedisChannels
from server.ingest.redis_stream import RedisStream
from server.node import Node

# The label ``source`` of metrics.
_SOURCES: Final = ("redis_channels", "redis_stream")


class Sources(NamedTuple):
    """Counters of each source."""

    channels: Counters
    stream: Counters


class Ingest:
    """What ``[ingest]`` asks for; made once the store was started.

    Attributes:
        name: of this node, in Redis.
        channels, stream: the parts; None if they are not wanted.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = trio.Event()
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64]
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        url = parse_redis_url(node.config.store.url)
        wanted = node.config.ingest
        self.channels = RedisChannels(node, self.name, url) if wanted.channels else None
        self.stream = RedisStream(node, self.name, url) if wanted.stream else None

    @property
    def counters(self) -> Sources:
        """What came of it on this node; zeros for what is off."""
        return Sources(
            self.channels.counters if self.channels is not None else Counters(),
            self.stream.counters if self.stream is not None else Counters(),
        )

    def published(self) -> dict[str, float]:
        """What became of updates, by source and outcome."""
        return {
            f"{source} {outcome}": count
            for source, its in zip(_SOURCES, self.counters, strict=True)
            for outcome, count in (
                ("accepted", its.accepted),
                ("duplicate", its.duplicates),
                ("rejected", its.rejected),
            )
        }

    def sample(self) -> dict[str, float | dict[str, float]]:
        """What else there is to measure, see ``server.metrics``."""
        channels, stream = self.counters
        return {
            "statuswire_ingest_dropped_total": channels.dropped,
            "statuswire_ingest_dead_total": stream.dead,
            "statuswire_ingest_trimmed_total": dict(zip(_SOURCES, (channels.trimmed, stream.trimmed), strict=True)),
        }

    async def run(self) -> None:
        """Take in until ``stop``, then finish what was taken."""
        parts = [part for part in (self.channels, self.stream) if part is not None]
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(part.run)
            await self._stop.wait()
            for part in parts:
                part.stop()
            for part in parts:
                await part.done.wait()
            nursery.cancel_scope.cancel()
        self._node.end()

    def stop(self) -> None:
        """Take nothing more; the node is busy (see ``Node.wait_quiet``) until all that was taken is finished."""
        if not self._stop.is_set():
            self._node.begin()
            self._stop.set()
