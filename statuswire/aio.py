"""The same as ``statuswire`` for asyncio and trio.

    >>> import asyncio
    >>> from statuswire import aio
    >>> async def export() -> None:
    ...     async with aio.job("export-2", user="alice") as j:
    ...         j.progress(45, "page 120 of 300")
    >>> asyncio.run(export())

``progress`` is the same plain call, because it waits for nothing. What writes to the disk or waits for the server is
awaited, and done in a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack

from anyio.to_thread import run_sync

from statuswire import jobs, notices
from statuswire.client import Client, default_client
from statuswire.fields import Fields
from statuswire.jobs import Counter, create_task, length_of, update_task
from statuswire.notices import Options, Target

__all__ = [
    "Job",
    "broadcast",
    "cancel_task",
    "complete_task",
    "create_task",
    "fail_task",
    "flush",
    "job",
    "publish",
    "send",
    "send_to_channel",
    "send_to_channels",
    "send_to_client",
    "send_to_user",
    "send_to_users",
    "track",
    "update_task",
]

_T = TypeVar("_T")
_P = ParamSpec("_P")


async def _in_thread(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    # Not abandoned: each of these ends by itself, and an end that was begun to be kept should be.
    return await run_sync(partial(call, *args, **kwargs))


class Job:
    """One attempt of a job, as its worker sees it; see ``statuswire.Job``.

    Attributes:
        sync: the handle for synchronous code.
        progress: as there, a plain call.
    """

    def __init__(self, sync: jobs.Job) -> None:
        self.sync = sync
        self.progress = sync.progress

    @property
    def id(self) -> str:
        """The job's id."""
        return self.sync.id

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the job to be cancelled."""
        return self.sync.cancel_requested

    async def complete(self, result: Any = None, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It is done. Raises Rejected or Unavailable with ``strict``."""
        await _in_thread(self.sync.complete, result, message, **fields)

    async def fail(self, error: object, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It went wrong. Raises Rejected or Unavailable with ``strict``."""
        await _in_thread(self.sync.fail, error, message, **fields)

    async def cancel(self, message: str | None = None, **fields: Unpack[Fields]) -> None:
        """It was stopped. Raises Rejected or Unavailable with ``strict``."""
        await _in_thread(self.sync.cancel, message, **fields)

    async def track(
        self, items: AsyncIterable[_T] | Iterable[_T], total: int | None = None, **fields: Unpack[Fields]
    ) -> AsyncIterator[_T]:
        """Pass the items on and report how many of them were; the job is not ended by it."""
        counter = Counter(self.sync, total if total is not None else length_of(items), fields)
        async for item in _each(items):
            yield item
            counter.count()
        counter.report()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.complete()
        else:
            # In this thread, because a task that is being cancelled cannot wait for another: some milliseconds.
            self.sync.end_by(error)


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
    """Begin to report on a job; see ``statuswire.job``. The handle is an asynchronous context manager."""
    first = {**fields, "user": user, "message": message}
    return Job(jobs.Job(job_id, first, renew=renew, raise_on_cancel=raise_on_cancel, client=client))


async def track(
    items: AsyncIterable[_T] | Iterable[_T],
    job_id: str,
    total: int | None = None,
    *,
    user: str | None = None,
    message: str | None = None,
    renew: bool = True,
    raise_on_cancel: bool = False,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> AsyncIterator[_T]:
    """Iterate over the items, asynchronous or not, as one job; see ``statuswire.track``.

    Python closes an asynchronous iteration that is left early only some time later, and only then the job becomes
    ``cancelled``; ``contextlib.aclosing`` makes it prompt.

    Example:
        >>> import asyncio
        >>> async def pages() -> None:
        ...     async for page in track(["one", "two"], "print-2", user="alice"):
        ...         print(page)
        >>> asyncio.run(pages())
        one
        two
    """
    first = {**fields, "user": user, "message": message}
    handle = jobs.Job(job_id, first, renew=renew, raise_on_cancel=raise_on_cancel, client=client)
    counter = Counter(handle, total if total is not None else length_of(items), {})
    try:
        async for item in _each(items):
            yield item
            counter.count()
        counter.report()
    except GeneratorExit:
        handle.cancel(f"left after {counter}")
        raise
    except BaseException as error:
        handle.end_by(error)
        raise
    await _in_thread(handle.complete)


class _Async(AsyncIterator[_T]):
    """A plain iteration as an asynchronous one; not a generator, which would have to be closed when it is left."""

    def __init__(self, items: Iterable[_T]) -> None:
        self._items = iter(items)

    async def __anext__(self) -> _T:
        for item in self._items:
            return item
        raise StopAsyncIteration


def _each(items: AsyncIterable[_T] | Iterable[_T]) -> AsyncIterable[_T]:
    return items if isinstance(items, AsyncIterable) else _Async(items)


async def complete_task(
    job_id: str,
    result: Any = None,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job is done. Raises Rejected or Unavailable with ``strict``."""
    await _in_thread(jobs.complete_task, job_id, result, message, user=user, client=client, **fields)


async def fail_task(
    job_id: str,
    error: object,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job went wrong. Raises Rejected or Unavailable with ``strict``."""
    await _in_thread(jobs.fail_task, job_id, error, message, user=user, client=client, **fields)


async def cancel_task(
    job_id: str,
    message: str | None = None,
    *,
    user: str | None = None,
    client: Client | None = None,
    **fields: Unpack[Fields],
) -> None:
    """A job was stopped. Raises Rejected or Unavailable with ``strict``."""
    await _in_thread(jobs.cancel_task, job_id, message, user=user, client=client, **fields)


async def publish(*updates: dict[str, Any], client: Client | None = None) -> None:
    """Publish updates in the words of the wire protocol; see ``statuswire.publish``."""
    await _in_thread(jobs.publish, *updates, client=client)


async def flush(timeout: float = 10.0, *, client: Client | None = None) -> bool:  # noqa: ASYNC109 - not an error, an answer
    """Send what there is; whether all of it was answered within ``timeout`` seconds."""
    return await run_sync((client or default_client()).flush, timeout, abandon_on_cancel=True)


async def send(
    target: Target, to: str | Iterable[str] | None, event: str, data: Any = None, **options: Unpack[Options]
) -> int:
    """Send a notification; how many connections got it. See ``statuswire.send``."""
    return await run_sync(partial(notices.send, target, to, event, data, **options), abandon_on_cancel=True)


async def send_to_client(client_id: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To one connection, by the ``clientId`` that it was told."""
    return await send("client", client_id, event, data, **options)


async def send_to_user(user: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To all connections of a user."""
    return await send("user", user, event, data, **options)


async def send_to_users(users: Iterable[str], event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To all connections of several users."""
    return await send("users", users, event, data, **options)


async def send_to_channel(channel: str, event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To those who have joined a channel."""
    return await send("channel", channel, event, data, **options)


async def send_to_channels(channels: Iterable[str], event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To those who have joined one of several channels."""
    return await send("channels", channels, event, data, **options)


async def broadcast(event: str, data: Any = None, **options: Unpack[Options]) -> int:
    """To everybody."""
    return await send("broadcast", None, event, data, **options)
