"""APScheduler 3: executors that report on each run of a job.

    from statuswire.hooks.apscheduler import ThreadPoolExecutor

    scheduler = BackgroundScheduler(executors={"default": ThreadPoolExecutor(10, user="kwargs.user_id")})

A run is a job of its own: ``<id of the scheduled job>:<time it was due>``. One that comes too late is ``cancelled``.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.executors import asyncio as on_asyncio
from apscheduler.executors import pool as on_pools
from apscheduler.executors.base import run_coroutine_job, run_job
from apscheduler.util import iscoroutinefunction_partial

from statuswire.client import logger
from statuswire.hooks.futures import Task
from statuswire.hooks.reporting import Call, Settings, begin, contained, end, within
from statuswire.jobs import Job


class _Reports:
    """What the executors have in common."""

    def _report(self, settings: dict[str, Any]) -> None:
        self._settings = Settings("apscheduler", **settings)

    def _tasks(self, job: Any, run_times: list[datetime]) -> list[Task | None]:
        found: list[Task | None] = []
        for run_time in run_times:
            try:
                call = _call(job, run_time)
                self._settings.queued(call)
                first = self._settings.first(call)
                found.append(Task(call.id, first, self._settings.results, self._settings.raise_on_cancel))
            except Exception:
                logger.exception("a run of %s cannot be reported on", job)
                found.append(None)
        return found

    @contained
    def _lost(self, tasks: list[Task | None], error: BaseException) -> None:
        """The process that had them died."""
        for task in filter(None, tasks):
            job = begin(task.job_id, task.first, False, self._settings.client)
            job.may_climb(0)
            job.fail(error)


class _Pool(_Reports):
    """In threads and processes."""

    def _do_submit_job(self: Any, job: Any, run_times: list[datetime]) -> None:
        tasks = self._tasks(job, run_times)
        client = None if isinstance(self, ProcessPoolExecutor) else self._settings.client
        arguments = (tasks, client, job, job._jobstore_alias, run_times, self._logger.name)

        def done(future: Any) -> None:
            error = future.exception()
            if error is None:
                self._run_job_success(job.id, future.result())
            else:
                self._lost(tasks, error)
                self._run_job_error(job.id, error, error.__traceback__)

        try:
            future = self._pool.submit(_run, *arguments)
        except BrokenProcessPool:
            self._logger.warning("the process pool is broken and is replaced")
            self._pool = type(self._pool)(self._pool._max_workers, **self.pool_kwargs)
            future = self._pool.submit(_run, *arguments)
        future.add_done_callback(done)


class ThreadPoolExecutor(_Pool, on_pools.ThreadPoolExecutor):
    """APScheduler's, reporting; further arguments are those of ``reporting.Settings``."""

    def __init__(self, max_workers: int = 10, pool_kwargs: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(max_workers, pool_kwargs)
        self._report(settings)


class ProcessPoolExecutor(_Pool, on_pools.ProcessPoolExecutor):
    """The same in processes, which find the server by the environment."""

    def __init__(self, max_workers: int = 10, pool_kwargs: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(max_workers, pool_kwargs)
        self._report(settings)


class AsyncIOExecutor(_Reports, on_asyncio.AsyncIOExecutor):
    """The same in an event loop."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._report(settings)

    def _do_submit_job(self: Any, job: Any, run_times: list[datetime]) -> None:
        tasks = self._tasks(job, run_times)
        arguments = (tasks, self._settings.client, job, job._jobstore_alias, run_times, self._logger.name)

        def done(future: Any) -> None:
            self._pending_futures.discard(future)
            error = None if future.cancelled() else future.exception()
            if future.cancelled() or error is not None:
                stopped = error or RuntimeError("the scheduler was shut down")
                self._lost(tasks, stopped)
                self._run_job_error(job.id, stopped, stopped.__traceback__)
            else:
                self._run_job_success(job.id, future.result())

        if iscoroutinefunction_partial(job.func):
            future = self._eventloop.create_task(_run_coroutine(*arguments))
        else:
            future = self._eventloop.run_in_executor(None, _run, *arguments)
        future.add_done_callback(done)
        self._pending_futures.add(future)


def _run(
    tasks: list[Task | None], client: Any, job: Any, store: str, run_times: list[datetime], logger_name: str
) -> list[Any]:
    events: list[Any] = []
    for task, run_time in zip(tasks, run_times, strict=True):
        handle = _begin(task, client)
        with within(handle):
            found = run_job(job, store, [run_time], logger_name)
        _end(handle, task, found)
        events += found
    return events


async def _run_coroutine(
    tasks: list[Task | None], client: Any, job: Any, store: str, run_times: list[datetime], logger_name: str
) -> list[Any]:
    from asyncio import to_thread

    events: list[Any] = []
    for task, run_time in zip(tasks, run_times, strict=True):
        handle = _begin(task, client)
        with within(handle):
            found = await run_coroutine_job(job, store, [run_time], logger_name)
        # In a thread, because the end is on disk when this returns.
        await to_thread(_end, handle, task, found)
        events += found
    return events


def _begin(task: Task | None, client: Any) -> Job | None:
    try:
        return task and begin(task.job_id, task.first, task.raise_on_cancel, client)
    except Exception:
        logger.exception("a run cannot be reported on")
        return None


@contained
def _end(handle: Job | None, task: Task | None, events: list[Any]) -> None:
    if handle is None or task is None:
        return
    for event in events:
        if event.code == EVENT_JOB_EXECUTED:
            handle.complete(event.retval if task.results else None)
        elif event.code == EVENT_JOB_ERROR:
            end(handle, None, event.exception)
        else:
            handle.cancel("missed")


def _call(job: Any, run_time: datetime) -> Call:
    due = run_time.astimezone(UTC)
    return Call(
        id=f"{job.id}:{due:%Y%m%dT%H%M%S.%f}Z",
        name=job.name,
        told={"args": job.args, "kwargs": job.kwargs},
        message=job,
        run_at=due.timestamp(),
    )
