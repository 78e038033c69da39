"""Classic subscriptions on a connection of their own: what anybody sends with PUBLISH, wherever it is sent."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Unpack

import trio
from trio.abc import Stream

from protocol.resp import RedisError
from server.brokers.redis_client import NodeInfo, RedisStartError
from server.brokers.redis_connection import connect
from server.brokers.redis_single import Callbacks, Client
from server.brokers.redis_subscriptions import PatternLink
from server.brokers.redis_topology import fetch_slots
from server.brokers.redis_url import Address, Options, RedisUrl

__all__ = ["Listener", "PatternListener"]


class Listener(Client):
    """A client that only listens. In a cluster any node passes every message on, so it listens to one that answers.

    Args:
        channels: what to listen to, from ``run`` on.
        url, options, callbacks: see ``Client``.
    """

    def __init__(
        self,
        channels: Iterable[bytes],
        url: RedisUrl,
        *,
        options: Options | None = None,
        **callbacks: Unpack[Callbacks],
    ) -> None:
        super().__init__(url, options=options, **callbacks)
        self._addresses = list(url.addresses)
        self.subscribe(channels)

    def drop(self, reason: str) -> None:
        """Listen elsewhere, or anew: nothing comes from where it listens now."""
        self._subscriptions().drop(reason)

    def _run_in(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._subscriptions().run)  # no connection for commands
        if self.url.topology == "sentinel":
            nursery.start_soon(self._sentinel_watch().run)

    async def _connect(self) -> tuple[Stream, NodeInfo]:
        if self.url.topology != "cluster":
            return await super()._connect()
        problem: RedisStartError | None = None
        for address in list(self._addresses):
            # The one that is tried now is the last to be tried again.
            self._addresses.remove(address)
            self._addresses.append(address)
            try:
                stream, node = await connect(address, self.url, self.options)
            except RedisStartError as error:
                problem = error
                continue
            try:
                await self._learn(address)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            return stream, node
        assert problem is not None
        raise problem

    async def _learn(self, address: Address) -> None:
        """What other nodes there are, so that the seeds may go."""
        with suppress(RedisStartError, RedisError):
            ranges = await fetch_slots(address, self.url, self.options)
            known = {other for piece in ranges for other in (piece.master, *piece.replicas)} | set(self.url.addresses)
            kept = [other for other in self._addresses if other in known]
            self._addresses = kept + sorted(known.difference(kept))


class PatternListener(Listener):
    """The same for patterns of channels, such as ``celery-task-meta-*``: for a single Redis, or behind sentinels."""

    subscription_kind = PatternLink
