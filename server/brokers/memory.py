"""The log in memory only: accepted is kept, and a restart is a new epoch."""

from __future__ import annotations

import math

import trio

from server.brokers.local import Group, LocalBroker, new_epoch


class MemoryBroker(LocalBroker):
    """Shows what was accepted before ``submit`` returns. Nothing waits, so nothing bounds what waits."""

    max_waiting_bytes = math.inf  # type: ignore[assignment]
    max_waiting_entries = math.inf  # type: ignore[assignment]

    async def start(self) -> None:
        """Begin a new log."""
        self._jobs.clear()
        self._history.restart(new_epoch())
        self.inboxes.clear()
        self._started(at_ms=0)
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Refuse what comes later."""
        self._closing = True
        self._leases.clear()
        await trio.lowlevel.checkpoint()

    def _gathered(self) -> None:
        group, self._group = self._group, Group()
        self._kept(group)
