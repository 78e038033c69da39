"""Rules for single configuration values: reading them from text, checking and spelling them, naming the near miss.

Nothing here knows the tables and keys; a rule returns the value in its one spelling or raises ValueError with the
reason in words.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from msgspec import inspect

from server.brokers.redis_errors import RedisStartError
from server.brokers.redis_url import parse_redis_url


def from_text(info: inspect.Type, text: str) -> object:
    """What a flag or an environment variable says, ready for ``msgspec.convert(…, strict=False)``."""
    if isinstance(info, inspect.VarTupleType):
        return [item.strip() for item in text.split(",") if item.strip()]
    if isinstance(info, inspect.LiteralType):
        # Levels and formats in capitals are common in environments; algorithms have one spelling each.
        folded = {str(choice).casefold(): choice for choice in info.values}
        return folded.get(text.strip().casefold(), text)
    return text if isinstance(info, inspect.StrType) else text.strip()


def choices(info: inspect.Type) -> tuple[str, ...]:
    """The words a value is one of; empty for other types."""
    return tuple(str(value) for value in info.values if value) if isinstance(info, inspect.LiteralType) else ()


def expected(info: inspect.Type) -> str:
    """What a value should have been, in words."""
    if isinstance(info, inspect.LiteralType):
        return "one of " + ", ".join(choices(info))
    if isinstance(info, inspect.VarTupleType):
        return "a list of strings"
    if isinstance(info, inspect.BoolType):
        return "true or false"
    if isinstance(info, inspect.IntType | inspect.FloatType):
        noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
        if info.ge is not None and info.le is not None:
            return f"{noun} from {info.ge} to {info.le}"
        if info.ge is not None:
            return f"{noun}, {info.ge:g} or more"
        return f"{noun} greater than {info.gt:g}" if info.gt is not None else noun
    return "a string"


@lru_cache(maxsize=256)  # asked of the Host header of every request in open mode, mostly the same few names
def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only: 127.0.0.0/8, ::1 or a name under ``localhost``.

    Other names count as reachable: what they resolve to is not ours to promise.
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        name = host.rstrip(".").lower()
        return name == "localhost" or name.endswith(".localhost")


def service_links(environ: Mapping[str, str], prefix: str) -> set[str]:
    """Variables that Kubernetes and Docker links add for a service named "statuswire" or "statuswire-…".

    They look like ``STATUSWIRE_PORT=tcp://10.0.0.1:3000`` with ``STATUSWIRE_SERVICE_HOST`` and more beside it. Nobody
    wrote them as configuration, so they must neither be taken as such nor stop the server.
    """
    links: set[str] = set()
    for variable, raw in environ.items():
        if variable.startswith(prefix) and variable.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", raw):
            base = re.escape(variable.removesuffix("_PORT"))
            link = re.compile(base + r"_(NAME|PORT(_\d+_(TCP|UDP|SCTP).*)?|SERVICE_(HOST|PORT)(_.*)?)")
            links.update(name for name in environ if link.fullmatch(name))
    return links


def _base_path(text: str) -> str:
    path = text.strip("/")
    if not path:
        return ""
    for segment in path.split("/"):
        if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+", segment) or segment in (".", ".."):
            raise ValueError('expected a plain URL path such as "/statuswire"')
    return "/" + path


def _proxies(items: tuple[str, ...]) -> tuple[str, ...]:
    for item in items:
        if item == "unix":  # whoever connects over the Unix socket
            continue
        try:
            ipaddress.ip_network(item, strict=False)
        except ValueError:
            hint = ' ("0.0.0.0/0" trusts everyone)' if item == "*" else ""
            raise ValueError(
                f"{item!r} is neither an IP address nor a network like 10.0.0.0/8, nor unix{hint}"
            ) from None
    return items


def _origins(items: tuple[str, ...]) -> tuple[str, ...]:
    """Spell origins the way browsers do (RFC 6454 section 6.2): lower case, no default port, no slash at the end."""
    spelled = []
    for item in items:
        if item in ("*", "null"):  # any page; allowed without cookies only
            spelled.append(item)
            continue
        match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?/?", item.lower())
        if match is None:
            raise ValueError(f"{item!r} is not an origin like https://app.example.com or http://localhost:8080")
        scheme, host, port = match.groups()
        default = {"http": "80", "https": "443"}.get(scheme)
        spelled.append(f"{scheme}://{host}" + (f":{port}" if port and port != default else ""))
    return tuple(spelled)


def _store_url(url: str) -> str:
    if re.match(r"rediss?(\+[a-z]+)?:", url):
        try:
            parse_redis_url(url)
        except RedisStartError as error:
            raise ValueError(str(error)) from None
        return url
    if url == "memory:":
        return url
    scheme, _, path = url.partition(":")
    if scheme != "sqlite" or not path:
        raise ValueError("expected memory:, sqlite:PATH or redis://HOST")
    if path.startswith("//"):
        raise ValueError("write sqlite:/absolute/path or sqlite:relative/path, without //")
    if path == ":memory:":
        raise ValueError("write memory: for a store that keeps nothing")
    return url


def _queue_url(url: str) -> str:
    if not url:
        return ""
    try:
        parse_redis_url(url)
    except RedisStartError as error:
        raise ValueError(str(error)) from None
    return url


def _formed(form: str, expected: str) -> Callable[[str], str]:
    """What checks that a text is empty or of this form."""

    def check(text: str) -> str:
        if text and not re.fullmatch(form, text):
            raise ValueError(f"expected {expected}")
        return text

    return check


_path = _formed(r"[^.\s]+(\.[^.\s]+)*", 'names with dots between, such as "data.userId"')
_id_prefix = _formed(r"[A-Za-z0-9_.:@-]{1,32}", 'at most 32 of A-Z a-z 0-9 _ . : @ -, such as "staging:"')
_event = _formed(r"[A-Za-z0-9_.:@-]{1,128}", "a name of at most 128 characters of A-Z a-z 0-9 _ . : @ -")


def _http_url(text: str) -> str:
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment
        _ = parts.port  # raises for one that is no port
    except ValueError:
        good = False
    if not good:
        raise ValueError("expected a URL like http://127.0.0.1:8000/statuswire/auth")
    return text


def _pointer(text: str) -> str:
    """RFC 6901 section 3."""
    if not re.fullmatch(r"(/([^~/]|~[01])*)*", text):
        raise ValueError('expected a JSON pointer such as "/data/userId", or "" for the whole body')
    return text


def _pointer_or_id(text: str) -> str:
    if text.startswith("/"):
        return _pointer(text)
    if text and not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,128}", text):
        raise ValueError('expected a JSON pointer such as "/data/userId", or an id')
    return text


def _pem_newlines(key: str) -> str:
    """Environment files cannot hold line ends, so a PEM key there often has a backslash and an n instead."""
    return key.replace("\\n", "\n") if key.startswith("-----BEGIN") else key


def _channels(items: tuple[str, ...]) -> tuple[str, ...]:
    for item in items:
        if not re.fullmatch(r"[A-Za-z0-9_.:@*-]{1,128}", item):
            raise ValueError(f'{item!r} is not a channel or a pattern such as "team-*"')
    return items


RULES: dict[str, Callable[[Any], object]] = {
    "server.base_path": _base_path,
    "server.trusted_proxies": _proxies,
    "cors.origins": _origins,
    "store.url": _store_url,
    "auth.jwt_key": _pem_newlines,
    "auth.hook_url": _http_url,
    "auth.default_channels": _channels,
    "callbacks.url": _http_url,
    "queues.url": _queue_url,
    "queues.events_url": _queue_url,
    "queues.user": _path,
    "queues.id_prefix": _id_prefix,
    "webhooks.event": _event,
    "webhooks.target_id": _pointer_or_id,
    "webhooks.data": _pointer,
}


def toml(value: object) -> str:
    """A value as TOML text (strings as basic strings)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    # JSON strings are TOML basic strings; DEL alone must be escaped in addition.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


def suggest(wanted: str | None, kind: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the near miss, or else all there is."""
    return f"; did you mean {wanted}?" if wanted is not None else f"; known {kind}: {', '.join(known)}"
