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
from server.brokers.base import Accepted, Acknowledge, Claim, Delete, Notify, Operation, Submission
from server.brokers.deciding import key_reused, too_many_jobs
from server.brokers.redis_answers import Answers, settled
from server.brokers.redis_calls import Batch, Call, Waiting, arguments_of, find_written, lease_of, send
from server.brokers.redis_client import Client, ConnectionLostError, OverloadedError, RedisClientError, Reply
from server.brokers.redis_deciding import BlockedError, Decider, address
from server.brokers.redis_follower import Follower, unavailable
from server.brokers.redis_keys import (
    CONFLICT,
    DONE,
    FULL,
    OTHER_EPOCH,
    PUBLISH_KEYS,
    REPEATED,
    Stored,
    idempotency_key,
    stored_of,
)
from server.brokers.redis_notices import LET_GO, NOTIFY, address_acknowledgement, arguments_of_notice, let_go_arguments
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
        self._over = ""  # an epoch that Redis says is over
        # Jobs of which an update was given up, up to which number later ones were there by then, and until when that
        # matters: those are given up as well, or they would come first when both are sent again.
        self._given_up: dict[str, tuple[int, float]] = {}
        self._pump = trio.Event()
        self._nursery: trio.Nursery | None = None

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
        address_acknowledgement(call, places)
        return True

    # Deciding

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
            decided = not isinstance(call.operation, Claim | Acknowledge) and self._decider.decide(call)
        except UnknownError as unknown:
            self._states.want(unknown.job_id)
            self._pump.set()
            return False
        except BlockedError:
            return False
        except ApiError as error:
            call.verdict = error
            decided = False
        except Exception:
            # What Redis has cannot be read, say; that must stay the trouble of this one operation.
            log.exception("an operation on job %r cannot be decided", call.job_id)
            self.answers.settle(call, ApiError(500, "internal", "something went wrong here"))
            return True
        try:
            if decided:
                self._send(call)
            else:
                self._look(call)
        except OverloadedError:
            call.changes = []
            self.answers.settle(call, ApiError(503, "overloaded", "Redis cannot keep up, try again", retry_after=1))
        except RedisClientError:
            call.changes = []
            return False
        return True

    # Sending

    def _send(self, call: Call) -> None:
        call.epoch = self._history.epoch
        call.floor = max(self._top, self._history.last)
        if isinstance(call.operation, Notify):
            call.keys, call.arguments = arguments_of_notice(
                call, call.operation, self._history.max_updates, self._publish_command
            )
            reply = self._send_written(call)
            self._fly(call)
        else:
            keys = PUBLISH_KEYS[call.shard]
            call.keys = (*keys, idempotency_key(call.digest)) if call.digest else keys
            call.arguments = arguments_of(call, self._history.max_updates, self._jobs.max_jobs, self._publish_command)
            for change in call.changes:
                lease_ms = lease_of(change)
                if lease_ms:
                    self._on_lease(lease_ms / 1000)
            reply = self._send_written(call)
            self._fly(call)
            for change in call.changes:
                self._states.expect(change, call.number)
        reply.when_settled(partial(self._sent, call))

    def _look(self, call: Call) -> None:
        """Ask for the states that the verdict rests on."""
        self._ask(call)
        self._fly(call)

    @property
    def _publish_command(self) -> str:
        return "SPUBLISH" if self.client.sharded else "PUBLISH"

    def _send_written(self, call: Call) -> Reply:
        if isinstance(call.operation, Notify):
            return self.client.send_script(NOTIFY, call.keys, call.arguments)
        return send(self.client, call)

    def _ask(self, call: Call) -> None:
        call.epoch = self._history.epoch
        if isinstance(call.operation, Acknowledge):
            keys, arguments = let_go_arguments(
                call.epoch, self._history.max_updates, self._publish_command, call.arguments
            )
            self.client.send_script(LET_GO, keys, arguments).when_settled(partial(self._acknowledged, call))
            return
        take = self._claimed if isinstance(call.operation, Claim) else self._looked
        send(self.client, call).when_settled(partial(take, call))

    def _send_again(self, call: Call) -> None:
        """After a lost connection: the same call with the same tokens, so that it cannot have an effect twice."""
        if call.changes:
            self._send_written(call).when_settled(partial(self._sent, call))
        else:
            self._ask(call)

    def _fly(self, call: Call) -> None:
        self._flying[call.job_id] = self._flying.get(call.job_id, 0) + 1

    def _land(self, call: Call) -> None:
        left = self._flying.pop(call.job_id) - 1
        if left:
            self._flying[call.job_id] = left
        elif call.job_id in self._waiting.held:
            self._pump.set()

    # Replies

    def _sent(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
            return
        code = outcome[0]
        if code == DONE:
            self.refusing = None
            self._done(call, outcome[1], outcome[2], outcome[3:])
        elif code == REPEATED and not call.in_doubt:
            self._states.drop(call)
            self._repeated(call, outcome[1], stored_of(outcome[3], outcome[2]))
        elif code == FULL:
            self._states.drop(call)
            self._land(call)
            self.answers.settle(call, too_many_jobs(self._jobs.max_jobs))
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
        self._decider.at_ms = max(self._decider.at_ms, at_ms)
        stamp = first - 1
        for change in call.changes:
            if change.entry:
                stamp += 1
                change.update.offset = stamp
                change.update.at_ms = at_ms
        self._top = max(self._top, stamp)
        if isinstance(call.operation, Notify):
            self._land(call)
            self.answers.answer(call, Accepted(stamp, 0, False, False, None), stamp)
            if self._waiting.held:
                self._pump.set()
            return
        for change, born in zip(call.changes, created, strict=True):
            self._states.done(change, born, call.shard, stamp)
        own = call.changes[0]
        self._land(call)
        requested = own.after is not None and own.after.private.cancel_requested
        if isinstance(call.operation, Delete):
            requested = False
        accepted = Accepted(own.update.offset, own.update.version, False, requested, own.after)
        self.answers.answer(call, accepted, stamp)
        if self._waiting.held:
            self._pump.set()

    def _repeated(self, call: Call, value: bytes, state: Stored) -> None:
        """The idempotency key was used before: the first answer again, and the job as it is now."""
        self._land(call)
        fingerprint, _, offset, version = value.split(b" ")
        if fingerprint != call.fingerprint:
            self.answers.settle(call, key_reused())
            return
        call.shard = state.shard
        requested = state.job is not None and state.job.private.cancel_requested
        self.answers.answer(call, Accepted(int(offset), int(version), True, requested, state.job), state.stamp)

    def _claimed(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
            return
        self._land(call)
        offset, value = outcome
        if value is None:
            self.answers.settle(call, Accepted(offset, 0, False, False, None))
            return
        fingerprint, _, first, version = value.split(b" ")
        if fingerprint == call.fingerprint:
            self.answers.settle(call, Accepted(int(first), int(version), True, False, None))
        else:
            self.answers.settle(call, key_reused())

    def _acknowledged(self, call: Call, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list):
            self._failed(call, outcome)
        elif outcome[0] == OTHER_EPOCH:
            self._other_epoch(call.epoch)
            self._wait(call)
            self._land(call)
        else:
            self._land(call)
            assert isinstance(call.operation, Acknowledge)
            self.answers.settle(call, Accepted(call.operation.offset, 0, False, False, None))

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
            self.answers.answer(call, call.verdict, stamp)
        else:
            job = states[0].job
            assert job is not None
            call.shard = states[0].shard
            accepted = Accepted(job.latest.offset, job.latest.version, True, job.private.cancel_requested, job)
            self.answers.answer(call, accepted, stamp)

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
        self._give_up_behind(call)
        self._states.drop(call)
        self._land(call)
        self.answers.settle(call, error)

    def _give_up_behind(self, call: Call) -> None:
        if call.job_id in self._flying or call.job_id in self._waiting.held:
            self._given_up[call.job_id] = next(self._numbers), trio.current_time() + 2 * PATIENCE_S

    def _resolve(self, call: Call, start: str, undone: Callable[[], object]) -> None:
        """Redis did not execute it just now: ``undone``. Unless it was sent before, and had been executed then."""
        if call.in_doubt and call.changes and self._nursery is not None:
            self._nursery.start_soon(self._search, call, start, undone)
        else:
            undone()

    async def _search(self, call: Call, start: str, undone: Callable[[], object]) -> None:
        try:
            message = await find_written(self.client, call, start)
        except (RedisClientError, RedisError):
            self._again.append(call)
            return
        if message is None:
            undone()
        else:
            call.in_doubt = False
            self._done(call, message.first, message.at_ms, message.created)

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

    async def run(self) -> None:
        """Decide again what had to wait, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await self._pump.wait()
                self._pump = trio.Event()
                self._resend()
                self._try_waiting()
                self._states.look_up(self.client, self.wake)

    def wake(self) -> None:
        """Redis is back, or another epoch has been loaded."""
        self._pump.set()

    def _resend(self) -> None:
        if not self._again or self.client.away is not None:
            return
        again, self._again = self._again, []
        again.sort(key=lambda call: call.number)
        for position, call in enumerate(again):
            try:
                self._send_again(call)
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
        self.give_up(float("inf"))
