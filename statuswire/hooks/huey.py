"""Huey: its signals become reports.

from statuswire.hooks.huey import report

report(huey, user="kwargs.user_id")
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from huey import signals
from huey.api import PeriodicTask

from statuswire.hooks.reporting import MAX_RUNNING, Call, Running, Settings, contained


def report(huey: Any, **settings: Any) -> None:
    """Report on the tasks of this instance, where they are sent and where they run.

    The arguments are those of ``reporting.Settings``; the path to the owner leads through ``args`` and ``kwargs``.
    """
    hook = _Hook(Settings("huey", **settings), huey)
    for names, receiver in (
        ((signals.SIGNAL_ENQUEUED, signals.SIGNAL_SCHEDULED), hook.queued),
        ((signals.SIGNAL_EXECUTING,), hook.executing),
        ((signals.SIGNAL_COMPLETE,), hook.complete),
        ((signals.SIGNAL_RETRYING,), hook.retrying),
        (tuple(_ERRORS), hook.went_wrong),
        (tuple(_DROPPED), hook.dropped),
    ):
        huey.signal(*names)(receiver)
    if settings.get("results"):
        huey.post_execute("statuswire")(hook.remember)


# What a task is ended with that is not tried again; where there is no exception, its error.
_ERRORS = {
    getattr(signals, f"SIGNAL_{name.upper()}"): word
    for name, word in (
        ("error", ""),
        ("locked", "locked by another task"),
        ("timeout", "timed out"),
        ("rate_limited", "over its rate limit"),
        ("canceled", ""),
    )
    if hasattr(signals, f"SIGNAL_{name.upper()}")
}
_DROPPED = {
    signals.SIGNAL_REVOKED: "revoked",
    signals.SIGNAL_EXPIRED: "expired",
    signals.SIGNAL_INTERRUPTED: "interrupted",
}


class _Hook:
    """Receivers of signals, which Huey calls where the task is."""

    def __init__(self, settings: Settings, huey: Any) -> None:
        self._settings = settings
        self._queue = huey.name
        self._utc = huey.utc
        self._running = Running()
        self._results: dict[str, object] = {}
        # How many retries a task had when it was first seen here. It counts them down.
        self._first: OrderedDict[str, int] = OrderedDict()

    @contained
    def queued(self, signal: str, task: Any) -> None:
        # Huey reuses the ids of periodic tasks: each run is a job of its own, and known when it begins.
        if not isinstance(task, PeriodicTask):
            self._settings.queued(self._call(task))

    @contained
    def executing(self, signal: str, task: Any) -> None:
        call = self._call(task)
        if isinstance(task, PeriodicTask):
            call = Call(uuid4().hex, call.name, call.told, task, self._queue)
        self._running.add(task.id, self._settings.begin(call))

    @contained
    def remember(self, task: Any, value: object, error: BaseException | None) -> None:
        if error is None and self._running.get(task.id) is not None:
            self._results[task.id] = value

    @contained
    def complete(self, signal: str, task: Any) -> None:
        job = self._running.pop(task.id)
        result = self._results.pop(task.id, None)
        self._first.pop(task.id, None)
        if job is not None:
            self._settings.ended(job, result, None)

    @contained
    def went_wrong(self, signal: str, task: Any, error: BaseException | None = None) -> None:
        if task.retries and not isinstance(task, PeriodicTask):
            return  # ``retrying`` follows
        job = self._running.pop(task.id)
        self._first.pop(task.id, None)
        if job is None:
            if signal == signals.SIGNAL_CANCELED:
                self._settings.dropped(self._call(task), "cancelled")
        elif signal == signals.SIGNAL_CANCELED:
            job.cancel()
        elif error is not None:
            self._settings.ended(job, None, error)
        else:
            job.fail(_ERRORS[signal])

    @contained
    def retrying(self, signal: str, task: Any) -> None:
        job = self._running.pop(task.id)
        if job is None:
            return
        if isinstance(task, PeriodicTask):
            job.fail("to be tried again")
            return
        call = self._call(task)
        again = Call(call.id, call.name, call.told, task, self._queue, max(call.attempt, job.attempt) + 1)
        job.leave()
        self._settings.queued(again)

    @contained
    def dropped(self, signal: str, task: Any) -> None:
        job = self._running.pop(task.id)
        self._first.pop(task.id, None)
        if job is not None:
            job.cancel(_DROPPED[signal])
        elif signal != signals.SIGNAL_INTERRUPTED and not isinstance(task, PeriodicTask):
            self._settings.dropped(self._call(task), _DROPPED[signal])

    def _call(self, task: Any) -> Call:
        first = max(self._first.get(task.id, 0), task.retries or 0, type(task).default_retries or 0)
        self._first[task.id] = first
        if len(self._first) > MAX_RUNNING:
            self._first.popitem(last=False)
        return Call(
            id=task.id,
            name=task.name,
            told={"args": task.args, "kwargs": task.kwargs},
            message=task,
            queue=self._queue,
            attempt=1 + first - (task.retries or 0),
            run_at=None if task.eta is None else self._seconds(task.eta),
        )

    def _seconds(self, eta: datetime) -> float:
        return (eta.replace(tzinfo=UTC) if self._utc and eta.tzinfo is None else eta).timestamp()
