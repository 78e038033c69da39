"""Reporting on jobs from plain, synchronous code; every call returns at once, whatever the server does.

    >>> from statuswire import job
    >>> with job("export-1", user="alice", kind="export") as j:
    ...     j.progress(45, "page 120 of 300", stage="pages")
    ...     j.complete(result={"url": "/files/1.pdf"})

News of progress is sent a few times a second, the newest only, and held while the server is away. The end of a job is
on disk when the call that ends it returns, and is sent until the server has answered.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sized
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from statuswire.client import Client, default_client, logger
from statuswire.errors import JobCancelled, Rejected, StatuswireError
from statuswire.fields import Fields, to_wire

_T = TypeVar("_T")
# Of an iteration: what is reported more often is overtaken before it is sent.
TRACK_EVERY_S = 0.1


class Job:
    """One attempt of a job, as its worker sees it; made by ``job``. Safe to use from several threads.

    Attributes:
        id: the job's id.
        ended: whether its end was published here.
    """

    def __init__(
        self,
        job_id: str,
        fields: Mapping[str, Any],
        *,
        renew: bool = True,
        raise_on_cancel: bool = False,
        client: Client | None = None,
    ) -> None:
        self.id = job_id
        self.ended = False
        self._client = client or default_client()
        self._raise_on_cancel = raise_on_cancel
        first: dict[str, Any] = {"status": "processing"} | to_wire(fields)
        # With every update of this attempt.
        self._always = {"attempt": first["attempt"]} if "attempt" in first else {}
        self._state = self._client.hold(job_id, first.get("attempt"), first, first.get("ttl") if renew else None)
        # A handle that nobody has any more must not keep a lease alive.
        self._release = weakref.finalize(self, self._client.release, self._state)
        self._release.atexit = False
        self._client.put(self._state, dict(first), urgent=True)

    def __repr__(self) -> str:
        return f"<statuswire job {self.id!r}{' ended' if self.ended else ''}>"

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the job to be cancelled. Known from the answers to its updates."""
        return self._state.cancel_requested

    def may_climb(self, times: int) -> None:
        """For queues that give a job to another worker without counting it as another attempt.

        If this attempt turns out to be over, it is the next one instead.
        """
        self._state.climbs = times

    @property
    def attempt(self) -> int:
        """Which attempt this is, as far as is known."""
        return self._state.attempt or 1

    def clear(self, *names: str) -> None:
        """Take fields out of the record; names as they go over the wire."""
        if not self.ended:
            self._client.put(self._state, {**self._always, **dict.fromkeys(names)})

    def leave(self) -> None:
        """Say no more about it without ending it: its lease is not renewed any longer."""
        self.ended = True
        self._release()

    def progress(self, progress: float | None = None, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """Say how far it is, 0 to 100, and anything else (``Fields``). Waits for nothing and takes about 1 µs.

        Raises:
            JobCancelled: somebody asked for that, and ``raise_on_cancel`` was given.
            Rejected: the server does not take the job's updates any more; with ``strict``.
        """
        state = self._state
        if self._raise_on_cancel and state.cancel_requested:
            raise JobCancelled(f"job {self.id} is to be cancelled")
        if self.ended:
            return
        if state.refused is not None:
            if self._client.strict:
                raise Rejected(*state.refused)
            return
        update = {**self._always, **to_wire(fields)} if fields else dict(self._always)
        if progress is not None:
            update["progress"] = progress
        if message is not None:
            update["message"] = message
        self._client.put(state, update, "status" in update)

    def complete(self, result: Any = None, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It is done. Raises Rejected or Unavailable with ``strict``."""
        self.end("completed", {"result": result, "message": message, **fields})

    def fail(self, error: object, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It went wrong; ``error`` is a text or an exception. Raises Rejected or Unavailable with ``strict``."""
        self.end("failed", {"error": one_line(error), "message": message, **fields})

    def cancel(self, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It was stopped. Raises Rejected or Unavailable with ``strict``."""
        self.end("cancelled", {"message": message, **fields})

    def end(self, status: str, fields: Mapping[str, Any]) -> None:
        """Publish an end; only the first one counts. Raises Rejected or Unavailable with ``strict``."""
        named = to_wire(fields)
        if self.ended:
            return
        self.ended = True
        try:
            self._client.end(self._state, {**self._always, **named, "status": status})
        finally:
            self._release()

    def end_by(self, error: BaseException) -> None:
        """End it by what left its ``with`` block; what the server says to that is only logged.

        An ``Exception`` is a failure. Anything else (KeyboardInterrupt, SystemExit, the cancellation of a task) and
        ``JobCancelled`` mean that it was stopped.
        """
        try:
            if was_stopped(error):
                # What it says besides is about the machinery, not about the job.
                asked = isinstance(error, JobCancelled)
                self.end("cancelled", {} if asked else {"error": type(error).__name__})
            else:
                self.fail(error)
        except StatuswireError as refused:
            logger.error("job %s: %s", self.id, refused)

    def track(self, items: Iterable[_T], total: int | None = None, **fields: Unpack[Fields]) -> Iterator[_T]:
        """Pass the items on and report how many of them were; the job is not ended by it.

        Args:
            total: how many there are, else ``len(items)`` where that is known.
        """
        counter = Counter(self, total if total is not None else length_of(items), fields)
        for item in items:
            yield item
            counter.count()
        counter.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end_by(error)
        else:
            self.complete()


class Counter:
    """Counts items of a job and says so, not too often."""

    __slots__ = ("_done", "_fields", "_job", "_next", "_total")

    def __init__(self, job: Job, total: int | None, fields: Fields) -> None:
        self._job = job
        self._total = total
        self._done = 0
        self._next = 0.0
        self._fields = fields

    def count(self) -> None:
        """One more is done. Raises JobCancelled or Rejected as ``Job.progress`` does."""
        self._done += 1
        if monotonic() >= self._next:
            self.report()

    def report(self) -> None:
        """Say how many."""
        self._next = monotonic() + TRACK_EVERY_S
        done, total = self._done, self._total
        update: Fields = {**self._fields, "steps": {"done": done} if total is None else (done, total)}
        self._job.progress(None if not total else 100 * done / total, **update)

    def __str__(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done} of {self._total}"


def job(
    job_id: str,
    *,
    user: str | None = None,
    message: str | None = None,
    renew: bool = True,
    raise_on_cancel: bool = False,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> Job:
    """Begin to report on a job, which is made unless it exists (that takes ``user``, its owner).

    As a context manager it ends the job: ``completed``, or ``failed`` with the exception, which goes on. What stops the
    worker without being an ``Exception`` (KeyboardInterrupt, SystemExit, the cancellation of a task) makes it
    ``cancelled``.

    Args:
        renew: with a ``ttl``, renew the lease every third of it while the handle is open, so that it shows when the
            process dies. That is done in the background and says nothing about the work itself: with ``renew=False``
            only calls of ``progress`` renew it, so that work that hangs shows as well.
        raise_on_cancel: ``progress`` raises ``JobCancelled`` once somebody asked for that.
        client: the way to the server, else the one of ``configure`` or the environment.

    Example:
        >>> with job("video-1", user="alice", ttl=30) as j:
        ...     for step in range(4):
        ...         j.progress(25 * step)
        ...         if j.cancel_requested:
        ...             j.cancel("stopped by request")
        ...             break
    """
    first = {**fields, "user": user, "message": message}
    return Job(job_id, first, renew=renew, raise_on_cancel=raise_on_cancel, client=client)


def track(
    items: Iterable[_T],
    job_id: str,
    total: int | None = None,
    *,
    user: str | None = None,
    message: str | None = None,
    renew: bool = True,
    raise_on_cancel: bool = False,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> Iterator[_T]:
    """Iterate over the items as one job: it begins with the first and is completed behind the last.

    An iteration that is left early is ``cancelled``: from in here, ``break`` and an exception in the loop look the
    same. ``with job(…) as j: for item in j.track(items): …`` tells them apart.

    Example:
        >>> for page in track(["one", "two", "three"], "print-1", user="alice"):
        ...     print(page)
        one
        two
        three
    """
    first = {**fields, "user": user, "message": message}
    handle = Job(job_id, first, renew=renew, raise_on_cancel=raise_on_cancel, client=client)
    counter = Counter(handle, total if total is not None else length_of(items), {})
    try:
        for item in items:
            yield item
            counter.count()
        counter.report()
    except GeneratorExit:
        handle.cancel(f"left after {counter}")
        raise
    except BaseException as error:
        handle.end_by(error)
        raise
    handle.complete()


# Single updates, from wherever the job's id is known


def create_task(
    job_id: str,
    *,
    user: str,
    message: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """Make a job that is not begun yet.

    Example:
        >>> create_task("import-1", user="alice", kind="import")
        >>> update_task("import-1", 30, "rows", stage="read")
        >>> complete_task("import-1", {"rows": 1200})
    """
    _news(job_id, {"status": "queued", **fields, "user": user, "message": message}, client, urgent=True)


def update_task(
    job_id: str,
    progress: float | None = None,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """Say how far a job is; it is ``processing`` from then on, unless ``status`` says otherwise."""
    update = {"status": "processing", **fields, "user": user, "progress": progress, "message": message}
    _news(job_id, update, client, urgent="status" in fields)


def complete_task(
    job_id: str,
    result: Any = None,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job is done. Raises Rejected or Unavailable with ``strict``."""
    named = {"user": user, "result": result, "message": message, "status": "completed"}
    _end(job_id, {**fields, **named}, client)


def fail_task(
    job_id: str,
    error: object,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job went wrong; ``error`` is a text or an exception. Raises Rejected or Unavailable with ``strict``."""
    named = {"user": user, "error": one_line(error), "message": message, "status": "failed"}
    _end(job_id, {**fields, **named}, client)


def cancel_task(
    job_id: str,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job was stopped. Raises Rejected or Unavailable with ``strict``."""
    _end(job_id, {**fields, "user": user, "message": message, "status": "cancelled"}, client)


def publish(*updates: Mapping[str, Any], client: Client | None = None) -> None:
    """Publish updates in the words of the wire protocol; unlike above, None clears a field.

    Raises:
        ValueError: one has no ``jobId``.
        Rejected, Unavailable: an end, with ``strict``.

    Example:
        >>> publish({"jobId": "scan-1", "userId": "alice", "progress": 5}, {"jobId": "scan-1", "stage": "second"})
    """
    client = client or default_client()
    for update in updates:
        fields = dict(update)
        job_id = fields.pop("jobId", None)
        if not isinstance(job_id, str) or not job_id:
            raise ValueError("an update must name its job: jobId")
        state = client.state(job_id, fields.get("attempt"))
        if fields.get("status") in ("completed", "failed", "cancelled"):
            client.end(state, fields)
        else:
            client.put(state, fields, "status" in fields)


def _news(job_id: str, fields: Mapping[str, Any], client: Client | None, *, urgent: bool) -> None:
    client = client or default_client()
    named = to_wire(fields)
    client.put(client.state(job_id, named.get("attempt")), named, urgent)


def _end(job_id: str, fields: Mapping[str, Any], client: Client | None) -> None:
    client = client or default_client()
    named = to_wire(fields)
    client.end(client.state(job_id, named.get("attempt")), named)


def one_line(error: object) -> str:
    """What went wrong, in one line: the type of an exception and its message."""
    if not isinstance(error, BaseException):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def was_stopped(error: BaseException) -> bool:
    """Whether this says that the work was stopped, rather than that it went wrong."""
    if isinstance(error, BaseExceptionGroup):
        return all(was_stopped(inner) for inner in error.exceptions)
    return isinstance(error, JobCancelled) or not isinstance(error, Exception)


def length_of(items: object) -> int | None:
    """How many there are, if they know."""
    return len(items) if isinstance(items, Sized) else None
