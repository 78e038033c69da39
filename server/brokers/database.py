"""SQLite files that are this process' alone: what the store's and the spool's have in common."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from server.brokers.base import StoreError

# Rows of one statement. The sqlite3 module releases the GIL around every step; with executemany that is once per row,
# and a busy main thread gives it back only after the switch interval. Measured, 1,000 rows while the main thread
# computes (median of 15, CPython 3.11, 2 cores): executemany 23 to 520 ms from one run to the next, statements of 256
# rows 36 to 59 ms; with a switch interval of 1 ms 29 and 9 to 25 ms (main thread idle: 3 to 5 ms either way). A few
# fixed sizes keep the statements in the module's cache.
_ROWS: Final = (256, 32, 4, 1)


@contextmanager
def opening(path: str, unusable: Callable[[sqlite3.Error], StoreError]) -> Iterator[sqlite3.Connection]:
    """Open a file for a block that prepares it, and close it again if that fails.

    Raises:
        StoreError: the block's own, or for what sqlite says, in the words of ``unusable``.
    """
    try:
        # The server may be restarting: give its predecessor a moment to let go of the file.
        db = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise unusable(error) from error
    try:
        yield db
    except sqlite3.Error as error:
        db.close()
        raise unusable(error) from error
    except BaseException:
        db.close()
        raise


def begin_alone(db: sqlite3.Connection) -> set[str]:
    """Lock the file, and begin a transaction that prepares it. Returns the names of its tables."""
    # A second server on this file fails at once instead of forking the log, and no shared memory is needed.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def make_durable(db: sqlite3.Connection) -> None:
    """From now on a commit is on disk."""
    # WAL: one sync per commit. FULL: what was answered is on disk.
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA journal_size_limit = 67108864")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of a block, or nothing."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors roll back by themselves
            db.execute("ROLLBACK")
        raise


def chunks(rows: Sequence[tuple[object, ...]]) -> Iterator[Sequence[tuple[object, ...]]]:
    """Rows in portions of a few fixed sizes, one statement each."""
    start = 0
    for size in _ROWS:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def trouble(error: sqlite3.Error) -> Literal["in use", "damaged", "not writable", "other"]:
    """Why a file cannot be used."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return "in use"
    if "not a database" in text or "malformed" in text:
        return "damaged"
    return "not writable" if "readonly" in text or "unable to open" in text else "other"
