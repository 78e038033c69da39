"""Taskiq: a middleware that reports on tasks.

    from statuswire.hooks.taskiq import StatusMiddleware

    broker.add_middlewares(StatusMiddleware(user="kwargs.user_id"))

The middleware is to be where tasks are sent, too: there they become ``queued``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq.exceptions import NoResultError

from statuswire.hooks.reporting import Call, Running, Settings, contained


class StatusMiddleware(TaskiqMiddleware):
    """Reports on tasks; the arguments are those of ``reporting.Settings``.

    The path to the owner leads through ``args``, ``kwargs`` and ``labels``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = Settings("taskiq", **settings)
        self._running = Running()
        self._again: set[str] = set()

    def post_send(self, message: TaskiqMessage) -> None:
        """It waits."""
        self._sent(message)

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """A worker has it."""
        self._begin(message)
        return message

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """It is done, or is tried again, which all middleware has decided by now."""
        # In a thread, because the end is on disk when this returns.
        await asyncio.to_thread(self._end, message, result)
        self._running.pop(message.task_id)

    @contained
    def _sent(self, message: TaskiqMessage) -> None:
        if self._running.get(message.task_id) is not None:
            self._again.add(message.task_id)
        self._settings.queued(_call(message))

    @contained
    def _begin(self, message: TaskiqMessage) -> None:
        self._running.add(message.task_id, self._settings.begin(_call(message)))

    @contained
    def _end(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        job = self._running.get(message.task_id)
        again = message.task_id in self._again
        self._again.discard(message.task_id)
        if job is None:
            return
        error = result.error if result.is_err else None
        if again and error is not None:
            job.leave()
        elif isinstance(error, NoResultError):  # sent on by a scheduler, or by the task itself
            job.leave()
            call = _call(message)
            self._settings.queued(
                Call(call.id, call.name, call.told, message, call.queue, max(call.attempt, job.attempt) + 1)
            )
        else:
            self._settings.ended(job, result.return_value, error)


def _call(message: TaskiqMessage) -> Call:
    labels = message.labels
    return Call(
        id=message.task_id,
        name=message.task_name.rpartition(":")[2],
        told={"args": message.args, "kwargs": message.kwargs, "labels": labels},
        message=message,
        queue=str(labels["queue_name"]) if "queue_name" in labels else None,
        attempt=1 + _number(labels.get("_retries")) + _number(labels.get("X-Taskiq-requeue")),
    )


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | str) and str(value).isdecimal() else 0
