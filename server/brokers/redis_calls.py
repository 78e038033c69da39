"""What the Redis broker's writing half passes around: an operation on its way, and what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from protocol.errors import ApiError
from protocol.resp import Argument
from protocol.update import Job, Update
from server.brokers.base import Claim, Operation, Publish, Result, Submission
from server.brokers.redis_client import Client, Reply
from server.brokers.redis_keys import (
    CLAIM,
    LOOK,
    META,
    PUBLISH,
    PUBLISH_KEYS,
    WHERE,
    Kind,
    idempotency_key,
    write_of,
)


class Change(msgspec.Struct, gc=False):
    """One job of a call."""

    job_id: str
    before: Job | None
    after: Job | None
    update: Update
    entry: bool
    expected: str
    rev: str


class Doubt(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A call that was given up although Redis may have executed it.

    Attributes:
        epoch: of the log that it was meant for.
        shard: of the log.
        floor: an offset below any that it can have been given there.
        rev: the token that its message carries.
    """

    epoch: str
    shard: int
    floor: int
    rev: str


class Batch(Submission):
    """A submission whose results come one by one.

    Attributes:
        left: how many are missing.
        doubts: of the results that say that the store is away, those that may be wrong.
    """

    __slots__ = ("doubts", "left")

    def __init__(self, count: int) -> None:
        super().__init__([_OPEN] * count)
        self.left = count
        self.doubts: dict[int, Doubt] = {}

    def give_up(self, call: Call) -> None:
        """A call will not be sent again; note whether it may have been executed. Its result follows."""
        if call.in_doubt and call.changes:
            self.doubts[call.index] = Doubt(call.epoch, call.shard, call.floor, call.changes[0].rev)

    def put(self, index: int, result: Result) -> None:
        self.results[index] = result
        self.left -= 1
        if not self.left:
            # The store being away is no answer to an operation; but what was kept beside it has to be told.
            away = [result for result in self.results if isinstance(result, ApiError) and result.code == _AWAY]
            self.settle(away[0] if len(away) == len(self.results) else None)


_AWAY: Final = "store_unavailable"
_OPEN: Final = ApiError(500, "internal", "there is no answer yet")


class Call:
    """One operation on its way to its answer.

    Attributes:
        number: order of submission.
        job_id: the job it is about.
        holds: the jobs whose later calls have to wait while this one does: its own, and the parent it is to get.
        digest, fingerprint: of its idempotency key; empty without one.
        reads: the states it was decided on: job id -> token, "" for none.
        changes: what it writes; empty while it is only a look.
        places: what an acknowledgement takes away, as ``redis_notices.LET_GO`` is given it.
        verdict: what the look is to confirm: a refusal, or None for "this changes nothing".
        script, keys, arguments: what is sent, and after a lost connection sent again as it is.
        in_doubt: it may have been executed although no answer came; ``floor`` is where to look for it.
        floor: an offset below any that the call can have been given.
        gives_up: when it is refused (Trio's clock).
    """

    __slots__ = (
        "arguments",
        "batch",
        "changes",
        "digest",
        "epoch",
        "fingerprint",
        "floor",
        "gives_up",
        "holds",
        "in_doubt",
        "index",
        "job_id",
        "keys",
        "number",
        "operation",
        "places",
        "reads",
        "script",
        "shard",
        "verdict",
    )

    def __init__(self, operation: Operation, batch: Batch, index: int, number: int) -> None:
        self.operation = operation
        self.batch = batch
        self.index = index
        self.number = number
        self.job_id = ""
        self.holds: tuple[str, ...] = ()
        self.digest = self.fingerprint = b""
        self.reads: dict[str, str] = {}
        self.changes: list[Change] = []
        self.places: Sequence[str] = ()
        self.verdict: ApiError | None = None
        self.script = LOOK
        self.keys: Sequence[bytes] = ()
        self.arguments: Sequence[Argument] = ()
        self.epoch = ""
        self.shard = 0
        self.in_doubt = False
        self.floor = 0
        self.gives_up = 0.0


class Waiting:
    """Calls that have to be decided again, and the jobs that they keep later calls from meanwhile.

    Attributes:
        held: these jobs.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self.held: dict[str, None] = {}

    def add(self, call: Call) -> None:
        """Let a call wait."""
        self._calls.append(call)
        self.held.update(dict.fromkeys(call.holds))

    def holds(self, call: Call) -> bool:
        """Whether one that waits was there before this call."""
        return bool(self.held) and not self.held.keys().isdisjoint(call.holds)

    def take(self) -> list[Call]:
        """All of them, out and in order of submission."""
        calls, self._calls = self._calls, []
        self.held = {}
        return sorted(calls, key=lambda call: call.number)

    def take_late(self, now: float) -> list[Call]:
        """Those whose time is up."""
        late = [call for call in self._calls if call.gives_up <= now]
        if late:
            staying = [call for call in self._calls if call.gives_up > now]
            self._calls, self.held = [], {}
            for call in staying:
                self.add(call)
        return late


def send(client: Client, call: Call) -> Reply:
    """Send what was filled in. Raises RedisClientError."""
    return client.send_script(call.script, call.keys, call.arguments)


def fill_in_look(call: Call) -> None:
    """Fill in the look that the answer rests on; a claim is one that leaves something."""
    key = (idempotency_key(call.digest),) if call.digest else ()
    if isinstance(call.operation, Claim):
        call.script, call.keys, call.arguments = CLAIM, (META, *key), (call.fingerprint,)
    else:
        call.script, call.keys, call.arguments = LOOK, (META, WHERE, *key), list(call.reads)


def fill_in_publish(call: Call, max_updates: int, max_jobs: int, publish: str) -> None:
    """Fill in what writes the changes of jobs."""
    keys = PUBLISH_KEYS[call.shard]
    lasting = isinstance(call.operation, Publish) and call.operation.lasting
    arguments: list[Argument] = [
        call.epoch,
        call.changes[0].update.at_ms,
        max_updates,
        max_jobs,
        publish,
        call.shard,
        call.fingerprint + b"+" if lasting else call.fingerprint,
    ]
    for change in call.changes:
        kind: Kind = "q" if not change.entry else "s" if change.after is not None else "d"
        lease_ms = lease_of(change)
        arguments += (
            change.job_id,
            change.expected,
            change.rev,
            kind,
            "" if lease_ms is None else lease_ms,
            _ended_of(change),
            change.update.version,
            write_of(change.after, change.update, change.rev, entry=change.entry),
        )
    call.script, call.arguments = PUBLISH, arguments
    call.keys = (*keys, idempotency_key(call.digest)) if call.digest else keys


def lease_of(change: Change) -> int | None:
    """The lease that a change begins, in milliseconds; 0 if it ends the job's lease, None to leave it as it is."""
    before, after = change.before, change.after
    had = before is not None and before.private.ttl is not None and not before.latest.ended
    if after is None or after.private.ttl is None or after.latest.ended:
        return 0 if had else None
    if had and before is not None and before.private.heard == after.private.heard:
        return None  # a cancel request or a roll-up is no sign of life
    return max(1, round(after.private.ttl * 1000))


def _ended_of(change: Change) -> str:
    """Whether the job has ended with this change ("1"), or goes on although it had ("0"); "" if neither."""
    before, after = change.before, change.after
    if change.entry and after is not None and after.latest.ended:
        return "1"
    return "0" if before is not None and before.latest.ended and (after is None or not after.latest.ended) else ""
