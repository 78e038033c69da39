"""What can be configured: one typed table each, with every default's reason. ``config_load`` fills them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

from server.config_rules import is_loopback as is_loopback

JwtAlgorithm: TypeAlias = Literal[
    "", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
    "ES256", "ES384", "ES512", "EdDSA",
]  # fmt: skip
Seconds: TypeAlias = Annotated[float, Meta(gt=0)]
SecondsOrZero: TypeAlias = Annotated[float, Meta(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1)]
CountOrZero: TypeAlias = Annotated[int, Meta(ge=0)]
RateOrZero: TypeAlias = Annotated[float, Meta(ge=0)]


class ConfigError(Exception):
    """A configuration that cannot be used; the message says which key, which value, from where, and what to do."""


class Server(Struct, frozen=True, kw_only=True):
    """Table ``[server]``: where to listen and how to treat connections.

    Attributes:
        host: address or name to bind; "" only together with ``unix_socket``: no TCP at all.
        port: TCP port; 0 takes any free one, the start line shows which.
        unix_socket: path of a Unix socket to listen on, "" for none. Alone (neither host nor port set by anyone)
            it replaces TCP; otherwise the server listens on both.
        workers: processes.
        drain: seconds over which live streams are closed after SIGTERM; 0 closes them at once.
        base_path: prefix of every path, normalised to "" or "/x/y".
        trusted_proxies: addresses and networks whose ``X-Forwarded-For`` is believed; ``unix`` for the Unix socket.
        proxy_protocol: connections of trusted proxies begin with a PROXY header (``protocol.proxy``), and only those.
        max_connections: open sockets, over all clients.
        heartbeat: seconds between heartbeats and pings.
        tls_cert: PEM file with the certificate and its chain, "" for no TLS. For TCP only.
        tls_key: PEM file with its key, "" for the same file.
    """

    # Without auth everyone is an admin, so nobody else may reach it until the operator says so.
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 3000
    unix_socket: str = ""
    # One process does what one core can; several need a store that they share.
    workers: AtLeastOne = 1
    # Long enough to spread 10,000 reconnects, short enough for the ten seconds most supervisors wait before SIGKILL.
    drain: SecondsOrZero = 3.0
    base_path: str = ""
    # Nobody: a forwarded address that anyone may claim is worth nothing.
    trusted_proxies: tuple[str, ...] = ()
    # A header that is asked for and does not come cannot be told from one that is not sent.
    proxy_protocol: bool = False
    # At 8 KB for an idle connection about 160 MB; the usual limit of open files must be raised to match.
    max_connections: AtLeastOne = 20_000
    # Below the 60 s after which common proxies drop a silent connection.
    heartbeat: Seconds = 30.0
    tls_cert: str = ""
    tls_key: str = ""

    @property
    def tcp(self) -> bool:
        """Whether the server listens on ``host:port``."""
        return bool(self.host)


class Auth(Struct, frozen=True, kw_only=True):
    """Table ``[auth]``: how callers prove who they are. Empty: open mode, everyone is an admin, loopback only.

    Attributes:
        jwt_algorithm: the one algorithm that is accepted, whatever a token says of itself; "" without auth, and for a
            ``jwt_key_file`` that may hold a shared secret: HS256 then.
        jwt_key: shared secret (HS*) or PEM key, "" for none.
        jwt_key_file: file with the same, "" for none.
        jwks_file: file with a JSON Web Key Set (RFC 7517), "" for none.
        hook_url: URL of the application's own auth check, "" for none.
        hook_timeout: seconds the application has to answer.
        hook_cache: seconds an answer of it is remembered at most.
        hook_concurrency: requests to it that are under way at once.
        jwt_audience: required ``aud`` claim, "" for no check.
        jwt_issuer: required ``iss`` claim, "" for no check.
        default_channels: channels, or patterns of them, that those may join whose token says nothing of ``channels``.
    """

    jwt_algorithm: JwtAlgorithm = ""
    jwt_key: str = ""
    jwt_key_file: str = ""
    jwks_file: str = ""
    hook_url: str = ""
    # A page that waits longer shows nothing anyway.
    hook_timeout: Seconds = 5.0
    # A page's several requests are one question; a session that ends is over for new connections soon after.
    hook_cache: SecondsOrZero = 10.0
    # As many as a usual application server has workers.
    hook_concurrency: AtLeastOne = 32
    jwt_audience: str = ""
    jwt_issuer: str = ""
    # A channel's name is a subject, like a topic in a room; what only some may hear takes a claim or another default.
    default_channels: tuple[str, ...] = ("*",)

    @property
    def keyed(self) -> bool:
        """Whether tokens can be verified."""
        return bool(self.jwt_key or self.jwt_key_file or self.jwks_file)

    @property
    def open(self) -> bool:
        """Whether no credential is asked for."""
        return not (self.keyed or self.hook_url)

    @property
    def shown_hook_url(self) -> str:
        """The hook's URL without what is secret in it."""
        return without_password(self.hook_url).partition("?")[0]


