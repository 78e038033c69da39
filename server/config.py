"""The configuration: what can be set, where it came from, and what is refused at start.

Four layers, the first that sets a key wins: command-line flags, environment (``STATUSWIRE_<TABLE>_<KEY>``),
a TOML file, the defaults below. A key nobody knows is an error in every layer: a typo in a limit must not
silently mean "no limit".

``load_config`` depends on its arguments alone (and on the files they name), so it can be called again while
the server runs.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct, field, inspect

from server import config_rules as rules
from server.config_rules import is_loopback as is_loopback

ENV_PREFIX = "STATUSWIRE_"
DEFAULT_FILE = "statuswire.toml"
# These belong to the client commands (where to find a server), not to the server's configuration.
CLIENT_VARIABLES = frozenset({"STATUSWIRE_URL", "STATUSWIRE_TOKEN"})
# RFC 7518 section 3.2 asks HMAC keys to be as long as the hash; 32 bytes is the least that withstands guessing.
MIN_SECRET_BYTES = 32

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
        max_connections: open sockets, over all clients.
        heartbeat: seconds between heartbeats and pings.
        tls_cert: PEM certificate chain file, "" for none.
        tls_key: PEM key file, "" for none.
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
        jwt_audience: required ``aud`` claim, "" for no check.
        jwt_issuer: required ``iss`` claim, "" for no check.
    """

    jwt_algorithm: JwtAlgorithm = ""
    jwt_key: str = ""
    jwt_key_file: str = ""
    jwks_file: str = ""
    hook_url: str = ""
    jwt_audience: str = ""
    jwt_issuer: str = ""

    @property
    def open(self) -> bool:
        """Whether no credential is asked for."""
        return not (self.jwt_key or self.jwt_key_file or self.jwks_file)


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
        connects_per_second: accepted sockets per address.
        messages_per_second: incoming WebSocket messages per user.
        publishes_per_second: published updates per user.
        max_message: bytes of the largest incoming WebSocket message.
        backlog: bytes that may wait for one slow reader before it is closed to resume later.
    """

    connections_per_user: CountOrZero = 0
    connects_per_second: RateOrZero = 0.0
    messages_per_second: RateOrZero = 0.0
    publishes_per_second: RateOrZero = 0.0
    # A subscribe to 1000 jobs with the longest ids is an eighth of it.
    max_message: AtLeastOne = 1024 * 1024
    # The newest of some ten thousand jobs. What is held is shared with the log and the records, so this much text
    # costs about 1 MB of memory.
    backlog: AtLeastOne = 4 * 1024 * 1024


class Store(Struct, frozen=True, kw_only=True):
    """Table ``[store]``.

    Attributes:
        url: ``memory:`` (nothing survives a restart), ``sqlite:PATH`` (relative to the working directory), or where
            Redis is: ``redis://``, ``rediss://``, ``redis+sentinel://`` or ``redis+cluster://``.
    """

    # Durable without anything to install or run.
    url: str = "sqlite:statuswire.db"

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

    @property
    def label(self) -> str:
        """The URL without what is secret in it."""
        return _without_password(self.url)


class Log(Struct, frozen=True, kw_only=True):
    """Table ``[log]``.

    Attributes:
        format: ``plain`` for people, ``json`` for collectors; one line per event on stderr either way.
        level: least level that is written.
    """

    format: Literal["plain", "json"] = "plain"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Debug(Struct, frozen=True, kw_only=True):
    """Table ``[debug]``.

    Attributes:
        echo: adds ``/ws/echo``, which returns every message through the same WebSocket code.
    """

    # Anyone could make the server send: for compliance suites only.
    echo: bool = False


class Config(Struct, frozen=True, kw_only=True):
    """Everything that can be set, checked: one table each."""

    server: Server = field(default_factory=Server)
    auth: Auth = field(default_factory=Auth)
    cors: Cors = field(default_factory=Cors)
    history: History = field(default_factory=History)
    limits: Limits = field(default_factory=Limits)
    store: Store = field(default_factory=Store)
    log: Log = field(default_factory=Log)
    debug: Debug = field(default_factory=Debug)


class _Key(NamedTuple):
    name: str  # "server.port"
    type: Any  # annotation, for msgspec.convert
    info: inspect.Type
    default: object
    flag: str | None


class _Value(NamedTuple):
    raw: object
    source: str
    text: bool  # from a flag or the environment: "3000" is a number there


# Flags of `statuswire serve`; the command line is built from this table.
FLAGS = {
    "server.host": "--host",
    "server.port": "--port",
    "server.unix_socket": "--unix-socket",
    "server.workers": "--workers",
    "store.url": "--store",
    "auth.jwt_key": "--jwt-key",
    "auth.jwt_algorithm": "--jwt-algorithm",
    "log.level": "--log-level",
}
_TABLES: dict[str, type[Struct]] = {
    "server": Server,
    "auth": Auth,
    "cors": Cors,
    "history": History,
    "limits": Limits,
    "store": Store,
    "log": Log,
    "debug": Debug,
}
# Values that other keys imply, with the reason.
_IMPLIED = {
    "server.host": "no TCP: server.unix_socket is set, server.host and server.port are not",
    "auth.jwt_algorithm": "auth.jwt_key is a shared secret",
}
_SECRETS = frozenset({"auth.jwt_key"})
_UNSUPPORTED_TABLES = {"webhooks": "incoming webhooks"}
_UNSUPPORTED_KEYS = {
    "auth.hook_url": "asking the application who a caller is; configure auth.jwt_algorithm and a key instead",
    "server.tls_cert": "TLS; let a proxy in front of it (nginx, Caddy) terminate TLS",
    "server.tls_key": "TLS; let a proxy in front of it (nginx, Caddy) terminate TLS",
}


def _keys() -> Iterator[_Key]:
    for table, struct in _TABLES.items():
        info = inspect.type_info(struct)
        assert isinstance(info, inspect.StructType)
        hints = msgspec.structs.fields(struct)
        for description, hint in zip(info.fields, hints, strict=True):
            name = f"{table}.{description.name}"
            yield _Key(name, hint.type, description.type, hint.default, FLAGS.get(name))


_KEYS = {key.name: key for key in _keys()}
_VARIABLES = {ENV_PREFIX + name.replace(".", "_").upper(): name for name in _KEYS}


def find_config_file(option: str | None, directory: Path) -> Path | None:
    """The TOML file to read: what ``--config`` names, else ``statuswire.toml`` in ``directory`` if it is there."""
    if option is not None:
        return Path(option)
    default = directory / DEFAULT_FILE
    return default if default.is_file() else None


def load_config(flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None) -> Config:
    """Merge, convert and check all layers.

    Args:
        flags: dotted key to value, ``{"server.port": "4000"}``; None means that the flag was not given.
        environ: environment variables; those without our prefix are ignored.
        file: TOML file, or None for no file.

    Raises:
        ConfigError: unknown key, wrong type or range, keys that contradict each other, or a file that cannot be read.
    """
    return load_with_sources(flags, environ, file)[0]


def load_with_sources(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None
) -> tuple[Config, dict[str, str]]:
    """Like :func:`load_config`, and for every key that is not a default where it came from (dotted key to words)."""
    given: dict[str, _Value] = {}
    if file is not None:
        given.update(_from_file(file))
    given.update(_from_environ(environ))
    given.update(_from_flags(flags))

    for name, value in given.items():
        if name in _UNSUPPORTED_KEYS and value.raw not in ("", None):
            raise ConfigError(f"{name} ({value.source}): this version does not support {_UNSUPPORTED_KEYS[name]}")
    values: dict[str, dict[str, object]] = {table: {} for table in _TABLES}
    for name, value in given.items():
        table, _, key = name.partition(".")
        values[table][key] = _convert(_KEYS[name], value)
    if values["server"].get("unix_socket") and not values["server"].keys() & {"host", "port"}:
        values["server"]["host"] = ""  # a Unix socket that is asked for alone is meant alone
    auth = values["auth"]
    if "jwt_algorithm" not in auth and auth.get("jwt_key") and not str(auth["jwt_key"]).startswith("-----BEGIN"):
        auth["jwt_algorithm"] = "HS256"  # the one thing a shared secret alone can sensibly mean
    config = Config(**{table: struct(**values[table]) for table, struct in _TABLES.items()})  # type: ignore[arg-type]
    sources = {name: value.source for name, value in given.items()}
    _check(config, sources)
    return config, sources


def describe(config: Config, sources: Mapping[str, str]) -> str:
    """The effective configuration as TOML text, secrets hidden, with a comment where a value is not the default."""
    lines: list[str] = []
    for table in _TABLES:
        lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        for name, key in _KEYS.items():
            if not name.startswith(table + "."):
                continue
            bare = name.partition(".")[2]
            value = getattr(getattr(config, table), bare)
            shown = rules.toml(_masked(name, value))
            comment = ""
            if name in sources:
                comment = f"  # {sources[name]}"
            elif value != key.default:
                comment = f"  # {_IMPLIED[name]}"
            lines.append(f"{bare} = {shown}{comment}")
    return "\n".join(lines) + "\n"


# --- the layers -------------------------------------------------------------------------------------------------


def _from_file(file: Path) -> Iterator[tuple[str, _Value]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {str(file)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    source = str(file)
    for table, entries in document.items():
        if table in _UNSUPPORTED_TABLES:
            raise ConfigError(f"[{table}] ({source}): this version does not support {_UNSUPPORTED_TABLES[table]}")
        if table not in _TABLES:
            wanted = _nearest_key(table) if not isinstance(entries, dict) else rules.nearest(table, _TABLES)
            what = f"table [{table}]" if isinstance(entries, dict) else f"key {table!r} outside of any table"
            raise ConfigError(f"unknown {what} in {source}{rules.suggest(wanted, 'tables', _TABLES)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{table} ({source}): expected a table, [{table}], not a single value")
        for key, raw in entries.items():
            name = f"{table}.{key}"
            if name not in _KEYS:
                raise ConfigError(f"unknown key {name} in {source}{_suggest_key(name)}")
            yield name, _Value(raw, source, text=False)


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, _Value]]:
    links = rules.service_links(environ, ENV_PREFIX)
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in CLIENT_VARIABLES or variable in links:
            continue
        name = _VARIABLES.get(variable)
        if name is None:
            hint = rules.suggest(rules.nearest(variable, _VARIABLES), "variables", _VARIABLES)
            raise ConfigError(f"unknown environment variable {variable}{hint}")
        yield name, _Value(raw, f"environment variable {variable}", text=True)


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, _Value]]:
    for name, raw in flags.items():
        if name not in _KEYS:
            raise ConfigError(f"unknown key {name}{_suggest_key(name)}")
        if raw is not None:
            yield name, _Value(raw, f"flag {_KEYS[name].flag or name}", text=isinstance(raw, str))


# --- one value --------------------------------------------------------------------------------------------------


def _convert(key: _Key, value: _Value) -> object:
    """The value in its type and its one spelling."""
    raw = rules.from_text(key.info, value.raw) if value.text and isinstance(value.raw, str) else value.raw
    try:
        converted = msgspec.convert(raw, key.type, strict=not value.text)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError("not finite")
    except (msgspec.ValidationError, ValueError):
        near = rules.nearest(str(raw), rules.choices(key.info))
        hint = f"; did you mean {near!r}?" if near else ""
        raise _bad(key.name, value.raw, value.source, f"expected {rules.expected(key.info)}{hint}") from None
    rule = rules.RULES.get(key.name)
    try:
        return converted if rule is None else rule(converted)
    except ValueError as error:
        raise _bad(key.name, value.raw, value.source, str(error)) from None


# --- keys that depend on each other -----------------------------------------------------------------------------


def _check(config: Config, sources: Mapping[str, str]) -> None:
    _check_auth(config.auth)
    server = config.server
    if server.workers > 1:
        raise ConfigError(
            f"server.workers = {server.workers} ({sources['server.workers']}): this version runs one process a "
            "server; start several servers on one Redis store instead, each with its own port, and set workers to 1"
        )
    if not server.host and not server.unix_socket:
        raise ConfigError(
            f"server.host is empty ({sources['server.host']}) and there is no server.unix_socket: nothing to listen "
            "on; use 0.0.0.0 or :: for all interfaces"
        )
    if server.tcp and config.auth.open and not is_loopback(server.host):
        raise ConfigError(
            f"server.host = {server.host!r} ({sources['server.host']}): without auth everyone is an admin, so the "
            "server listens on loopback only; configure auth.jwt_algorithm and auth.jwt_key (or jwt_key_file or "
            "jwks_file), or listen on 127.0.0.1 or a Unix socket"
        )
    anybody = {"*", "null"}.intersection(config.cors.origins)
    if anybody and config.auth.open:
        raise ConfigError(
            f"cors.origins = {sorted(anybody)[0]!r} ({sources['cors.origins']}): without auth every web page that is "
            "opened on this machine could control the jobs; list the origins, or configure auth"
        )


def _check_auth(auth: Auth) -> None:
    """What can be said without reading the key; whether it fits the algorithm is for ``server.auth`` to find out."""
    keys = [name for name in ("jwt_key", "jwt_key_file", "jwks_file") if getattr(auth, name)]
    if len(keys) > 1:
        raise ConfigError(f"auth.{' and auth.'.join(keys)} are set together: keep one of them")
    if auth.jwt_algorithm and not keys:
        raise ConfigError(
            f"auth.jwt_algorithm = {auth.jwt_algorithm} needs a key: set auth.jwt_key, auth.jwt_key_file or "
            "auth.jwks_file"
        )
    if keys and not auth.jwt_algorithm and keys[0] != "jwt_key_file":
        raise ConfigError(
            f"auth.{keys[0]} is set but auth.jwt_algorithm is not: the server must know which one algorithm to "
            "accept, for example RS256, ES256 or EdDSA"
        )
    size = len(auth.jwt_key.encode())
    if auth.jwt_key and auth.jwt_algorithm.startswith("HS") and size < MIN_SECRET_BYTES:
        raise ConfigError(
            f"auth.jwt_key has {size} bytes; a secret for {auth.jwt_algorithm} must have {MIN_SECRET_BYTES} or more, "
            "or it can be guessed from any token: make one with `openssl rand -hex 32`"
        )


# --- words ------------------------------------------------------------------------------------------------------


def _bad(name: str, value: object, source: str, reason: str) -> ConfigError:
    return ConfigError(f"{name} = {rules.toml(_masked(name, value))} ({source}): {reason}")


def _masked(name: str, value: object) -> object:
    if name in _SECRETS and value:
        return "(hidden)"
    return _without_password(value) if isinstance(value, str) else value


def _without_password(text: str) -> str:
    """A URL as it may be shown: a password in it, should one be there, is nobody's business."""
    text = re.sub(r"://[^/@]*@", "://(hidden)@", text)
    return re.sub(r"(sentinel_password=)[^&]*", r"\1(hidden)", text)


def _nearest_key(name: str) -> str | None:
    """The known key that was probably meant: the same bare name elsewhere, else a near one, in the same table first."""
    table, _, bare = name.rpartition(".")
    anywhere = {key.partition(".")[2]: key for key in _KEYS}
    here = {short: key for short, key in anywhere.items() if key.startswith(table + ".")}
    for known in ({bare: anywhere[bare]} if bare in anywhere else {}, here, anywhere):
        near = rules.nearest(bare, known)
        if near is not None:
            return known[near]
    return None


def _suggest_key(name: str) -> str:
    table = name.partition(".")[0]
    return rules.suggest(_nearest_key(name), "keys", [key for key in _KEYS if key.startswith(table + ".")])
