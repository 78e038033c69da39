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
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import trio

from protocol.errors import ApiError
from protocol.resp import RedisError
from server.brokers.base import Accepted, Acknowledge, Claim, Notify, Operation, Result, Submission
from server.brokers.deciding import key_reused, too_many_jobs
from server.brokers.redis_answers import Answers, settled
from server.brokers.redis_calls import (
    Batch,
    Call,
    Waiting,
    fill_in_look,
    fill_in_publish,
    lease_of,
    send,
)
from server.brokers.redis_client import Client, ConnectionLostError, OverloadedError, RedisClientError, Reply
from server.brokers.redis_deciding import BlockedError, Decider, address
from server.brokers.redis_doubts import Doubts
from server.brokers.redis_follower import Follower, unavailable
from server.brokers.redis_keys import (
    CONFLICT,
    DONE,
    FULL,
    OTHER_EPOCH,
    REPEATED,
    Message,
    Stored,
    stored_of,
)
from server.brokers.redis_notices import fill_in_acknowledgement, fill_in_notice, texts_of
from server.brokers.redis_states import States, UnknownError
from server.history import History
from server.inbox import Inboxes
from server.jobs import Jobs

log = logging.getLogger("statuswire.broker")

# An operation that could not be settled for so long is refused; its publisher sends it again.
PATIENCE_S: Final = 10.0
# Operations without an answer: seconds of work for one core.
MAX_OPEN: Final = 50_000
# Redis cannot write just now, but will.
_PASSING: Final = frozenset(
    ("ASK", "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "NOSCRIPT", "READONLY", "TRYAGAIN")
)


class Publisher:
    """Takes operations and gives each its answer.

    Args:
        jobs, history: what is shown.
        follower: says how far, and is told of other epochs.
        inboxes: what is stored for users.
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
        inboxes: Inboxes,
        *,
        clock: Callable[[], float] = time.time,
        on_lease: Callable[[float], object],
    ) -> None:
        self._jobs = jobs
        self._history = history
        self._follower = follower
        self._inboxes = inboxes
        self._on_lease = on_lease
        self.refusing: str | None = None
        self.closing = False
        self._numbers = itertools.count(1)
        self._top = 0  # highest offset heard of
        self._states = States(jobs, follower)
        self._decider = Decider(self._states, clock)
        self.answers = Answers(jobs, follower)
        self._flying: dict[str, int] = {}  # job id -> calls under way
        self._waiting = Waiting()
        self._again: list[Call] = []  # to be sent again, as they are
        self._doubts = Doubts(lambda call: self._again.append(call))
        self._over = ""  # an epoch that Redis says is over
        # Jobs of which an update was given up, up to which number later ones were there by then, and until when that
        # matters: those are given up as well, or they would come first when both are sent again.
        self._given_up: dict[str, tuple[int, float]] = {}
        self._pump = trio.Event()

    # Taking operations

    @property
    def waiting(self) -> int:
        """Operations that were taken and are not settled."""
        return self.answers.open

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """See ``base.Broker``; ``results`` are there once it is kept."""
        if self.closing:
            error = ApiError(503, "shutting_down", "the server is shutting down", retry_after=5)
            return settled([error] * len(operations), None)
        if self.client.away is not None and self._follower.arrived:
            error = unavailable(self.client.away)
            return settled([error] * len(operations), error)
        if self.answers.open + len(operations) > MAX_OPEN:
            error = ApiError(503, "overloaded", "Redis cannot keep up, try again in a moment", retry_after=1)
            return settled([error] * len(operations), None)
        if not operations:
            return settled([], None)
        batch = Batch(len(operations))
        gives_up = trio.current_time() + PATIENCE_S
        self.answers.open += len(operations)
        for index, operation in enumerate(operations):
            call = Call(operation, batch, index, next(self._numbers))
            call.gives_up = gives_up
            try:
                address(call)
            except ApiError as error:
                self.answers.settle(call, error)
                continue
            if isinstance(operation, Acknowledge) and not self._let_go(call, operation):
                continue
            if self._waiting.holds(call) or not self._try(call):
                self._wait(call)
        return batch

    def _let_go(self, call: Call, operation: Acknowledge) -> bool:
        """What is acknowledged goes at once, here; False if there is nothing."""
        places = self._inboxes.up_to(operation.user, operation.offset)
        if not places:
            self.answers.settle(call, Accepted(operation.offset, 0, True, False, None))
            return False
        self._inboxes.remove(places)
        call.places = texts_of(places)
        return True

    # Deciding and sending

    def _try(self, call: Call) -> bool:
        """Decide it now, and send what follows. False if it has to wait."""
        if self.client.away is not None or self._over == self._history.epoch:
            return False
        if self._given_up and any(call.number <= self._given_up.get(job_id, (0, 0.0))[0] for job_id in call.holds):
            self.answers.settle(call, unavailable("an update before this one was not accepted"))
            return True
        call.reads = {}
        call.changes = []
        call.verdict = None
        try:
            if self._decide(call):
                self._send(call)
            else:
                self._look(call)
        except UnknownError as unknown:
            self._states.want(unknown.job_id)
            self._pump.set()
            return False
        except BlockedError:
            return False
        except OverloadedError:
            self.answers.settle(call, ApiError(503, "overloaded", "Redis cannot keep up, try again", retry_after=1))
        except RedisClientError:
            return False
        except Exception:
            call.changes = []
            self._broken(call)
        return True

    def _decide(self, call: Call) -> bool:
        """False if nothing is to be written, and only to be looked whether that is right."""
        try:
            return self._decider.decide(call)
        except ApiError as error:
            call.verdict = error
            call.changes = []
            return False

    def _send(self, call: Call) -> None:
        operation, history = call.operation, self._history
        call.epoch = history.epoch
        call.floor = max(self._top, history.last)
        publish = "SPUBLISH" if self.client.sharded else "PUBLISH"
        if isinstance(operation, Notify):
            fill_in_notice(call, operation, history.max_updates, publish)
            self._dispatch(call)
            return
        fill_in_publish(call, history.max_updates, self._jobs.max_jobs, publish)
        self._dispatch(call)
        for change in call.changes:
            lease_ms = lease_of(change)
            if lease_ms:
                self._on_lease(lease_ms / 1000)
            self._states.expect(change, call.number)

    def _look(self, call: Call) -> None:
        """Ask for the states that the verdict rests on."""
        call.epoch = self._history.epoch
        if isinstance(call.operation, Acknowledge):
            publish = "SPUBLISH" if self.client.sharded else "PUBLISH"
            fill_in_acknowledgement(call, self._history.max_updates, publish)
        else:
            fill_in_look(call)
        self._dispatch(call)

    def _dispatch(self, call: Call) -> None:
        send(self.client, call).when_settled(partial(self._answered, call))
        self._flying[call.job_id] = self._flying.get(call.job_id, 0) + 1

    def _broken(self, call: Call) -> None:
        """What Redis has cannot be read, say: that must stay the trouble of this one operation."""
        log.exception("an operation on job %r cannot be seen through", call.job_id)
        self._states.drop(call)
        self.answers.settle(call, ApiError(500, "internal", "something went wrong here"))

    def _land(self, call: Call) -> None:
        left = self._flying.pop(call.job_id) - 1
        if left:
            self._flying[call.job_id] = left
        elif call.job_id in self._waiting.held:
            self._pump.set()

    # Replies

    def _answered(self, call: Call, reply: Reply) -> None:
        """Redis has answered, or there will be no answer. Whatever can fail below comes before ``_land``."""
        outcome = reply.outcome
        try:
            if not isinstance(outcome, list):
                self._failed(call, outcome)
            elif call.changes:
                self._written(call, outcome)
            elif isinstance(call.operation, Claim):
                self._claimed(call, *outcome)
            elif isinstance(call.operation, Acknowledge):
                self._acknowledged(call, call.operation, outcome)
            else:
                self._looked(call, *outcome)
        except Exception:
            self._land(call)
            self._broken(call)

    def _written(self, call: Call, outcome: Sequence[Any]) -> None:
        code = outcome[0]
        if code == DONE:
            self.refusing = None
            self._done(call, outcome[1], outcome[2], outcome[3:])
        elif code == FULL:
            self._states.drop(call)
            self._land(call)
            self.answers.settle(call, too_many_jobs(self._jobs.max_jobs))
        else:
            # Within our epoch it can only have come behind what was known then; another one is read as a whole.
            floor = 0 if code == OTHER_EPOCH else call.floor
            self._resolve(call, floor, partial(self._undone, call, outcome))

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
        self._decide_again(call)

    def _done(self, call: Call, first: int, at_ms: int, created: Sequence[int]) -> None:
        self._decider.at_ms = max(self._decider.at_ms, at_ms)
        stamp = first - 1
        for change in call.changes:
            if change.entry:
                stamp += 1
                change.update.offset = stamp
                change.update.at_ms = at_ms
        self._top = max(self._top, stamp)
        accepted = Accepted(stamp, 0, False, False, None)
        if not isinstance(call.operation, Notify):
            for change, born in zip(call.changes, created, strict=True):
                self._states.done(change, born, call.shard, stamp)
            own = call.changes[0]
            requested = own.after is not None and own.after.private.cancel_requested
            accepted = Accepted(own.update.offset, own.update.version, False, requested, own.after)
        self._land(call)
        self.answers.answer(call, accepted, stamp)
        if self._waiting.held:
            self._pump.set()

    def _repeated(self, call: Call, value: bytes, state: Stored) -> None:
        """The idempotency key was used before: the first answer again, and the job as it is now."""
        fingerprint, _, offset, version = value.split(b" ")
        requested = state.job is not None and state.job.private.cancel_requested
        first = Accepted(int(offset), int(version), True, requested, state.job)
        self._land(call)
        if fingerprint != call.fingerprint:
            self.answers.settle(call, key_reused())
            return
        call.shard = state.shard
        self.answers.answer(call, first, state.stamp)

    def _claimed(self, call: Call, offset: int, value: bytes | None) -> None:
        if value is None:
            self._land(call)
            self.answers.settle(call, Accepted(offset, 0, False, False, None))
        else:
            self._repeated(call, value, stored_of(None, offset))

    def _acknowledged(self, call: Call, operation: Acknowledge, outcome: Sequence[Any]) -> None:
        if outcome[0] == OTHER_EPOCH:
            self._other_epoch(call.epoch)
            self._decide_again(call)
        else:
            self._land(call)
            self.answers.settle(call, Accepted(operation.offset, 0, False, False, None))

    def _looked(self, call: Call, epoch: bytes | None, offset: int, value: bytes | None, *blobs: bytes | None) -> None:
        if epoch is None or epoch.decode() != call.epoch:
            self._other_epoch(call.epoch)
            self._decide_again(call)
            return
        states = [stored_of(blob, offset) for blob in blobs]
        if value is not None:
            self._repeated(call, value, states[0])
            return
        if [state.rev for state in states] != list(call.reads.values()):
            for job_id, state in zip(call.reads, states, strict=True):
                self._states.told(job_id, state, call.number)
            self._decide_again(call)
            return
        stamp = max((state.stamp for state in states if state.job is not None), default=0)
        verdict: Result
        if call.verdict is not None:
            call.shard = max((state.shard for state in states), default=-1)
            verdict = call.verdict
        else:
            job = states[0].job
            assert job is not None
            call.shard = states[0].shard
            verdict = Accepted(job.latest.offset, job.latest.version, True, job.private.cancel_requested, job)
        self._land(call)
        self.answers.answer(call, verdict, stamp)

    def _failed(self, call: Call, outcome: object) -> None:
        """No answer, or an error instead of one."""
        if isinstance(outcome, RedisError) and outcome.code not in _PASSING:
            # Nothing that waiting for would help: it is full, or forbids it.
            if self.refusing is None:
                log.error("Redis refuses to write: %s", outcome.message)
            self.refusing = f"Redis refuses to write: {outcome.message}"
            self._resolve(call, call.floor, partial(self._refused, call, unavailable(self.refusing)))
            return
        if isinstance(outcome, ConnectionLostError) and outcome.sent:
            call.in_doubt = True
        self._again.append(call)  # until there is a connection again, or for the next look at those who wait

    def _refused(self, call: Call, error: ApiError) -> None:
        self._give_up_behind(call)
        self._states.drop(call)
        self._land(call)
        self.answers.settle(call, error)

    def _give_up_behind(self, call: Call) -> None:
        if call.job_id in self._flying or call.job_id in self._waiting.held:
            self._given_up[call.job_id] = next(self._numbers), trio.current_time() + 2 * PATIENCE_S

    def _resolve(self, call: Call, floor: int, undone: Callable[[], object]) -> None:
        """Redis did not execute it just now: ``undone``. Unless it was sent before, and had been executed then."""
        if call.in_doubt and call.changes:
            self._doubts.add(call, floor, partial(self._looked_up, call, undone))
        else:
            undone()

    def _looked_up(self, call: Call, undone: Callable[[], object], message: Message | None) -> None:
        try:
            if message is None:
                undone()
            else:
                call.in_doubt = False
                self._done(call, message.first, message.at_ms, message.created)
        except Exception:
            self._land(call)
            self._broken(call)

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

    # Waiting

    def _wait(self, call: Call) -> None:
        call.changes = []
        self._waiting.add(call)

    def _decide_again(self, call: Call) -> None:
        """It was decided on what does not hold any more."""
        self._wait(call)
        self._land(call)

    async def run(self) -> None:
        """Decide again what had to wait, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._doubts.run, self.client)
            while True:
                await self._pump.wait()
                self._pump = trio.Event()
                if self.client.away is None:
                    self._resend()
                    self._try_waiting()
                    self._states.look_up(self.client, self.wake)

    def wake(self) -> None:
        """Redis is back, or another epoch has been loaded."""
        self._pump.set()

    def _resend(self) -> None:
        """The same calls with the same tokens, so that none can have an effect twice."""
        again, self._again = self._again, []
        again.sort(key=lambda call: call.number)
        for position, call in enumerate(again):
            try:
                send(self.client, call).when_settled(partial(self._answered, call))
            except RedisClientError:
                self._again += again[position:]
                return

    def _try_waiting(self) -> None:
        for call in self._waiting.take():
            if self._waiting.holds(call) or call.job_id in self._flying or not self._try(call):
                self._wait(call)

    def give_up(self, now: float) -> None:
        """Answer those who have waited too long; called now and then."""
        self.answers.release_late(now)
        if self._given_up:
            self._given_up = {job_id: entry for job_id, entry in self._given_up.items() if entry[1] > now}
        if self._again:
            self._pump.set()
        late = self._waiting.take_late(now)
        if late:
            self._pump.set()
        stranded = [call for call in self._again if call.gives_up <= now]
        if stranded:
            self._again = [call for call in self._again if call.gives_up > now]
            for call in stranded:
                call.batch.give_up(call)
                self._states.drop(call)
                self._land(call)
        for call in late + stranded:
            self._give_up_behind(call)
            self.answers.settle(call, unavailable(self.client.away or "Redis did not settle it in time"))

    def close(self) -> None:
        """Refuse what has no answer yet."""
        self.closing = True
        self.answers.release_all()
        self._again += self._doubts.take()
        self.give_up(float("inf"))
