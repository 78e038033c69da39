"""The file of the sqlite broker: writing a group in one transaction, reading everything back.

Runs in the broker's thread, one call at a time. Nothing here knows Trio or the rules of jobs.

The log is what makes an update durable: a group is one row, which a lone statement adds. The table of jobs follows in
larger steps: it has every job as of the offset ``settled``, and what became of them since is read from the log.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from protocol.notice import notice_entry, users_of
from protocol.update import JOB_DELETED, Job, Update
from server.brokers.base import StoreError
from server.brokers.database import begin_alone, chunks, make_durable, opening, transaction, trouble
from server.brokers.keys import KEEP_MS, Kept
from server.brokers.local import Group
from server.brokers.sqlite_formats import (
    ENTRIES_PER_ROW,
    SCHEMA_VERSION,
    TABLES,
    entry,
    migrate,
    pack,
    unpack_entries,
    unpack_job,
)

# Jobs whose newest state is in the log only, and entries that are to be read for it: some 3 ms of a commit then, and
# 20 ms of a start.
_UNSETTLED_JOBS: Final = 1000
_UNSETTLED_ENTRIES: Final = 20_000

# A trim takes at most this many rows, or twice what the group adds: it catches up without ever making one commit long.
_TRIM_STEP: Final = 1000
_TRIM_SLACK: Final = 256  # rows over the bound before a trim is worth it
_TRIM_EVERY_S: Final = 1.0

_decode_targets = msgspec.json.Decoder(tuple[str, ...]).decode


class Loaded(NamedTuple):
    """All that a file remembers.

    ``jobs`` by ``created``; ``tail``, ``keys`` and ``stored`` oldest first. ``tail`` has no gaps, and reaches ``last``,
    but for what came with an import: offsets that had no entry where it came from. ``stored``: notifications and those
    who have not acknowledged them.
    """

    epoch: str
    last: int
    at_ms: int
    jobs: list[Job]
    tail: list[Update]
    keys: list[Kept]
    stored: list[tuple[Update, list[str]]]


class Standing(NamedTuple):
    """Where a log stands: its newest entry, when that was, and from which offset on nothing is missing."""

    epoch: str
    last: int
    at_ms: int
    first: int


class SqliteFile:
    """One database file, ours alone.

    Args:
        path: of the file; its directory must exist.
        max_updates: log entries kept.
        max_age: seconds that log entries are kept.
    """

    def __init__(self, path: str, *, max_updates: int, max_age: float) -> None:
        self.path = path
        self.max_updates = max_updates
        self.max_age = max_age
        self._first = 1  # near the lowest offset in the log, whose rows go whole
        self._last = 0  # highest offset that was written
        self._trimmed_at = 0.0  # time.monotonic()
        self._settled = 0  # the offset as of which the table has every job
        self._unsettled: dict[int, Job | None] = {}  # those that changed since, by ``created``; None: gone

    def open(self, epoch: str) -> None:
        """Open or create the file and lock it.

        Args:
            epoch: for a new file.

        Raises:
            StoreError: it cannot be used; the message says what to do.
        """
        path = self.path
        directory = Path(path).absolute().parent
        if not path or path.startswith(":"):
            raise StoreError(f"store.url: 'sqlite:{path}' names no file; use sqlite:PATH, or memory: to keep nothing")
        if not directory.is_dir():
            raise StoreError(f"store.url: {path}: the directory {directory} does not exist; create it first")
        with opening(path, self._unusable) as self._db:
            self._prepare(epoch)

    def _prepare(self, epoch: str) -> None:
        db = self._db
        tables = begin_alone(db)
        if not tables:
            for statement in TABLES:
                db.execute(statement)
            values = (str(SCHEMA_VERSION), epoch)
            db.execute("INSERT INTO meta VALUES ('schema', ?), ('epoch', ?), ('settled', '0')", values)
        elif not {"meta", "log", "jobs", "keys"} <= tables:
            raise StoreError(f"store.url: {self.path} is a database of another application; name another file")
        try:
            found = migrate(db, self._meta("schema"))
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise self._damaged(error) from error
        db.execute("COMMIT")
        if found != str(SCHEMA_VERSION):
            raise StoreError(
                f"store.url: {self.path} has format {found}, this version reads format {SCHEMA_VERSION}; "
                "use the version that wrote it, or another file"
            )
        make_durable(db)

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        match trouble(error):
            case "in use":
                advice = "is in use by another server; stop it, or name another file"
            case "damaged":
                advice = f"is damaged or no database ({error}); restore a copy, or move it away"
            case "not writable":
                advice = f"cannot be written ({error}); check its owner and permissions"
            case "other":
                advice = f"cannot be used ({error})"
        return StoreError(f"store.url: {self.path} {advice}")

    def _damaged(self, what: object) -> StoreError:
        return StoreError(f"store.url: {self.path} is damaged ({what}); restore a copy, or move it away")

    def load(self, *, renew_epoch: str | None = None, new_epoch: str) -> Loaded:
        """Read everything.

        Args:
            renew_epoch: start a new incarnation of the log under this name.
            new_epoch: likewise, but only if the log's tail is missing.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            return self._load(renew_epoch, new_epoch)
        except (sqlite3.DatabaseError, msgspec.MsgspecError, UnicodeError) as error:
            raise self._damaged(error) from error

    def _load(self, renew_epoch: str | None, new_epoch: str) -> Loaded:
        db = self._db
        last_in_log, at_ms = db.execute("SELECT last, at_ms FROM log ORDER BY last DESC LIMIT 1").fetchone() or (0, 0)
        last = self.last_offset()
        if last > last_in_log:  # rows that were there are gone: offsets may have been used that we cannot vouch for
            renew_epoch = renew_epoch or new_epoch
        if renew_epoch is not None:
            db.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (renew_epoch,))
        epoch = self._meta("epoch")
        if epoch is None:
            raise self._damaged("no epoch")
        tail: dict[int, Update] = {}
        gaps_until = self._gaps_until()
        previous = last - self.max_updates
        for update in self.entries(previous + 1):
            if update.offset - 1 > max(previous, gaps_until):
                tail.clear()
            tail[update.offset] = update
            previous = update.offset
        if last > max(previous, gaps_until):
            tail.clear()
        self._first = db.execute("SELECT coalesce(min(last), 1) FROM log").fetchone()[0]
        self._last = last
        jobs = [Job(tail.get(job.latest.offset) or job.latest, job.created, job.private) for job in self.jobs()]
        keys = [
            Kept(*row)
            for row in db.execute("SELECT digest, fingerprint, job_id, offset, version, at_ms FROM keys ORDER BY id")
        ]
        return Loaded(epoch, last, at_ms, jobs, list(tail.values()), keys, self._load_stored(tail))

    def _load_stored(self, tail: dict[int, Update]) -> list[tuple[Update, list[str]]]:
        stored: list[tuple[Update, list[str]]] = []
        for offset, at_ms, event, targets, body, user_id in self._db.execute(
            "SELECT offset, at_ms, event, targets, body, user_id FROM notices JOIN inbox USING (offset) ORDER BY offset"
        ):
            if not stored or stored[-1][0].offset != offset:
                notice = tail.get(offset) or notice_entry(offset, at_ms, event, _decode_targets(targets), body)
                stored.append((notice, []))
            stored[-1][1].append(user_id)
        return stored

    def jobs(self) -> Iterator[Job]:
        """Every job, oldest first."""
        self._replay()
        unsettled = self._unsettled
        settled = (
            unpack_job(state)
            for created, state in self._db.execute("SELECT created, state FROM jobs ORDER BY created")
            if created not in unsettled
        )
        newer = [unsettled[created] for created in sorted(unsettled)]
        for job in merge(settled, (job for job in newer if job is not None), key=attrgetter("created")):
            _intern(job.latest)
            yield job

    def _replay(self) -> None:
        """Read from the log what became of jobs since the table was settled."""
        self._settled = int(self._meta("settled") or 0)
        unsettled: dict[int, Job | None] = {}
        for item in self._items(self._settled + 1):
            if item.created:
                unsettled[item.created] = None if item.latest.type == JOB_DELETED else item
        self._unsettled = unsettled

    def _items(self, first: int) -> Iterator[Job]:
        """The log from an offset on, as it is packed."""
        for (entries,) in self._db.execute("SELECT entries FROM log WHERE last >= ? ORDER BY last", (first,)):
            for item in unpack_entries(entries):
                if item.latest.offset >= first:
                    yield item

    def _gaps_until(self) -> int:
        """The offset up to which the log may have gaps."""
        return int(self._meta("gaps_until") or 0)

    # Moving to another store and back

    def standing(self) -> Standing:
        """Where the log stands. Raises StoreError: the file is damaged."""
        epoch, last, gaps_until = self._meta("epoch"), self.last_offset(), self._gaps_until()
        if epoch is None:
            raise self._damaged("no epoch")
        (at_ms,) = self._db.execute("SELECT coalesce(max(at_ms), 0) FROM log").fetchone()
        first, previous = last + 1, 0
        for update in self.entries(last - self.max_updates + 1):
            if first > last or update.offset - 1 > max(previous, gaps_until):
                first = update.offset
            previous = update.offset
        return Standing(epoch, last, at_ms, last + 1 if last > max(previous, gaps_until) else first)

    def entries(self, first: int) -> Iterator[Update]:
        """The log from an offset on."""
        for item in self._items(first):
            _intern(item.latest)
            yield item.latest

    def stored(self) -> list[tuple[Update, list[str]]]:
        """Notifications that are kept for their users, oldest first, and who has not acknowledged them."""
        return self._load_stored({})

    def insert(
        self, jobs: Sequence[Job], updates: Sequence[Update], stored: Sequence[tuple[Update, list[str]]]
    ) -> None:
        """Put something into a file that is being filled."""
        with transaction(self._db):
            self._append([entry(update, None) for update in updates])
            self._insert("INSERT INTO jobs VALUES", 2, [(job.created, pack(job)) for job in jobs])
            self._insert("INSERT INTO notices VALUES", 5, [_notice_row(notice) for notice, _ in stored])
            places = [(user, notice.offset) for notice, users in stored for user in users]
            self._insert("INSERT INTO inbox VALUES", 2, places)

    def complete(self, last: int, at_ms: int, *, gaps: bool) -> None:
        """The file is filled; its log stands at ``last``, with gaps up to there or without."""
        db = self._db
        with transaction(db):
            if gaps:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('gaps_until', ?)", (str(last),))
            if self.last_offset() < last:  # what came last had no entry
                db.execute("INSERT INTO log VALUES (?, ?, ?)", (last, at_ms, pack([])))
            self._set_settled(max(last, *(job.latest.offset for job in self.jobs()), 0))

    def last_offset(self) -> int:
        """Highest offset of any kept entry, 0 without one."""
        (last,) = self._db.execute("SELECT coalesce(max(last), 0) FROM log").fetchone()
        return max(int(last), int(self._meta("settled") or 0))

    def write(self, group: Group) -> None:
        """Keep a group, on disk when this returns. Raises sqlite3.Error; ``last_offset`` tells if it is kept then."""
        items = [entry(update, job, group.deleted.get(update.offset, 0)) for update, job in group.entries]
        last = items[-1].latest.offset if items else self._last
        changes = _changes(group)
        trims = bool(items) and self._is_to_trim(items[-1].latest)
        upto = self._trimmable(items[-1].latest, len(items)) if trims else 0
        settles = (
            bool(group.silent or group.forgotten)  # what has no entry is in no log
            or upto > self._settled
            or len(self._unsettled) + len(changes) > _UNSETTLED_JOBS
            or last - self._settled > _UNSETTLED_ENTRIES
        )
        if trims or settles or len(items) > ENTRIES_PER_ROW or group.keys or group.stored or group.gone:
            with transaction(self._db):
                self._append(items)
                self._insert(
                    "REPLACE INTO keys (digest, fingerprint, job_id, offset, version, at_ms) VALUES",
                    6,
                    [
                        (kept.digest, kept.fingerprint, kept.job_id, kept.offset, kept.version, kept.at_ms)
                        for kept in group.keys
                    ],
                )
                self._keep_notices(group)
                if settles:
                    self._write_jobs(self._unsettled | changes, last)
                if trims:
                    self._trim(upto, items[-1].latest.at_ms, len(items))
        else:
            self._append(items)  # one statement is a transaction by itself
        self._last = last
        if settles:
            self._settled, self._unsettled = last, {}
        else:
            self._unsettled.update(changes)

    def settle(self) -> None:
        """Have every job in the table. Raises sqlite3.Error, and nothing is lost then."""
        if self._unsettled:
            with transaction(self._db):
                self._write_jobs(self._unsettled, self._last)
            self._settled, self._unsettled = self._last, {}

    def _append(self, items: Sequence[Job]) -> None:
        for start in range(0, len(items), ENTRIES_PER_ROW):
            portion = items[start : start + ENTRIES_PER_ROW]
            newest = portion[-1].latest
            self._db.execute("INSERT INTO log VALUES (?, ?, ?)", (newest.offset, newest.at_ms, pack(portion)))

    def _write_jobs(self, states: Mapping[int, Job | None], settled: int) -> None:
        self._delete_in("jobs", "created", [created for created, job in states.items() if job is None])
        self._insert(
            "REPLACE INTO jobs VALUES", 2, [(created, pack(job)) for created, job in states.items() if job is not None]
        )
        self._set_settled(settled)

    def _set_settled(self, offset: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'settled'", (str(offset),))

    def marks(self) -> dict[str, str]:
        """Every short text that was kept, by name."""
        rows = self._db.execute("SELECT name, value FROM meta WHERE name LIKE 'mark:%'")
        return {name.removeprefix("mark:"): value for name, value in rows}

    def save_mark(self, name: str, text: str) -> None:
        """Keep a short text under a name."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"mark:{name}", text))

    def _keep_notices(self, group: Group) -> None:
        """Stored notifications that came, and those that need not be kept any more."""
        self._insert("REPLACE INTO notices VALUES", 5, [_notice_row(notice) for notice in group.stored])
        self._insert(
            "REPLACE INTO inbox VALUES",
            2,
            [(user, notice.offset) for notice in group.stored for user in users_of(notice)],
        )
        for rows in chunks(group.gone):
            places = ", ".join(["(?, ?)"] * len(rows))
            self._db.execute(
                f"DELETE FROM inbox WHERE (user_id, offset) IN (VALUES {places})",
                [value for row in rows for value in row],
            )
        self._delete_in(
            "notices",
            "offset",
            list({place.offset for place in group.gone}),
            " AND NOT EXISTS (SELECT 1 FROM inbox WHERE inbox.offset = notices.offset)",
        )

    def probe(self) -> None:
        """Find out whether a commit works: one that needs some room. Raises sqlite3.Error."""
        with transaction(self._db):
            self._db.execute("INSERT INTO probe VALUES (zeroblob(65536))")
            self._db.execute("DELETE FROM probe")

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _insert(self, head: str, columns: int, rows: Sequence[tuple[object, ...]], tail: str = "") -> None:
        places = f"({', '.join('?' * columns)})"
        for chunk in chunks(rows):
            values = [value for row in chunk for value in row]
            self._db.execute(f"{head} {', '.join([places] * len(chunk))}{tail}", values)

    def _delete_in(self, table: str, column: str, values: Sequence[int], also: str = "") -> None:
        for rows in chunks([(value,) for value in values]):
            places = ", ".join("?" * len(rows))
            self._db.execute(f"DELETE FROM {table} WHERE {column} IN ({places}){also}", [value for (value,) in rows])

    def _is_to_trim(self, newest: Update) -> bool:
        floor = newest.offset - self.max_updates  # highest offset that is over the count
        return floor >= self._first + _TRIM_SLACK or time.monotonic() >= self._trimmed_at + _TRIM_EVERY_S

    def _trimmable(self, newest: Update, added: int) -> int:
        """Up to where the log may be dropped now: what is over the bounds of count and age, though never the newest
        entry, which says where the log stands."""
        self._trimmed_at = time.monotonic()
        step = _trim_step(added)
        (aged,) = self._db.execute(
            "SELECT max(last) FROM (SELECT last, at_ms FROM log ORDER BY last LIMIT ?) WHERE at_ms < ?",
            (step, newest.at_ms - int(self.max_age * 1000)),
        ).fetchone()
        floor = newest.offset - self.max_updates
        return min(max(floor, aged or 0), self._first + step - 1, newest.offset - 1)

    def _trim(self, upto: int, now_ms: int, added: int) -> None:
        if upto >= self._first:
            self._db.execute("DELETE FROM log WHERE last <= ?", (upto,))
            self._first = upto + 1
        self._db.execute(
            "DELETE FROM keys WHERE id <= (SELECT max(id) FROM (SELECT id, at_ms FROM keys ORDER BY id LIMIT ?)"
            " WHERE at_ms < ?)",
            (_trim_step(added), now_ms - KEEP_MS),
        )


def _trim_step(added: int) -> int:
    return max(_TRIM_STEP, 2 * added)


def _changes(group: Group) -> dict[int, Job | None]:
    """What a group makes of jobs, by ``created``; None: gone."""
    changes: dict[int, Job | None] = {job.created: job for job in group.newest.values() if job is not None}
    if group.deleted or group.forgotten:
        changes |= dict.fromkeys((*group.deleted.values(), *group.forgotten))
    return changes


def _notice_row(notice: Update) -> tuple[object, ...]:
    return notice.offset, notice.at_ms, notice.kind, _targets_text(notice), notice.body


def _targets_text(update: Update) -> str | None:
    return None if update.targets is None else msgspec.json.encode(update.targets).decode()


def _intern(update: Update) -> None:
    """Texts that many have in common, once in memory."""
    update.type, update.status = sys.intern(update.type), sys.intern(update.status)
    update.user_id = sys.intern(update.user_id)
    if update.kind is not None:
        update.kind = sys.intern(update.kind)
