"""Where Redis is (``redis://``, ``rediss://``, ``redis+sentinel://``, ``redis+cluster://``), and client options."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from server.brokers.redis_errors import RedisStartError

Topology = Literal["single", "sentinel", "cluster"]

_SCHEMES: Final[dict[str, tuple[Topology, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_TLS_PARAMETERS: Final = ("ca", "cert", "key", "verify_host")
_SENTINEL_PARAMETERS: Final = ("sentinel_username", "sentinel_password")
_ENCODING: Final = "user and password must be percent-encoded (%40 for @, %2F for /, %3F for ?, %23 for #)"


class Address(NamedTuple):
    """A TCP address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How patient a client is. Times in seconds.

    Attributes:
        connect_timeout_s: for a whole attempt: TCP, TLS, AUTH, SELECT, INFO.
        command_timeout_s: a command unanswered for so long means that the connection is dead.
        ping_every_s: with nothing owed and nothing heard for so long, a PING is sent.
        silence_s: an answer is owed and not a byte came for so long: the connection is dead. A frozen or cut Redis is
            thus noticed within ``ping_every_s + silence_s``, 3 s, so a blocking command (on a client of its own) must
            not block for longer than ``silence_s``.
        backoff_base_s, backoff_cap_s: before attempt n the wait is random between 0 and min(cap, base * 2^n)
            ("full jitter": many nodes do not come back in step). The cap bounds what a restart costs beyond itself.
        max_commands, max_bytes: unanswered commands per connection; beyond, ``OverloadedError``.
        start_patience_s: how long ``start`` tries again while Redis is unreachable, loading, or electing a master.
        name: shown by CLIENT LIST.
    """

    connect_timeout_s: float = 2.0
    command_timeout_s: float = 5.0
    ping_every_s: float = 1.0
    silence_s: float = 2.0
    backoff_base_s: float = 0.05
    backoff_cap_s: float = 2.0
    max_commands: int = 100_000
    max_bytes: int = 64 * 1024 * 1024
    start_patience_s: float = 5.0
    name: str = "statuswire"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """A parsed URL. ``str()`` of it shows no secret."""

    topology: Topology
    addresses: tuple[Address, ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    master_name: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        scheme = ("rediss" if self.tls else "redis") + ("" if self.topology == "single" else f"+{self.topology}")
        path = f"/{self.master_name}" if self.topology == "sentinel" else ""
        database = "" if self.topology == "cluster" else f"/{self.database}"
        return f"{scheme}://{','.join(map(str, self.addresses))}{path}{database}"


def parse_redis_url(text: str) -> RedisUrl:
    """Read a URL of the store.

    ``redis://[[user]:password@]host[:port][/database]``, with ``rediss`` for TLS;
    ``redis+sentinel://[[user]:password@]host[:port][,host[:port]…]/master-name[/database]`` (ports of the sentinels);
    ``redis+cluster://[[user]:password@]host[:port][,host[:port]…]`` (any nodes; the others are found through them).
    With TLS ``ca``, ``cert`` and ``key`` name PEM files, ``verify_host=no`` accepts a certificate for another name;
    with Sentinel ``sentinel_username`` and ``sentinel_password`` are sent to the sentinels. User and password are
    percent-encoded.

    Raises:
        RedisStartError: it cannot be read, or a file it names cannot.
    """
    try:
        parts = urlsplit(text)
    except ValueError:  # whose words quote parts of the password
        raise RedisStartError(f"The Redis URL cannot be read: {_ENCODING}.") from None
    if parts.scheme not in _SCHEMES:
        raise RedisStartError(f"A Redis URL begins with one of {', '.join(_SCHEMES)}, followed by ://.")
    topology, tls = _SCHEMES[parts.scheme]
    if "@" in parts.path + parts.query + parts.fragment or parts.fragment:
        # Cut within a password; what is said about the pieces would quote it.
        raise RedisStartError(f"The Redis URL has an @ or a # after its host: {_ENCODING}.")
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, colon, password = credentials.partition(":")
    addresses = tuple(_address(host, 26379 if topology == "sentinel" else 6379) for host in hosts.split(","))
    if topology == "single" and len(addresses) > 1:
        raise RedisStartError(
            f"{parts.scheme}:// takes one host, not {len(addresses)}: "
            "use redis+sentinel://…/NAME for sentinels or redis+cluster:// for a cluster."
        )
    master_name, database = _path(topology, parts.path)
    query = _query(parts.query, (*_TLS_PARAMETERS, *_SENTINEL_PARAMETERS))
    for name in query:
        if name in _TLS_PARAMETERS and not tls:
            raise RedisStartError(f"`{name}` in the Redis URL is for TLS: begin the URL with rediss, or leave it out.")
        if name in _SENTINEL_PARAMETERS and topology != "sentinel":
            raise RedisStartError(f"`{name}` in the Redis URL is for redis+sentinel:// only.")
    return RedisUrl(
        topology=topology,
        addresses=addresses,
        username=unquote(username) or None,
        password=unquote(password) if colon else None,
        database=database,
        master_name=master_name,
        sentinel_username=query.get("sentinel_username"),
        sentinel_password=query.get("sentinel_password"),
        tls=_tls_context(query) if tls else None,
    )


def _address(text: str, default_port: int) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):  # no port, or an IPv6 address without one
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise RedisStartError(f"{text!r} in the Redis URL is not host or host:port.")
    return Address(host, int(port))


def _path(topology: Topology, path: str) -> tuple[str, int]:
    """The sentinels' name of the master, and the number of the database."""
    parts = [unquote(part) for part in path.split("/")[1:]]
    if parts and parts[-1] == "":
        parts.pop()
    master_name = ""
    if topology == "sentinel":
        if not parts:
            raise RedisStartError("redis+sentinel:// needs the master's name: redis+sentinel://host:26379/NAME.")
        master_name = parts.pop(0)
    database = parts.pop(0) if parts else "0"
    if parts or not (database.isascii() and database.isdigit() and len(database) < 10):
        raise RedisStartError(f"The path {path!r} of the Redis URL does not end in the number of a database, like /0.")
    if topology == "cluster" and database != "0":
        raise RedisStartError(f"A Redis Cluster has database 0 only: leave /{database} out of the URL.")
    return master_name, int(database)


def _query(text: str, known: tuple[str, ...]) -> dict[str, str]:
    query = dict(parse_qsl(text, keep_blank_values=True))
    for name in query:
        if name not in known:
            raise RedisStartError(f"`{name}` in the Redis URL is not known; there are {', '.join(known)}.")
    return query


def _tls_context(query: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=query.get("ca"))
        if "cert" in query:
            context.load_cert_chain(query["cert"], query.get("key"))
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(query[name] for name in ("ca", "cert", "key") if name in query)
        raise RedisStartError(f"The TLS files of the Redis URL ({names}) cannot be used: {error}.") from error
    context.check_hostname = query.get("verify_host", "yes") == "yes"
    return context
