"""What a node shows of the log in Redis: records, entries, stored notifications, and how far each shard has come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Set
from operator import attrgetter
from typing import Any, Final, NamedTuple

from protocol.update import Job, Update
from server.brokers.base import Deliver
from server.brokers.redis_keys import (
    NOTICES_SHARD,
    SHARDS,
    Message,
    Stored,
    decode_message,
    shard_of,
    update_of,
)
from server.brokers.redis_notices import places_of
from server.brokers.redis_reading import entries_of
from server.history import History
from server.inbox import Inboxes, Place
from server.jobs import Jobs
from server.turns import PORTION, in_turns, portions, sort

# Records forgotten before others have a turn: about a millisecond.
_TURN: Final = 1000

_created = attrgetter("created")


class LogLostError(Exception):
    """What was shown is not in Redis any more: the log has to begin anew."""


class OutOfStepError(Exception):
    """The log is another one by now, or has moved on too far: it has to be loaded again."""


class Loaded(NamedTuple):
    """What was read of some shards, as of one offset.

    Attributes:
        jobs: their records, a few of which may be later. Used up.
        entries: what of their logs is in reach.
        newest: of each shard, the stamp of its newest message, and that message as it is in the stream.
        cut: the offset up to which entries were too old.
        inboxes: stored notifications and whom they are for; None where they are not among these shards.
    """

    offset: int
    jobs: list[Stored]
    entries: list[Update]
    newest: dict[int, tuple[int, bytes | None]]
    cut: int
    inboxes: list[tuple[Update, list[str]]] | None


class Beside(NamedTuple):
    """What is to take the place of all that is shown."""

    loaded: Loaded
    history: History
    jobs: Jobs
    revs: dict[str, str]


class Shown:
    """Shows what the follower has read, in ``Jobs``, ``History`` and ``Inboxes``.

    Args:
        jobs, history, inboxes: what is shown.
        deliver: shows entries, see ``base.Deliver``.
        on_evicted: called with stored notifications that had no room any more.

    Attributes:
        seen: of each shard, the stamp of its newest message that was shown.
        revs: of each shown job, the token of its state.
    """

    def __init__(
        self,
        jobs: Jobs,
        history: History,
        deliver: Deliver,
        inboxes: Inboxes,
        on_evicted: Callable[[list[Place]], object],
    ) -> None:
        self._jobs = jobs
        self._history = history
        self._deliver = deliver
        self._inboxes = inboxes
        self._on_evicted = on_evicted
        # Both are changed in place: others hold them.
        self.seen: Final = [0] * (SHARDS + 1)
        self.revs: Final[dict[str, str]] = {}
        self._newest: list[bytes | None] = [None] * (SHARDS + 1)  # the newest message shown, as it is in the stream

    # Messages

    def show(self, shard: int, message: Message, data: bytes) -> None:
        """Show one message. It is the shard's next, and nothing after it has been shown."""
        jobs, revs = self._jobs, self.revs
        self.seen[shard] = message.stamp
        self._newest[shard] = data
        if shard == NOTICES_SHARD:
            self._show_notices(message)
            return
        kept: list[tuple[Update, Job | None]] = []
        quiet: list[Job] = []
        offset = message.first
        for write, created in zip(message.writes, message.created, strict=True):
            job_id = write.job_id
            if not write.entry:
                shown = jobs.get(job_id)
                if shown is not None and write.private is not None:
                    revs[job_id] = write.rev
                    quiet.append(Job(shown.latest, created, write.private))
                continue
            update = update_of(write, offset, message.at_ms)
            offset += 1
            if write.private is None:
                revs.pop(job_id, None)
                kept.append((update, None))
            else:
                revs[job_id] = write.rev
                kept.append((update, Job(update, created, write.private)))
        if kept:
            self._history.skip(message.first - 1)
            self._deliver(kept)
        for job in quiet:
            jobs.put(job)
        for job_id in message.gone:
            revs.pop(job_id, None)
            jobs.forget(job_id)
        self._history.skip(message.stamp)

    def _show_notices(self, message: Message) -> None:
        entries = entries_of(message)
        if entries:
            self._history.skip(message.first - 1)
            for entry, write in zip(entries, message.writes, strict=True):
                if write.store:
                    self._on_evicted(self._inboxes.add(entry))
            self._deliver([(entry, None) for entry in entries])
        self._inboxes.remove(places_of(message.gone))
        self._history.skip(message.stamp)

    def following(self, shard: int, page: list[Any], offset: int, cut: int) -> list[tuple[Message, bytes]]:
        """The messages of one log after the newest that was shown, which must come first."""
        seen = self.seen[shard]
        datas: list[bytes] = [fields[1] for _, fields in page]
        if seen:
            if not datas:  # a log keeps its newest entry, however old
                raise LogLostError(f"there is nothing from entry {seen} of shard {shard} on")
            if datas[0] == self._newest[shard]:
                del datas[0]
            elif seen > max(offset - self._history.max_updates - 1, cut) or decode_message(datas[0]).stamp == seen:
                raise LogLostError(f"the entry at {seen} of shard {shard} is not what it was")
        messages = [(decode_message(data), data) for data in datas]
        if messages and messages[0][0].prev != seen:
            raise OutOfStepError(f"what came after entry {seen} of shard {shard} is not kept any more")
        return messages

    # Shards

    async def add(self, loaded: Loaded) -> None:
        """Show shards of which nothing was shown before."""
        await in_turns(self._history.fill(loaded.entries))
        self._load_inboxes(loaded)
        self._history.forget(loaded.cut)
        jobs, revs = await in_turns(_jobs_of(loaded))
        jobs = await in_turns(sort(portions([*self._jobs.jobs.values(), *jobs]), _created))
        await in_turns(self._jobs.load(jobs))
        self.revs.update(revs)
        for shard, (stamp, data) in loaded.newest.items():
            self.seen[shard], self._newest[shard] = stamp, data

    def let_go(self, shards: Set[int]) -> Generator[None, None, None]:
        """Nothing of these shards is shown any more; what is given back forgets their jobs, in turns."""
        for shard in shards:
            self.seen[shard], self._newest[shard] = 0, None
        return self._forget(shards)

    def _forget(self, shards: Set[int]) -> Generator[None, None, None]:
        jobs = self._jobs
        gone = [job_id for user_id, owned in jobs.by_user.items() if shard_of(user_id) in shards for job_id in owned]
        for count, job_id in enumerate(gone):
            job = jobs.get(job_id)
            if job is not None and shard_of(job.latest.user_id) in shards:  # else it is another owner's by now
                self.revs.pop(job_id, None)
                jobs.forget(job_id)
            if count % _TURN == _TURN - 1:
                yield

    # Epochs

    def begin(self, epoch: str, offset: int) -> None:
        """The log is this one and stands at ``offset``; nothing of it is shown."""
        self._history.become(self._fresh(epoch, offset))

    def _fresh(self, epoch: str, offset: int) -> History:
        """A log that stands at ``offset`` and has nothing."""
        fresh = self._history.beside(epoch, max(0, offset - self._history.max_updates + 1))
        fresh.skip(offset)
        return fresh

    async def beside(self, epoch: str, loaded: Loaded) -> Beside:
        """All of it anew, made beside what is shown."""
        history, jobs = self._fresh(epoch, loaded.offset), Jobs(max_jobs=self._jobs.max_jobs)
        await in_turns(history.fill(loaded.entries))
        history.forget(loaded.cut)
        known, revs = await in_turns(_jobs_of(loaded))
        await in_turns(jobs.load(await in_turns(sort(portions(known), _created))))
        return Beside(loaded, history, jobs, revs)

    def become(self, fresh: Beside) -> None:
        """It takes the place of all that is shown, in one step."""
        newest = fresh.loaded.newest
        self._history.become(fresh.history)
        self._load_inboxes(fresh.loaded)
        self._jobs.become(fresh.jobs)
        self.revs.clear()
        self.revs.update(fresh.revs)
        for shard in range(SHARDS + 1):
            self.seen[shard], self._newest[shard] = newest.get(shard, (0, None))

    def _load_inboxes(self, loaded: Loaded) -> None:
        if loaded.inboxes is not None:
            self._inboxes.load((notice, users) for notice, users in loaded.inboxes if notice.offset <= loaded.offset)


def _jobs_of(loaded: Loaded) -> Generator[None, None, tuple[list[Job], dict[str, str]]]:
    """Those that there were at its offset, and the tokens of their states."""
    jobs: list[Job] = []
    revs: dict[str, str] = {}
    while loaded.jobs:
        portion = loaded.jobs[-PORTION:]
        del loaded.jobs[-PORTION:]
        for stored in portion:
            if stored.job is not None and stored.job.created <= loaded.offset:
                jobs.append(stored.job)
                revs[stored.job.latest.job_id] = stored.rev
        yield
    return jobs, revs
