"""What a reader asked for: which jobs, which updates of them, which fields.

Delivery goes by channel. An update is offered on four: everything, its user's, its job's for readers of any
owner (admins and delegates), and its job's for its owner alone. A reader without rights to a foreign job
sits on a channel of its own name that never fires, so it cannot tell a foreign job from none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from protocol.errors import invalid_parameter
from protocol.fields import is_id
from protocol.job import Record
from protocol.update import NOTIFICATION, STATUSES, Update

MAX_JOB_IDS = 1000

RECORD_FIELDS = frozenset(field.encode_name for field in msgspec.structs.fields(Record))
UPDATE_TYPES = frozenset({"status_update", "job_completed", "job_failed", "job_cancelled", "job_deleted"})
# Where notifications can be asked for as well.
ALL_TYPES = UPDATE_TYPES | {NOTIFICATION}

EVERYTHING = "*"
# All notifications, for those that pick theirs themselves: polls that wait. Other readers are found by who they are.
NOTICES = "n"


class Filter(NamedTuple):
    """Which updates of the watched jobs are wanted; None means any."""

    types: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    statuses: frozenset[str] | None = None

    @property
    def is_any(self) -> bool:
        """Whether nothing is filtered out."""
        return self is ANY or (self.types is None and self.kinds is None and self.statuses is None)

    def passes(self, update: Update) -> bool:
        """Whether this update is wanted."""
        return (
            (self.types is None or update.type in self.types)
            and (self.kinds is None or update.kind in self.kinds)
            and (self.statuses is None or update.status in self.statuses)
        )


ANY = Filter()


class Watch(NamedTuple):
    """A reader's question.

    Attributes:
        job_ids: the named jobs, or None for all that the rest allows.
        user_id: only this user's jobs; None for no narrowing.
        filter: which updates.
        fields: which record fields, None for all.
    """

    job_ids: tuple[str, ...] | None = None
    user_id: str | None = None
    filter: Filter = ANY
    fields: frozenset[str] | None = None


def job_channel(job_id: str, owner: str | None = None) -> str:
    """Channel of one job: for readers of any owner's, or for one owner alone. ``/`` cannot occur in ids."""
    return f"j/{job_id}" if owner is None else f"j/{job_id}/{owner}"


def user_channel(user_id: str) -> str:
    """Channel of all jobs of one user."""
    return f"u/{user_id}"


def channels_of(update: Update) -> tuple[str, ...]:
    """The channels an update is offered on: four for a job's, one for a notification."""
    if update.targets is not None:
        return (NOTICES,)
    job = f"j/{update.job_id}"
    return EVERYTHING, f"u/{update.user_id}", job, f"{job}/{update.user_id}"


def parse_watch(query: Mapping[str, str], types: frozenset[str] = UPDATE_TYPES) -> Watch:
    """Read ``jobIds, userId, all, types, kind, status, fields`` of a query string; ``types`` are those there are.

    Raises:
        ApiError: 400 naming the parameter.
    """
    job_ids: tuple[str, ...] | None = None
    if "jobIds" in query:
        job_ids = tuple(dict.fromkeys(parse_list(query, "jobIds")))
        if len(job_ids) > MAX_JOB_IDS:
            raise invalid_parameter("jobIds", f"{len(job_ids)} ids, at most {MAX_JOB_IDS} are allowed")
        for job_id in job_ids:
            check_parameter_id("jobIds", job_id)
    user_id = query.get("userId")
    if user_id is not None:
        check_parameter_id("userId", user_id)
    return Watch(job_ids, user_id, parse_filter(query, types), parse_fields(query))


def parse_filter(query: Mapping[str, str], known_types: frozenset[str] = UPDATE_TYPES) -> Filter:
    """Read ``types, kind, status``, each a comma list.

    Raises:
        ApiError: 400 for an unknown type or status.
    """
    if "types" not in query and "status" not in query and "kind" not in query:
        return ANY
    types = _words(query, "types", known_types)
    statuses = _words(query, "status", frozenset(STATUSES))
    kinds = frozenset(parse_list(query, "kind")) if "kind" in query else None
    return Filter(types, kinds, statuses)


def parse_fields(query: Mapping[str, str]) -> frozenset[str] | None:
    """Read ``fields``, a comma list of record field names.

    Raises:
        ApiError: 400 for a name that no record has.
    """
    return _words(query, "fields", RECORD_FIELDS)


def wants_all(query: Mapping[str, str]) -> bool:
    """Read ``all``: the explicit form of an admin's default.

    Raises:
        ApiError: 400 for anything but a boolean.
    """
    value = query.get("all", "0")
    if value not in ("0", "1", "false", "true"):
        raise invalid_parameter("all", f"{value!r} is not 0 or 1")
    return value in ("1", "true")


def parse_list(query: Mapping[str, str], name: str) -> list[str]:
    """Read a comma list. Raises ApiError 400 if an item of it is empty."""
    values = [value.strip() for value in query[name].split(",")]
    if not all(values):
        raise invalid_parameter(name, "an item of the comma list is empty")
    return values


def _words(query: Mapping[str, str], name: str, known: frozenset[str]) -> frozenset[str] | None:
    if name not in query:
        return None
    words = frozenset(parse_list(query, name))
    unknown = sorted(words - known)
    if unknown:
        raise invalid_parameter(name, f"{unknown[0]!r} is not one of {', '.join(sorted(known))}")
    return words


def check_parameter_id(name: str, value: str) -> None:
    """Raise ApiError 400 naming the parameter unless ``value`` is an id."""
    if not is_id(value):
        raise invalid_parameter(name, f"{value!r} is not an id: 1 to 128 characters of A-Z a-z 0-9 _ . : @ -")
