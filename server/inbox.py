"""Notifications that are kept for their users until they acknowledge them: the same table over every store.

It is filled by what a broker shows, and stands in memory on every node; what survives a restart is the broker's.
Three bounds, oldest out first: age, number per user, and number and bytes in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from protocol.notice import users_of
from protocol.update import Update

KEPT_S: Final = 86_400.0
# More than anyone reads after a day away.
MAX_PER_USER: Final = 1000
# Places, one for each user of each notification; some 100 bytes each beside the notifications themselves.
MAX_PLACES: Final = 100_000
MAX_BYTES: Final = 64 * 1024 * 1024


class Place(NamedTuple):
    """One user's claim to one stored notification."""

    user: str
    offset: int


class Inboxes:
    """What is kept for whom.

    Everything that goes is returned as the places that went, so that a store can let go of them as well.
    """

    def __init__(
        self,
        *,
        kept_s: float = KEPT_S,
        max_per_user: int = MAX_PER_USER,
        max_places: int = MAX_PLACES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._kept_ms = int(kept_s * 1000)
        self._max_per_user = max_per_user
        self._max_places = max_places
        self._max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._by_user: dict[str, dict[int, Update]] = {}
        # Of each stored notification, oldest first, those who have not acknowledged it.
        self._waiting: dict[int, dict[str, None]] = {}
        self.places = 0
        self.bytes = 0

    def add(self, notice: Update, users: Iterable[str] | None = None) -> list[Place]:
        """Keep a notification, newer than all that are kept, for its users (or only for ``users``)."""
        offset = notice.offset
        waiting = dict.fromkeys(users_of(notice) if users is None else users)
        if not waiting:
            return []
        self._waiting[offset] = waiting
        self.bytes += len(notice.body)
        self.places += len(waiting)
        gone: list[Place] = []
        for user in waiting:
            kept = self._by_user.setdefault(user, {})
            kept[offset] = notice
            if len(kept) > self._max_per_user:
                gone.append(Place(user, next(iter(kept))))
        self.remove(gone)
        return gone + self.trim(notice.at_ms)

    def of_user(self, user: str, after: int = 0) -> list[Update]:
        """What is kept for a user behind an offset, oldest first."""
        return [notice for offset, notice in self._by_user.get(user, {}).items() if offset > after]

    def up_to(self, user: str, offset: int) -> list[Place]:
        """What an acknowledgement up to this offset would take away."""
        return [Place(user, kept) for kept in self._by_user.get(user, {}) if kept <= offset]

    def remove(self, places: Sequence[Place]) -> None:
        """Let go of these; those that are not there do not matter."""
        for user, offset in places:
            kept = self._by_user.get(user)
            if kept is None or offset not in kept:
                continue
            notice = kept.pop(offset)
            if not kept:
                del self._by_user[user]
            self.places -= 1
            waiting = self._waiting[offset]
            del waiting[user]
            if not waiting:
                del self._waiting[offset]
                self.bytes -= len(notice.body)

    def trim(self, now_ms: int) -> list[Place]:
        """Let go of what is too old at this time (unix milliseconds), and of the oldest while there is too much."""
        gone: list[Place] = []
        while self._waiting:
            offset, waiting = next(iter(self._waiting.items()))
            at_ms = self._by_user[next(iter(waiting))][offset].at_ms
            over = self.places > self._max_places or self.bytes > self._max_bytes
            if at_ms > now_ms - self._kept_ms and not over:
                break
            places = [Place(user, offset) for user in waiting]
            self.remove(places)
            gone += places
        return gone

    def load(self, kept: Iterable[tuple[Update, Sequence[str]]]) -> list[Place]:
        """Start from these, oldest first: notifications and who has not acknowledged them."""
        self.clear()
        return [place for notice, users in kept for place in self.add(notice, users)]
