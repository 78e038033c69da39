"""What users put into progress reports and job data: numbers, texts and owners, wherever they keep them."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from textwrap import dedent
from typing import Any, Final

import msgspec
from msgspec import Raw

from protocol.errors import ApiError
from protocol.fields import MAX_PAYLOAD, MAX_TEXT, encoded, is_id, time_ms

# Where a report says how far it is: a percentage under one of these names, or so many of so many.
PERCENT_NAMES: Final = ("percent", "progress", "pct", "percentage")
PART_NAMES: Final = (("current", "total"), ("done", "total"))
MESSAGE_NAMES: Final = ("message", "status", "stage")
STAGE_NAME: Final = "stage"

# Of one value in Redis that is looked into; larger ones are not.
MAX_READ: Final = 1024 * 1024

_TRACEBACK: Final = "Traceback (most recent call last)"
# What stands in front of that word in the same line, or is a line of its own.
_GROUP: Final = "Exception Group "
_RULES: Final = " \t\r\n\f\v|+"
# A line of a stack, as Python has them or JavaScript. What a line of a message begins with is no such reason.
_FRAME: Final = re.compile(r'\s*File "|\s+at \S|at .*:\d+:\d+\)?\s*$')

_decode = msgspec.json.Decoder().decode


def read_json(data: bytes | str | None) -> Any:
    """The value, or None if it is missing, no JSON, or beyond all measure."""
    if not data or len(data) > MAX_READ:
        return None
    try:
        return _decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        taken = float(value)
    except OverflowError:
        return None
    return taken if math.isfinite(taken) else None


def percent_of(report: object) -> float | None:
    """How far a report says the job is, 0 to 100: a bare number, or an object with one. None if it does not say."""
    found = number(report)
    if found is None and isinstance(report, dict):
        for name in PERCENT_NAMES:
            found = number(report.get(name))
            if found is not None:
                break
        else:
            for part_name, whole_name in PART_NAMES:
                part, whole = number(report.get(part_name)), number(report.get(whole_name))
                if part is not None and whole is not None and whole > 0:
                    found = 100 * part / whole
                    break
    if found is None or not math.isfinite(found):
        return None
    return min(100.0, max(0.0, found))


def text(value: object) -> str | None:
    """As a text field may be: valid and of at most 2 KiB in UTF-8. None for what is no text, or an empty one."""
    if not isinstance(value, str) or not value:
        return None
    data = value[:MAX_TEXT].encode("utf-8", "replace")
    return data[:MAX_TEXT].decode("utf-8", "ignore")


def message_of(report: object) -> str | None:
    """What a report says to people."""
    if isinstance(report, dict):
        for name in MESSAGE_NAMES:
            found = text(report.get(name))
            if found is not None:
                return found
    return None


def stage_of(report: object) -> str | None:
    """Which stage a report names."""
    return text(report.get(STAGE_NAME)) if isinstance(report, dict) else None


def reason(value: object) -> str | None:
    """An error as people may see it: what stands before a traceback, else the exception it ends with."""
    if not isinstance(value, str):
        return None
    value = dedent(value).strip()
    before, mark, _ = value.partition(_TRACEBACK)
    told = _without_frames(before.removesuffix(_GROUP).rstrip(_RULES) if mark else before)
    if mark and not told:
        told = _without_frames(last_error(value))
    return text(told)


def failure(value: object) -> str:
    """The same of what has failed, whatever it says; in JavaScript anything may be thrown."""
    found = reason(value)
    return "failed" if found in (None, "null", "undefined") else found


def last_error(trace: str) -> str:
    """The last line of a traceback, which names the exception; of a group the line that is about all of it.

    "" if it was cut short, and ends with a line of source code.
    """
    lines = trace.rstrip().splitlines() or [""]
    if not lines[-1].lstrip().startswith("+-"):
        level = next((line for line in reversed(lines) if line.startswith('  File "') or line[:1].strip()), "")
        return "" if level.startswith(" ") else lines[-1]
    about_all, margin = "", ""
    for line in lines:
        before, mark, _ = line.partition("+ Exception Group")
        if mark and not before.strip():
            about_all, margin = "", f"{before}| "
        elif margin and not about_all and line.startswith(margin) and not line[len(margin) :].startswith(" "):
            about_all = line[len(margin) :]
    return about_all


def _without_frames(error: str) -> str:
    kept = []
    for line in error.strip().splitlines():
        if _FRAME.match(line):
            break
        kept.append(line)
    return "\n".join(kept).strip()


def result_of(value: object) -> Raw | None:
    """A job's result as it may stand in a record; None if it may not: too large, too deep, nothing."""
    if value is None:
        return None
    try:
        raw = encoded("result", value)
    except (ApiError, TypeError, ValueError, UnicodeError):
        return None
    return raw if len(raw) <= MAX_PAYLOAD // 2 else None


def at_path(document: object, path: str) -> object:
    """What is at a path of names and list positions with dots between, ``data.user.id``; None if it leads nowhere."""
    for name in path.split("."):
        if isinstance(document, Mapping):
            document = document.get(name)
        elif isinstance(document, Sequence) and not isinstance(document, str | bytes) and name.isdecimal():
            document = document[int(name)] if int(name) < len(document) else None
        else:
            return None
    return document


def owner_at(document: object, path: str) -> str | None:
    """The owner's id at a path: a text or a whole number that is a well-formed id and nobody's reserved one."""
    value = at_path(document, path)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**30 else None
    if not isinstance(value, str) or not is_id(value) or is_reserved(value):
        return None
    return value


# Owners of jobs that say nothing of theirs, one for each source. No caller may have such an id, so that only admins
# see those jobs.
_RESERVED: Final = "queue:"


def reserved_owner(source: str) -> str:
    """Who owns the jobs of a source that name no owner."""
    return _RESERVED + source


def is_reserved(user: str) -> bool:
    """Whether this is such an owner's id."""
    return user.startswith(_RESERVED)


def iso_ms(value: object) -> int | None:
    """A time in ISO 8601 as unix milliseconds; without a zone it is UTC."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return time_ms(moment if moment.tzinfo else moment.replace(tzinfo=UTC), "timestamp")
    except (ValueError, ApiError):
        return None


def unpacked(data: bytes) -> bytes | None:
    """What zlib has packed; None if it is damaged, or more than ``MAX_READ``."""
    try:
        unpacker = zlib.decompressobj()
        found = unpacker.decompress(data, MAX_READ)
    except zlib.error:
        return None
    return found if unpacker.eof else None
