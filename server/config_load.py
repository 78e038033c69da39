"""Reading the configuration: where each value came from, and what is refused at start.

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, inspect

from server import config_rules as rules
from server.brokers.redis_url import parse_redis_url
from server.config import (
    Auth,
    Callback,
    Config,
    ConfigError,
    Cors,
    Debug,
    Health,
    History,
    Ingest,
    Limits,
    Log,
    Queue,
    Server,
    Store,
    Views,
    Webhook,
    is_loopback,
    without_password,
)

ENV_PREFIX = "STATUSWIRE_"
DEFAULT_FILE = "statuswire.toml"
# These belong to client commands and workers (where to find a server), not to the server's configuration.
CLIENT_VARIABLES = frozenset({"STATUSWIRE_URL", "STATUSWIRE_TOKEN", "STATUSWIRE_SPOOL_DIR"})
# RFC 7518 section 3.2 asks HMAC keys to be as long as the hash; 32 bytes is the least that withstands guessing.
MIN_SECRET_BYTES = 32
# Those of webhooks are often given by the other side, and a guess can be checked against this server only.
MIN_HOOK_SECRET_BYTES = 16


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
    "health": Health,
    "views": Views,
    "ingest": Ingest,
    "log": Log,
    "debug": Debug,
}
# Tables of tables: [webhooks.payment]. What can be set is the same for every name.
_FAMILIES: dict[str, type[Struct]] = {"webhooks": Webhook, "callbacks": Callback, "queues": Queue}
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Values that other keys imply, with the reason.
_IMPLIED = {
    "server.host": "no TCP: server.unix_socket is set, server.host and server.port are not",
    "auth.jwt_algorithm": "auth.jwt_key is a shared secret",
}
_SECRETS = frozenset({"auth.jwt_key", "webhooks.secret", "callbacks.secret"})


def _keys(tables: Mapping[str, type[Struct]]) -> Iterator[_Key]:
    for table, struct in tables.items():
        info = inspect.type_info(struct)
        assert isinstance(info, inspect.StructType)
        hints = msgspec.structs.fields(struct)
        for description, hint in zip(info.fields, hints, strict=True):
            name = f"{table}.{description.name}"
            yield _Key(name, hint.type, description.type, hint.default, FLAGS.get(name))


_KEYS = {key.name: key for key in _keys(_TABLES)}
_FAMILY_KEYS = {key.name: key for key in _keys(_FAMILIES)}  # "webhooks.secret": without the name between


def _variable(name: str) -> str:
    return ENV_PREFIX + re.sub("[.-]", "_", name).upper()


_VARIABLES = {_variable(name): name for name in _KEYS}


def _generic(name: str) -> str:
    """A key as the rules know it: ``webhooks.secret`` for ``webhooks.payment.secret``."""
    family, *_, key = name.split(".")
    return f"{family}.{key}"


def _key(name: str) -> _Key | None:
    """The key of this name, ``server.port`` or ``webhooks.payment.secret``, if there is one."""
    if name.count(".") == 2:
        return _FAMILY_KEYS.get(_generic(name))
    return _KEYS.get(name)


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
    given.update(_from_environ(environ, {name.rpartition(".")[0] for name in given if name.count(".") == 2}))
    given.update(_from_flags(flags))

    values: dict[str, dict[str, object]] = {table: {} for table in _TABLES}
    for name, value in given.items():
        table, _, bare = name.rpartition(".")
        known = _key(name)
        assert known is not None
        values.setdefault(table, {})[bare] = _convert(name, known, value)
    if values["server"].get("unix_socket") and not values["server"].keys() & {"host", "port"}:
        values["server"]["host"] = ""  # a Unix socket that is asked for alone is meant alone
    auth = values["auth"]
    if "jwt_algorithm" not in auth and auth.get("jwt_key") and not str(auth["jwt_key"]).startswith("-----BEGIN"):
        auth["jwt_algorithm"] = "HS256"  # the one thing a shared secret alone can sensibly mean
    tables: dict[str, Any] = {table: struct(**values[table]) for table, struct in _TABLES.items()}
    for family, struct in _FAMILIES.items():
        names = [table.partition(".")[2] for table in values if table.startswith(f"{family}.")]
        tables[family] = {name: struct(**values[f"{family}.{name}"]) for name in names}
    config = Config(**tables)
    sources = {name: value.source for name, value in given.items()}
    _check(config, sources)
    return config, sources


def describe(config: Config, sources: Mapping[str, str]) -> str:
    """The effective configuration as TOML text, secrets hidden, with a comment where a value is not the default."""
    lines: list[str] = []
    tables = [(table, getattr(config, table), struct) for table, struct in _TABLES.items()]
    for family, struct in _FAMILIES.items():
        tables += [(f"{family}.{name}", member, struct) for name, member in getattr(config, family).items()]
    for table, values, struct in tables:
        lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        for bare in struct.__struct_fields__:
            name = f"{table}.{bare}"
            key, value = _key(name), getattr(values, bare)
            assert key is not None
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
    if isinstance(unnamed := document.get("ingest"), list) and isinstance(named := document.get("queues", {}), dict):
        document["queues"] = _with_names(unnamed, named, source)
        del document["ingest"]
    for table, entries in document.items():
        if table not in _TABLES and table not in _FAMILIES:
            wanted = _nearest_key(table) if not isinstance(entries, dict) else rules.nearest(table, _TABLES | _FAMILIES)
            what = f"table [{table}]" if isinstance(entries, dict) else f"key {table!r} outside of any table"
            raise ConfigError(f"unknown {what} in {source}{rules.suggest(wanted, 'tables', _TABLES | _FAMILIES)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{table} ({source}): expected a table, [{table}], not a single value")
        if table in _TABLES:
            yield from _from_table(table, entries, source)
            continue
        for member, values in entries.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{table}.{member} ({source}): expected a table, [{table}.NAME], with keys in it")
            if not _MEMBER.fullmatch(member):
                raise ConfigError(f"[{table}.{member}] ({source}): a name is of a-z 0-9 _ -, at most 64 of them")
            yield from _from_table(f"{table}.{member}", values, source)


def _with_names(entries: list[object], queues: Mapping[str, object], source: str) -> dict[str, object]:
    """``[[ingest]]`` is ``[queues.NAME]`` for who needs no names: the first has that of its kind, others ``kind-2``."""
    named = dict(queues)
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(f"ingest ({source}): expected tables, [[ingest]], one for each queue")
        kind = entry.get("kind")
        name = kind if isinstance(kind, str) and _MEMBER.fullmatch(kind) else "ingest"
        names = (name, *(f"{name}-{number}" for number in range(2, len(entries) + len(named) + 2)))
        named[next(free for free in names if free not in named)] = entry
    return named


def _from_table(table: str, entries: Mapping[str, object], source: str) -> Iterator[tuple[str, _Value]]:
    for bare, raw in entries.items():
        name = f"{table}.{bare}"
        if _key(name) is None:
            raise ConfigError(f"unknown key {name} in {source}{_suggest_key(name)}")
        yield name, _Value(raw, source, text=False)


def _from_environ(environ: Mapping[str, str], members: Iterable[str]) -> Iterator[tuple[str, _Value]]:
    """``members``: the tables of families that the file has, ``webhooks.payment``; an environment adds none."""
    links = rules.service_links(environ, ENV_PREFIX)
    variables = dict(_VARIABLES)
    for member in members:
        fields = _FAMILIES[member.partition(".")[0]].__struct_fields__
        variables |= {_variable(f"{member}.{bare}"): f"{member}.{bare}" for bare in fields}
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in CLIENT_VARIABLES or variable in links:
            continue
        name = variables.get(variable)
        if name is None:
            hint = rules.suggest(rules.nearest(variable, variables), "variables", variables)
            raise ConfigError(f"unknown environment variable {variable}{hint}")
        yield name, _Value(raw, f"environment variable {variable}", text=True)


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, _Value]]:
    for name, raw in flags.items():
        key = _key(name)
        if key is None:
            raise ConfigError(f"unknown key {name}{_suggest_key(name)}")
        if raw is not None:
            yield name, _Value(raw, f"flag {key.flag or name}", text=isinstance(raw, str))


# --- one value --------------------------------------------------------------------------------------------------


def _convert(name: str, key: _Key, value: _Value) -> object:
    """The value in its type and its one spelling."""
    raw = rules.from_text(key.info, value.raw) if value.text and isinstance(value.raw, str) else value.raw
    try:
        converted = msgspec.convert(raw, key.type, strict=not value.text)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError("not finite")
    except (msgspec.ValidationError, ValueError):
        near = rules.nearest(str(raw), rules.choices(key.info))
        hint = f"; did you mean {near!r}?" if near else ""
        raise _bad(name, value.raw, value.source, f"expected {rules.expected(key.info)}{hint}") from None
    rule = rules.RULES.get(key.name)
    try:
        return converted if rule is None else rule(converted)
    except ValueError as error:
        raise _bad(name, value.raw, value.source, str(error)) from None


# --- keys that depend on each other -----------------------------------------------------------------------------


def _check(config: Config, sources: Mapping[str, str]) -> None:
    _check_auth(config.auth)
    _check_hooks(config)
    _check_queues(config.queues)
    server = config.server
    if server.workers > 1 and config.store.kind != "redis":
        raise ConfigError(
            f"server.workers = {server.workers} ({sources['server.workers']}): several workers need a Redis store, and "
            f"store.url is {config.store.label}; set it to redis://…, or workers to 1"
        )
    _check_store(config.store, sources)
    if server.proxy_protocol and not server.trusted_proxies:
        raise ConfigError(
            f"server.proxy_protocol = true ({sources['server.proxy_protocol']}): a PROXY header is taken from trusted "
            "proxies only; set server.trusted_proxies"
        )
    if server.tls_key and not server.tls_cert:
        raise ConfigError(
            f"server.tls_key ({sources['server.tls_key']}): there is no server.tls_cert that it is the key of"
        )
    if server.tls_cert and not server.tcp:
        raise ConfigError(
            f"server.tls_cert ({sources['server.tls_cert']}): TLS is for TCP, and the server listens on a Unix socket "
            "only; set server.host, or leave it out"
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


def _check_store(store: Store, sources: Mapping[str, str]) -> None:
    if store.spool and store.kind != "redis":
        raise ConfigError(
            f"store.spool = true ({sources['store.spool']}): the store is {store.label}, which is this machine's own; "
            "a spool is for a store.url with redis, leave it out"
        )
    if store.spool and not store.spool_path:
        raise ConfigError(f"store.spool_path is empty ({sources['store.spool_path']}): name a file for store.spool")


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


def _check_hooks(config: Config) -> None:
    for name, webhook in config.webhooks.items():
        table = f"webhooks.{name}"
        if len(webhook.secret.encode()) < MIN_HOOK_SECRET_BYTES:
            raise ConfigError(
                f"{table}.secret must have {MIN_HOOK_SECRET_BYTES} bytes or more, or anyone may guess it: make one "
                "with `openssl rand -hex 32`"
            )
        if not webhook.event:
            raise ConfigError(f"{table}.event is not set: under which name shall it be passed on?")
        if (webhook.target == "broadcast") == bool(webhook.target_id):
            wrong = "goes to everyone, so target_id has no meaning" if webhook.target_id else "needs a target_id"
            raise ConfigError(f"{table}.target = {webhook.target!r} {wrong}")
        if webhook.store and webhook.target not in ("user", "users"):
            raise ConfigError(f"{table}.store keeps notifications for users, but target = {webhook.target!r}")
    for name, callback in config.callbacks.items():
        if not callback.url:
            raise ConfigError(f"callbacks.{name}.url is not set: where shall it be told?")
        if callback.secret and len(callback.secret.encode()) < MIN_HOOK_SECRET_BYTES:
            raise ConfigError(
                f"callbacks.{name}.secret must have {MIN_HOOK_SECRET_BYTES} bytes or more, or none at all"
            )


def _check_queues(queues: Mapping[str, Queue]) -> None:
    for name, queue in queues.items():
        if not queue.kind:
            raise ConfigError(f"queues.{name}.kind is not set: bullmq, bull4, celery or rq?")
        if not queue.url:
            raise ConfigError(f"queues.{name}.url is empty: where does it keep its jobs?")
        if queue.kind == "celery" and queue.queues:
            raise ConfigError(f"queues.{name}.queues: Celery does not say which queue a task is in; leave it out")
        if any(parse_redis_url(url).topology == "cluster" for url in (queue.url, queue.events_url) if url):
            if queue.kind not in ("bullmq", "bull4"):
                raise ConfigError(f"queues.{name}.url: {queue.kind} does not keep its jobs in a Redis Cluster")
            if not re.search(r"\{[^}]+\}", queue.prefix):
                raise ConfigError(
                    f"queues.{name}.prefix: in a Redis Cluster all keys of a queue have a hash tag; give the prefix "
                    'that its workers have, such as "{bull}"'
                )
        if queue.events_url and queue.kind != "celery":
            raise ConfigError(f"queues.{name}.events_url is for Celery; {queue.kind} has one Redis only")


# --- words ------------------------------------------------------------------------------------------------------


def _bad(name: str, value: object, source: str, reason: str) -> ConfigError:
    return ConfigError(f"{name} = {rules.toml(_masked(name, value))} ({source}): {reason}")


def _masked(name: str, value: object) -> object:
    if _generic(name) in _SECRETS and value:
        return "(hidden)"
    return without_password(value) if isinstance(value, str) else value


def _nearest_key(name: str) -> str | None:
    """The known key that was probably meant: the same bare name elsewhere, else a near one, in the same table first."""
    table, _, bare = name.rpartition(".")
    anywhere = {key.partition(".")[2]: key for key in _KEYS}
    if table.partition(".")[0] in _FAMILIES:
        anywhere = {short: f"{table}.{short}" for short in _FAMILIES[table.partition(".")[0]].__struct_fields__}
    here = {short: key for short, key in anywhere.items() if key.startswith(table + ".")}
    for known in ({bare: anywhere[bare]} if bare in anywhere else {}, here, anywhere):
        near = rules.nearest(bare, known)
        if near is not None:
            return known[near]
    return None


def _suggest_key(name: str) -> str:
    table = name.rpartition(".")[0]
    family = _FAMILIES.get(table.partition(".")[0])
    known = [key for key in _KEYS if key.startswith(table + ".")]
    return rules.suggest(_nearest_key(name), "keys", known if family is None else family.__struct_fields__)
