"""Exporting from and importing to the file of the sqlite store."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from protocol.update import Job, Update
from server.brokers.base import StoreError
from server.brokers.sqlite_file import SqliteFile
from server.config import Config
from server.transfer.lines import Header, Item, Mark, Reader, Stored, TransferError, Writer

# Rows of one transaction.
_PORTION: Final = 2000


def export(config: Config, out: IO[bytes]) -> Writer:
    """Write all that the file has, as of one moment: nobody else can have it open.

    Raises:
        TransferError: it cannot be read, or a server has it.
    """
    path = config.store.path
    if not Path(path).is_file():
        raise TransferError(f"store.url: there is no file {path} to export; name another one")
    with _opened(path, config) as file:
        standing = file.standing()
        writer = Writer(
            out, Header(epoch=standing.epoch, offset=standing.last, at=standing.at_ms, first=standing.first)
        )
        for job in file.jobs():
            writer.job(job)
        for update in file.entries(standing.first):
            writer.update(update)
        for notice, users in file.stored():
            writer.stored(notice, users)
        for name, text in file.marks().items():
            writer.mark(name, text)
        writer.end()
        return writer


def import_(config: Config, reader: Reader) -> None:
    """Fill a file that is new or has nothing in it. It appears, or changes, only once all is there.

    Raises:
        TransferError: it has something in it, a server has it, or the input is not sound; it is as before.
    """
    path = Path(config.store.path).absolute()
    if path.exists():
        with _opened(str(path), config) as file:
            last = file.last_offset()
            if last:
                raise TransferError(
                    f"store.url: {path} is not empty (its log stands at {last}); name a new file, or move this one away"
                )
    if not path.parent.is_dir():
        raise TransferError(f"store.url: {path}: the directory {path.parent} does not exist; create it first")
    unfinished = path.with_name(path.name + ".importing")
    _remove(unfinished)
    try:
        with _opened(str(unfinished), config, reader.header.epoch) as file:
            portion: list[Item] = []
            for item in reader.items():
                portion.append(item)
                if len(portion) == _PORTION:
                    _insert(file, portion)
                    portion.clear()
            _insert(file, portion)
            header = reader.header
            gaps = reader.updates != header.offset - header.first + 1
            file.complete(header.offset, header.at, gaps=gaps)
        _remove(path)  # nothing was in it; with what is beside it
        os.rename(unfinished, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise TransferError(f"store.url: {path} cannot be written ({error.strerror})") from None
    finally:
        _remove(unfinished)


def _insert(file: SqliteFile, items: Sequence[Item]) -> None:
    jobs = [item for item in items if isinstance(item, Job)]
    updates = [item for item in items if isinstance(item, Update)]
    file.insert(jobs, updates, [item for item in items if isinstance(item, Stored)])
    for item in items:
        if isinstance(item, Mark):
            file.save_mark(item.name, item.text)


@contextmanager
def _opened(path: str, config: Config, epoch: str = "") -> Iterator[SqliteFile]:
    history = config.history
    file = SqliteFile(path, max_updates=history.max_updates, max_age=history.max_age)
    try:
        file.open(epoch)
    except StoreError as error:
        raise TransferError(str(error)) from None
    try:
        yield file
    except StoreError as error:
        raise TransferError(str(error)) from None
    except sqlite3.Error as error:
        raise TransferError(f"store.url: {path} failed ({error})") from None
    finally:
        file.close()


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
