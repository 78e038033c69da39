"""All ``[queues.NAME]`` of a node."""

from __future__ import annotations

from typing import Final

import trio

from server.ingest.queues.bull4 import Bull4
from server.ingest.queues.bullmq import BullMq
from server.ingest.queues.celery import Celery
from server.ingest.queues.rq import Rq
from server.ingest.queues.source import Source
from server.node import Node

KINDS: Final[dict[str, type[Source]]] = {"bullmq": BullMq, "bull4": Bull4, "celery": Celery, "rq": Rq}


class Queues:
    """The sources of a node.

    Attributes:
        sources: by name.
    """

    def __init__(self, node: Node) -> None:
        self.sources = {name: KINDS[config.kind](node, name, config) for name, config in node.config.queues.items()}

    async def run(self) -> None:
        """Take in, until cancelled."""
        async with trio.open_nursery() as nursery:
            for source in self.sources.values():
                nursery.start_soon(source.run)

    def stop(self) -> None:
        """Others may go on."""
        for source in self.sources.values():
            source.stop()

    def states(self) -> dict[str, dict[str, str]]:
        """How each is: ``up``, ``standby`` (another node takes it in) or ``away`` with the reason."""
        found = {}
        for name, source in self.sources.items():
            if source.standby:
                found[name] = {"state": "standby"}
            elif source.trouble is None:
                found[name] = {"state": "up"}
            else:
                found[name] = {"state": "away", "reason": source.trouble}
        return found

    def published(self) -> dict[str, float]:
        """What became of updates, by source and outcome."""
        return {
            f"{name} {outcome}": count
            for name, source in self.sources.items()
            for outcome, count in (
                ("accepted", source.taker.counters.accepted),
                ("duplicate", source.taker.counters.duplicates),
                ("rejected", source.taker.counters.rejected),
            )
        }

    def sample(self) -> dict[str, float | dict[str, float]]:
        """What else there is to measure, see ``server.metrics``."""
        return {
            "statuswire_queue_up": {
                name: float(not source.standby and source.trouble is None) for name, source in self.sources.items()
            },
            "statuswire_queue_open_jobs": {
                name: float(len(source.taker.open)) for name, source in self.sources.items()
            },
        }
