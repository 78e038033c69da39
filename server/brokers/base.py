"""What a broker is: it takes operations, decides them in order, keeps the outcome and then delivers it.

``submit`` decides synchronously, so a caller learns at once what became of each operation; but nothing is
shown to anyone, and no publisher is answered, before the store has it. That moment is ``Submission.kept``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, Protocol

import msgspec
import trio

from protocol.errors import ApiError
from protocol.fields import Fields
from protocol.notice import Notice
from protocol.update import Job, Update
from server.inbox import Inboxes

_log = logging.getLogger("statuswire.broker")

Deliver = Callable[[Sequence[tuple[Update, Job | None]]], object]
"""Shows what was kept: pairs of an entry and the job after it (None once deleted, and for a notification), in order.

Called synchronously on the Trio thread. It must update ``Jobs`` and ``History``, must not raise and must not submit.
"""


class StoreError(Exception):
    """The store cannot be used at all: a bad path, a foreign or damaged file, another server on it."""


class Publish(msgspec.Struct, frozen=True, gc=False):
    """One update of a job.

    Attributes:
        job_id: the job's id from the path, or None to take ``fields.job_id``; with neither, ``create="must"``
            makes one up and anything else is 422.
        fields: the update as published.
        create: ``"must"``: the job must be new (409 ``job_exists``), ``userId`` defaults to ``sub``;
            ``"may"``: an unknown job is created if ``userId`` is given, else 404; ``"never"``: 404.
        sub: who publishes; idempotency keys are scoped to it.
        key: idempotency key from the header, or None to take ``fields.event_id``.
        view: name of the view in whose words it came, if that has a say in what the update comes to.
        new_id: the id of a job that is created without one; "" makes one up.
        lasting: it may come again hours later, so its key is to be remembered for longer than others.
    """

    job_id: str | None
    fields: Fields
    create: Literal["must", "may", "never"]
    sub: str
    key: str | None = None
    view: str | None = None
    new_id: str = ""
    lasting: bool = False


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """Ask a job's worker to stop: ``cancelRequested``.

    Attributes:
        job_id: the job's id.
        owner: whose job the caller may cancel: if the id is another owner's by now, there is no such job.
    """

    job_id: str
    owner: str


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Forget a job. The caller has checked who may."""

    job_id: str


class Expire(msgspec.Struct, frozen=True, gc=False):
    """A lease ran out. Nothing happens if the job was heard of since version ``heard``."""

    job_id: str
    heard: int


class Claim(msgspec.Struct, frozen=True, gc=False):
    """Take an idempotency key for a whole batch, ahead of its updates; changes no job.

    It is a duplicate if the same body claimed the key before, and 422 if another did.

    Attributes:
        sub: who publishes.
        key: the key.
        fingerprint: of the body.
    """

    sub: str
    key: str
    fingerprint: bytes


class Notify(msgspec.Struct, frozen=True, gc=False):
    """Send a notification. The caller has checked who may.

    Attributes:
        notice: what and to whom.
        sub: who sends it; idempotency keys are scoped to it.
        key: idempotency key, or None.
    """

    notice: Notice
    sub: str
    key: str | None = None


class Acknowledge(msgspec.Struct, frozen=True, gc=False):
    """A user has everything up to an offset: what was stored for it up to there goes.

    It is a duplicate if nothing was.
    """

    user: str
    offset: int


Operation = Publish | Cancel | Delete | Expire | Claim | Notify | Acknowledge


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """The outcome of one operation that was not refused.

    Attributes:
        offset: where it stands in the log; for a duplicate, where the first one stands.
        version: the job's version after it; for a duplicate with a key, after the first one; 0 without a job.
        duplicate: it changed nothing, because it (or a later ``seq``) was accepted before.
        cancel_requested: the job is asked to stop; workers learn it from the answer to any update.
        job: the job's state after it; None once deleted (also for a duplicate whose job is gone by now).
        spooled: "", or the id of the job that it is for: the store is away, and it waits on this machine's disk for its
            return. Then nothing else is known: ``offset`` and ``version`` are 0, ``job`` is None.
    """

    offset: int
    version: int
    duplicate: bool
    cancel_requested: bool
    job: Job | None
    spooled: str = ""


Result = Accepted | ApiError


