"""The file of the spool: operations that were answered and are not in Redis yet, in order.

Runs in worker threads, one call at a time. Nothing here knows Trio or Redis.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from server.brokers.base import StoreError
from server.brokers.database import begin_alone, chunks, make_durable, opening, transaction, trouble

SCHEMA_VERSION: Final = 1
# Moved from one file to another at a time.
_ROWS: Final = 500
_BYTES: Final = 8 * 1024 * 1024

_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE waiting (seq INTEGER PRIMARY KEY, data BLOB NOT NULL)",
)


class Held(NamedTuple):
    """What a file holds: how many operations, their bytes, and the highest number (0 for none)."""

    operations: int
    bytes: int
    last: int


def left_by_others(base: str, worker: int | None, workers: int) -> list[str]:
    """Files of workers that there are not any more, or of a time without workers.

    Args:
        base: ``store.spool_path``.
        worker: who asks, None without workers; all but the first are told nothing.
        workers: how many there are.
    """
    if worker not in (None, 1):
        return []
    path = Path(base)
    used = {path.name} if worker is None else {f"{path.name}.{number}" for number in range(1, workers + 1)}
    name = re.compile(re.escape(path.name) + r"(\.[1-9][0-9]*)?")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(str(each) for each in found if name.fullmatch(each.name) and each.name not in used)


class SpoolFile:
    """One database file, ours alone. Methods but ``open`` raise sqlite3.Error.

    Args:
        path: of the file; its directory must exist.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self) -> None:
        """Open or create the file, lock it and check it.

        Raises:
            StoreError: it cannot be used; the message says what to do.
        """
        directory = Path(self.path).absolute().parent
        if not directory.is_dir():
            raise StoreError(f"store.spool_path: {self.path}: the directory {directory} does not exist; create it")
        with opening(self.path, self._unusable) as self._db:
            self._prepare()

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts for a new file; a long outage's room is given back
        tables = begin_alone(db)
        if not tables:
            for statement in _TABLES:
                db.execute(statement)
            db.execute("INSERT INTO meta VALUES ('spool', ?)", (str(SCHEMA_VERSION),))
        elif tables != {"meta", "waiting"}:
            raise StoreError(f"store.spool_path: {self.path} is a database of another kind; name another file")
        db.execute("COMMIT")
        (found,) = db.execute("SELECT value FROM meta WHERE name = 'spool'").fetchone() or (None,)
        if found != str(SCHEMA_VERSION):
            raise StoreError(
                f"store.spool_path: {self.path} has format {found}, this version reads format {SCHEMA_VERSION}; "
                "let the version that wrote it pass on what is in it, or name another file"
            )
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"malformed: {verdict}")
        make_durable(db)

    def held(self) -> Held:
        """What there is in it."""
        row = self._db.execute("SELECT count(*), coalesce(sum(length(data)), 0), coalesce(max(seq), 0) FROM waiting")
        return Held(*row.fetchone())

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        match trouble(error):
            case "in use":
                advice = "is in use by another server; give each server a file of its own"
            case "damaged":
                advice = (
                    f"is damaged or no database ({error}); updates that were answered with 202 may be in it: restore "
                    "what can be read with sqlite3's .recover, or move the file away to do without them"
                )
            case "not writable":
                advice = f"cannot be written ({error}); check its owner and permissions"
            case "other":
                advice = f"cannot be used ({error})"
        return StoreError(f"store.spool_path: {self.path} {advice}")

    def append(self, rows: Sequence[tuple[int, bytes]]) -> None:
        """Keep operations under their numbers; on disk when this returns, all or none."""
        with transaction(self._db):
            for some in chunks(rows):
                places = ", ".join(["(?, ?)"] * len(some))
                self._db.execute(f"INSERT INTO waiting VALUES {places}", [value for row in some for value in row])

    def first(self, count: int, size: int) -> list[tuple[int, bytes]]:
        """The first operations: at most so many, and at most so many bytes, but one at least if there is any."""
        found: list[tuple[int, bytes]] = []
        for seq, data in self._db.execute("SELECT seq, data FROM waiting ORDER BY seq LIMIT ?", (count,)):
            size -= len(data)
            if found and size < 0:
                break
            found.append((seq, data))
        return found

    def take_over(self, path: str) -> int:
        """Move what waits in another file behind what is in this one; both are open to nobody else meanwhile.

        Cut off in the middle it leaves some in both: they have keys, and count once. Returns how many there were.

        Raises:
            StoreError: the other file cannot be used.
        """
        other = SpoolFile(path)
        other.open()
        try:
            count, last = other.held().operations, self.held().last
            while rows := other.first(_ROWS, _BYTES):
                self.append([(last + place, data) for place, (_, data) in enumerate(rows, 1)])
                other.remove([number for number, _ in rows])
                last += len(rows)
            other.shrink()
        finally:
            other.close()
        return count

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget operations."""
        with transaction(self._db):
            for some in chunks([(number,) for number in numbers]):
                places = ", ".join("?" * len(some))
                self._db.execute(f"DELETE FROM waiting WHERE seq IN ({places})", [number for (number,) in some])

    def shrink(self) -> None:
        """Give the room of what was removed back to the file system."""
        self._db.execute("PRAGMA incremental_vacuum").fetchall()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Release the file."""
        self._db.close()
