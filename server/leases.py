"""Leases: a job whose worker is silent for ``ttl`` seconds is shown as stalled, and after another ``ttl`` as failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

import trio

from protocol.update import Job, Update
from server.wheel import Timer, Wheel

# Seconds until an expiry is tried again that the store did not keep (or that was overtaken by an update
# which then was not kept).
_RETRY: Final = 1.0


class _Lease:
    __slots__ = ("deadline", "fires", "heard", "timer")

    def __init__(self, heard: int) -> None:
        self.heard = heard  # version of the last sign of life
        self.deadline = 0.0  # trio.current_time() seconds
        self.fires = math.inf  # when the timer looks, never after the deadline except while it tries again
        self.timer: Timer | None = None


class Leases:
    """The leases of all live jobs, at most one timer each.

    An update that renews only moves the deadline; the timer notices when it fires. So a job that reports a thousand
    times within its lease costs a thousand assignments and one timer.

    Args:
        wheel: where the timers live.
        expire: called with a job id and the version last heard, when a lease has run out. It is called again
            every second until what it leads to is shown, or the job is heard of.
    """

    def __init__(self, wheel: Wheel, expire: Callable[[str, int], object]) -> None:
        self._wheel = wheel
        self._expire = expire
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def follow(self, kept: Iterable[tuple[Update, Job | None]]) -> None:
        """Entries were kept: renew, start or drop the leases they touch."""
        leases = self._leases
        for update, job in kept:
            if job is None or job.private.ttl is None or job.latest.ended:
                if leases and (lease := leases.get(update.job_id)) is not None:
                    self._drop(update.job_id, lease)
                continue
            lease = leases.get(update.job_id)
            if lease is None:
                lease = leases[update.job_id] = _Lease(job.private.heard)
            elif lease.heard == job.private.heard:
                continue  # a cancel request or a roll-up is no sign of life
            lease.heard = job.private.heard
            lease.deadline = trio.current_time() + job.private.ttl
            if lease.deadline < lease.fires:
                self._arm(update.job_id, lease, job.private.ttl)

    def restart(self, jobs: Iterable[Job]) -> None:
        """Begin every lease anew from now: while the server was away, no worker could report."""
        self.clear()
        self.follow((job.latest, job) for job in jobs)

    def clear(self) -> None:
        """Drop all."""
        for job_id, lease in list(self._leases.items()):
            self._drop(job_id, lease)

    def _arm(self, job_id: str, lease: _Lease, seconds: float) -> None:
        if lease.timer is not None:
            lease.timer.cancel()
        lease.fires = trio.current_time() + seconds
        lease.timer = self._wheel.after(seconds, lambda: self._due(job_id, lease))

    def _drop(self, job_id: str, lease: _Lease) -> None:
        if lease.timer is not None:
            lease.timer.cancel()
        del self._leases[job_id]

    def _due(self, job_id: str, lease: _Lease) -> None:
        left = lease.deadline - trio.current_time()
        if left > 0:
            self._arm(job_id, lease, left)
        else:
            self._arm(job_id, lease, _RETRY)
            self._expire(job_id, lease.heard)