class Submission:
    """What became of some operations, and when they are kept.

    ``results`` is there at once, one per operation in order; it may be shown to the publisher only after
    ``wait_kept`` or ``when_kept``, because until then a failing store can still undo all of it.
    """

    __slots__ = ("_callbacks", "_error", "_kept", "results")

    def __init__(self, results: list[Result]) -> None:
        self.results = results
        self._kept = False
        self._error: ApiError | None = None
        self._callbacks: list[Callable[[ApiError | None], object]] = []

    @property
    def kept(self) -> bool:
        """Whether it is settled and nothing was lost."""
        return self._kept and self._error is None

    @property
    def settled(self) -> bool:
        """Whether it is kept or lost."""
        return self._kept

    def check(self) -> None:
        """Once settled: raise ApiError 503 if it was lost, as ``wait_kept`` does."""
        if self._error is not None:
            raise self._error

    async def wait_kept(self) -> None:
        """Wait until everything accepted is kept and was delivered.

        Being cancelled here takes nothing back. Raises:
            ApiError: 503 ``store_unavailable``, with ``retry_after``: nothing of it was kept.
        """
        if self._kept:
            await trio.lowlevel.checkpoint()
        else:
            # By hand, as every publish to a store that takes its time comes by here: an event costs a third more.
            wake = partial(_wake, trio.lowlevel.current_task())
            self._callbacks.append(wake)

            def abort(_: object) -> trio.lowlevel.Abort:
                if wake not in self._callbacks:  # it is being settled, and this is about to wake
                    return trio.lowlevel.Abort.FAILED
                self._callbacks.remove(wake)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        self.check()

    def when_kept(self, callback: Callable[[ApiError | None], object]) -> None:
        """Call back on the Trio thread when it is settled, at once if it is: with None, or the 503 above."""
        if self._kept:
            self._call(callback)
        else:
            self._callbacks.append(callback)

    def settle(self, error: ApiError | None = None) -> None:
        """For brokers: it is kept, or lost with ``error``."""
        self._kept = True
        self._error = error
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[ApiError | None], object]) -> None:
        try:
            callback(self._error)
        except Exception:
            # One publisher's trouble must not reach the store's task, on which all the others depend.
            _log.exception("a callback of a kept submission failed")


def _wake(task: trio.lowlevel.Task, _: ApiError | None) -> None:
    trio.lowlevel.reschedule(task)


class Broker(Protocol):
    """The interface of every store. ``start``, then ``run`` in a task, ``submit`` from anywhere, ``close``."""

    @property
    def epoch(self) -> str:
        """Names this incarnation of the log: 12 of ``[a-z0-9]``."""

    @property
    def inboxes(self) -> Inboxes:
        """The stored notifications that are shown; to be read only."""

    @property
    def available(self) -> str | None:
        """None while the store works, else why it does not."""

    @property
    def live(self) -> bool:
        """Whether what is accepted anywhere is shown here; not while a store that others reach cannot be reached."""

    def figures(self) -> dict[str, int]:
        """Numbers for whoever operates it, by name: ``waiting`` is what was accepted and is not kept yet."""

    async def start(self) -> None:
        """Open the store; fill ``Jobs`` and ``History`` with what it kept. Raises StoreError."""

    async def run(self) -> None:
        """Keep what is submitted, until cancelled. What waits when it is cancelled is kept by ``close``."""

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """Decide operations in order, now. Never raises for what a peer sent: see ``Submission.results``."""

    async def follow(self, names: Iterable[str], cursor: str | None = None) -> None:
        """Before reading: return when all that these channels have is shown here, and as far as ``cursor``.

        It stays shown while a reader is on one of them (``Node.watched``), and for minutes after the last asking.

        Raises:
            ApiError: 503 ``store_unavailable``: it is not, and cannot be just now.
        """

    async def load_mark(self, name: str) -> str | None:
        """What ``save_mark`` kept under this name. Raises ApiError 503 ``store_unavailable``."""

    async def save_mark(self, name: str, text: str) -> None:
        """Keep a short text, in place of what was kept under this name. Raises ApiError 503 ``store_unavailable``."""

    async def close(self) -> None:
        """Keep what still waits, release the store. Later submissions are refused with 503."""
