"""What the Redis broker's writing half passes around: an operation on its way, and what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from protocol.errors import ApiError
from protocol.update import Job, Update
from server.brokers.base import Operation, Result, Submission


class Change(msgspec.Struct, gc=False):
    """One job of a call."""

    job_id: str
    before: Job | None
    after: Job | None
    update: Update
    entry: bool
    expected: str
    rev: str


class Batch(Submission):
    """A submission whose results come one by one."""

    __slots__ = ("left",)

    def __init__(self, count: int) -> None:
        super().__init__([_OPEN] * count)
        self.left = count

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
        verdict: what the look is to confirm: a refusal, or None for "this changes nothing".
        keys, arguments: the script call, to be sent again as it is after a lost connection.
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
        "reads",
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
        self.verdict: ApiError | None = None
        self.keys: Sequence[bytes] = ()
        self.arguments: Sequence[bytes | str | int | float] = ()
        self.epoch = ""
        self.shard = 0
        self.in_doubt = False
        self.floor = 0
        self.gives_up = 0.0


def ended_of(change: Change) -> str:
    before, after = change.before, change.after
    if change.entry and after is not None and after.latest.ended:
        return "1"
    return "0" if before is not None and before.latest.ended and (after is None or not after.latest.ended) else ""
