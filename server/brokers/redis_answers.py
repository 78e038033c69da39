"""Giving operations their answers, once their own node shows what came of them; see ``redis_publisher``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec
import trio

from protocol.errors import ApiError
from server.brokers.base import Accepted, Result, Submission
from server.brokers.redis_calls import Call
from server.brokers.redis_follower import Follower
from server.brokers.redis_keys import CHANNELS
from server.jobs import Jobs

# How long a publisher waits, beyond Redis' answer, until its own node shows the update.
SHOWN_S: Final = 1.0


class Answers:
    """Holds answers back until what they rest on is shown here, if it is to be: a publisher reads its own writes.

    Args:
        jobs: what is shown.
        follower: says how far.

    Attributes:
        open: operations without an answer.
    """

    def __init__(self, jobs: Jobs, follower: Follower) -> None:
        self._jobs = jobs
        self._follower = follower
        self.open = 0
        self._idle = trio.Event()
        self._unshown: dict[int, deque[tuple[int, float, Call, Result]]] = {}

    def answer(self, call: Call, result: Result, stamp: int) -> None:
        """Settle it once the message with this stamp is shown here."""
        shard = call.shard
        follower = self._follower
        if (
            shard in follower.followed
            and follower.seen[shard] < stamp
            and CHANNELS[shard] in follower.client.subscribed
        ):
            waiting = self._unshown.get(shard)
            if waiting is None:
                waiting = self._unshown[shard] = deque()
            waiting.append((stamp, trio.current_time() + SHOWN_S, call, result))
        else:
            self.settle(call, result)

    def settle(self, call: Call, result: Result) -> None:
        """Give the answer now."""
        if isinstance(result, Accepted) and result.job is not None:
            shown = self._jobs.get(result.job.latest.job_id)
            if shown is not None and shown.latest.offset == result.job.latest.offset:
                result = msgspec.structs.replace(result, job=shown)
        self.open -= 1
        call.batch.put(call.index, result)
        if not self.open:
            self._idle.set()

    def on_shown(self, shard: int) -> None:
        """More of a shard is shown."""
        if shard in self._unshown:
            self._release(shard, 0.0)

    def release_late(self, now: float) -> None:
        """Do not wait any longer for what has not been shown for ``SHOWN_S``."""
        for shard in list(self._unshown):
            self._release(shard, now)

    def release_all(self) -> None:
        """Nothing more is shown for now: do not wait for it."""
        self.release_late(float("inf"))

    def _release(self, shard: int, now: float) -> None:
        waiting, follower = self._unshown[shard], self._follower
        seen = follower.seen[shard] if shard in follower.followed else float("inf")
        while waiting and (waiting[0][0] <= seen or waiting[0][1] <= now):
            _, _, call, result = waiting.popleft()
            self.settle(call, result)
        if not waiting:
            self._unshown.pop(shard, None)

    async def wait_idle(self) -> None:
        """Return when every operation has its answer."""
        while self.open:
            self._idle = trio.Event()
            await self._idle.wait()


def settled(results: Iterable[Result], error: ApiError | None) -> Submission:
    """A submission that was refused as a whole."""
    submission = Submission(list(results))
    submission.settle(error)
    return submission
