"""The embedded default: one file, group commit in a thread of its own, shown and answered only after the commit.

Natural batching: while one group is being committed, the next one gathers; no timer. An idle server commits a lone
update at once, a busy one as many together as arrived during the last commit.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from protocol.errors import ApiError
from server.brokers.base import Deliver
from server.brokers.local import HOUSEKEEPING_S, Group, LocalBroker, log, new_epoch
from server.brokers.sqlite_file import Loaded, SqliteFile
from server.brokers.thread import StoreThread
from server.history import History
from server.jobs import Jobs
from server.turns import at_once
from server.wheel import Wheel

_PROBE_EVERY_S: Final = 1.0
_SWITCH_INTERVAL_S: Final = 0.001


class SqliteBroker(LocalBroker):
    """Keeps everything in one SQLite file.

    Args:
        path: of the file.
        jobs, history, deliver, wheel: see ``LocalBroker``. The history's bounds of count and age hold for the file too.
        on_new_epoch: called with the new epoch when the log had to start anew while running: ``Jobs`` and ``History``
            have been filled again by then, and every reader needs a snapshot.
    """

    def __init__(
        self,
        path: str,
        jobs: Jobs,
        history: History,
        deliver: Deliver,
        wheel: Wheel,
        *,
        on_new_epoch: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(jobs, history, deliver, wheel)
        self._file = SqliteFile(path, max_updates=history.max_updates, max_age=history.max_age)
        self._thread = StoreThread()
        self._on_new_epoch = on_new_epoch
        self._wake = trio.Event()
        self._writing = trio.Lock()  # run() and close() take turns
        self._in_doubt = False  # after an error it could not be read whether the commit took place
        self._open = False

    async def start(self) -> None:
        """Open the file and load it. Raises StoreError with a message for the operator."""
        # A commit takes the GIL back half a dozen times, and waits for it up to the switch interval when the main
        # thread is busy: at the default of 5 ms a commit of 100 rows took 20 to 100 ms then, at 1 ms it took 5.
        sys.setswitchinterval(min(_SWITCH_INTERVAL_S, sys.getswitchinterval()))
        try:
            loaded = await self._thread.run(self._open_and_load)
        except BaseException:
            self._thread.stop()
            raise
        self._open = True
        self._adopt(loaded)
        self._marks = await self._thread.run(self._file.marks)
        while self._count > self._jobs.max_jobs:  # the bound may have been lowered since
            oldest = self._jobs.take_oldest_ended()
            if oldest is None:
                break
            self._add_silent(oldest.latest.job_id, None)
            self._group.forgotten.append(oldest.created)
            self._count -= 1
        if not self._group.empty:
            await self._keep_group()

    def _settle_and_close(self) -> None:
        with suppress(sqlite3.Error):  # it is in the log
            self._file.settle()
        self._file.close()

    def _open_and_load(self) -> Loaded:
        self._file.open(new_epoch())
        try:
            return self._file.load(new_epoch=new_epoch())
        except BaseException:
            self._file.close()
            raise

    async def run(self) -> None:
        """Commit what gathers, until cancelled; look for the store's return while it is away."""
        while True:
            away = self._away is not None
            # One scope for as long as nothing changes: a commit need not pay for one.
            with trio.move_on_after(_PROBE_EVERY_S if away else HOUSEKEEPING_S) as pause:
                while away == (self._away is not None):
                    await self._wake.wait()
                    self._wake = trio.Event()
                    await self._keep_group()
            if not pause.cancelled_caught:
                continue
            if not self._group.empty or self._group.submissions:
                self._wake.set()  # it was waiting for the writer when the pause was over
            if self._away:
                await self._probe()
            else:
                self._housekeep()

    async def save_mark(self, name: str, text: str) -> None:
        """See ``base.Broker``."""
        async with self._writing:
            if not self._open:
                raise ApiError(503, "store_unavailable", "the store is closed")
            try:
                await self._thread.run(partial(self._file.save_mark, name, text))
            except sqlite3.Error as error:
                raise ApiError(503, "store_unavailable", f"the store is away ({error})") from error
        self._marks[name] = text

    async def close(self) -> None:
        """Refuse what comes later, commit what waits, release the file."""
        self._closing = True
        self._leases.clear()
        with trio.CancelScope(shield=True):  # bounded by the disk; an accepted update is not thrown away
            while not self._group.empty or self._group.submissions:
                await self._keep_group()
            async with self._writing:
                if self._open:
                    self._open = False
                    await self._thread.run(self._settle_and_close)
            self._thread.stop()

    def _gathered(self) -> None:
        self._wake.set()

    async def _keep_group(self) -> None:
        """Commit what has gathered, then show and answer it."""
        try:
            self._writing.acquire_nowait()  # free nearly always; ``acquire`` is a pass through the loop even then
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            group, self._group = self._group, Group()
            if group.empty:  # only answers that waited for an earlier group
                self._kept(group)
                return
            try:
                await self._thread.run(partial(self._write, group))
            except Exception as error:
                await self._failed(group, error)
            else:
                self._recovered()
                self._kept(group)
        finally:
            self._writing.release()

    async def _probe(self) -> None:
        async with self._writing:
            try:
                await self._thread.run(partial(self._write, None))
            except Exception as error:
                await self._failed(Group(), error)
            else:
                self._recovered()

    def _write(self, group: Group | None) -> None:
        """In the thread: commit a group, or try whether that would work."""
        if self._in_doubt:
            if self._file.last_offset() != self._kept_offset:
                raise _DivergedError(f"{self._file.path} has another end than expected")
            self._in_doubt = False
        if group is not None:
            self._file.write(group)
        else:
            self._file.probe()

    def _recovered(self) -> None:
        if self._away is not None:
            self._away = None
            log.info("the store works again")

    async def _failed(self, group: Group, error: Exception) -> None:
        """A group was not kept, as far as one can know: take back what is not shown, and see where the log stands."""
        loaded: Loaded | None = None
        self._in_doubt = True
        try:
            if await self._thread.run(self._file.last_offset) != self._kept_offset:
                load = partial(self._file.load, renew_epoch=new_epoch(), new_epoch=new_epoch())
                loaded = await self._thread.run(load)
            self._in_doubt = False
        except Exception as worse:
            log.error("the store cannot be read: %s", worse)
        if self._away is None:
            # A sqlite3 error is the disk's; anything else is a mistake of ours and worth a traceback.
            log.error("the store failed: %s", error, exc_info=not isinstance(error, sqlite3.Error))
        self._away = f"sqlite: {error}"
        refusal = ApiError(503, "store_unavailable", f"the update could not be kept ({error})", retry_after=2)
        self._lost([group, self._group], refusal)
        if loaded is not None:
            # What a failed commit left behind was refused to its publishers; nobody was shown it under the old
            # epoch, and under the new one everybody starts from a snapshot that has it.
            self._adopt(loaded)
            log.warning("the log starts anew as epoch %s", loaded.epoch)
            if self._on_new_epoch is not None:
                self._on_new_epoch(loaded.epoch)

    def _adopt(self, loaded: Loaded) -> None:
        """Show what the file has."""
        at_once(self._jobs.load(loaded.jobs))
        first = loaded.tail[0].offset if loaded.tail else loaded.last + 1
        self._history.restart(loaded.epoch, first - 1)
        for update in loaded.tail:
            self._history.skip(update.offset - 1)
            self._history.append(update)
        self._history.skip(loaded.last)
        self._keys.load(loaded.keys)
        self._let_go(self.inboxes.load(loaded.stored))
        self._started(at_ms=loaded.at_ms)
        self._housekeep()


class _DivergedError(Exception):
    """The file's last offset is not the one that was last shown."""
