"""Dramatiq: a middleware that reports on messages.

    from statuswire.hooks.dramatiq import StatusMiddleware

    broker.add_middleware(StatusMiddleware(user="kwargs.user_id"))

The middleware is to be where messages are sent, too: there they become ``queued``.
"""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.middleware import Middleware

from statuswire.hooks.reporting import Call, Running, Settings, contained


class StatusMiddleware(Middleware):
    """Reports on messages; the arguments are those of ``reporting.Settings``.

    The path to the owner leads through ``args``, ``kwargs`` and ``options``.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = Settings("dramatiq", **settings)
        self._running = Running()
        self._errors: dict[str, BaseException] = {}
        self._results: dict[str, object] = {}
        self._again: set[str] = set()

    @contained
    def after_enqueue(self, broker: dramatiq.Broker, message: Any, delay: int | None) -> None:
        if self._running.get(message.message_id) is not None:
            self._again.add(message.message_id)  # by itself, from within: a retry
        self._settings.queued(_call(message))

    @contained
    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        self._running.add(message.message_id, self._settings.begin(_call(message)))

    @contained
    def after_process_message(
        self,
        broker: dramatiq.Broker,
        message: Any,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        # Whether it is tried again is only known when all middleware has seen it.
        if self._running.get(message.message_id) is not None:
            if exception is not None:
                self._errors[message.message_id] = exception
            elif self._settings.results:
                self._results[message.message_id] = result

    @contained
    def after_skip_message(self, broker: dramatiq.Broker, message: Any) -> None:
        job = self._running.pop(message.message_id)
        if job is None:
            self._settings.dropped(_call(message), "skipped")
        else:
            job.cancel("skipped")

    @contained
    def before_ack(self, broker: dramatiq.Broker, message: Any) -> None:
        self._end(message.message_id)

    @contained
    def before_nack(self, broker: dramatiq.Broker, message: Any) -> None:
        self._end(message.message_id)

    def _end(self, name: str) -> None:
        job = self._running.pop(name)
        error, result = self._errors.pop(name, None), self._results.pop(name, None)
        again = name in self._again
        self._again.discard(name)
        if job is None:
            return
        if again and error is not None:
            job.leave()
        else:
            self._settings.ended(job, result, error)


def _call(message: Any) -> Call:
    options = message.options
    eta = options.get("eta")
    return Call(
        id=message.message_id,
        name=message.actor_name,
        told={"args": message.args, "kwargs": message.kwargs, "options": options},
        message=message,
        queue=message.queue_name.removesuffix(".DQ"),
        attempt=1 + int(options.get("retries") or 0),
        run_at=eta / 1000 if eta else None,
    )
