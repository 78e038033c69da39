"""Log lines: one line per event on stderr, plain for people or JSON for collectors.

What a client sends ends up in log fields, so both forms escape every character that could end a line, steer a
terminal or hide text, and both strike out access tokens wherever they stand.
"""

from __future__ import annotations

import fcntl
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, TextIO

import msgspec

from server.config import Log

# A field holds a path or a message, an exception holds groups of tracebacks: both have their bound, so that nobody
# fills a disk with one request. In characters.
MAX_FIELD = 2048
MAX_EXCEPTION = 32768

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# C0 (JSON escapes those itself, the plain form does not), DEL and C1; line and paragraph separators; the marks that
# turn the reading direction and so let text pose as other text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BARE = re.compile(r"[^\s\"'=\\]+")
_PLAIN_RESERVED = frozenset({"exception"})
_JSON_RESERVED = frozenset({"time", "level", "logger", "event", "exception"})
_TOKENS = re.compile(
    r"(?i)((?:access|statuswire)_token=)[^\s&;,\"'\\]+|(\bbearer[ .])[\w.~+/=-]{16,}|\beyJ[\w-]+\.[\w-]+\.[\w-]*"
)
_HIDDEN = "***"


def configure(log: Log, stream: TextIO | None = None, *, worker: int | None = None, lock: int | None = None) -> None:
    """Send all logging to ``stream`` (stderr by default) as ``log`` says; calling it again changes both.

    Warnings are logged too. Handlers that others have put on the root logger stay.

    Args:
        worker: a number that every line is to have as its field ``worker``.
        lock: a file that is locked (``lockf``) while a line is written, so that those of several processes stay whole.
    """
    out = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(out) if lock is None else _SharedHandler(out, lock)
    if worker is not None:
        handler.addFilter(partial(_number, worker))
    handler.setFormatter(JsonFormatter() if log.format == "json" else PlainFormatter())
    handler.set_name(__name__)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == __name__]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_LEVELS[log.level])
    # They tell of every request with its whole URL and, at the level debug, of its headers: both may hold secrets.
    for client in ("httpx", "httpcore"):
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class _SharedHandler(logging.StreamHandler[TextIO]):
    """Writes to what other processes write to as well."""

    def __init__(self, stream: TextIO, lock: int) -> None:
        super().__init__(stream)
        self._lock = lock

    def emit(self, record: logging.LogRecord) -> None:
        # A long line is several writes, and a pipe takes no more than 4 KiB as one.
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            super().emit(record)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)


def _number(worker: int, record: logging.LogRecord) -> bool:
    fields = getattr(record, "fields", None)
    record.fields = {**(fields if isinstance(fields, Mapping) else {}), "worker": worker}
    return True


def log_event(
    logger: logging.Logger, level: int, event: str, /, *, exc_info: BaseException | None = None, **fields: object
) -> None:
    """Log one event with its fields, in the order given; fields that are None are left out.

    Args:
        logger: the module's logger.
        level: ``logging.INFO`` and so on.
        event: constant snake_case or plain words naming what happened; the variable parts are fields.
        exc_info: exception whose traceback belongs to the event.
        fields: values of any JSON-like type; others are written as ``str(value)``.
    """
    if logger.isEnabledFor(level):
        logger.log(level, "%s", event, exc_info=exc_info, extra={"fields": fields})


def printable(text: str) -> str:
    """``text`` on one line and without control characters, those spelled as escapes (``\\u001b``)."""
    return _escape(_encodable(text))


class PlainFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z info server.app request method=GET path=/health status=200``"""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname.lower(), record.name, printable(_clip(record.getMessage(), MAX_FIELD))]
        for name, value in _fields(record, _PLAIN_RESERVED).items():
            words.append(f"{printable(name)}={_plain(value)}")
        exception = _exception(record)
        if exception:
            words.append(f"exception={_plain(exception)}")
        return _strike(" ".join(words))


class JsonFormatter(logging.Formatter):
    """One object: ``time``, ``level``, ``logger``, ``event``, then the fields, then ``exception`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _encodable(_clip(record.getMessage(), MAX_FIELD)),
            **_fields(record, _JSON_RESERVED),
        }
        exception = _exception(record)
        if exception:
            line["exception"] = exception
        # Those characters can only stand inside strings, where \u escapes are JSON too.
        return _strike(_escape(msgspec.json.encode(line).decode()))


def _time(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord, reserved: frozenset[str]) -> dict[str, object]:
    fields = getattr(record, "fields", None)
    if not isinstance(fields, Mapping):
        return {}
    given = {_encodable(str(name)): _value(value) for name, value in fields.items() if value is not None}
    return {f"{name}_" if name in reserved else name: value for name, value in given.items()}


def _value(value: object) -> Any:
    """A copy that JSON can hold: bounded, valid Unicode, no foreign types."""
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {_encodable(str(name)): _value(item) for name, item in list(value.items())[:100]}
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(item) for item in list(value)[:100]]
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return _encodable(_clip(text, MAX_FIELD))


def _plain(value: Any) -> str:
    """Bare if it is one harmless word, else JSON: ``a=1 b="two words"``."""
    if isinstance(value, str) and _BARE.fullmatch(value) and not _UNSAFE.search(value):
        return value
    return _escape(msgspec.json.encode(value).decode())


def _exception(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    text = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    # The end of a traceback says what went wrong.
    return _encodable(text if len(text) <= MAX_EXCEPTION else "…" + text[-MAX_EXCEPTION:])


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _encodable(text: str) -> str:
    """Without lone surrogates, which no UTF-8 can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _strike(line: str) -> str:
    """The last line of defence: whatever looks like a token in a finished line is not written."""
    return _TOKENS.sub(lambda match: (match[1] or match[2] or "") + _HIDDEN, line)
