"""Disks of the sqlite broker: full ones, slow ones, and some that do not tell the truth."""

from __future__ import annotations

import sqlite3
import threading

from server.brokers.local import Group
from server.brokers.sqlite import SqliteBroker
from server.brokers.sqlite_file import SqliteFile
from tests.contract.harness import Rig
from tests.support import PATIENCE_S


def file_of(rig: Rig) -> SqliteFile:
    assert isinstance(rig.broker, SqliteBroker)
    return rig.broker._file


def fill_up(rig: Rig) -> None:
    """From now on SQLite finds its disk full (SQLITE_FULL)."""
    (pages,) = file_of(rig)._db.execute("PRAGMA page_count").fetchone()
    file_of(rig)._db.execute(f"PRAGMA max_page_count = {pages}")


def make_room(rig: Rig) -> None:
    file_of(rig)._db.execute("PRAGMA max_page_count = 1000000")


def away(rig: Rig) -> str:
    """Why the store is away, or nothing."""
    return rig.broker.available or ""


BIG = {"filler": "x" * 60_000}


class Held(SqliteFile):
    """A disk that takes its time: a write ends only when the test says so."""

    go: threading.Event

    def write(self, group: Group) -> None:
        self.go.wait(PATIENCE_S)
        super().write(group)


def held(rig: Rig) -> Held:
    """Its disk, from now on of this kind."""
    file = file_of(rig)
    file.__class__ = Held
    assert isinstance(file, Held)
    file.go = threading.Event()
    return file


class Flaky(SqliteFile):
    """A disk that says it failed though the commit took place; then is unreadable for a while."""

    unreadable = 0
    lie = False

    def write(self, group: Group) -> None:
        super().write(group)
        if self.lie:
            self.lie = False
            raise sqlite3.OperationalError("disk I/O error")

    def last_offset(self) -> int:
        if self.unreadable:
            self.unreadable -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return super().last_offset()


def flaky(rig: Rig) -> Flaky:
    """Its disk, from now on of this kind."""
    file = file_of(rig)
    file.__class__ = Flaky
    assert isinstance(file, Flaky)
    return file
