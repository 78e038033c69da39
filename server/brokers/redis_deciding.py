"""Deciding an operation on the newest state that this node knows; see ``redis_publisher``."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from functools import partial
from typing import Final

from msgspec import UNSET

from protocol import job as rules
from protocol.errors import job_not_found
from protocol.update import Job, Update
from server.brokers.base import Acknowledge, Cancel, Claim, Delete, Expire, Notify, Operation, Publish
from server.brokers.deciding import ancestors_of, create, fields_for, identify, job_exists, new_target, owned
from server.brokers.keys import digest_of, fingerprint_of
from server.brokers.redis_calls import Call, Change
from server.brokers.redis_keys import shard_of
from server.brokers.redis_notices import HELD, address_notice, decide_notice
from server.brokers.redis_states import States

# Offsets of what Redis has not numbered yet are negative: a call's own, and after it those of its ancestors.
_PER_CALL: Final = 16
# A union would be made anew for each operation, in half a microsecond.
_OF_NO_JOB: Final = (Claim, Acknowledge)


class BlockedError(Exception):
    """A job that this depends on is on its way."""


def address(call: Call) -> None:
    """Fill in which job a call is about, what it holds, and its idempotency key.

    Raises:
        ApiError: see ``deciding.identify`` and ``deciding.new_target``.
    """
    operation = call.operation
    if isinstance(operation, Publish):
        job_id, key = identify(operation)
        if key is not None:
            call.digest = digest_of(operation.sub, key)
            call.fingerprint = fingerprint_of(job_id, operation.create, operation.fields).hex().encode()
        call.job_id = new_target(operation) if job_id is None else job_id
        parent_id = operation.fields.parent_id
        call.holds = (call.job_id,) if parent_id is UNSET else (call.job_id, parent_id)
    elif isinstance(operation, Claim):
        call.digest = digest_of(operation.sub, operation.key)
        call.fingerprint = operation.fingerprint.hex().encode()
    elif isinstance(operation, Notify | Acknowledge):
        call.job_id = HELD
        call.holds = (HELD,)
        if isinstance(operation, Notify):
            address_notice(call, operation)
    else:
        call.job_id = operation.job_id
        call.holds = (call.job_id,)


class Decider:
    """Applies the rules to the known states.

    Args:
        states: what is known.
        clock: unix time in seconds.

    Attributes:
        at_ms: time of the newest entry heard of: the log's time never goes back, whatever the wall clock does.
    """

    def __init__(self, states: States, clock: Callable[[], float]) -> None:
        self._states = states
        self._clock = clock
        self._node = secrets.token_urlsafe(6)
        self._revs = itertools.count()
        self.at_ms = 0

    def decide(self, call: Call) -> bool:
        """Fill ``changes``. False if nothing changes, or nothing of a job.

        Raises:
            ApiError: it is refused.
            UnknownError: a job that it rests on is not known here.
            BlockedError: one is being created just now.
        """
        operation, job_id = call.operation, call.job_id
        if isinstance(operation, _OF_NO_JOB):
            return False
        now_ms = max(self.at_ms, int(self._clock() * 1000))
        if isinstance(operation, Notify):
            decide_notice(call, operation, self._new_rev(), now_ms)
            return True
        get = partial(self._read, call)
        offset = -_PER_CALL * call.number
        before = get(job_id)
        after: Job | None = None
        match operation:
            case Publish():
                if before is None:
                    after = create(operation, job_id, partial(self._read_parent, call), offset=offset, now_ms=now_ms)
                else:
                    fields = fields_for(operation, before)
                    if rules.is_repeat(before, fields):
                        return False
                    if operation.create == "must":
                        raise job_exists(job_id)
                    after = rules.apply(before, fields, offset=offset, now_ms=now_ms)
            case Cancel(owner=owner):
                after = rules.request_cancel(owned(_must(before, job_id), owner), offset=offset, now_ms=now_ms)
                if after is None:
                    return False
            case Expire():
                private = _must(before, job_id).private
                if before is None or before.latest.ended or private.ttl is None or private.heard != operation.heard:
                    return False
                after = rules.expire(before, offset=offset, now_ms=now_ms)
            case Delete():
                update = rules.delete(_must(before, job_id), offset=offset, now_ms=now_ms)
        if after is not None:
            update = after.latest
        self._change(call, before, after, update, True)
        some = after or before
        if some is not None and some.private.link is not None:
            for job in ancestors_of(before, after, get, update):
                parent = get(job.latest.job_id)
                assert parent is not None
                self._change(call, parent, job, job.latest, job.latest is not parent.latest)
        call.shard = shard_of(update.user_id)
        return True

    def _change(self, call: Call, before: Job | None, after: Job | None, update: Update, entry: bool) -> None:
        rev = self._new_rev()
        call.changes.append(Change(update.job_id, before, after, update, entry, call.reads[update.job_id], rev))

    def _new_rev(self) -> str:
        return f"{self._node}{next(self._revs):x}"

    def _read(self, call: Call, job_id: str) -> Job | None:
        """The newest state known of a job, noting on which one the decision rests."""
        guess = job_id == call.job_id and _may_create(call.operation)
        job, call.reads[job_id] = self._states.read(job_id, guess=guess)
        return job

    def _read_parent(self, call: Call, job_id: str) -> Job | None:
        parent = self._read(call, job_id)
        if parent is not None and parent.created < 0:
            raise BlockedError  # a part's tie names the parent's first offset
        return parent


def _must(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise job_not_found(job_id)
    return job


def _may_create(operation: Operation) -> bool:
    """Whether it is worth trying without knowing if the job exists: Redis checks it anyway."""
    return isinstance(operation, Publish) and (
        operation.create == "must" or (operation.create == "may" and operation.fields.user_id is not UNSET)
    )
