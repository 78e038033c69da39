"""The shapes of what is answered, as types: nothing is made from them, everything is checked against them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

from protocol.job import Record
from server.describe.model import Schema

Status = Literal["queued", "processing", "stalled", "completed", "failed", "cancelled"]


class ErrorDetail(Struct, rename="camel"):
    """``code`` is made for programs, ``message`` for people."""

    code: str
    message: str
    request_id: str
    field: str | UnsetType = UNSET


class Error(Struct):
    """Every refusal."""

    error: ErrorDetail


class Health(Struct):
    status: Literal["ok"]


class QueueState(Struct):
    """How one ``[queues.NAME]`` is."""

    state: Literal["up", "standby", "away"]
    reason: str | UnsetType = UNSET


class Ready(Struct):
    status: Literal["ready"]
    queues: dict[str, QueueState] | UnsetType = UNSET


class NotReady(Struct):
    status: Literal["unavailable"]
    reason: str
    error: ErrorDetail


class Me(Struct, rename="camel"):
    """``admin`` includes every capability."""

    user_id: str
    admin: bool
    capabilities: list[Literal["publish", "notify", "ops"]]


class Created(Struct):
    """A new job, and the cursor behind it."""

    job: Record
    id: str


class CreatedBefore(Struct):
    """The answer to a repeat: the job, as far as the caller may see it."""

    job: Record | None
    id: str
    version: int
    duplicate: Literal[True]


class Updated(Struct, rename="camel"):
    """An accepted update. ``duplicate``: it changed nothing; ``cancelRequested``: the worker shall stop."""

    id: str
    version: int
    duplicate: Literal[True] | UnsetType = UNSET
    cancel_requested: Literal[True] | UnsetType = UNSET


class Spooled(Struct, rename="camel"):
    """The store is away: what becomes of it is seen when it is back."""

    spooled: Literal[True]
    job_id: str


class Rejection(Struct):
    """One update of a batch that was refused."""

    index: int
    code: str
    message: str
    field: str | UnsetType = UNSET


class BatchResult(Struct, rename="camel"):
    """What became of a batch. ``cancelRequested`` names jobs that shall stop."""

    accepted: int
    duplicates: int
    rejected: list[Rejection]
    id: str
    cancel_requested: list[str] | UnsetType = UNSET
    spooled: Literal[True] | UnsetType = UNSET


class CancelRequested(Struct):
    job: Record


class JobList(Struct):
    """Newest first. ``next`` is for ``after``."""

    jobs: list[Record]
    next: str | None
    id: str


class JobHistory(Struct):
    """Oldest first."""

    updates: list[JobMessage]
    id: str


class PollAnswer(Struct):
    """``done``: every named job has ended. ``live`` is there while the server is cut off from its store."""

    updates: list[JobMessage]
    last_seen: str
    reset: bool
    timed_out: bool = field(name="timedOut")
    done: bool
    live: Literal[False] | UnsetType = UNSET


class JobMessage(Record, kw_only=True):
    """An update as readers get it: the record, its type, and the cursor behind it."""

    type: Literal["status_update", "job_completed", "job_failed", "job_cancelled", "job_deleted"]
    id: str


class Notification(Struct):
    """What was sent to a client, a user, a channel or everyone. ``id`` is the cursor behind it."""

    type: Literal["notification"]
    id: str
    event: str
    data: Any
    metadata: dict[str, Any]
    timestamp: str


class Sent(Struct):
    """``delivered``: to so many live connections."""

    delivered: int
    id: str
    duplicate: Literal[True] | UnsetType = UNSET


class ConnectionInfo(Struct, rename="camel", kw_only=True):
    """A live connection. ``notifications``: it takes them."""

    client_id: str
    user_id: str
    username: str | UnsetType = UNSET
    transport: Literal["websocket", "sse"]
    address: str
    connected_at: str
    notifications: bool
    channels: list[str]


class ConnectionList(Struct):
    """``next`` is for ``after``, ``total`` of those that take notifications."""

    connections: list[ConnectionInfo]
    next: str | None
    total: int


class ClientState(Struct, rename="camel", kw_only=True):
    """Whether a client is connected; if it is, what is known of it."""

    client_id: str
    connected: bool
    user_id: str | UnsetType = UNSET
    username: str | UnsetType = UNSET
    transport: Literal["websocket", "sse"] | UnsetType = UNSET
    address: str | UnsetType = UNSET
    connected_at: str | UnsetType = UNSET
    notifications: bool | UnsetType = UNSET
    channels: list[str] | UnsetType = UNSET


class UserState(Struct, rename="camel"):
    user_id: str
    online: bool
    connections: int


class Disconnected(Struct):
    disconnected: int


class ByTransport(Struct):
    websocket: int
    sse: int
    poll: int


class ConnectionHealth(Struct):
    healthy: int
    unhealthy: int
    stale: int


class DeliveryLatency(Struct):
    """Of recent flushes, each by its oldest update; 0 before the first."""

    p50: float
    p99: float


class Delivered(Struct):
    live: int
    replay: int
    poll: int


class Readings(Struct):
    snapshot: int
    resume: int
    reset: int


class Published(Struct):
    accepted: int
    duplicate: int
    rejected: int


class ProcessStats(Struct, rename="camel"):
    cpu_seconds: float
    memory_bytes: int
    open_files: int
    tasks: int
    loop_lag_ms: float


class JobStats(Struct, rename="camel"):
    total: int
    by_status: dict[Status, int]


class HistoryStats(Struct):
    updates: int
    bytes: int


class BrokerStats(Struct, rename="camel"):
    """``waiting`` was accepted and is not kept yet; the others are there with a Redis store, or its spool."""

    store: Literal["memory", "sqlite", "redis"]
    available: bool
    epoch: str
    offset: int
    logs_lost: int
    reason: str | UnsetType = UNSET
    waiting: int | UnsetType = UNSET
    waiting_bytes: int | UnsetType = UNSET
    commands: int | UnsetType = UNSET
    connects: int | UnsetType = UNSET
    spool_pending: int | UnsetType = UNSET
    spool_bytes: int | UnsetType = UNSET
    spooled: int | UnsetType = UNSET
    spool_replayed: int | UnsetType = UNSET
    spool_rejected: int | UnsetType = UNSET


class NodeStats(Struct, rename="camel", kw_only=True):
    """What makes sense of one process and of several together. Counts are since the start."""

    total_connections: int
    active_connections: int
    by_transport: ByTransport
    connection_health: ConnectionHealth
    average_connection_time: float
    connection_errors: int
    connections_closed: dict[str, int]
    connections_refused: dict[str, int]
    sockets: int
    messages_delivered: int
    delivered: Delivered
    conflated: int
    delivery_latency_ms: DeliveryLatency = field(name="deliveryLatencyMs")
    readings: Readings
    published: dict[str, Published]
    shown: int
    requests: dict[str, int]
    errors: dict[str, int]
    process: ProcessStats


class OneNode(NodeStats, kw_only=True):
    """One of several nodes."""

    node: str


class Stats(NodeStats, kw_only=True):
    """All nodes together, and the one that answers. ``uptime`` in seconds."""

    jobs: JobStats
    history: HistoryStats
    broker: BrokerStats
    draining: bool
    uptime: float
    version: str
    nodes: list[OneNode] | UnsetType = UNSET


STATUS: Schema = {"type": "string", "enum": ["queued", "processing", "stalled", "completed", "failed", "cancelled"]}
TIME: Schema = {"type": "string", "format": "date-time"}
# Where a type says less than is known: what was encoded before, and texts of a known form.
OF_RECORDS: dict[str, Any] = {
    "status": STATUS,
    "steps": {"$ref": "#/components/schemas/Steps"},
    "metadata": {"type": "object"},
    "progress": {"type": "number", "minimum": 0, "maximum": 100},
    "estimatedTimeRemaining": {"type": "number", "minimum": 0},
    **dict.fromkeys(("createdAt", "startedAt", "timestamp", "endedAt", "estimatedCompletionTime"), TIME),
}
