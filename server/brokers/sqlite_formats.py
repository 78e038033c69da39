"""The tables of the sqlite broker's file, and what takes a file from an older format to today's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Final

import msgspec

from protocol.rollup import fitted
from protocol.update import ENDED, JOB_DELETED, Job, Private, Update

SCHEMA_VERSION: Final = 3
# Entries of one row of the log: large enough that rows cost nothing beside their entries, small enough to trim by.
ENTRIES_PER_ROW: Final = 512

_NOTICE_TABLES: Final = (
    "CREATE TABLE notices (offset INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, event TEXT NOT NULL,"
    " targets TEXT NOT NULL, body BLOB NOT NULL)",
    "CREATE TABLE inbox (user_id TEXT NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (user_id, offset)) WITHOUT ROWID",
    "CREATE INDEX inbox_offset ON inbox (offset)",
)
# A row of the log has what was committed together: packed entries, the offset of the last one and its time.
_LOG: Final = "CREATE TABLE log (last INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, entries BLOB NOT NULL)"
# Keyed by ``Job.created``: that is one lookup in one tree, where an id would be two, and the order of age.
_JOBS: Final = "CREATE TABLE jobs (created INTEGER PRIMARY KEY, state BLOB NOT NULL)"
TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    _LOG,
    _JOBS,
    "CREATE TABLE keys (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, fingerprint BLOB NOT NULL,"
    " job_id TEXT NOT NULL, offset INTEGER NOT NULL, version INTEGER NOT NULL, at_ms INTEGER NOT NULL)",
    "CREATE TABLE probe (filler BLOB NOT NULL)",
    *_NOTICE_TABLES,
)

pack: Final = msgspec.msgpack.Encoder().encode
unpack_job: Final = msgspec.msgpack.Decoder(Job).decode
unpack_entries: Final = msgspec.msgpack.Decoder(list[Job]).decode
_NOTHING: Final = Private()


def entry(update: Update, job: Job | None, created: int = 0) -> Job:
    """How an entry stands in the log: with the state after it; if there is none, with the ``Job.created`` of the job
    that was deleted, 0 for a notification and where it is not known."""
    return Job(update, created, _NOTHING) if job is None else job


def migrate(db: sqlite3.Connection, found: str | None) -> str | None:
    """Bring a file up as far as is known how. Returns its format then. Within a transaction of the caller's."""
    while found is not None and found.isdecimal() and int(found) in _MIGRATIONS:
        _MIGRATIONS[int(found)](db)
        found = str(int(found) + 1)
        db.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (found,))
    return found


def _notifications(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE log ADD COLUMN targets TEXT")
    for statement in _NOTICE_TABLES:
        db.execute(statement)


def _packed(db: sqlite3.Connection) -> None:
    """From a row for each entry, and for each job one that every entry wrote over."""
    (last,) = db.execute(
        "SELECT max(coalesce((SELECT max(offset) FROM log), 0), coalesce((SELECT max(offset) FROM jobs), 0))"
    ).fetchone()
    db.execute("ALTER TABLE log RENAME TO old_log")
    db.execute("ALTER TABLE jobs RENAME TO old_jobs")
    db.execute(_LOG)
    db.execute(_JOBS)
    columns = "offset, at_ms, type, job_id, user_id, kind, status, version, body, urgent"
    rows = db.execute(f"SELECT {columns}, targets FROM old_log ORDER BY offset")
    while portion := rows.fetchmany(ENTRIES_PER_ROW):
        entries = [entry(_old_update(row), None) for row in portion]
        newest = entries[-1].latest
        db.execute("INSERT INTO log VALUES (?, ?, ?)", (newest.offset, newest.at_ms, pack(entries)))
    for created, private, *row in db.execute(f"SELECT created, private, {columns} FROM old_jobs"):
        job = Job(_old_update((*row, None)), created, fitted(msgspec.json.decode(private, type=Private)))
        db.execute("INSERT INTO jobs VALUES (?, ?)", (created, pack(job)))
    db.execute("DROP TABLE old_log")
    db.execute("DROP TABLE old_jobs")
    db.execute("INSERT INTO meta VALUES ('settled', ?)", (str(last),))


def _old_update(row: tuple[Any, ...]) -> Update:
    offset, at_ms, type_, job_id, user_id, kind, status, version, body, urgent, targets = row
    aimed = None if targets is None else msgspec.json.decode(targets, type=tuple[str, ...])
    ended = aimed is not None or type_ == JOB_DELETED or status in ENDED
    return Update(offset, at_ms, type_, job_id, user_id, kind, status, version, body, ended, bool(urgent), aimed)


_MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {1: _notifications, 2: _packed}
