"""What is measured, as a table; the numbers of one process; and several processes as one.

A *sample* is one process's numbers as plain data, which nodes can send each other: by name a number, or numbers by
label values joined with spaces. ``/metrics`` and ``/api/v2/stats`` both show samples that were merged.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import trio

from server.config import Config
from server.counters import DELAY_MS
from server.transports.live import stale_after

if TYPE_CHECKING:
    from server.node import Node

Value: TypeAlias = float | dict[str, float]
Sample: TypeAlias = dict[str, Value]

# The last sign of life of a client that does answer is as old as a heartbeat, and the time its answer takes.
ANSWER_S: Final = 5.0
# Not a metric: the delivery times of recent flushes, for the quantiles of ``stats``.
RECENT: Final = "recent_delivery_seconds"

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Metric(NamedTuple):
    """One row of the table.

    Attributes:
        name: as scraped, with its unit; counters end in ``_total``.
        kind: ``counter`` only goes up, ``gauge`` is as of now, ``histogram`` counts by upper bound.
        help: one sentence.
        labels: names of the labels, in the order in which their values stand in a sample.
        merge: how several processes make one number. What all of them know alike, the shared log for one, is not added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    merge: Literal["sum", "max", "min"] = "sum"


METRICS: Final = (
    Metric("statuswire_processes", "gauge", "Server processes that this scrape covers."),
    Metric("statuswire_ready", "gauge", "1 if all of them want traffic: not draining, the store is there.", (), "min"),
    Metric("statuswire_sockets", "gauge", "Open sockets, whatever they are used for."),
    Metric("statuswire_sockets_accepted_total", "counter", "Accepted sockets."),
    Metric("statuswire_sockets_refused_total", "counter", "Sockets turned away at once, by why.", ("reason",)),
    Metric("statuswire_connections", "gauge", "Live connections, and polls that wait.", ("transport",)),
    Metric("statuswire_connections_opened_total", "counter", "Live connections, and polls, so far.", ("transport",)),
    Metric("statuswire_connections_closed_total", "counter", "Live connections that ended, by why.", ("reason",)),
    Metric("statuswire_connections_health", "gauge", "Live connections by their last sign of life.", ("health",)),
    Metric("statuswire_connection_errors_total", "counter", "Connections that ended otherwise than they should."),
    Metric("statuswire_connection_seconds_total", "counter", "Seconds that all live connections have lasted."),
    Metric("statuswire_http_requests_total", "counter", "Requests by method, path and class of the answer's status.",
           ("method", "route", "status")),
    Metric("statuswire_errors_total", "counter", "Refusals by code, in answers and in WebSocket messages.", ("code",)),
    Metric("statuswire_websocket_messages_received_total", "counter", "Messages from WebSocket clients."),
    Metric("statuswire_updates_published_total", "counter", "Updates from publishers.", ("source", "outcome")),
    Metric("statuswire_ingest_dropped_total", "counter",
           "Updates from the channels of Redis that could not be accepted in time."),
    Metric("statuswire_ingest_dead_total", "counter",
           "Updates from the stream of Redis that were set aside as dead letters."),
    Metric("statuswire_ingest_trimmed_total", "counter",
           "Updates from Redis of which unknown fields were left out.", ("source",)),
    Metric("statuswire_queue_up", "gauge", "1 if the jobs of this queue are taken in.", ("source",), "max"),
    Metric("statuswire_queue_open_jobs", "gauge", "Jobs of this queue that have not ended.", ("source",), "max"),
    Metric("statuswire_updates_shown_total", "counter", "Updates shown here, whoever published them."),
    Metric("statuswire_updates_delivered_total", "counter",
           "Updates given to readers: live, replayed to one that came back, or in the answer to a poll.", ("way",)),
    Metric("statuswire_updates_conflated_total", "counter", "Updates that a slow reader got only a newer one of."),
    Metric("statuswire_readings_total", "counter", "Readings by how they began.", ("start",)),
    Metric("statuswire_delivery_seconds", "histogram",
           "From acceptance to the last reader's socket, once for each flush: its oldest update."),
    Metric("statuswire_pending_bytes", "gauge", "Updates that are yet to be written to sockets."),
    Metric("statuswire_channels", "gauge", "Things that are watched."),
    Metric("statuswire_jobs", "gauge", "Jobs that are known, by status.", ("status",), "max"),
    Metric("statuswire_log_updates", "gauge", "Updates kept for readers that come back.", (), "max"),
    Metric("statuswire_log_bytes", "gauge", "Memory of those updates.", (), "max"),
    Metric("statuswire_log_offset", "gauge", "Position of the newest update.", (), "max"),
    Metric("statuswire_logs_lost_total", "counter", "Times the log began anew, and all readers with it.", (), "max"),
    Metric("statuswire_store_up", "gauge", "1 while the store takes updates.", (), "min"),
    Metric("statuswire_store_waiting", "gauge", "Updates accepted and not kept yet."),
    Metric("statuswire_store_waiting_bytes", "gauge", "Bytes of those, where they are counted."),
    Metric("statuswire_store_commands", "gauge", "Commands that wait for an answer of Redis."),
    Metric("statuswire_store_connects_total", "counter", "Connections made to Redis."),
    Metric("statuswire_spool_waiting", "gauge", "Updates on this server's disk that wait for Redis."),
    Metric("statuswire_spool_bytes", "gauge", "Bytes of those."),
    Metric("statuswire_spooled_total", "counter", "Updates that were answered from the spool."),
    Metric("statuswire_spool_replayed_total", "counter", "Updates of the spool that Redis has accepted since."),
    Metric("statuswire_spool_rejected_total", "counter", "Updates of the spool that were refused then."),
    Metric("statuswire_notifications_total", "counter", "Notifications that were sent here, by outcome.", ("outcome",)),
    Metric("statuswire_inbox_places", "gauge", "Notifications stored for users, each user's counted.", (), "max"),
    Metric("statuswire_callbacks_total", "counter", "What became of ends of jobs that an application was to be told.",
           ("callback", "outcome")),
    Metric("statuswire_callbacks_waiting", "gauge", "Ends of jobs that an application is yet to be told.",
           ("callback",)),
    Metric("statuswire_auth_hook_asked_total", "counter", "Questions to the application who a caller is."),
    Metric("statuswire_auth_hook_failed_total", "counter", "Those of them without a usable answer."),
    Metric("statuswire_loop_lag_seconds", "gauge", "How late the loop was at most within the last minute.", (), "max"),
    Metric("statuswire_tasks", "gauge", "Tasks of the process."),
    Metric("process_cpu_seconds_total", "counter", "User and system CPU time."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
    Metric("process_open_fds", "gauge", "Open file descriptors."),
    Metric("process_max_fds", "gauge", "Most file descriptors that may be open."),
    Metric("process_start_time_seconds", "gauge", "When the process started, unix seconds.", (), "min"),
)  # fmt: skip
# What brokers call their figures, and under which name they are shown.
FIGURES: Final = {
    "waiting": "statuswire_store_waiting",
    "waitingBytes": "statuswire_store_waiting_bytes",
    "commands": "statuswire_store_commands",
    "connects": "statuswire_store_connects_total",
    "spoolPending": "statuswire_spool_waiting",
    "spoolBytes": "statuswire_spool_bytes",
    "spooled": "statuswire_spooled_total",
    "spoolReplayed": "statuswire_spool_replayed_total",
    "spoolRejected": "statuswire_spool_rejected_total",
}


def sample(node: Node) -> Sample:
    """The numbers of this process as of now; those of things that there are not here are left out."""
    counters, broker, now = node.counters, node.broker, trio.current_time()
    connections: dict[str, float] = {"websocket": 0, "sse": 0, "poll": len(node.polls)}
    health: dict[str, float] = {"healthy": len(node.polls), "unhealthy": 0, "stale": 0}
    state_of = health_at(now, node.config)
    for stream in node.streams:
        connections[stream.transport] += 1
        health[state_of(stream.heard_at)] += 1
    requests: dict[str, float] = {}
    for (method, path, status), count in counters.requests.items():
        key = f"{method or '-'} {path or '-'} {status // 100}xx"
        requests[key] = requests.get(key, 0) + count
    figures = broker.figures()
    return {
        "statuswire_processes": 1,
        "statuswire_ready": int(not node.draining and broker.available is None),
        "statuswire_sockets": node.connections,
        "statuswire_sockets_accepted_total": counters.sockets,
        "statuswire_sockets_refused_total": {**counters.refused},
        "statuswire_connections": connections,
        "statuswire_connections_opened_total": {**counters.opened},
        "statuswire_connections_closed_total": {**counters.closed},
        "statuswire_connections_health": health,
        "statuswire_connection_errors_total": counters.connection_errors,
        "statuswire_connection_seconds_total": max(0.0, counters.lived_s + now * len(node.streams)),
        "statuswire_http_requests_total": requests,
        "statuswire_errors_total": {**counters.errors},
        "statuswire_websocket_messages_received_total": counters.messages,
        "statuswire_updates_published_total": {" ".join(key): count for key, count in counters.updates.items()}
        | (node.ingest.published() if node.ingest is not None else {})
        | (node.queues.published() if node.queues is not None else {}),
        **(node.ingest.sample() if node.ingest is not None else {}),
        **(node.queues.sample() if node.queues is not None else {}),
        "statuswire_updates_shown_total": counters.shown,
        "statuswire_updates_delivered_total": {
            "live": counters.delivered,
            "replay": counters.replayed,
            "poll": counters.polled,
        },
        "statuswire_updates_conflated_total": counters.conflated,
        "statuswire_readings_total": {**counters.begun},
        "statuswire_delivery_seconds": delays_as_value(counters.delays.counts, counters.delays.sum_ms),
        RECENT: delays_as_value(counters.delays.recent, 0.0),
        "statuswire_pending_bytes": node.hub.pending_bytes,
        "statuswire_channels": len(node.hub.channels),
        "statuswire_jobs": {**node.jobs.by_status},
        "statuswire_log_updates": len(node.history),
        "statuswire_log_bytes": node.history.bytes,
        "statuswire_log_offset": node.history.last,
        "statuswire_logs_lost_total": counters.logs_lost,
        "statuswire_store_up": int(broker.available is None),
        **{name: figures[key] for key, name in FIGURES.items() if key in figures},
        "statuswire_notifications_total": {**counters.notices},
        "statuswire_inbox_places": broker.inboxes.places,
        **_told(node),
        "statuswire_loop_lag_seconds": max(counters.loop_late_s),
        "statuswire_tasks": trio.lowlevel.current_statistics().tasks_living,
        **process_sample(),
        "process_start_time_seconds": node.started,
    }


def _told(node: Node) -> Sample:
    """What became of what the application was asked or told, if it is."""
    found: Sample = {}
    if node.callbacks is not None:
        found["statuswire_callbacks_total"] = {
            f"{teller.name} {outcome}": getattr(teller.counts, outcome)
            for teller in node.callbacks.tellers
            for outcome in ("told", "failed", "given_up", "seen")
        }
        found["statuswire_callbacks_waiting"] = {teller.name: teller.waiting for teller in node.callbacks.tellers}
    if (hook := node.authenticator.hook) is not None:
        found["statuswire_auth_hook_asked_total"] = hook.asked
        found["statuswire_auth_hook_failed_total"] = hook.failed
    return found


def process_sample() -> Sample:
    """What the operating system says of this process."""
    with open("/proc/self/statm", "rb") as file:
        resident = int(file.read().split()[1]) * _PAGE
    return {
        "process_cpu_seconds_total": time.process_time(),
        "process_resident_memory_bytes": resident,
        "process_open_fds": _open_descriptors(),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _open_descriptors() -> int:
    """Linux 6.2 tells the number; listing 10,000 of them takes 10 ms."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1


def health_at(now: float, config: Config) -> Callable[[float], str]:
    """How to call a connection by when it was last heard: ``healthy``, ``unhealthy`` or ``stale``."""
    unhealthy_before = now - max(config.health.unhealthy_after, config.server.heartbeat) - ANSWER_S
    stale_before = now - stale_after(config)

    def state(heard_at: float) -> str:
        return "healthy" if heard_at >= unhealthy_before else "unhealthy" if heard_at >= stale_before else "stale"

    return state


def delays_as_value(counts: Iterable[float], sum_ms: float) -> dict[str, float]:
    """A histogram's counts by upper bound in seconds (each alone, not added up), and their ``sum``."""
    bounds = [*(f"{bound / 1000:g}" for bound in DELAY_MS), "+Inf"]
    return {**dict(zip(bounds, counts, strict=True)), "sum": sum_ms / 1000}


def quantile_ms(recent: Mapping[str, float], share: float) -> float:
    """The delay, in milliseconds, below which this share of the samples lies, straight between the bounds; 0 without
    samples, and the last bound for what is beyond it."""
    counts = [count for bound, count in recent.items() if bound != "sum"]
    left = share * sum(counts)
    if not left:
        return 0.0
    low = 0.0
    for count, high in zip(counts, DELAY_MS, strict=False):
        if count >= left:
            return round(low + (high - low) * left / count, 3)
        left -= count
        low = high
    return low


_MERGE: Final[dict[str, Callable[[Iterable[float]], float]]] = {"sum": sum, "max": max, "min": min}
_MERGES: Final = {metric.name: _MERGE[metric.merge] for metric in METRICS} | {RECENT: sum}


def merged(samples: Iterable[Sample]) -> Sample:
    """Several processes as one. Names that this version does not know are left out."""
    found: dict[str, list[Value]] = {}
    for one in samples:
        for name, value in one.items():
            if name in _MERGES:
                found.setdefault(name, []).append(value)
    result: Sample = {}
    for name, values in found.items():
        merge = _MERGES[name]
        numbers = [value for value in values if not isinstance(value, dict)]
        if numbers:
            result[name] = merge(numbers)
            continue
        by_label: dict[str, list[float]] = {}
        for value in values:
            assert isinstance(value, dict)
            for key, number in value.items():
                by_label.setdefault(key, []).append(number)
        result[name] = {key: merge(group) for key, group in by_label.items()}
    return result
