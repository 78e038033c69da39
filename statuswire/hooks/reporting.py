"""What all hooks share: whose job it is, how its stages are told, and what the job itself may say."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final, ParamSpec, Unpack

from statuswire.client import Client, default_client, logger
from statuswire.errors import JobCancelled
from statuswire.fields import Fields, to_wire
from statuswire.jobs import Job

# Where the owner's id is unless the user says otherwise.
USER: Final = "kwargs.user_id"
# Seconds after which the jobs of a worker that died are shown as stalled, and after as many again as failed.
TTL: Final = 30.0
# Jobs of one process that are under way. One that a queue forgot to end must not be kept for ever.
MAX_RUNNING: Final = 10_000
# How often a job may turn out to have been given to a worker before, without the queue saying so.
MAX_CLIMBS: Final = 100
RETRY: Final = "retry"

_ID: Final = re.compile(r"[A-Za-z0-9_.:@-]{1,128}")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9_.:@-]")
_P = ParamSpec("_P")

# A path to the owner's id, or a function of the library's own message that returns it.
User = str | Callable[[Any], object]

_current: ContextVar[Job | None] = ContextVar("statuswire_job", default=None)


def current_job() -> Job | None:
    """The job that this code runs in: its handle, with ``cancel_requested`` among others. None outside of any."""
    return _current.get()


def progress(value: float | None = None, message: str | None = None, **fields: Unpack[Fields]) -> None:
    """Say how far the job is that this code runs in; see ``Job.progress``. Outside of a job it does nothing.

    Raises:
        JobCancelled: somebody asked for that, and the hook was given ``raise_on_cancel``.
    """
    job = _current.get()
    if job is not None:
        job.progress(value, message, **fields)


@dataclass(frozen=True, slots=True)
class Call:
    """One job as its queue knows it.

    Attributes:
        id: in the queue's own words.
        name: what is called; the job's kind.
        told: what the path to the owner leads through: ``args``, ``kwargs`` and more.
        message: the library's own object, for a function that finds the owner.
        queue: the queue's name.
        attempt: 1 for the first.
        run_at: when it is to begin, unix seconds, if that is later.
    """

    id: str
    name: str
    told: Mapping[str, Any]
    message: Any
    queue: str | None = None
    attempt: int = 1
    run_at: float | None = None


@dataclass(slots=True)
class Settings:
    """How a hook reports; the arguments that all hooks have.

    Args:
        source: the hook's name, in ``metadata``.
        user: where the owner's id is: a path such as ``kwargs.user_id`` or ``args.0``, or a function of the message.
            A job without one belongs to ``queue:<source>``, whom only admins see.
        ttl: the lease, seconds; None for none.
        results: whether results are shown. Arguments never are.
        raise_on_cancel: ``progress`` raises ``JobCancelled`` once somebody asked for that.
        client: the way to the server, else the one of ``configure`` or the environment.
    """

    source: str
    user: User | None = None
    ttl: float | None = TTL
    results: bool = False
    raise_on_cancel: bool = False
    client: Client | None = None

    def owner(self, call: Call) -> str:
        """The id of the job's owner."""
        user = USER if self.user is None else self.user
        try:
            found = user(call.message) if callable(user) else at_path(call.told, user)
        except Exception as error:  # as with a path that leads nowhere
            logger.warning("job %s: its owner cannot be found: %s: %s", call.id, type(error).__name__, error)
            found = None
        if isinstance(found, int) and not isinstance(found, bool):
            found = str(found)
        if isinstance(found, str) and _ID.fullmatch(found) and not found.startswith("queue:"):
            return found
        return f"queue:{job_id(self.source)}"

    def fields(self, call: Call) -> dict[str, Any]:
        """What every first word of a job has."""
        metadata = {"source": self.source}
        if call.queue:
            metadata["queue"] = call.queue
        if call.run_at is not None:
            metadata["runAt"] = datetime.fromtimestamp(call.run_at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        return {"user": self.owner(call), "kind": call.name, "metadata": metadata, "attempt": max(1, call.attempt)}

    def queued(self, call: Call) -> None:
        """It waits; as a retry if it is not the first attempt."""
        client = self.client or default_client()
        named = to_wire(self.fields(call)) | {"status": "queued"}
        if call.attempt > 1:
            # The worker that held the lease is done with it.
            named |= {"message": RETRY, "ttl": None}
        client.put_unless_held(job_id(call.id), named["attempt"], named)

    def begin(self, call: Call) -> Job:
        """A worker has it."""
        return begin(call.id, self.first(call), self.raise_on_cancel, self.client)

    def first(self, call: Call) -> dict[str, Any]:
        """What a worker says at first; plain data, to be taken to other processes."""
        return self.fields(call) | {"ttl": self.ttl}

    def dropped(self, call: Call, why: str) -> None:
        """It is not going to run."""
        job = self.begin(call)
        job.cancel(why)

    def ended(self, job: Job, result: object, error: BaseException | None) -> None:
        """It has ended by itself, or by this."""
        end(job, result if self.results else None, error)


def begin(name: str, first: Mapping[str, Any], raise_on_cancel: bool, client: Client | None = None) -> Job:
    """A handle for an attempt of a job, which a worker may have had before without the queue saying so."""
    job = Job(job_id(name), first, raise_on_cancel=raise_on_cancel, client=client)
    job.may_climb(MAX_CLIMBS)
    if first["attempt"] > 1:
        job.clear("message")  # why it came back is over
    return job


def end(job: Job, result: object, error: BaseException | None) -> None:
    """It has returned this, or was left by this error."""
    if error is None:
        job.complete(result)
    elif isinstance(error, JobCancelled) or type(error).__name__ == "CancelledError":
        job.cancel()
    else:
        # What some queues stop jobs by, such as a limit of time, is no Exception; to them it is a failure.
        job.fail(error)


@dataclass(slots=True)
class Running:
    """The jobs that this process is at, by the queue's own ids."""

    jobs: OrderedDict[str, tuple[Job, Any]] = field(default_factory=OrderedDict)

    def add(self, name: str, job: Job) -> None:
        """It has begun, in this context: ``progress`` is about it from now on."""
        self.jobs[name] = job, _current.set(job)
        if len(self.jobs) > MAX_RUNNING:
            self.jobs.popitem(last=False)

    def get(self, name: str) -> Job | None:
        """The handle of a job that is under way."""
        found = self.jobs.get(name)
        return found[0] if found else None

    def pop(self, name: str) -> Job | None:
        """It is over; None if it was not under way."""
        found = self.jobs.pop(name, None)
        if found is None:
            return None
        job = found[0]
        if _current.get() is job:
            _current.set(None)
        return job


@contextmanager
def within(job: Job | None) -> Iterator[None]:
    """``progress`` is about this job."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)


def contained(hook: Callable[_P, None]) -> Callable[_P, None]:
    """A hook that never fails: what goes wrong in it is logged."""

    @functools.wraps(hook)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:
            logger.exception("%s failed", hook.__qualname__)

    return inner


def job_id(name: str) -> str:
    """An id as records may have it: what it may not have is replaced, and then a digest keeps it apart from others."""
    if _ID.fullmatch(name):
        return name
    digest = blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()
    return f"{_UNFIT.sub('-', name)[:100]}.{digest}"


def at_path(document: object, path: str) -> object:
    """What is at a path of names and list positions with dots between; None if it leads nowhere."""
    for name in path.split("."):
        if isinstance(document, Mapping):
            document = document.get(name)
        elif isinstance(document, Sequence) and not isinstance(document, str | bytes) and name.isdecimal():
            document = document[int(name)] if int(name) < len(document) else None
        else:
            return None
    return document
