"""arq: the functions of a worker report on their jobs, and a pool on what it enqueues.

from statuswire.hooks.arq import report

@report(user="kwargs.user_id")
class WorkerSettings:
    functions = [export]

redis = reporting(await create_pool(…), user="kwargs.user_id")  # where jobs are enqueued: there they are ``queued``
"""

from __future__ import annotations

import asyncio
import functools
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from arq.connections import ArqRedis
from arq.constants import default_queue_name
from arq.cron import CronJob
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus
from arq.worker import Function, Retry, RetryJob, func

from statuswire.hooks.reporting import Call, Running, Settings, contained

_T = TypeVar("_T")


def report(**settings: Any) -> Callable[[_T], _T]:
    """Make a worker's settings, a class or a dictionary, report on its jobs.

    The arguments are those of ``reporting.Settings``; the path to the owner leads through ``args`` and ``kwargs``.
    """

    def change(worker: _T) -> _T:
        _Hook(worker, Settings("arq", **settings))
        return worker

    return change


def reporting(redis: ArqRedis, **settings: Any) -> ArqRedis:
    """The same pool, reporting on what is enqueued with it."""
    return _report_enqueued(redis, Settings("arq", **settings))


def _report_enqueued(redis: ArqRedis, settings: Settings) -> ArqRedis:
    enqueue = redis.enqueue_job

    @contained
    def tell(job: ArqJob, function: str, args: Any, kwargs: dict[str, Any]) -> None:
        told = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        settings.queued(_call(job.job_id, function, args, told, job._queue_name))

    @functools.wraps(enqueue)
    async def enqueue_job(function: str, *args: Any, **kwargs: Any) -> ArqJob | None:
        job = await enqueue(function, *args, **kwargs)
        if job is not None:
            tell(job, function, args, kwargs)
        return job

    redis.enqueue_job = enqueue_job  # type: ignore[method-assign]
    return redis


class _Hook:
    """What is put into the settings of a worker.

    A function's wrapper sees how most jobs end. Whether a cancelled one was aborted, timed out or will be run again,
    and what never began, is seen where arq makes its result: the worker's serializer.
    """

    def __init__(self, worker: Any, settings: Settings) -> None:
        self._settings = settings
        self._running = Running()
        self._cancelled: dict[str, Call] = {}
        self._begun: set[str] = set()
        given = worker if isinstance(worker, dict) else vars(worker)
        self._queue = given.get("queue_name") or default_queue_name
        self._serialize = given.get("job_serializer") or pickle.dumps
        self._startup, self._after = given.get("on_startup"), given.get("after_job_end")
        changed = {
            "functions": [self._reporting(func(one)) for one in given.get("functions", ())],
            "cron_jobs": [self._reporting(one) for one in given.get("cron_jobs") or ()],
            "job_serializer": self._serializer,
            "on_startup": self._on_startup,
            "after_job_end": self._after_job_end,
        }
        for name, value in changed.items():
            if isinstance(worker, dict):
                worker[name] = value
            else:
                setattr(worker, name, value)

    def _reporting(self, function: Any) -> Function | CronJob:
        coroutine = function.coroutine

        @functools.wraps(coroutine)
        async def run(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
            name = ctx["job_id"]
            call = _call(name, function.name, args, kwargs, self._queue, ctx.get("job_try", 1))
            self._begun.add(name)
            self._begin(call)
            try:
                result = await coroutine(ctx, *args, **kwargs)
            except (Retry, RetryJob):
                # That it was the last try arq says when it would begin the next one.
                await self._ended(call, None, None, again=True)
                raise
            except asyncio.CancelledError:
                self._cancelled[name] = call
                raise
            except BaseException as error:
                await self._ended(call, None, error)
                raise
            await self._ended(call, result, None)
            return result

        return replace(function, coroutine=run)

    @contained
    def _begin(self, call: Call) -> None:
        self._running.add(call.id, self._settings.begin(call))

    async def _ended(self, call: Call, result: object, error: BaseException | None, *, again: bool = False) -> None:
        # In a thread, because an end is on disk when this returns.
        await asyncio.to_thread(self._end, call, result, error, again)
        self._running.pop(call.id)

    @contained
    def _end(self, call: Call, result: object, error: BaseException | None, again: bool) -> None:
        job = self._running.get(call.id)
        if job is None:
            return
        if again:
            job.leave()
            self._settings.queued(replace(call, attempt=max(call.attempt, job.attempt) + 1))
        else:
            self._settings.ended(job, result, error)

    def _serializer(self, data: dict[str, Any]) -> bytes:
        if "s" in data and data.get("id"):
            self._told_result(data)
        encoded: bytes = self._serialize(data)
        return encoded

    @contained
    def _told_result(self, data: dict[str, Any]) -> None:
        """arq makes the result of a job. Those of functions that have returned or raised are told of already."""
        name, result = data["id"], data["r"]
        cancelled = self._cancelled.pop(name, None) is not None
        if name in self._begun and not cancelled:
            return
        job = self._running.pop(name)
        if job is None:  # it ended before it began: expired, unknown, aborted, or tried too often
            job = self._settings.begin(_call(name, data["f"], data["a"], data["k"], self._queue, data["t"]))
        if isinstance(result, asyncio.CancelledError):
            job.cancel("aborted")
        else:
            self._settings.ended(job, None, result)

    async def _on_startup(self, ctx: dict[Any, Any]) -> None:
        _report_enqueued(ctx["redis"], self._settings)
        if self._startup is not None:
            await self._startup(ctx)

    async def _after_job_end(self, ctx: dict[Any, Any]) -> None:
        name = ctx["job_id"]
        self._begun.discard(name)
        call = self._cancelled.pop(name, None)
        if call is not None:
            # No result was made: it will be run again, or nobody wants to keep results.
            waits = True
            with suppress(Exception):  # Redis is away: then it cannot have been removed either
                status = await ArqJob(name, ctx["redis"], _queue_name=self._queue).status()
                waits = status not in (JobStatus.not_found, JobStatus.complete)
            await self._ended(call, None, None if waits else asyncio.CancelledError(), again=waits)
        if self._after is not None:
            await self._after(ctx)


def _call(name: str, function: str, args: Any, kwargs: Any, queue: str | None, attempt: int = 1) -> Call:
    told = {"args": args, "kwargs": kwargs}
    return Call(name, function, told, told, queue, attempt)
