"""When a user was last there to see something: a reader that left, a poll, a request for a record.

Only kept while somebody wants to know (``wanted``), and for as long as a callback may wait. On Redis every node knows.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from server.brokers.redis_broker import RedisBroker
    from server.presence import Presence

MAX_USERS: Final = 100_000
# Other nodes are told of the same user once in so long.
TELL_EVERY_MS: Final = 1000
KEPT_S: Final = 86_400.0
_NEVER: Final = (-1, 0)


class Seen:
    """Who was there lately.

    Args:
        presence: who is there now.
        shared: the broker, if other nodes want to know too.
        clock: unix seconds.
    """

    def __init__(
        self,
        presence: Presence,
        shared: RedisBroker | None,
        *,
        wanted: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.wanted = wanted
        self._presence = presence
        self._shared = shared
        self._clock = clock
        # When each was seen, and when other nodes were last told so: unix milliseconds; the longest ago first.
        self._last: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def note(self, user: str) -> None:
        """This user was shown something just now. Never waits."""
        if not self.wanted:
            return
        now = int(self._clock() * 1000)
        _, told = self._last.get(user, _NEVER)
        if self._shared is not None and now - told >= TELL_EVERY_MS:
            self._shared.remember(_name(user), str(now + TELL_EVERY_MS), KEPT_S)
            told = now
        self._last[user] = now, told
        self._last.move_to_end(user)
        if len(self._last) > MAX_USERS:
            self._last.popitem(last=False)

    async def since(self, user: str, unix_ms: int) -> bool:
        """Whether this user is there now, on any node, or was at some moment from ``unix_ms`` on."""
        if user in self._presence.users or self._last.get(user, _NEVER)[0] >= unix_ms:
            return True
        if self._shared is None:
            return False
        if await self._presence.of_user(user):
            return True
        told = await self._shared.recall(_name(user))
        return told is not None and int(told) >= unix_ms


def _name(user: str) -> str:
    return f"seen:{user}"  # names of cursors have no colon
