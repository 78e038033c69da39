"""The file of the sqlite broker: tables, writing a group in one transaction, reading everything back.

Runs in worker threads, one call at a time. Nothing here knows Trio or the rules of jobs.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from protocol.notice import notice_entry, users_of
from protocol.update import ENDED, JOB_DELETED, NOTIFICATION, Job, Private, Update
from server.brokers.base import StoreError
from server.brokers.keys import KEEP_MS, Kept
from server.brokers.local import Group

SCHEMA_VERSION: Final = 2

_NOTICE_TABLES: Final = (
    "CREATE TABLE notices (offset INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, event TEXT NOT NULL,"
    " targets TEXT NOT NULL, body BLOB NOT NULL)",
    "CREATE TABLE inbox (user_id TEXT NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (user_id, offset)) WITHOUT ROWID",
    "CREATE INDEX inbox_offset ON inbox (offset)",
)
_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE log (offset INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, type TEXT NOT NULL, job_id TEXT NOT NULL,"
    " user_id TEXT NOT NULL, kind TEXT, status TEXT NOT NULL, version INTEGER NOT NULL, urgent INTEGER NOT NULL,"
    " body BLOB NOT NULL, targets TEXT)",
    "CREATE TABLE jobs (job_id TEXT PRIMARY KEY, created INTEGER NOT NULL, offset INTEGER NOT NULL,"
    " at_ms INTEGER NOT NULL, type TEXT NOT NULL, user_id TEXT NOT NULL, kind TEXT, status TEXT NOT NULL,"
    " version INTEGER NOT NULL, urgent INTEGER NOT NULL, body BLOB NOT NULL, private BLOB NOT NULL)",
    "CREATE TABLE keys (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, fingerprint BLOB NOT NULL,"
    " job_id TEXT NOT NULL, offset INTEGER NOT NULL, version INTEGER NOT NULL, at_ms INTEGER NOT NULL)",
    "CREATE TABLE probe (filler BLOB NOT NULL)",
    *_NOTICE_TABLES,
)
# What takes a file from a format to the next one.
_MIGRATIONS: Final = {1: ("ALTER TABLE log ADD COLUMN targets TEXT", *_NOTICE_TABLES)}

# Rows of one statement. The sqlite3 module releases the GIL around every step; with executemany that is once per row,
# and a busy main thread gives it back only after the switch interval. Measured, 1,000 rows while the main thread
# computes (median of 15, CPython 3.11, 2 cores): executemany 23 to 520 ms from one run to the next, statements of 256
# rows 36 to 59 ms; with a switch interval of 1 ms 29 and 9 to 25 ms (main thread idle: 3 to 5 ms either way). A few
# fixed sizes keep the statements in the module's cache.
_ROWS: Final = (256, 32, 4, 1)

# A job's row is written over. REPLACE would take it out and put a new one at the end of the table and into the index:
# five pages in the commit of a lone update instead of two (25 instead of 21 for a hundred), and a ninth more CPU.
_ANEW: Final = " ON CONFLICT (job_id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}"
    for name in (
        "created",
        "offset",
        "at_ms",
        "type",
        "user_id",
        "kind",
        "status",
        "version",
        "urgent",
        "body",
        "private",
    )
)

# A trim takes at most this many rows, or twice what the group adds: it catches up without ever making one commit long.
_TRIM_STEP: Final = 1000
_TRIM_SLACK: Final = 256  # rows over the bound before a trim is worth it
_TRIM_EVERY_S: Final = 1.0

_encode_private = msgspec.json.Encoder().encode
_decode_private = msgspec.json.Decoder(Private).decode
_decode_targets = msgspec.json.Decoder(tuple[str, ...]).decode


class Loaded(NamedTuple):
    """All that a file remembers.

    ``jobs`` by ``created``; ``tail``, ``keys`` and ``stored`` oldest first. ``tail`` has no gaps but those that came
    with an import: offsets that had no entry where it came from. ``stored``: notifications and who has not acknowledged
    them.
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
        self._first = 1  # lowest offset in the log, or lower
        self._trimmed_at = 0.0  # time.monotonic()

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
        try:
            # The server may be restarting: give its predecessor a moment to let go of the file.
            self._db = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._prepare(epoch)
        except sqlite3.Error as error:
            self._db.close()
            raise self._unusable(error) from error
        except StoreError:
            self._db.close()
            raise

    def _prepare(self, epoch: str) -> None:
        db = self._db
        # A second server on this file fails at once instead of forking the log, and no shared memory is needed.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            for statement in _TABLES:
                db.execute(statement)
            db.execute("INSERT INTO meta VALUES ('schema', ?), ('epoch', ?)", (str(SCHEMA_VERSION), epoch))
        elif not {"meta", "log", "jobs", "keys"} <= tables:
            raise StoreError(f"store.url: {self.path} is a database of another application; name another file")
        found = self._meta("schema")
        while found is not None and found.isdecimal() and int(found) in _MIGRATIONS:
            for statement in _MIGRATIONS[int(found)]:
                db.execute(statement)
            db.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (str(int(found) + 1),))
            found = self._meta("schema")
        db.execute("COMMIT")
        if found != str(SCHEMA_VERSION):
            raise StoreError(
                f"store.url: {self.path} has format {found}, this version reads format {SCHEMA_VERSION}; "
                "use the version that wrote it, or another file"
            )
        # WAL: one sync per commit. FULL: an answered update is on disk.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 67108864")

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        text = str(error)
        if "locked" in text or "busy" in text:
            return StoreError(f"store.url: {self.path} is in use by another server; stop it, or name another file")
        if "not a database" in text or "malformed" in text:
            return StoreError(
                f"store.url: {self.path} is damaged or no database ({text}); restore a copy, or move it away"
            )
        if "readonly" in text or "unable to open" in text:
            return StoreError(f"store.url: {self.path} cannot be written ({text}); check its owner and permissions")
        return StoreError(f"store.url: {self.path} cannot be used ({text})")

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
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise StoreError(f"store.url: {self.path} is damaged ({error}); restore a copy, or move it away") from error

    def _load(self, renew_epoch: str | None, new_epoch: str) -> Loaded:
        db = self._db
        last_in_log, at_ms = db.execute("SELECT max(offset), max(at_ms) FROM log").fetchone()
        last = self.last_offset()
        if last > (
            last_in_log or 0
        ):  # rows that were there are gone: offsets may have been used that we cannot vouch for
            renew_epoch = renew_epoch or new_epoch
        if renew_epoch is not None:
            db.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (renew_epoch,))
        epoch = self._meta("epoch")
        if epoch is None:
            raise StoreError(f"store.url: {self.path} is damaged (no epoch); restore a copy, or move it away")
        tail: dict[int, Update] = {}
        gaps_until = self._gaps_until()
        previous = last - self.max_updates
        for row in db.execute(
            "SELECT offset, at_ms, type, job_id, user_id, kind, status, version, body, urgent, targets FROM log"
            " WHERE offset > ? ORDER BY offset",
            (previous,),
        ):
            update = _update(row)
            if update.offset != previous + 1 and update.offset > gaps_until:
                tail.clear()
            tail[update.offset] = update
            previous = update.offset
        if previous != last:
            tail.clear()
        self._first = db.execute("SELECT coalesce(min(offset), 1) FROM log").fetchone()[0]
        jobs = [Job(tail.get(job.latest.offset) or job.latest, job.created, job.private) for job in self.jobs()]
        keys = [
            Kept(*row)
            for row in db.execute("SELECT digest, fingerprint, job_id, offset, version, at_ms FROM keys ORDER BY id")
        ]
        return Loaded(epoch, last, at_ms or 0, jobs, list(tail.values()), keys, self._load_stored(tail))

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
        for created, private, *row in self._db.execute(
            "SELECT created, private, offset, at_ms, type, job_id, user_id, kind, status, version, body, urgent"
            " FROM jobs ORDER BY created"
        ):
            yield Job(_update(row), created, _decode_private(private))

    def _gaps_until(self) -> int:
        """The offset up to which the log may have gaps."""
        return int(self._meta("gaps_until") or 0)

    # Moving to another store and back

    def standing(self) -> Standing:
        """Where the log stands. Raises StoreError: the file is damaged."""
        epoch, last, gaps_until = self._meta("epoch"), self.last_offset(), self._gaps_until()
        if epoch is None:
            raise StoreError(f"store.url: {self.path} is damaged (no epoch); restore a copy, or move it away")
        (at_ms,) = self._db.execute("SELECT coalesce(max(at_ms), 0) FROM log").fetchone()
        first = last + 1
        for (offset,) in self._db.execute(
            "SELECT offset FROM log WHERE offset > ? ORDER BY offset DESC", (last - self.max_updates,)
        ):
            if offset != first - 1 and (first > last or first > gaps_until):
                break
            first = offset
        return Standing(epoch, last, at_ms, first)

    def entries(self, first: int) -> Iterator[Update]:
        """The log from an offset on."""
        for row in self._db.execute(
            "SELECT offset, at_ms, type, job_id, user_id, kind, status, version, body, urgent, targets FROM log"
            " WHERE offset >= ? ORDER BY offset",
            (first,),
        ):
            yield _update(row)

    def stored(self) -> list[tuple[Update, list[str]]]:
        """Notifications that are kept for their users, oldest first, and who has not acknowledged them."""
        return self._load_stored({})

    def insert(
        self, jobs: Sequence[Job], updates: Sequence[Update], stored: Sequence[tuple[Update, list[str]]]
    ) -> None:
        """Put something into a file that is being filled."""
        self._db.execute("BEGIN IMMEDIATE")
        self._insert("INSERT INTO log VALUES", 11, [_log_row(update) for update in updates])
        self._insert("INSERT INTO jobs VALUES", 12, [_job_row(job) for job in jobs])
        self._insert("INSERT INTO notices VALUES", 5, [_notice_row(notice) for notice, _ in stored])
        places = [(user, notice.offset) for notice, users in stored for user in users]
        self._insert("INSERT INTO inbox VALUES", 2, places)
        self._db.execute("COMMIT")

    def complete(self, gaps_until: int) -> None:
        """The file is filled; up to this offset its log may have gaps."""
        if gaps_until:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('gaps_until', ?)", (str(gaps_until),))

    def last_offset(self) -> int:
        """Highest offset of any kept entry, 0 without one."""
        row = self._db.execute(
            "SELECT max(coalesce((SELECT max(offset) FROM log), 0), coalesce((SELECT max(offset) FROM jobs), 0))"
        ).fetchone()
        return int(row[0])

    def write(self, group: Group) -> None:
        """Keep a group, on disk when this returns. Raises sqlite3.Error; ``last_offset`` tells if it is kept then."""
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            self._insert("INSERT INTO log VALUES", 11, [_log_row(update) for update, _ in group.entries])
            gone = [(job_id,) for job_id, job in group.newest.items() if job is None]
            for rows in chunks(gone):
                places = ", ".join("?" * len(rows))
                db.execute(f"DELETE FROM jobs WHERE job_id IN ({places})", [job_id for (job_id,) in rows])
            self._insert("INSERT INTO jobs VALUES", 12, [_job_row(job) for job in group.newest.values() if job], _ANEW)
            self._insert(
                "REPLACE INTO keys (digest, fingerprint, job_id, offset, version, at_ms) VALUES",
                6,
                [
                    (kept.digest, kept.fingerprint, kept.job_id, kept.offset, kept.version, kept.at_ms)
                    for kept in group.keys
                ],
            )
            self._keep_notices(group)
            if group.entries:
                self._trim(group.entries[-1][0], len(group.entries))
            db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

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
        for rows in chunks([(offset,) for offset in {place.offset for place in group.gone}]):
            places = ", ".join("?" * len(rows))
            self._db.execute(
                f"DELETE FROM notices WHERE offset IN ({places})"
                " AND NOT EXISTS (SELECT 1 FROM inbox WHERE inbox.offset = notices.offset)",
                [offset for (offset,) in rows],
            )

    def probe(self) -> None:
        """Find out whether a commit works: one that needs some room. Raises sqlite3.Error."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT INTO probe VALUES (zeroblob(65536))")
            self._db.execute("DELETE FROM probe")
            self._db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # some errors roll back by themselves
            self._db.execute("ROLLBACK")

    def _insert(self, head: str, columns: int, rows: Sequence[tuple[object, ...]], tail: str = "") -> None:
        places = f"({', '.join('?' * columns)})"
        for chunk in chunks(rows):
            values = [value for row in chunk for value in row]
            self._db.execute(f"{head} {', '.join([places] * len(chunk))}{tail}", values)

    def _trim(self, newest: Update, added: int) -> None:
        """Drop what is over the bounds of count and age; never the newest entry, which says where the log stands."""
        now = time.monotonic()
        floor = newest.offset - self.max_updates  # highest offset that is over the count
        if floor < self._first + _TRIM_SLACK and now < self._trimmed_at + _TRIM_EVERY_S:
            return
        self._trimmed_at = now
        step = max(_TRIM_STEP, 2 * added)
        (aged,) = self._db.execute(
            "SELECT max(offset) FROM (SELECT offset, at_ms FROM log ORDER BY offset LIMIT ?) WHERE at_ms < ?",
            (step, newest.at_ms - int(self.max_age * 1000)),
        ).fetchone()
        upto = min(max(floor, aged or 0), self._first + step - 1, newest.offset - 1)
        if upto >= self._first:
            self._db.execute("DELETE FROM log WHERE offset <= ?", (upto,))
            self._first = upto + 1
        self._db.execute(
            "DELETE FROM keys WHERE id <= (SELECT max(id) FROM (SELECT id, at_ms FROM keys ORDER BY id LIMIT ?)"
            " WHERE at_ms < ?)",
            (step, newest.at_ms - KEEP_MS),
        )


def chunks(rows: Sequence[tuple[object, ...]]) -> Iterator[Sequence[tuple[object, ...]]]:
    """Rows in portions of a few fixed sizes, one statement each."""
    start = 0
    for size in _ROWS:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def _log_row(update: Update) -> tuple[object, ...]:
    return (
        update.offset,
        update.at_ms,
        update.type,
        update.job_id,
        update.user_id,
        update.kind,
        update.status,
        update.version,
        update.urgent,
        update.body,
        _targets_text(update),
    )


def _notice_row(notice: Update) -> tuple[object, ...]:
    return notice.offset, notice.at_ms, notice.kind, _targets_text(notice), notice.body


def _targets_text(update: Update) -> str | None:
    return None if update.targets is None else msgspec.json.encode(update.targets).decode()


def _job_row(job: Job) -> tuple[object, ...]:
    latest = job.latest
    return (
        latest.job_id,
        job.created,
        latest.offset,
        latest.at_ms,
        latest.type,
        latest.user_id,
        latest.kind,
        latest.status,
        latest.version,
        latest.urgent,
        latest.body,
        _encode_private(job.private),
    )


def _update(row: Sequence[Any]) -> Update:
    offset, at_ms, type_, job_id, user_id, kind, status, version, body, urgent, *targets = row
    if type_ == NOTIFICATION:
        return notice_entry(offset, at_ms, kind, _decode_targets(targets[0]), body)
    return Update(
        offset,
        at_ms,
        sys.intern(type_),
        job_id,
        sys.intern(user_id),
        sys.intern(kind) if kind is not None else None,
        sys.intern(status),
        version,
        body,
        type_ == JOB_DELETED or status in ENDED,
        bool(urgent),
    )
