"""The writing half of the Redis broker: decides on what it knows, and lets a script in Redis check that it still holds.

A decision is made at once, on the newest state that this node knows of a job: what it has sent and what it was shown or
told. The script compares the tokens (``rev``) of the states that were decided on; if another node was faster it
answers with the states there are, and the operation is decided again. Refusals and repetitions change nothing in
Redis, so they are verified by a look before they are given. Many calls are under way at once; those to one job stay in
order: one that has to be decided again waits until those behind it have come back, and new ones wait behind it.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import trio
from msgspec import UNSET

from protocol import job as rules
from protocol.errors import ApiError, job_not_found
from protocol.resp import RedisError
from protocol.update import Job, Update
from server.brokers.base import Accepted, Cancel, Claim, Delete, Expire, Operation, Publish, Result, Submission
from server.brokers.deciding import (
    ancestors_of,
    create,
    identify,
    job_exists,
    key_reused,
    new_target,
    too_many_jobs,
)
from server.brokers.keys import digest_of, fingerprint_of
from server.brokers.redis_calls import Batch, Call, Change, ended_of
from server.brokers.redis_client import Client, ConnectionLostError, OverloadedError, RedisClientError, Reply
from server.brokers.redis_follower import Follower, unavailable
from server.brokers.redis_keys import (
    CHANNELS,
    CLAIM,
    CONFLICT,
    DONE,
    FULL,
    LOGS,
    LOOK,
    META,
    OTHER_EPOCH,
    PUBLISH,
    PUBLISH_KEYS,
    REPEATED,
    WHERE,
    Kind,
    Stored,
    decode_message,
    idempotency_key,
    shard_of,
    stored_of,
    write_of,
)
from server.brokers.redis_states import States, UnknownError
from server.history import History
from server.jobs import Jobs

log = logging.getLogger("statuswire.broker")

# An operation that could not be settled for so long is refused; its publisher sends it again.
PATIENCE_S: Final = 10.0
# How long a publisher waits, beyond Redis' answer, until its own node shows the update.
SHOWN_S: Final = 1.0
# Operations without an answer: seconds of work for one core.
MAX_OPEN: Final = 50_000
# Ids looked up at once.
_LOOK_UP: Final = 200
_PAGE: Final = 1000
# Offsets of what Redis has not numbered yet are negative: a call's own, and after it those of its ancestors.
_PER_CALL: Final = 16
# Redis cannot write just now, but will.
_PASSING: Final = frozenset(
    ("ASK", "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "NOSCRIPT", "READONLY", "TRYAGAIN")
)


class _BlockedError(Exception):
    """A job that this depends on is on its way."""


class Publisher:
    """Takes operations and gives each its answer.

    Args:
        jobs, history: what is shown.
        follower: says how far, and is told of other epochs.
        clock: unix time in seconds.
        on_lease: called with the seconds after which a lease will have to be looked at.

    Attributes:
        client: set before anything is submitted.
        refusing: why Redis does not take writes although it is there (it is full, say), None while it does.
    """

    client: Client

    def __init__(
        self,
        jobs: Jobs,
        history: History,
        follower: Follower,
        *,
        clock: Callable[[], float] = time.time,
        on_lease: Callable[[float], object],
    ) -> None:
        self._jobs = jobs
        self._history = history
        self._follower = follower
        self._clock = clock
        self._on_lease = on_lease
        self.refusing: str | None = None
        self.closing = False
        self._node = secrets.token_urlsafe(6)
        self._revs = itertools.count()
        self._numbers = itertools.count(1)
        self._open = 0
        self._idle = trio.Event()
        self._at_ms = 0
        self._top = 0  # highest offset heard of
        self._states = States(jobs, follower)
        self._flying: dict[str, int] = {}  # job id -> calls under way
        self._waiting: list[Call] = []
        self._held: dict[str, None] = {}  # what those in _waiting hold
        self._again: list[Call] = []  # to be sent again, as they are
        self._looking: set[str] = set()
        self._unshown: dict[int, deque[tuple[int, float, Call, Result]]] = {}
        self._over = ""  # an epoch that Redis says is over
        self._pump = trio.Event()
        self._nursery: trio.Nursery | None = None

    # Taking operations

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """See ``base.Broker``; ``results`` are there once it is kept."""
        if self.closing:
            error = ApiError(503, "shutting_down", "the server is shutting down", retry_after=5)
            return _settled([error] * len(operations), None)
        if self.client.away is not None and self._follower.arrived:
            error = unavailable(self.client.away)
            return _settled([error] * len(operations), error)
        if self._open + len(operations) > MAX_OPEN:
            error = ApiError(503, "overloaded", "Redis cannot keep up, try again in a moment", retry_after=1)
            return _settled([error] * len(operations), None)
        if not operations:
            return _settled([], None)
        batch = Batch(len(operations))
        gives_up = trio.current_time() + PATIENCE_S
        self._open += len(operations)
        for index, operation in enumerate(operations):
            call = Call(operation, batch, index, next(self._numbers))
            call.gives_up = gives_up
            try:
                self._identify(call)
            except ApiError as error:
                self._settle(call, error)
                continue
            if not self._held.keys().isdisjoint(call.holds) or not self._try(call):
                self._wait(call)
        return batch

    def _identify(self, call: Call) -> None:
        operation = call.operation
        if isinstance(operation, Claim):
            call.digest = digest_of(operation.sub, operation.key)
            call.fingerprint = operation.fingerprint.hex().encode()
            return
        if not isinstance(operation, Publish):
            call.job_id = operation.job_id
            call.holds = (call.job_id,)
            return
        job_id, key = identify(operation)
        if key is not None:
            call.digest = digest_of(operation.sub, key)
            call.fingerprint = fingerprint_of(job_id, operation.create, operation.fields).hex().encode()
        call.job_id = new_target(operation) if job_id is None else job_id
        parent_id = operation.fields.parent_id
        call.holds = (call.job_id,) if parent_id is UNSET else (call.job_id, parent_id)

    # Deciding

    def _try(self, call: Call) -> bool:
        """Decide it now, and send what follows. False if it has to wait."""
        if self.client.away is not None or self._over == self._history.epoch:
            return False
        call.reads = {}
        call.changes = []
        call.verdict = None
        try:
            decided = not isinstance(call.operation, Claim) and self._decide(call)
        except UnknownError as unknown:
            self._look_up(unknown.job_id)
            return False
        except _BlockedError:
            return False
        except ApiError as error:
            call.verdict = error
            decided = False
        except Exception:
            # What Redis has cannot be read, say; that must stay the trouble of this one operation.
            log.exception("an operation on job %r cannot be decided", call.job_id)
            self._settle(call, ApiError(500, "internal", "something went wrong here"))
            return True
        try:
            if decided:
                self._send(call)
            else:
                self._look(call)
        except OverloadedError:
            call.changes = []
            self._settle(call, ApiError(503, "overloaded", "Redis cannot keep up, try again", retry_after=1))
        except RedisClientError:
            call.changes = []
            return False
        return True

    def _decide(self, call: Call) -> bool:
        """Fill ``changes``. False if nothing changes. Raises ApiError for a refusal."""
        operation, job_id = call.operation, call.job_id
        now_ms = max(self._at_ms, int(self._clock() * 1000))
        get = partial(self._read, call)
        offset = -_PER_CALL * call.number
        before = get(job_id)
        after: Job | None = None
        match operation:
            case Publish(fields=fields):
                if before is None:
                    after = create(operation, job_id, partial(self._read_parent, call), offset=offset, now_ms=now_ms)
                else:
                    if rules.is_repeat(before, fields):
                        return False
                    if operation.create == "must":
                        raise job_exists(job_id)
                    after = rules.apply(before, fields, offset=offset, now_ms=now_ms)
            case Cancel():
                after = rules.request_cancel(_must(before, job_id), offset=offset, now_ms=now_ms)
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
        rev = f"{self._node}{next(self._revs):x}"
        call.changes.append(Change(update.job_id, before, after, update, entry, call.reads[update.job_id], rev))

    def _read(self, call: Call, job_id: str) -> Job | None:
        """The newest state known of a job, noting on which one the decision rests."""
        guess = job_id == call.job_id and _may_create(call.operation)
        job, call.reads[job_id] = self._states.read(job_id, guess=guess)
        return job

    def _read_parent(self, call: Call, job_id: str) -> Job | None:
        parent = self._read(call, job_id)
        if parent is not None and parent.created < 0:
            raise _BlockedError  # a part's tie names the parent's first offset
        return parent

    # Sending

    def _send(self, call: Call) -> None:
        call.epoch = self._history.epoch
        call.floor = max(self._top, self._history.last)
        client = self.client
        keys = PUBLISH_KEYS[call.shard]
        call.keys = (*keys, idempotency_key(call.digest)) if call.digest else keys
        publish = "SPUBLISH" if client.sharded else "PUBLISH"
        arguments: list[bytes | str | int | float] = [
            call.epoch,
            call.changes[0].update.at_ms,
            self._history.max_updates,
            self._jobs.max_jobs,
            publish,
            call.shard,
            call.fingerprint,
        ]
        for change in call.changes:
            kind: Kind = "q" if not change.entry else "s" if change.after is not None else "d"
            arguments += (
                change.job_id,
                change.expected,
                change.rev,
                kind,
                self._lease_of(change),
                ended_of(change),
                change.update.version,
                write_of(change.after, change.update, change.rev, entry=change.entry),
            )
        call.arguments = arguments
        reply = client.send_script(PUBLISH, call.keys, arguments)
        self._fly(call)
        for change in call.changes:
            self._states.expect(change, call.number)
        reply.when_settled(partial(self._sent, call))

    def _lease_of(self, change: Change) -> str:
        before, after = change.before, change.after
        had = before is not None and before.private.ttl is not None and not before.latest.ended
        if after is None or after.private.ttl is None or after.latest.ended:
            return "0" if had else ""
        if had and before is not None and before.private.heard == after.private.heard:
            return ""  # a cancel request or a roll-up is no sign of life
        self._on_lease(after.private.ttl)
        return str(max(1, round(after.private.ttl * 1000)))

    def _look(self, call: Call) -> None:
        """Ask for the states that the verdict rests on."""
        self._ask(call)
        self._fly(call)

    def _ask(self, call: Call) -> None:
        call.epoch = self._history.epoch
        if isinstance(call.operation, Claim):
            reply = self.client.send_script(CLAIM, (META, idempotency_key(call.digest)), (call.fingerprint,))
            reply.when_settled(partial(self._claimed, call))
            return
        keys = [META, WHERE]
        if call.digest:
            keys.append(idempotency_key(call.digest))
        reply = self.client.send_script(LOOK, keys, list(call.reads))
        reply.when_settled(partial(self._looked, call))

    def _send_again(self, call: Call) -> None:
        """After a lost connection: the same call with the same tokens, so that it cannot have an effect twice."""
        if call.changes:
            reply = self.client.send_script(PUBLISH, call.keys, call.arguments)
            reply.when_settled(partial(self._sent, call))
        else:
            self._ask(call)

    def _fly(self, call: Call) -> None:
        self._flying[call.job_id] = self._flying.get(call.job_id, 0) + 1

    def _land(self, call: Call) -> None:
        left = self._flying.pop(call.job_id) - 1
        if left:
            self._flying[call.job_id] = left
        elif call.job_id in self._held:
            self._pump.set()

    # Replies

    def _sent(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
            return
        self.refusing = None
        code = outcome[0]
        if code == DONE:
            self._done(call, outcome[1], outcome[2], outcome[3:])
        elif code == REPEATED and not call.in_doubt:
            self._states.drop(call)
            self._repeated(call, outcome[1], stored_of(outcome[3], outcome[2]))
        elif code == FULL:
            self._states.drop(call)
            self._land(call)
            self._settle(call, too_many_jobs(self._jobs.max_jobs))
        else:
            # Within our epoch it can only have come behind what was known then; another one is read as a whole.
            start = f"({call.floor}-0" if code == CONFLICT else "-"
            self._resolve(call, start, partial(self._undone, call, outcome))

    def _undone(self, call: Call, outcome: Sequence[Any]) -> None:
        """Redis did not execute it."""
        self._states.drop(call)
        call.in_doubt = False
        if outcome[0] == REPEATED:
            self._repeated(call, outcome[1], stored_of(outcome[3], outcome[2]))
            return
        if outcome[0] == OTHER_EPOCH:
            self._other_epoch(call.epoch)
        else:
            assert outcome[0] == CONFLICT
            for change, blob in zip(call.changes, outcome[2:], strict=True):
                self._states.told(change.job_id, stored_of(blob, outcome[1]), call.number)
        self._wait(call)
        self._land(call)

    def _done(self, call: Call, first: int, at_ms: int, created: Sequence[int]) -> None:
        self._at_ms = max(self._at_ms, at_ms)
        stamp = first - 1
        for change in call.changes:
            if change.entry:
                stamp += 1
                change.update.offset = stamp
                change.update.at_ms = at_ms
        self._top = max(self._top, stamp)
        for change, born in zip(call.changes, created, strict=True):
            self._states.done(change, born, call.shard, stamp)
        own = call.changes[0]
        self._land(call)
        requested = own.after is not None and own.after.private.cancel_requested
        if isinstance(call.operation, Delete):
            requested = False
        accepted = Accepted(own.update.offset, own.update.version, False, requested, own.after)
        self._answer(call, accepted, stamp)
        if self._held:
            self._pump.set()

    def _repeated(self, call: Call, value: bytes, state: Stored) -> None:
        """The idempotency key was used before: the first answer again, and the job as it is now."""
        self._land(call)
        fingerprint, _, offset, version = value.split(b" ")
        if fingerprint != call.fingerprint:
            self._settle(call, key_reused())
            return
        call.shard = state.shard
        requested = state.job is not None and state.job.private.cancel_requested
        self._answer(call, Accepted(int(offset), int(version), True, requested, state.job), state.stamp)

    def _claimed(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
            return
        self._land(call)
        offset, value = outcome
        if value is None:
            self._settle(call, Accepted(offset, 0, False, False, None))
            return
        fingerprint, _, first, version = value.split(b" ")
        if fingerprint == call.fingerprint:
            self._settle(call, Accepted(int(first), int(version), True, False, None))
        else:
            self._settle(call, key_reused())

    def _looked(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
            return
        epoch, offset, value, *blobs = outcome
        if epoch is None or epoch.decode() != call.epoch:
            self._other_epoch(call.epoch)
            self._wait(call)
            self._land(call)
            return
        states = [stored_of(blob, offset) for blob in blobs]
        if value is not None:
            self._repeated(call, value, states[0])
            return
        if [state.rev for state in states] != list(call.reads.values()):
            for job_id, state in zip(call.reads, states, strict=True):
                self._states.told(job_id, state, call.number)
            self._wait(call)
            self._land(call)
            return
        self._land(call)
        stamp = max((state.stamp for state in states if state.job is not None), default=0)
        if call.verdict is not None:
            call.shard = max((state.shard for state in states), default=-1)
            self._answer(call, call.verdict, stamp)
        else:
            job = states[0].job
            assert job is not None
            call.shard = states[0].shard
            latest = job.latest
            self._answer(call, Accepted(latest.offset, latest.version, True, job.private.cancel_requested, job), stamp)

    def _failed(self, call: Call, outcome: object) -> None:
        """No answer, or an error instead of one."""
        if isinstance(outcome, RedisError) and outcome.code not in _PASSING:
            # Nothing that waiting for would help: it is full, or forbids it.
            if self.refusing is None:
                log.error("Redis refuses to write: %s", outcome.message)
            self.refusing = f"Redis refuses to write: {outcome.message}"
            self._resolve(call, f"({call.floor}-0", partial(self._refused, call, unavailable(self.refusing)))
            return
        if isinstance(outcome, ConnectionLostError) and outcome.sent:
            call.in_doubt = True
        self._again.append(call)  # until there is a connection again, or for the next look at those who wait

    def _refused(self, call: Call, error: ApiError) -> None:
        self._states.drop(call)
        self._land(call)
        self._settle(call, error)

    def _resolve(self, call: Call, start: str, undone: Callable[[], object]) -> None:
        """Redis did not execute it just now: ``undone``. Unless it was sent before, and had been executed then."""
        if call.in_doubt and call.changes and self._nursery is not None:
            self._nursery.start_soon(self._search, call, start, undone)
        else:
            undone()

    async def _search(self, call: Call, start: str, undone: Callable[[], object]) -> None:
        own = call.changes[0]
        try:
            while True:
                page = await self.client.call("XRANGE", LOGS[call.shard], start, "+", "COUNT", _PAGE)
                for _, fields in page:
                    message = decode_message(fields[1])
                    if any(write.rev == own.rev for write in message.writes):
                        call.in_doubt = False
                        self._done(call, message.first, message.at_ms, message.created)
                        return
                if len(page) < _PAGE:
                    break
                start = "(" + page[-1][0].decode()
        except (RedisClientError, RedisError):
            self._again.append(call)
            return
        undone()

    # Epochs, and what was not known

    def _other_epoch(self, epoch: str) -> None:
        if epoch == self._history.epoch:
            self._over = epoch
            self._follower.wake()

    def forget(self) -> None:
        """The log began anew: nothing that was known holds."""
        self._states.clear()
        self._top = 0
        self._pump.set()

    def _look_up(self, job_id: str) -> None:
        self._looking.add(job_id)
        self._pump.set()

    def _send_look_up(self) -> None:
        wanted = list(self._looking)
        self._looking.clear()
        for start in range(0, len(wanted), _LOOK_UP):
            ids: Sequence[str] = wanted[start : start + _LOOK_UP]
            try:
                reply = self.client.send_script(LOOK, (META, WHERE), ids)
            except RedisClientError:
                return  # whoever wanted it asks again
            reply.when_settled(partial(self._looked_up, ids))

    def _looked_up(self, ids: Sequence[str], reply: Reply) -> None:
        if isinstance(reply.outcome, list):
            _, offset, _, *blobs = reply.outcome
            for job_id, blob in zip(ids, blobs, strict=True):
                self._states.looked_up(job_id, stored_of(blob, offset))
        self._pump.set()

    # Waiting

    def _wait(self, call: Call) -> None:
        call.changes = []
        self._waiting.append(call)
        self._held.update(dict.fromkeys(call.holds))

    async def run(self) -> None:
        """Decide again what had to wait, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await self._pump.wait()
                self._pump = trio.Event()
                self._resend()
                self._try_waiting()
                if self._looking:
                    self._send_look_up()

    def wake(self) -> None:
        """Redis is back, or another epoch has been loaded."""
        self._pump.set()

    def _resend(self) -> None:
        if not self._again or self.client.away is not None:
            return
        again, self._again = self._again, []
        again.sort(key=_number)
        for position, call in enumerate(again):
            try:
                self._send_again(call)
            except RedisClientError:
                self._again += again[position:]
                return

    def _try_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        waiting.sort(key=_number)
        self._held = {}
        for call in waiting:
            if not self._held.keys().isdisjoint(call.holds) or call.job_id in self._flying or not self._try(call):
                self._wait(call)

    def give_up(self, now: float) -> None:
        """Answer those who have waited too long; called now and then."""
        for shard in list(self._unshown):
            self._release(shard, now)
        if self._again:
            self._pump.set()
        late = [call for call in self._waiting if call.gives_up <= now]
        if late:
            self._waiting = [call for call in self._waiting if call.gives_up > now]
            self._held = {}
            for call in self._waiting:
                self._held.update(dict.fromkeys(call.holds))
            self._pump.set()
        stranded = [call for call in self._again if call.gives_up <= now]
        if stranded:
            self._again = [call for call in self._again if call.gives_up > now]
            for call in stranded:
                self._states.drop(call)
                self._land(call)
        for call in late + stranded:
            self._settle(call, unavailable(self.client.away or "Redis did not settle it in time"))

    def close(self) -> None:
        """Refuse what has no answer yet."""
        self.closing = True
        self.release_all()
        self.give_up(float("inf"))

    async def wait_idle(self) -> None:
        """Return when every operation has its answer."""
        while self._open:
            self._idle = trio.Event()
            await self._idle.wait()

    # Answering

    def _answer(self, call: Call, result: Result, stamp: int) -> None:
        """Settle it once what it rests on is shown here, if it is to be: a publisher reads its own writes."""
        shard = call.shard
        follower = self._follower
        if shard in follower.followed and follower.seen[shard] < stamp and CHANNELS[shard] in self.client.subscribed:
            waiting = self._unshown.get(shard)
            if waiting is None:
                waiting = self._unshown[shard] = deque()
            waiting.append((stamp, trio.current_time() + SHOWN_S, call, result))
        else:
            self._settle(call, result)

    def on_shown(self, shard: int) -> None:
        """More of a shard is shown."""
        if shard in self._unshown:
            self._release(shard, 0.0)

    def _release(self, shard: int, now: float) -> None:
        waiting, seen = self._unshown[shard], self._follower.seen[shard]
        while waiting and (waiting[0][0] <= seen or waiting[0][1] <= now):
            _, _, call, result = waiting.popleft()
            self._settle(call, result)
        if not waiting:
            self._unshown.pop(shard, None)

    def release_all(self) -> None:
        """Nothing more is shown for now: do not wait for it."""
        for shard in list(self._unshown):
            self._release(shard, float("inf"))

    def _settle(self, call: Call, result: Result) -> None:
        if isinstance(result, Accepted) and result.job is not None:
            shown = self._jobs.get(result.job.latest.job_id)
            if shown is not None and shown.latest.offset == result.job.latest.offset:
                result = msgspec.structs.replace(result, job=shown)
        self._open -= 1
        call.batch.put(call.index, result)
        if not self._open:
            self._idle.set()


def _settled(results: Iterable[Result], error: ApiError | None) -> Submission:
    submission = Submission(list(results))
    submission.settle(error)
    return submission


def _must(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise job_not_found(job_id)
    return job


def _number(call: Call) -> int:
    return call.number


def _may_create(operation: Operation) -> bool:
    """Whether it is worth trying without knowing if the job exists: Redis checks it anyway."""
    return isinstance(operation, Publish) and (
        operation.create == "must" or (operation.create == "may" and operation.fields.user_id is not UNSET)
    )
