"""The shown state of every job: what readers get as a snapshot. Written only by what a broker delivers."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Container, Generator, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from protocol.update import STATUSES, Job, Update
from server.turns import PORTION, portions, sort


class Page(NamedTuple):
    """Some jobs.

    Attributes:
        jobs: from the newest to the oldest.
        following: what to pass as ``after`` for the next page, or None if this is the last.
    """

    jobs: list[Job]
    following: int | None


class Jobs:
    """Records by id, by owner and by age, bounded.

    Args:
        max_jobs: most jobs kept. The broker enforces it: it takes the oldest ended job out before it lets a
            new one in, and refuses a new one when all are live.

    Attributes:
        jobs: every shown job by id.
        by_user: ids and jobs of each owner, oldest first; an owner without jobs has no entry.
        by_status: how many jobs there are of each status.
    """

    def __init__(self, *, max_jobs: int) -> None:
        self.max_jobs = max_jobs
        self.clear()

    def clear(self) -> None:
        """Forget everything (the log starts anew)."""
        self.jobs: dict[str, Job] = {}
        self.by_user: dict[str, dict[str, Job]] = {}
        self.by_status = dict.fromkeys(STATUSES, 0)
        # All jobs by age for paging: ``created`` offsets, ascending, and the id of each. A removed job leaves its
        # slot until half of them are dead.
        self._created: list[int] = []
        self._ids: list[str] = []
        # The updates that ended jobs, oldest first. One that is no longer its job's latest is stale.
        self._ended: deque[Update] = deque()

    def __len__(self) -> int:
        return len(self.jobs)

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""
        return self.jobs.get(job_id)

    def show(self, update: Update, job: Job | None) -> None:
        """An entry was kept: ``job`` is the state after it, None after a deletion. Notifications are no job's."""
        if job is None:
            self.forget(update.job_id)
        else:
            self.put(job)

    def put(self, job: Job) -> None:
        """Set a job's state."""
        latest = job.latest
        job_id, status = latest.job_id, latest.status
        known = self.jobs.get(job_id)
        if known is None or known.created != job.created:
            if known is not None:
                self.forget(job_id)
            self._created.append(job.created)
            self._ids.append(job_id)
            self.by_status[status] += 1
            self.by_user.setdefault(latest.user_id, {})
        elif known.latest.status != status:
            self.by_status[known.latest.status] -= 1
            self.by_status[status] += 1
        self.jobs[job_id] = self.by_user[latest.user_id][job_id] = job
        if latest.ended and (known is None or known.latest is not latest):
            self._ended.append(latest)
            if len(self._ended) > 2 * len(self.jobs) + 64:
                self._ended = deque(update for update in self._ended if self._is_latest(update))

    def forget(self, job_id: str) -> None:
        """Remove a job and every trace of it. Unknown ids are fine."""
        job = self.jobs.pop(job_id, None)
        if job is None:
            return
        self.by_status[job.latest.status] -= 1
        owned = self.by_user[job.latest.user_id]
        del owned[job_id]
        if not owned:
            del self.by_user[job.latest.user_id]
        if len(self._ids) > 2 * len(self.jobs) + 64:
            live = [slot for slot in range(len(self._ids)) if self._in_slot(slot) is not None]
            self._created = [self._created[slot] for slot in live]
            self._ids = [self._ids[slot] for slot in live]

    def load(self, jobs: Sequence[Job]) -> Generator[None, None, None]:
        """Start from these, which must come in order of ``created``; what was known is there until all is done."""
        fresh = Jobs(max_jobs=self.max_jobs)
        for portion in portions(jobs):
            for job in portion:
                fresh.put(job)
            yield
        fresh._ended = deque((yield from sort(portions(list(fresh._ended)), attrgetter("offset"))))
        self.become(fresh)

    def become(self, other: Jobs) -> None:
        """Have what the other has, which is not to be used any more."""
        vars(self).update(vars(other))

    def take_oldest_ended(self) -> Job | None:
        """Pick the job that ended longest ago; it is still shown, but will not be picked again."""
        while self._ended:
            update = self._ended.popleft()
            if self._is_latest(update):
                return self.jobs[update.job_id]
        return None

    def give_back(self, job: Job) -> None:
        """Undo ``take_oldest_ended``; the last one taken first."""
        self._ended.appendleft(job.latest)

    def page(
        self,
        *,
        user_id: str | None = None,
        status: Container[str] | None = None,
        kind: Container[str | None] | None = None,
        limit: int,
        after: int | None = None,
    ) -> Generator[None, None, Page]:
        """Jobs from the newest to the oldest, as of now.

        Args:
            user_id: only this owner's.
            status: only these statuses.
            kind: only these kinds.
            limit: most jobs returned, at least 1.
            after: go on after this: what the previous page returned.

        Returns:
            The page; where many are looked through, others can have turns.
        """
        found: list[Job] = []
        for job in self._newest(user_id, after):
            if job is None:
                yield
                continue
            latest = job.latest
            if (status is None or latest.status in status) and (kind is None or latest.kind in kind):
                if len(found) == limit:
                    return Page(found, found[-1].created)
                found.append(job)
        return Page(found, None)

    def _newest(self, user_id: str | None, after: int | None) -> Iterator[Job | None]:
        """Those that ``page`` looks through, and a None for each of its pauses."""
        looked = self._all_from(after) if user_id is None else self._of_user_from(user_id, after)
        for job in islice(looked, PORTION):
            yield job
            after = job.created
        if next(looked, None) is None:
            return
        # Copying the references is quick: 1 ms for 100,000.
        rest = list(self.jobs.values() if user_id is None else self.by_user[user_id].values())
        end = bisect_left(rest, after, key=attrgetter("created"))
        while end:
            yield None
            portion = rest[max(0, end - PORTION) : end]
            yield from reversed(portion)
            end -= len(portion)

    def _all_from(self, after: int | None) -> Iterator[Job]:
        slot = len(self._created) if after is None else bisect_left(self._created, after)
        while slot:
            slot -= 1
            job = self._in_slot(slot)
            if job is not None:
                yield job

    def _of_user_from(self, user_id: str, after: int | None) -> Iterator[Job]:
        owned = self.by_user.get(user_id, {})
        if after is None:
            return reversed(owned.values())
        jobs = list(owned.values())
        return (jobs[index] for index in reversed(range(bisect_left(jobs, after, key=attrgetter("created")))))

    def _in_slot(self, slot: int) -> Job | None:
        job = self.jobs.get(self._ids[slot])
        return job if job is not None and job.created == self._created[slot] else None

    def _is_latest(self, update: Update) -> bool:
        job = self.jobs.get(update.job_id)
        return job is not None and job.latest is update