class Cors(Struct, frozen=True, kw_only=True):
    """Table ``[cors]``.

    Attributes:
        origins: browser origins besides the server's own, spelled as browsers send them (``https://app.example``);
            ``*`` is any page and ``null`` any sandboxed one, both without cookies and only with auth.
    """

    origins: tuple[str, ...] = ()


class History(Struct, frozen=True, kw_only=True):
    """Table ``[history]``: how far back a reader can resume, and what is kept in memory.

    Attributes:
        max_updates: kept updates.
        max_age: seconds an update is kept.
        max_bytes: bytes of kept updates.
        max_jobs: job records kept; the longest-ended ones go first.
    """

    # Ten seconds of the highest measured rate, hours of a usual one.
    max_updates: AtLeastOne = 100_000
    # A reader that was away for a day takes a snapshot just as well.
    max_age: Seconds = 86_400.0
    # Updates are about half a kilobyte: reached together with max_updates.
    max_bytes: AtLeastOne = 64 * 1024 * 1024
    max_jobs: AtLeastOne = 100_000


class Limits(Struct, frozen=True, kw_only=True):
    """Table ``[limits]``: what one user or address may do. 0 is no limit.

    Attributes:
        connections_per_user: live connections of one user.
        connections_per_address: open sockets of one address; behind a trusted proxy, requests and streams.
        connects_per_second: accepted sockets per address.
        messages_per_second: incoming WebSocket messages per user.
        publishes_per_second: published updates per user.
        max_message: bytes of the largest incoming WebSocket message.
        backlog: bytes that may wait for one slow reader before it is closed to resume later.
        unfinished: bytes of large bodies and messages that are being received, and of what large answers are made
            from, over all connections.
        jobs_per_connection: jobs that one WebSocket connection may watch by name.
        head_timeout: seconds for the head of a request, from its first byte; of a new connection from the beginning.
        body_timeout: seconds between two pieces of a body.
        upload_timeout: seconds for all of a body that is read before it is answered.
        idle_timeout: seconds that an HTTP connection is kept without a request.
        send_timeout: seconds in which a peer that takes nothing of what it is sent is given up.
        poll_timeout: seconds that a poll waits, whatever it asks for.
        auth_timeout: seconds until a WebSocket client without a token must have sent ``auth``.
    """

    connections_per_user: CountOrZero = 0
    # Behind a proxy that is not in ``trusted_proxies`` everyone has one address.
    connections_per_address: CountOrZero = 0
    connects_per_second: RateOrZero = 0.0
    messages_per_second: RateOrZero = 0.0
    publishes_per_second: RateOrZero = 0.0
    # A subscribe to 1000 jobs with the longest ids is an eighth of it.
    max_message: AtLeastOne = 1024 * 1024
    # The newest of some ten thousand jobs. What is held is shared with the log and the records, so this much text
    # costs about 1 MB of memory.
    backlog: AtLeastOne = 4 * 1024 * 1024
    # Thirty of the largest batches at once, or two thousand of the largest updates.
    unfinished: AtLeastOne = 256 * 1024 * 1024
    # More than any page shows; who wants more asks for a user's jobs, or all.
    jobs_per_connection: AtLeastOne = 10_000
    # A head that takes longer than this to come is an attack or a broken peer: a person's slowest link needs 2 s.
    head_timeout: Seconds = 10.0
    body_timeout: Seconds = 30.0
    # 8 MiB come in that time at 30 KB/s.
    upload_timeout: Seconds = 300.0
    # Longer than the 60 s for which nginx keeps an upstream connection, so that it is never we who close under it.
    idle_timeout: Seconds = 75.0
    # Below the two minutes after which a silent connection is called stale (RFC 9112 section 9.5 leaves it to us).
    send_timeout: Seconds = 60.0
    # The most that can be asked for; less, where a proxy gives up sooner.
    poll_timeout: Annotated[float, Meta(gt=0, le=60)] = 60.0
    auth_timeout: Seconds = 10.0


