"""How many nodes, cores, Redis servers and gigabits a number of readers needs, from the costs in `perf.model`.

A *cell* is one Redis (standalone, or up to 16 masters of a Cluster) and the nodes on it. Every node that has readers of
all sixteen shards receives every update of its cell, so nodes share the sending but not the receiving: past a number of
updates a second another node in the cell helps no more, and users are divided over cells instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from perf.model import MEASURED, Costs

# What a node or a Redis is asked to do at most, so that bursts, reconnections and a lost neighbour find room.
ROOM: Final = 0.6
# Of a node, what receiving may take of that, so that most of it serves readers.
RECEIVING: Final = 0.2
SHARDS: Final = 16
HEARTBEAT_S: Final = 30.0
# What TCP/IP and Ethernet add to a small segment, and what a heartbeat and a pong weigh with that.
PACKET_BYTES: Final = 66 + 24
BEAT_BYTES: Final = 3 * PACKET_BYTES + 90


@dataclass(frozen=True)
class Crowd:
    """Who is there: `active` is the share of readers whose job runs, `rate` its updates a second, `watchers` how many
    readers each update goes to. All come back within `return_s` seconds after a restart of everything."""

    readers: int
    active: float = 0.1
    rate: float = 0.5
    watchers: float = 1.0
    size: int = 297
    return_s: float = 60.0


@dataclass(frozen=True)
class Fleet:
    """What they need: cores are of nodes (one each) and of Redis' masters; gigabits go out to readers."""

    updates: float
    deliveries: float
    cells: int
    nodes: int
    masters: int
    readers_per_node: float
    gigabytes: float
    gigabits: float
    first: str  # what sets the number of nodes
    loads: dict[str, float]  # cores that each kind of work takes, over all nodes


def fleet(crowd: Crowd, costs: Costs = MEASURED, node_gigabytes: float = 4.0) -> Fleet:
    """The smallest fleet in which nothing is used above `ROOM`."""
    updates = crowd.readers * crowd.active * crowd.rate / crowd.watchers
    deliveries = updates * crowd.watchers
    of_receiving = updates * costs.redis_receive / 1e6  # cores, on every node of a cell with all the updates
    cells = max(1, math.ceil(of_receiving / RECEIVING), math.ceil(updates * costs.redis_itself / 1e6 / ROOM / SHARDS))
    shared = {
        # Each reader of an update may be at another node.
        "sending": deliveries * (costs.lone + costs.delivery(1, crowd.size)) / 1e6,
        "publishing": updates * costs.redis_publish / 1e6,
        "heartbeats": crowd.readers / HEARTBEAT_S * (costs.send_cold + costs.pong) / 1e6,
        "coming back": crowd.readers / crowd.return_s * costs.connect / 1e6,
    }
    gigabytes = crowd.readers * (costs.connection_bytes + costs.kernel_bytes) / 1e9
    # Coming back is not everyday work: it may take all of a core but the rest of the work.
    everyday = sum(shared.values()) - shared["coming back"]
    room = ROOM - of_receiving / cells
    wanted = {
        "everyday work": everyday / room,
        "coming back": sum(shared.values()) / (1.0 - of_receiving / cells),
        "memory": gigabytes / node_gigabytes,
    }
    first = max(wanted, key=lambda name: wanted[name])
    nodes = cells * math.ceil(max(wanted.values()) / cells)
    masters = cells * max(1, math.ceil(updates / cells * costs.redis_itself / 1e6 / ROOM))
    traffic = deliveries * (crowd.size + PACKET_BYTES) + crowd.readers / HEARTBEAT_S * BEAT_BYTES
    shared["receiving"] = of_receiving * nodes / cells
    return Fleet(
        updates, deliveries, cells, nodes, masters, crowd.readers / nodes, gigabytes, traffic * 8 / 1e9, first, shared
    )
