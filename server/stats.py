"""``/api/v2/stats``: how it goes, in one JSON object, over all nodes."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, Final

from server.metrics import FIGURES, RECENT, Sample, merged, quantile_ms, sample
from server.node import Node

VERSION: Final = version("statuswire")


async def samples(node: Node, *, everywhere: bool) -> dict[str, Sample]:
    """Samples by node id: of this node's own process group, or of all nodes. Those of others are some seconds old."""
    cluster = node.cluster
    if cluster is None or (cluster.group == cluster.node_id and not everywhere):
        return {"": sample(node)}
    peers = [peer for peer in await cluster.peers() if peer.stats and (everywhere or peer.group == cluster.group)]
    return {peer.node_id: peer.stats for peer in peers} | {cluster.node_id: sample(node)}


async def stats(node: Node) -> dict[str, Any]:
    """The numbers of all nodes added up, and those of each node under ``nodes`` if there are several."""
    by_node = await samples(node, everywhere=True)
    total = merged(by_node.values())
    broker = node.broker
    answer = summary(total) | {
        "jobs": {
            "total": int(sum(_many(total, "statuswire_jobs").values())),
            "byStatus": _many(total, "statuswire_jobs"),
        },
        "history": {
            "updates": _one(total, "statuswire_log_updates"),
            "bytes": _one(total, "statuswire_log_bytes"),
        },
        "broker": {
            "store": node.config.store.kind,
            "available": broker.available is None,
            **({} if broker.available is None else {"reason": broker.available}),
            "epoch": broker.epoch,
            "offset": node.history.last,
            "logsLost": _one(total, "statuswire_logs_lost_total"),
            **{key: _one(total, name) for key, name in FIGURES.items() if name in total},
        },
        "draining": node.draining,
        "uptime": round(time.time() - node.started, 3),
        "version": VERSION,
    }
    if len(by_node) > 1:
        answer["nodes"] = [{"node": name, **summary(one)} for name, one in by_node.items()]
    return answer


def summary(one: Sample) -> dict[str, Any]:
    """What makes sense of one process and of several alike."""
    connections = _many(one, "statuswire_connections")
    opened = _many(one, "statuswire_connections_opened_total")
    live = opened["websocket"] + opened["sse"]
    delivered = _many(one, "statuswire_updates_delivered_total")
    recent = _by_label(one, RECENT)
    requests: dict[str, int] = {}
    for key, count in _many(one, "statuswire_http_requests_total").items():
        status = key.rpartition(" ")[2]
        requests[status] = requests.get(status, 0) + count
    published: dict[str, dict[str, int]] = {}
    for key, count in _many(one, "statuswire_updates_published_total").items():
        source, outcome = key.split(" ")
        published.setdefault(source, {})[outcome] = count
    return {
        "totalConnections": sum(opened.values()),
        "activeConnections": sum(connections.values()),
        "byTransport": connections,
        "connectionHealth": _many(one, "statuswire_connections_health"),
        "averageConnectionTime": round(_number(one, "statuswire_connection_seconds_total") / live, 3) if live else 0,
        "connectionErrors": _one(one, "statuswire_connection_errors_total"),
        "connectionsClosed": _many(one, "statuswire_connections_closed_total"),
        "connectionsRefused": _many(one, "statuswire_sockets_refused_total"),
        "sockets": _one(one, "statuswire_sockets"),
        "messagesDelivered": sum(delivered.values()),
        "delivered": delivered,
        "conflated": _one(one, "statuswire_updates_conflated_total"),
        "deliveryLatencyMs": {"p50": quantile_ms(recent, 0.5), "p99": quantile_ms(recent, 0.99)},
        "readings": _many(one, "statuswire_readings_total"),
        "published": published,
        "shown": _one(one, "statuswire_updates_shown_total"),
        "requests": requests,
        "errors": _many(one, "statuswire_errors_total"),
        "process": {
            "cpuSeconds": round(_number(one, "process_cpu_seconds_total"), 3),
            "memoryBytes": _one(one, "process_resident_memory_bytes"),
            "openFiles": _one(one, "process_open_fds"),
            "tasks": _one(one, "statuswire_tasks"),
            "loopLagMs": round(1000 * _number(one, "statuswire_loop_lag_seconds"), 3),
        },
    }


def _number(one: Sample, name: str) -> float:
    value = one.get(name, 0)
    assert not isinstance(value, dict)
    return value


def _one(one: Sample, name: str) -> int:
    return int(_number(one, name))


def _many(one: Sample, name: str) -> dict[str, int]:
    return {key: int(count) for key, count in _by_label(one, name).items()}


def _by_label(one: Sample, name: str) -> dict[str, float]:
    value = one.get(name, {})
    assert isinstance(value, dict)
    return value