class Store(Struct, frozen=True, kw_only=True):
    """Table ``[store]``.

    Attributes:
        url: ``memory:`` (nothing survives a restart), ``sqlite:PATH`` (relative to the working directory), or where
            Redis is: ``redis://``, ``rediss://``, ``redis+sentinel://`` or ``redis+cluster://``.
        spool: keep what is published while Redis is away on the local disk, and pass it on later.
        spool_path: file for it, relative to the working directory; each server needs its own.
        spool_max_bytes: most that waits there; beyond, publishes are refused.
    """

    # Durable without anything to install or run.
    url: str = "sqlite:statuswire.db"
    # Who publishes then learns that it is kept, but not what became of it: that should be somebody's decision.
    spool: bool = False
    spool_path: str = "statuswire.spool"
    # Some two million updates: an hour at 500 a second.
    spool_max_bytes: AtLeastOne = 1024 * 1024 * 1024

    @property
    def kind(self) -> Literal["memory", "sqlite", "redis"]:
        """Which broker the URL asks for."""
        if self.url.startswith("redis"):
            return "redis"
        return "memory" if self.url == "memory:" else "sqlite"

    @property
    def path(self) -> str:
        """Path of the SQLite file; "" for the others."""
        return self.url.partition(":")[2] if self.kind == "sqlite" else ""

    def spool_file(self, worker: int | None = None) -> str:
        """The spool of this process: the only one, or one of several by its number."""
        return self.spool_path if worker is None else f"{self.spool_path}.{worker}"

    @property
    def label(self) -> str:
        """The URL without what is secret in it."""
        return without_password(self.url)


class Ingest(Struct, frozen=True, kw_only=True):
    """Table ``[ingest]``: taking updates in from the Redis that is the store; without one it means nothing.

    Attributes:
        channels: take in what is published to the pub/sub channels ``job_status_updates``, ``job_progress_updates`` and
            ``job_completion_updates``.
        stream: take in what is added to the stream ``statuswire:ingest``.
    """

    # Whoever can write to that Redis could write the store itself, so nothing is opened to anybody.
    channels: bool = True
    stream: bool = True


class Log(Struct, frozen=True, kw_only=True):
    """Table ``[log]``.

    Attributes:
        format: ``plain`` for people, ``json`` for collectors; one line per event on stderr either way.
        level: least level that is written.
    """

    format: Literal["plain", "json"] = "plain"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Health(Struct, frozen=True, kw_only=True):
    """Table ``[health]``: how long live connections may give no sign of life. Heartbeats ask for one.

    Attributes:
        check_interval: seconds between two looks at all of them.
        unhealthy_after: seconds without a sign after which one counts as unhealthy; not before the next heartbeat.
        stale_after: seconds after which it is closed; not before the fourth heartbeat.
    """

    check_interval: Seconds = 30.0
    unhealthy_after: Seconds = 30.0
    # Shorter than most networks' memory of a connection, longer than a lift or a tunnel.
    stale_after: Seconds = 120.0


class Views(Struct, frozen=True, kw_only=True):
    """Table ``[views]``: the event streams of tasks, reports and other views of jobs.

    Attributes:
        progress_interval: seconds between two looks at the progress of a job: of the updates in between only the newest
            is sent. A change of status, and above all an end, is sent at once. 0 sends every update.
    """

    # Browsers draw sixty times a second at most, but then every reader has updates of its own encoded for it.
    progress_interval: SecondsOrZero = 0.0


class Debug(Struct, frozen=True, kw_only=True):
    """Table ``[debug]``.

    Attributes:
        echo: adds ``/ws/echo``, which returns every message through the same WebSocket code.
    """

    # Anyone could make the server send: for compliance suites only.
    echo: bool = False


