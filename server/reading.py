"""What a reader may see, and what it has missed: channels, snapshots and replays, all without waiting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from typing import Final, NamedTuple

from protocol.errors import ApiError
from protocol.notice import reaches
from protocol.position import Position, Since, parse_cursor
from protocol.update import Job, Update
from protocol.watch import EVERYTHING, Filter, Watch, job_channel, user_channel
from protocol.wire import select_fields
from server.auth import Identity
from server.history import History
from server.jobs import Jobs

# Of what is looked through for a reader, so much at a time: some 10 µs, or 300 if fields are selected.
LOOK_EVERY: Final = 64


def channels_for(identity: Identity, watch: Watch, *, all_jobs: bool = False) -> list[str]:
    """The channels on which this reader gets what it asks for and nothing it may not see.

    Raises:
        ApiError: 403 for another user's jobs, or all jobs, by other than an admin.
    """
    if all_jobs and not identity.admin:
        raise ApiError(403, "forbidden", "all: only an admin may watch all jobs", field="all")
    user_id = watch.user_id
    if user_id is not None and user_id != identity.user and not identity.admin:
        raise ApiError(403, "forbidden", "userId: only an admin may read another user's jobs", field="userId")
    if watch.job_ids is not None:
        return [channel_of_job(identity, job_id, user_id) for job_id in watch.job_ids]
    if user_id is not None:
        return [user_channel(user_id)]
    return [EVERYTHING if identity.admin else user_channel(identity.user)]


def channel_of_job(identity: Identity, job_id: str, user_id: str | None = None) -> str:
    """The channel of one job, whoever owns it or will; ``user_id`` narrows it to one owner."""
    if user_id is not None:
        return job_channel(job_id, user_id)
    return job_channel(job_id) if identity.admin or identity.names_job(job_id) else job_channel(job_id, identity.user)


def narrowed(identity: Identity, name: str) -> str | None:
    """What of a channel this identity may still be on: the same, one of less, or None."""
    if identity.admin:
        return name
    if name == EVERYTHING:
        return user_channel(identity.user)
    kind, rest, *owner = name.split("/")
    if kind == "u":
        return name if rest == identity.user else None
    if owner:
        return name if owner[0] == identity.user else None
    return channel_of_job(identity, rest)


def channel_updates(history: History, name: str, after: int) -> list[Update]:
    """The kept updates of one channel after an offset, oldest first."""
    if name == EVERYTHING:
        missed = history.everything(after)
        return [update for update in missed if update.targets is None] if history.notices(after) else missed
    kind, rest, *owner = name.split("/")
    if kind == "u":
        return history.of_user(rest, after)
    return history.of_owned_job(rest, owner[0], after) if owner else history.of_job(rest, after)


def missed_updates(history: History, names: Sequence[str], after: int) -> list[Update]:
    """What came after ``after`` on these channels, in log order, each once; wanted or not."""
    if len(names) == 1:
        return channel_updates(history, names[0], after)
    found = {update.offset: update for name in names for update in channel_updates(history, name, after)}
    return [found[offset] for offset in sorted(found)]


def missed_notices(history: History, names: Set[str], after: int) -> list[Update]:
    """The kept notifications after ``after`` for any of these targets, oldest first."""
    return [notice for notice in history.notices(after) if reaches(notice, names)]


def snapshot(jobs: Jobs, names: Sequence[str]) -> list[Job]:
    """The jobs of these channels, each once, channel by channel, oldest first; wanted or not.

    All that has to be done at once, so that they are of one moment, is to copy the references: 1 ms for 100,000.
    """
    if len(names) == 1:
        return list(channel_jobs(jobs, names[0]))
    return list({job.latest.job_id: job for name in names for job in channel_jobs(jobs, name)}.values())


def records(jobs: Iterable[Job], wanted: Filter, fields: frozenset[str] | None) -> Iterator[bytes]:
    """The texts of those that are wanted; now and then an empty one, see ``PushReader.post``."""
    if wanted.is_any and fields is None:
        yield from (job.latest.body for job in jobs)
        return
    for count, job in enumerate(jobs, 1):
        if wanted.passes(job.latest):
            yield job.latest.body if fields is None else select_fields(job.latest.body, fields)
        if count % LOOK_EVERY == 0:
            yield b""


def channel_jobs(jobs: Jobs, name: str) -> Collection[Job]:
    """The jobs of one channel, oldest first."""
    if name == EVERYTHING:
        return jobs.jobs.values()
    kind, rest, *owner = name.split("/")
    if kind == "u":
        return jobs.by_user.get(rest, {}).values()
    job = jobs.get(rest)
    return [job] if job is not None and (not owner or job.latest.user_id == owner[0]) else []


def over(jobs: Jobs, history: History, name: str, kind: str = "") -> bool:
    """Whether the job of this channel has ended, or has gone as far as the log remembers; never, if it is not of
    this kind."""
    _, job_id, *owner = name.split("/")
    job = jobs.get(job_id)
    if job is not None and (not owner or job.latest.user_id == owner[0]):
        return job.latest.ended and kind in ("", job.latest.kind)
    last = history.last_of_job(job_id, *owner)
    return last is not None and last.ended and kind in ("", last.kind)


def live(jobs: Jobs, name: str) -> bool:
    """Whether the job of this channel exists and has not ended."""
    return any(not job.latest.ended for job in channel_jobs(jobs, name))


class Start(NamedTuple):
    """Where a reader begins.

    Attributes:
        given: the cursor text the client came with, if it is one of this log's form; else None.
        after: resume behind this offset; None means from a snapshot.
        lost: a cursor was given that the log cannot serve: tell the reader with ``reset``.
    """

    given: str | None
    after: int | None
    lost: bool


# Without a cursor.
FRESH = Start(None, None, False)


def start_from(history: History, cursor: str | None) -> Start:
    """Decide between snapshot, replay and reset for a reader's cursor (None or empty: it has none)."""
    if not cursor:
        return FRESH
    parsed = parse_cursor(cursor)
    if isinstance(parsed, Since):
        # What was trimmed is not a loss here: a time asks for what is still kept.
        return Start(None, history.offset_at(parsed.unix_ms), False)
    if isinstance(parsed, Position):
        if history.reaches(parsed):
            return Start(cursor, parsed.offset, False)
        return Start(cursor, None, True)
    return Start(None, None, True)
