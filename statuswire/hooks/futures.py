"""``concurrent.futures``: an executor whose calls are jobs.

    from statuswire.hooks.futures import JobExecutor

    with JobExecutor(ThreadPoolExecutor(), user="alice") as pool:
        future = pool.submit(export, "report.pdf")  # future.job_id

Within a call ``statuswire.hooks.progress`` tells how far it is. A call that raises is ``failed``, one that is cancelled
before it began ``cancelled``, as is one that raises ``JobCancelled``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from uuid import uuid4

from statuswire.client import Client, logger
from statuswire.hooks.reporting import Call, Settings, begin, contained, end, within
from statuswire.hooks.reporting import job_id as fitting_id
from statuswire.jobs import Job

_T = TypeVar("_T")
_P = ParamSpec("_P")
# Put on an exception that was told of where it was raised; it survives the way between processes.
_TOLD = "_statuswire_told"


class Submission(NamedTuple):
    """What a function that finds the owner is given."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class JobFuture(Future[_T]):
    """A future as the pool makes it, which also knows its job."""

    job_id: str


class Task(NamedTuple):
    """What is to be told of a call, wherever it is made; plain data."""

    job_id: str
    first: dict[str, Any]
    results: bool
    raise_on_cancel: bool


class JobExecutor(Executor):
    """Makes jobs of what is submitted, and gives it to another executor.

    Args:
        pool: of threads or processes. Processes find the server as any worker does: they inherit what ``configure``
            said if they are forked, and the environment always.
        user: the id of the owner of all, or a function of a ``Submission`` that returns it. Without one the jobs belong
            to ``queue:executor``, whom only admins see.
        ttl: the lease, seconds; None for none.
        results: whether results are shown. Arguments never are.
        raise_on_cancel: ``progress`` raises ``JobCancelled`` once somebody asked for that.
        client: the way to the server, else the one of ``configure`` or the environment; not for processes.
    """

    def __init__(
        self,
        pool: Executor,
        *,
        user: str | Callable[[Submission], object] | None = None,
        ttl: float | None = 30.0,
        results: bool = False,
        raise_on_cancel: bool = False,
        client: Client | None = None,
    ) -> None:
        owner = user if callable(user) else lambda _: user
        self._settings = Settings("executor", owner, ttl, results, raise_on_cancel, client)
        self._pool = pool
        self._elsewhere = isinstance(pool, ProcessPoolExecutor)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> JobFuture[_T]:
        """As with any executor; the future has the id of the job as ``job_id``."""
        return self.submit_as(uuid4().hex, fn, *args, **kwargs)

    def submit_as(self, job_id: str, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> JobFuture[_T]:
        """The same with an id of one's own."""
        name = getattr(fn, "__name__", None) or type(fn).__name__
        call = Call(job_id, name, {}, Submission(fn, args, kwargs))
        task = Task(job_id, self._settings.first(call), self._settings.results, self._settings.raise_on_cancel)
        self._queued(call)
        work: Callable[..., _T] = functools.partial(
            run, task, None if self._elsewhere else self._settings.client, fn, *args, **kwargs
        )
        try:
            future = cast("JobFuture[_T]", self._pool.submit(work))
        except BaseException:
            self._dropped(call, "it could not be submitted")
            raise
        future.job_id = fitting_id(job_id)
        future.add_done_callback(functools.partial(self._done, call))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The pool's."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    @contained
    def _queued(self, call: Call) -> None:
        self._settings.queued(call)

    @contained
    def _dropped(self, call: Call, why: str) -> None:
        self._settings.dropped(call, why)

    @contained
    def _done(self, call: Call, future: Future[Any]) -> None:
        if future.cancelled():
            self._settings.dropped(call, "cancelled before it began")
            return
        error = future.exception()
        if error is not None and not getattr(error, _TOLD, False):
            # The process died, or what it was given or returned could not be taken there or back.
            job = self._settings.begin(call)
            job.may_climb(0)
            job.fail(error)


def run(task: Task, client: Client | None, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Make the call as this job."""
    job = _begun(task, client)
    try:
        with within(job):
            result = fn(*args, **kwargs)
    except BaseException as error:
        _end(job, task, None, error)
        raise
    _end(job, task, result, None)
    return result


def _begun(task: Task, client: Client | None) -> Job | None:
    try:
        return begin(task.job_id, task.first, task.raise_on_cancel, client)
    except Exception:
        logger.exception("job %s cannot be reported on", task.job_id)
        return None


@contained
def _end(job: Job | None, task: Task, result: object, error: BaseException | None) -> None:
    if error is not None:
        error.__dict__[_TOLD] = True
    if job is not None:
        end(job, result if task.results else None, error)