class Webhook(Struct, frozen=True, kw_only=True):
    """Table ``[webhooks.NAME]``: what another system posts to ``/api/webhooks/NAME`` becomes a notification.

    Attributes:
        secret: the key of the signatures.
        event: the notification's event.
        target: who gets it, see ``protocol.notice``.
        target_id: JSON pointer (RFC 6901) to the id or ids in the body; or, without a leading ``/``, the id itself.
        data: JSON pointer to what is passed on; "" for the whole body.
        store: keep it for users who are not there.
    """

    secret: str = ""
    event: str = ""
    target: Literal["client", "user", "users", "channel", "channels", "broadcast"] = "user"
    target_id: str = ""
    data: str = ""
    store: bool = False


class Callback(Struct, frozen=True, kw_only=True):
    """Table ``[callbacks.NAME]``: a URL of the application that is told when jobs end.

    Attributes:
        url: where to POST.
        secret: the key of the signatures; "" for none.
        types: which updates.
        kinds: only jobs of these kinds; empty for all.
        unseen_after: seconds after which it is told only of what nobody of the job's user was there to see;
            0 to be told of everything, at once.
        timeout: seconds it has to answer.
        give_up_after: seconds of trying.
        concurrency: requests to it that are under way at once.
    """

    url: str = ""
    secret: str = ""
    types: tuple[Literal["job_completed", "job_failed", "job_cancelled"], ...] = (
        "job_completed",
        "job_failed",
        "job_cancelled",
    )
    kinds: tuple[str, ...] = ()
    unseen_after: SecondsOrZero = 0.0
    timeout: Seconds = 10.0
    # As long as the log remembers, by default.
    give_up_after: Seconds = 86_400.0
    concurrency: AtLeastOne = 8


class Queue(Struct, frozen=True, kw_only=True):
    """Table ``[queues.NAME]``: a job queue whose jobs are shown here as they are worked off.

    Attributes:
        kind: whose software it is.
        url: where it keeps its state: as the store's, ``redis+cluster://`` only for BullMQ and Bull; Celery's result
            backend.
        events_url: where Celery's workers send events, if that is another Redis; "" for the same.
        queues: names of queues; empty for all that are found there. Celery does not say which queue a task is in.
        prefix: in front of BullMQ's and Bull's keys, or Celery's ``global_keyprefix``.
        id_prefix: in front of the ids of its jobs here, for queues of the same names in several Redis.
        user: path to the id of a job's owner, see ``docs/queues.md``; "" for the usual place.
        results: whether what jobs return goes into their records.
        stalled_after: seconds without a sign of life from a worker after which its jobs are shown as stalled, and
            twice as many until they are shown as failed; 0 for never.
        poll: seconds between two looks at RQ's jobs, where Redis gives no notice of changes.
    """

    kind: Literal["", "bullmq", "bull4", "celery", "rq"] = ""
    url: str = "redis://127.0.0.1:6379/0"
    events_url: str = ""
    queues: tuple[str, ...] = ()
    prefix: str = ""
    id_prefix: str = ""
    user: str = ""
    # Reports are written to be seen; what a job returns may be anybody's guess.
    results: bool = False
    # RQ's workers give a sign of life every half minute.
    stalled_after: SecondsOrZero = 90.0
    poll: Seconds = 0.5


class Config(Struct, frozen=True, kw_only=True):
    """Everything that can be set, checked: one table each, or one for every name."""

    server: Server = field(default_factory=Server)
    auth: Auth = field(default_factory=Auth)
    cors: Cors = field(default_factory=Cors)
    history: History = field(default_factory=History)
    limits: Limits = field(default_factory=Limits)
    store: Store = field(default_factory=Store)
    health: Health = field(default_factory=Health)
    views: Views = field(default_factory=Views)
    ingest: Ingest = field(default_factory=Ingest)
    log: Log = field(default_factory=Log)
    debug: Debug = field(default_factory=Debug)
    webhooks: dict[str, Webhook] = field(default_factory=dict)
    callbacks: dict[str, Callback] = field(default_factory=dict)
    queues: dict[str, Queue] = field(default_factory=dict)


def without_password(text: str) -> str:
    """A URL as it may be shown: a password in it, should one be there, is nobody's business."""
    text = re.sub(r"://.*@", "://(hidden)@", text)
    return re.sub(r"(sentinel_password=).*", r"\1(hidden)", text)
