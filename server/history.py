"""The tail of the log in memory: a ring of shown updates, from which readers catch up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from typing import cast

from protocol.position import Position
from protocol.update import Update
from server.turns import PORTION, portions

# What one entry costs beside its body: the struct, its integers, the bytes header, three list slots. Measured with
# tracemalloc over 100,000 entries (CPython 3.11): 230 bytes, and then the index entry of a job seen for the first time.
ENTRY_OVERHEAD = 256

# The lists are cut when this many dead slots are in front and make up half of them: then each entry is moved
# at most once on average, and a cut of a full ring of 100,000 takes about 50 µs.
_CUT_FROM = 1024


class History:
    """Shown updates, newest kept, bounded by count, age and bytes.

    Two indexes, by job and by user, are chains: every entry knows the offset of the entry before it of the same
    job and of the same user, and a table has the newest of each. So appending and evicting are O(1), reading
    a job's or a user's updates costs what it returns, and nothing is left behind of a job without kept updates. Ids
    that were passed on to another user are indexed besides: what a user is told of one must cost nothing for what
    others did with it, or time would tell that they did.

    A node of several may follow only a part of the log. Then an offset whose entry it does not have has a place all the
    same (24 bytes), so that everything goes by offset; ``fill`` puts entries into such places later.

    Args:
        epoch: the log's epoch; the broker sets it when it starts.
        max_updates: most entries kept.
        max_age: seconds after which an entry goes.
        max_bytes: most bytes of memory, estimated.
        last: highest offset already used.

    Attributes:
        epoch: name of the log's incarnation.
        last: highest offset shown so far; 0 before the first.
    """

    def __init__(self, epoch: str = "", *, max_updates: int, max_age: float, max_bytes: int, last: int = 0) -> None:
        self.max_updates = max_updates
        self.max_age = max_age
        self.max_bytes = max_bytes
        self.restart(epoch, last)

    def restart(self, epoch: str, last: int = 0) -> None:
        """Forget everything and go on as another incarnation of the log, after offset ``last``."""
        self.epoch = epoch
        self.last = last
        self.bytes = 0
        self._entries: list[Update | None] = []  # None: evicted, waiting for the next cut; or not followed
        self._before_in_job: list[int] = []
        self._before_of_user: list[int] = []
        self._head = 0  # index of the oldest kept entry
        self._sparse = False  # there may be places without an entry after the head
        self._next_entry = 0  # index before which there is no entry from the head on
        self._newest_in_job: dict[str, int] = {}
        self._newest_of_user: dict[str, int] = {}
        # By job and owner: the offsets of the last updates before the job's id went to somebody else, ascending.
        self._passed_on: dict[tuple[str, str], list[int]] = {}

    @property
    def first(self) -> int:
        """Lowest offset still kept, ``last + 1`` if none is. A cursor below ``first - 1`` is lost."""
        return self.last - (len(self._entries) - self._head) + 1

    def __len__(self) -> int:
        return len(self._entries) - self._head

    def reaches(self, position: Position) -> bool:
        """Whether everything after this position is still here: right epoch, not trimmed, not ahead of the log."""
        return position.epoch == self.epoch and self.first - 1 <= position.offset <= self.last

    def append(self, update: Update) -> None:
        """Add the next update, whose offset is ``last + 1``; evict what is over the bounds."""
        self.extend((update,))

    def extend(self, updates: Sequence[Update]) -> None:
        """Add the next updates, at least one, whose offsets follow each other; evict what is over the bounds then."""
        entries, newest_in_job, newest_of_user = self._entries, self._newest_in_job, self._newest_of_user
        before_in_job, before_of_user = self._before_in_job, self._before_of_user
        last, size = self.last, 0
        for update in updates:
            offset, job_id, user_id = update.offset, update.job_id, update.user_id
            if offset != last + 1:
                self.bytes += size
                raise ValueError(f"offset {offset} after {last}: the log has no gaps")
            before = newest_in_job.get(job_id, 0)
            if before:
                earlier = entries[before - offset]
                if earlier is not None and earlier.user_id != user_id:
                    self._note_owner(earlier)
            entries.append(update)
            before_in_job.append(before)
            before_of_user.append(newest_of_user.get(user_id, 0))
            newest_in_job[job_id] = newest_of_user[user_id] = self.last = last = offset
            size += len(update.body) + ENTRY_OVERHEAD
        self.bytes += size
        oldest = entries[self._head]
        if (
            oldest is None
            or len(entries) - self._head > self.max_updates
            or self.bytes > self.max_bytes
            or oldest.at_ms < update.at_ms - self.max_age * 1000
        ):
            self.trim(update.at_ms)

    def skip(self, offset: int) -> None:
        """Go on behind ``offset``: what there is up to it is not followed here. Nothing happens if it is not ahead."""
        count = offset - self.last
        if count <= 0:
            return
        if count >= self.max_updates:
            self.restart(self.epoch, offset)
            return
        self._sparse = True
        self._entries += [None] * count
        self._before_in_job += [0] * count
        self._before_of_user += [0] * count
        self.last = offset
        self.trim(0)

    def fill(self, updates: Sequence[Update]) -> Generator[None, None, None]:
        """Put entries into places that were skipped; those before ``first`` are left out. Costs a walk over all.

        What is kept stays as it is until all is done. Meanwhile nothing may be appended; it may be trimmed.
        """
        base = self.last + 1 - len(self._entries)
        fresh = self.beside(self.epoch, self.last)
        fresh._head, fresh._sparse = self._head, self._sparse
        entries = fresh._entries = list(self._entries)
        size = self.bytes
        for portion in portions(updates):
            for update in portion:
                index = update.offset - base
                if index >= fresh._head and entries[index] is None:
                    entries[index] = update
                    size += len(update.body) + ENTRY_OVERHEAD
            yield
        before_in_job = fresh._before_in_job = [0] * len(entries)
        before_of_user = fresh._before_of_user = [0] * len(entries)
        newest_in_job, newest_of_user = fresh._newest_in_job, fresh._newest_of_user
        now_ms = 0
        for start in range(fresh._head, len(entries), PORTION):
            for index in range(start, min(start + PORTION, len(entries))):
                entry = entries[index]
                if entry is not None:
                    before = newest_in_job.get(entry.job_id, 0)
                    if before:
                        earlier = entries[before - base]
                        if earlier is not None and earlier.user_id != entry.user_id:
                            fresh._note_owner(earlier)
                    before_in_job[index] = before
                    before_of_user[index] = newest_of_user.get(entry.user_id, 0)
                    newest_in_job[entry.job_id] = newest_of_user[entry.user_id] = entry.offset
                    now_ms = entry.at_ms
            yield
        if (fresh.epoch, fresh.last) != (self.epoch, self.last):
            raise RuntimeError("the log went on while places in it were filled")
        fresh.bytes = size
        self.become(fresh)
        self.trim(now_ms)

    def beside(self, epoch: str, last: int) -> History:
        """An empty one with the same bounds."""
        return History(epoch, max_updates=self.max_updates, max_age=self.max_age, max_bytes=self.max_bytes, last=last)

    def become(self, other: History) -> None:
        """Have what the other has, which is not to be used any more."""
        vars(self).update(vars(other))

    def trim(self, now_ms: int) -> None:
        """Evict what is over the bounds at this time (unix milliseconds)."""
        entries, head, end = self._entries, self._head, len(self._entries)
        newest_in_job, newest_of_user = self._newest_in_job, self._newest_of_user
        oldest_ms = now_ms - self.max_age * 1000
        stay = end - self.max_updates  # index of the first that is within the count
        size, max_bytes = self.bytes, self.max_bytes
        while head < end:
            oldest = entries[head]
            if oldest is None:  # a skipped place goes with the first entry behind it
                next_entry = max(self._next_entry, head)
                while next_entry < end and entries[next_entry] is None:
                    next_entry += 1
                self._next_entry = next_entry
                oldest = entries[next_entry] if next_entry < end else None
                if head < stay:
                    head += 1
                elif oldest is not None and (oldest.at_ms < oldest_ms or size > max_bytes):
                    head = next_entry
                else:
                    break
                continue
            if head >= stay and oldest.at_ms >= oldest_ms and size <= max_bytes:
                break
            entries[head] = None
            head += 1
            size -= len(oldest.body) + ENTRY_OVERHEAD
            job_id, user_id, offset = oldest.job_id, oldest.user_id, oldest.offset
            if newest_in_job[job_id] == offset:
                del newest_in_job[job_id]
            if newest_of_user[user_id] == offset:
                del newest_of_user[user_id]
            if self._passed_on:
                self._forget_owner(oldest)
        self.bytes = size
        if head >= _CUT_FROM and head * 2 >= end:
            del entries[:head], self._before_in_job[:head], self._before_of_user[:head]
            self._next_entry = max(0, self._next_entry - head)
            head = 0
        self._head = head

    def forget(self, offset: int) -> None:
        """Evict everything up to this offset, skipped places too: nobody can resume in front of it any more."""
        if offset >= self.first:
            bound, self.max_updates = self.max_updates, max(0, self.last - offset)
            self.trim(0)
            self.max_updates = bound

    def of_job(self, job_id: str, after: int) -> list[Update]:
        """Kept updates of a job with an offset above ``after``, oldest first."""
        return self._chain(self._newest_in_job.get(job_id, 0), self._before_in_job, after)

    def of_owned_job(self, job_id: str, owner: str, after: int) -> list[Update]:
        """The same of what this user owned only: an id can have belonged to several, one after the other."""
        base = self.last + 1 - len(self._entries)
        stop = max(after, self.first - 1)
        found = []
        for offset in self._last_owned(job_id, owner):
            while offset > stop:
                update = self._entries[offset - base]
                assert update is not None
                if update.user_id != owner:
                    break
                found.append(update)
                offset = self._before_in_job[offset - base]
        found.reverse()
        return found

    def last_of_job(self, job_id: str, owner: str | None = None) -> Update | None:
        """The newest kept update of a job, its deletion included, or None.

        Args:
            owner: look only at what this user owned.
        """
        offset = self._newest_in_job.get(job_id, 0)
        if owner is not None:
            offset = next(self._last_owned(job_id, owner), 0)
        return self._entries[offset - self.last - 1] if offset >= self.first else None

    def of_user(self, user_id: str, after: int) -> list[Update]:
        """Kept updates of a user's jobs with an offset above ``after``, oldest first."""
        return self._chain(self._newest_of_user.get(user_id, 0), self._before_of_user, after)

    def notices(self, after: int) -> list[Update]:
        """Kept notifications with an offset above ``after``, oldest first: those entries that belong to nobody."""
        return self.of_user("", after)

    def everything(self, after: int) -> list[Update]:
        """All kept updates with an offset above ``after``, oldest first."""
        return self.between(after, self.last)

    def between(self, after: int, upto: int) -> list[Update]:
        """The kept updates with an offset above ``after`` and not above ``upto``, oldest first."""
        base = self.last + 1 - len(self._entries)
        entries = self._entries[max(self._head, after + 1 - base) : max(0, upto + 1 - base)]
        return [update for update in entries if update is not None] if self._sparse else cast("list[Update]", entries)

    def offset_at(self, unix_ms: int) -> int:
        """The offset just before the first kept entry accepted at or after that time; ``last`` if there is none."""
        if self._sparse:
            later = (
                index
                for index in range(self._head, len(self._entries))
                if (entry := self._entries[index]) is not None and entry.at_ms >= unix_ms
            )
            return self.first - 1 + next(later, len(self._entries)) - self._head
        index = bisect_left(self._entries, unix_ms, lo=self._head, key=_accepted_at)
        return self.first - 1 + index - self._head

    def _note_owner(self, last: Update) -> None:
        """This was the last one before the job's id went to somebody else."""
        self._passed_on.setdefault((last.job_id, last.user_id), []).append(last.offset)

    def _forget_owner(self, oldest: Update) -> None:
        key = (oldest.job_id, oldest.user_id)
        offsets = self._passed_on.get(key)
        if offsets is not None and offsets[0] == oldest.offset:
            del offsets[0]
            if not offsets:
                del self._passed_on[key]

    def _last_owned(self, job_id: str, owner: str) -> Iterator[int]:
        """The offsets of the last updates of each time that the job's id was this user's, newest first."""
        newest = self._newest_in_job.get(job_id, 0)
        if newest:
            update = self._entries[newest - self.last - 1]
            assert update is not None
            if update.user_id == owner:
                yield newest
        yield from reversed(self._passed_on.get((job_id, owner), ()))

    def _chain(self, offset: int, before: list[int], after: int) -> list[Update]:
        base = self.last + 1 - len(self._entries)  # offset of the entry at index 0
        stop = max(after, self.first - 1)
        found = []
        while offset > stop:
            update = self._entries[offset - base]
            assert update is not None
            found.append(update)
            offset = before[offset - base]
        found.reverse()
        return found


def _accepted_at(update: Update | None) -> int:
    assert update is not None
    return update.at_ms
