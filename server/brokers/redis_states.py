"""What one node knows of the jobs in Redis: what it is shown, what it was told beyond that, what it has under way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from protocol.update import Job
from server.brokers.redis_calls import Call, Change
from server.brokers.redis_client import Client, RedisClientError, Reply
from server.brokers.redis_follower import Follower
from server.brokers.redis_keys import LOOK, META, SHARDS, WHERE, Stored, shard_of, stored_of
from server.jobs import Jobs

log = logging.getLogger("statuswire.broker")

# Jobs remembered that are not shown here: some 20 MB.
MAX_KNOWN: Final = 20_000
# Ids looked up at once.
_LOOK_UP: Final = 200


class UnknownError(Exception):
    """It is not known here what Redis has of this job."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id


class Slot(msgspec.Struct, gc=False):
    """The state of a job as it will be once what is under way has arrived.

    ``chain`` is the number of the call with which this row of states began: if it or a later one fails, all do.
    """

    job: Job | None
    rev: str
    chain: int


class States:
    """The newest state known of every job: under way, else told, else shown.

    All of it may be stale: Redis compares the tokens.
    """

    def __init__(self, jobs: Jobs, follower: Follower) -> None:
        self._jobs = jobs
        self._follower = follower
        self._working: dict[str, Slot] = {}
        self._known: dict[str, Stored] = {}
        self._looking: set[str] = set()

    def read(self, job_id: str, *, guess: bool) -> tuple[Job | None, str]:
        """A job and the token of its state, None and "" if there is none.

        Args:
            guess: take a job that nothing is known of for none, because it is about to be created.

        Raises:
            UnknownError: nothing is known of it.
        """
        slot = self._working.get(job_id)
        if slot is not None:
            return slot.job, slot.rev
        follower = self._follower
        shown = self._jobs.get(job_id)
        known = self._known.get(job_id)
        if known is not None:
            shard = known.shard
            if shard < 0 and shown is not None:
                shard = shard_of(shown.latest.user_id)
            if shard not in follower.followed or known.stamp > follower.seen[shard]:
                return known.job, known.rev
            del self._known[job_id]
        if shown is not None:
            return shown, follower.revs[job_id]
        if len(follower.followed) <= SHARDS and not guess:  # the one of notifications is another
            raise UnknownError(job_id)
        return None, ""

    def expect(self, change: Change, number: int) -> None:
        """A call was sent: decide on its outcome from now on."""
        slot = self._working.get(change.job_id)
        chain = number if slot is None else slot.chain
        self._working[change.job_id] = Slot(change.after, change.rev, chain)

    def done(self, change: Change, born: int, shard: int, stamp: int) -> None:
        """It arrived, as the call with this stamp; the job's first offset is ``born``."""
        after = change.after
        provisional = 0
        if after is not None and after.created < 0:
            provisional = after.created
            after = change.after = Job(after.latest, born, after.private)
        slot = self._working.get(change.job_id)
        if slot is not None and slot.rev == change.rev:
            del self._working[change.job_id]
        elif slot is not None and slot.job is not None and provisional and slot.job.created == provisional:
            slot.job = Job(slot.job.latest, born, slot.job.private)
        if shard not in self._follower.followed or self._follower.seen[shard] < stamp:
            if after is None:
                self.remember(change.job_id, Stored("", stamp, -1, None))
            else:
                self.remember(change.job_id, Stored(change.rev, stamp, shard, after))

    def told(self, job_id: str, stored: Stored, number: int) -> None:
        """Redis' word on a job, in answer to the call with this number."""
        slot = self._working.get(job_id)
        if slot is None or number >= slot.chain:
            self._working.pop(job_id, None)
        self.remember(job_id, stored)

    def want(self, job_id: str) -> None:
        """Ask Redis for a job that nothing is known of with the next ``look_up``."""
        self._looking.add(job_id)

    def look_up(self, client: Client, then: Callable[[], object]) -> None:
        """Send off what is wanted; ``then`` is called when there is an answer, or none."""
        wanted = list(self._looking)
        self._looking.clear()
        for start in range(0, len(wanted), _LOOK_UP):
            ids: Sequence[str] = wanted[start : start + _LOOK_UP]
            try:
                reply = client.send_script(LOOK, (META, WHERE), ids)
            except RedisClientError:
                return  # whoever wanted it asks again
            reply.when_settled(partial(self._looked_up, ids, then))

    def _looked_up(self, ids: Sequence[str], then: Callable[[], object], reply: Reply) -> None:
        if isinstance(reply.outcome, list):
            _, offset, _, *blobs = reply.outcome
            for job_id, blob in zip(ids, blobs, strict=True):
                if job_id not in self._working:
                    self.remember(job_id, _readable(job_id, blob, offset))
        then()

    def remember(self, job_id: str, stored: Stored) -> None:
        """Redis has this, or had a moment ago."""
        self._known.pop(job_id, None)
        self._known[job_id] = stored
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def drop(self, call: Call) -> None:
        """What it would have written will not come, nor what rests on it."""
        for change in call.changes:
            slot = self._working.get(change.job_id)
            if slot is not None and call.number >= slot.chain:
                del self._working[change.job_id]

    def clear(self) -> None:
        """The log began anew: nothing holds."""
        self._working.clear()
        self._known.clear()


def _readable(job_id: str, blob: bytes | None, offset: int) -> Stored:
    """What Redis has of a job. If that cannot be read, none: deciding on that is refused by Redis, alone of all."""
    try:
        return stored_of(blob, offset)
    except Exception:
        log.exception("what Redis has of job %r cannot be read", job_id)
        return stored_of(None, offset)
