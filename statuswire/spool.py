"""Ends of jobs on disk, from before they are sent until they are answered.

Each process writes a journal of its own and holds a lock on it (``flock``), which the kernel gives up when the process
dies, however it dies. A journal that can be locked belonged to a dead process: whoever gets the lock sends what is in
it. Lines are JSON: ``{"key","at","jobId","attempt","update"}`` for an end, ``{"done"}`` for one that was answered. A
last line that is cut short was never said to be kept.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

MAX_JOURNAL: Final = 64 * 1024 * 1024
MAX_SPOOL: Final = 256 * 1024 * 1024  # of all journals, where no server takes what many processes leave
# Nobody waits for such an end any more, and the job may have gone on in ways of which it knows nothing.
MAX_AGE_US: Final = 7 * 86_400 * 1_000_000
SUFFIX: Final = ".journal"


class Entry(msgspec.Struct, rename="camel"):
    """An end as it is kept.

    Attributes:
        key: its ``eventId``.
        at: when it was said, unix microseconds.
    """

    key: str
    at: int
    job_id: str
    update: msgspec.Raw
    attempt: int | None = None


class Place(NamedTuple):
    """Where an end is kept."""

    journal: Journal
    offset: int
    length: int


class _Line(msgspec.Struct, omit_defaults=True):
    done: str | None = None
    key: str | None = None


_encode = msgspec.json.Encoder().encode
_decode_entry = msgspec.json.Decoder(Entry).decode
_decode_line = msgspec.json.Decoder(_Line).decode


class Journal:
    """One locked file.

    Args:
        path: made if it does not exist.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made, opened or locked.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        self.path = path
        self._fd = os.open(path, flags, 0o600)
        # Reentrant, and offsets are taken before writing: a signal handler may end a job while its thread is in here.
        self._lock = threading.RLock()
        self._waiting: set[str] = set()
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_nlink == 0:  # its last owner was just done with it
                raise BlockingIOError(f"{path} is gone")
            self._size = os.fstat(self._fd).st_size
            if create:
                _sync_directory(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def entries(self, now_us: int) -> list[tuple[Entry, Place]]:
        """What a dead process left, oldest first, without the updates; for a journal that was not made here.

        Raises:
            OSError: it cannot be read.
        """
        with os.fdopen(os.dup(self._fd), "rb") as file:
            done: set[str] = set()
            line = b"\n"
            for line in file:
                found = _parsed(line)
                if found is not None and found.done is not None:
                    done.add(found.done)
            if not line.endswith(b"\n"):  # cut short when its writer died; what is written now begins a new one
                self._append(b"\n")
            file.seek(0)
            offset = 0
            entries: list[tuple[Entry, Place]] = []
            for line in file:
                start, offset = offset, offset + len(line)
                found = _parsed(line)
                if found is None or found.key is None or found.key in done:
                    continue
                try:
                    entry = _decode_entry(line)
                except (msgspec.MsgspecError, UnicodeError):
                    continue
                if entry.at >= now_us - MAX_AGE_US:
                    self._waiting.add(entry.key)
                    entry.update = msgspec.Raw()
                    entries.append((entry, Place(self, start, len(line))))
        return entries

    def add(self, entry: Entry) -> Place:
        """Keep an end; it is on disk when this returns.

        Raises:
            OSError: it is not kept: the disk is full or broken, or the journal is.
        """
        line = _encode(entry) + b"\n"
        with self._lock:
            if self._size + len(line) > MAX_JOURNAL:
                raise OSError(f"{self.path} has {self._size} bytes, no more ends of jobs are kept")
            self._waiting.add(entry.key)
            try:
                offset = self._append(line)
            except OSError:
                self._waiting.discard(entry.key)
                raise
        try:
            # Outside of the lock: other threads may write meanwhile, and one of them syncs for both.
            os.fdatasync(self._fd)
        except OSError:
            with self._lock:
                self._waiting.discard(entry.key)
            raise
        return Place(self, offset, len(line))

    def read(self, place: Place) -> bytes:
        """The update that is kept there. Raises OSError or msgspec.MsgspecError if it cannot be read."""
        return bytes(_decode_entry(os.pread(self._fd, place.length, place.offset)).update)

    def done(self, key: str) -> bool:
        """This end was answered; whether there are no others. Raises OSError if that cannot be written down."""
        with self._lock:
            self._waiting.discard(key)
            if self._waiting:
                # Not synced: after a crash of the machine the end is sent once more, which changes nothing.
                self._append(_encode(_Line(done=key)) + b"\n")
                return False
            os.ftruncate(self._fd, 0)
            self._size = 0
            return True

    def close(self) -> None:
        """Give it up; the file goes with it unless there is something in it."""
        with self._lock:
            if not self._waiting:
                with suppress(OSError):  # one that stays is looked into again, and there is nothing in it
                    self.path.unlink()
            self.abandon()

    def abandon(self) -> None:
        """Close it in a child process; the parent still has it."""
        fd, self._fd = self._fd, -1  # whoever still comes finds no file, rather than somebody else's
        if fd >= 0:
            os.close(fd)

    def _append(self, line: bytes) -> int:
        """Write a line; where it begins. Raises OSError, with the file as it was."""
        length = len(line)
        offset = self._size
        self._size = offset + length
        try:
            if os.pwrite(self._fd, line, offset) != length:
                raise OSError(f"{self.path}: the disk is full")
        except OSError:
            if self._fd >= 0 and self._size == offset + length:
                self._size = offset
                os.ftruncate(self._fd, offset)
            raise
        return offset


class Spool:
    """A directory of journals. One process writes one of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._own: Journal | None = None
        self._adopted: dict[Path, Journal] = {}
        self._lock = threading.RLock()

    def keep(self, entry: Entry) -> Place:
        """Keep an end in this process' journal. Raises OSError if it is not kept."""
        with self._lock:
            if self._own is None:
                self._own = self._create()
            own = self._own
        return own.add(entry)

    def adopt(self, most: int, now_us: int) -> Iterator[tuple[Entry, Place]]:
        """What dead processes left, until it is more than ``most``; what cannot be read is left alone.

        Args:
            now_us: unix microseconds; what is too old is forgotten.
        """
        try:
            paths = sorted(self.directory.glob(f"*{SUFFIX}"))
        except OSError:
            return
        for path in paths:
            if most <= 0:
                return
            if path in self._adopted or (self._own is not None and path == self._own.path):
                continue
            try:
                journal = Journal(path, create=False)
            except OSError:
                continue
            self._adopted[path] = journal
            try:
                entries = journal.entries(now_us)
            except OSError:
                continue
            most -= len(entries)
            if not entries:
                self._drop(journal)
            yield from entries

    def done(self, place: Place, key: str) -> None:
        """This end was answered. Raises OSError if that cannot be written down."""
        if place.journal.done(key) and place.journal is not self._own:
            self._drop(place.journal)

    def close(self) -> None:
        """Give up everything; what was not answered is there for the next process."""
        with self._lock:
            own, self._own = self._own, None
        for journal in [*self._adopted.values(), *([own] if own else [])]:
            journal.close()
        self._adopted.clear()

    def abandon(self) -> None:
        """Forget everything, in a child process."""
        self._lock = threading.RLock()
        for journal in [*self._adopted.values(), *([self._own] if self._own else [])]:
            journal.abandon()
        self._own = None
        self._adopted = {}

    def _create(self) -> Journal:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sum(_size(path) for path in self.directory.glob(f"*{SUFFIX}")) > MAX_SPOOL:
            raise OSError(f"{self.directory} is full: no server has taken what is in it")
        for _ in range(8):
            try:
                return Journal(self.directory / f"{os.getpid()}-{secrets.token_hex(6)}{SUFFIX}", create=True)
            except BlockingIOError:
                continue  # somebody who looks for the journals of the dead was between our making and our locking it
        raise OSError(f"{self.directory}: no journal can be made")

    def _drop(self, journal: Journal) -> None:
        self._adopted.pop(journal.path, None)
        journal.close()


def _parsed(line: bytes) -> _Line | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return _decode_line(line)
    except (msgspec.MsgspecError, UnicodeError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # its owner was just done with it
        return 0


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
