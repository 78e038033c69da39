"""What all brokers decide alike before and after the rules of ``protocol.job``: targets, creation, ancestors."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable

from msgspec import UNSET

from protocol import job as rules
from protocol.errors import ApiError, invalid_field, invalid_parameter, job_not_found
from protocol.fields import Fields, check_id, is_id
from protocol.rollup import climb
from protocol.update import Job, Parts, Update
from protocol.views import all_views
from server.brokers.base import Publish


def identify(operation: Publish) -> tuple[str | None, str | None]:
    """The id of the job that is published to, None if none is given; and the idempotency key, likewise.

    Raises:
        ApiError: 400 for a malformed id, 422 for one in the path and another in the body.
    """
    fields, job_id, key = operation.fields, operation.job_id, operation.key
    if key is None and fields.event_id is not UNSET:
        key = fields.event_id
    if job_id is None:
        return (None if fields.job_id is UNSET else fields.job_id), key
    if not is_id(job_id):
        raise invalid_parameter("jobId", "must be 1 to 128 of letters, digits and _ . : @ -")
    if fields.job_id is not UNSET and fields.job_id != job_id:
        raise invalid_field("jobId", f"is {fields.job_id!r} in the body, but {job_id!r} in the path")
    return job_id, key


def new_target(operation: Publish) -> str:
    """An id for a job without one. Raises ApiError 422 unless one is to be created."""
    if operation.create != "must":
        raise invalid_field("jobId", "is required")
    return operation.new_id or f"job_{secrets.token_hex(10)}"


def owner_of(operation: Publish, job_id: str) -> str:
    """Who will own the job that this creates. Raises ApiError 404 if it may not, 422 for a ``sub`` that is no id."""
    fields = operation.fields
    if fields.user_id is not UNSET:
        user_id = fields.user_id
    elif operation.create == "must":
        user_id = check_id(operation.sub, "userId")
    else:
        raise job_not_found(job_id)
    if operation.create == "never":
        raise job_not_found(job_id)
    # One text per owner and id, however many jobs and updates name them.
    return sys.intern(user_id)


def owned(job: Job, owner: str) -> Job:
    """The job, if it is this owner's: an id can be deleted and come back as somebody else's. Raises ApiError 404."""
    if job.latest.user_id != owner:
        raise job_not_found(job.latest.job_id)
    return job


def fields_for(operation: Publish, before: Job | None) -> Fields:
    """What is published comes to this, given the state it meets; ``View.settle`` says what is raised."""
    if operation.view is None or (before is not None and operation.create == "must"):
        return operation.fields
    return all_views()[operation.view].settle(before, operation.fields)


def create(operation: Publish, job_id: str, get: Callable[[str], Job | None], *, offset: int, now_ms: int) -> Job:
    """The first state of a new job; see ``protocol.job.create`` and ``owner_of`` for what is raised."""
    user_id = owner_of(operation, job_id)
    fields = fields_for(operation, None)
    parent = get(fields.parent_id) if fields.parent_id is not UNSET else None
    return rules.create(fields, job_id=job_id, user_id=user_id, parent=parent, offset=offset, now_ms=now_ms)


def ancestors_of(before: Job | None, after: Job | None, get: Callable[[str], Job | None], update: Update) -> list[Job]:
    """The ancestors that a change of a job changes, nearest first; see ``protocol.rollup.climb``."""

    def roll_up(parent: Job, parts: Parts | None, started: bool, offset: int) -> Job:
        return rules.roll_up(parent, parts, part_started=started, offset=offset, now_ms=update.at_ms)

    return climb(before, after, get, roll_up, update.offset)


def job_exists(job_id: str) -> ApiError:
    """409: the id of a job that is to be created is taken."""
    return ApiError(409, "job_exists", f"there is a job {job_id!r} already", field="jobId")


def too_many_jobs(max_jobs: int) -> ApiError:
    """503: there is no ended job that could make room for a new one."""
    return ApiError(
        503,
        "too_many_jobs",
        f"all {max_jobs} jobs are live; wait for some to end, or raise history.max_jobs",
        retry_after=10,
    )


def key_reused() -> ApiError:
    """422: an idempotency key came again with something else."""
    return ApiError(422, "idempotency_key_reused", "this idempotency key was used for something else within 10 minutes")
