"""Cursors remembered for polling clients that send only a ``client_id``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# At some 200 bytes each this is 2 MB; beyond it the client longest unheard of starts from a snapshot again.
MAX_CURSORS: Final = 10_000
# A client that polls at all does so far more often; after this long a snapshot is smaller than what it missed.
KEPT_S: Final = 3600.0


class Cursors:
    """Last cursor by (user, client id); bounded in number and age. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._cursors: OrderedDict[tuple[str, str], tuple[float, str]] = OrderedDict()

    def get(self, user: str, client_id: str, now: float) -> str | None:
        """The cursor of this user's client, None if it has none or it is too old."""
        kept = self._cursors.get((user, client_id))
        return kept[1] if kept is not None and now - kept[0] < KEPT_S else None

    def put(self, user: str, client_id: str, cursor: str, now: float) -> None:
        """Remember a cursor that was given to the client."""
        self._cursors[(user, client_id)] = (now, cursor)
        self._cursors.move_to_end((user, client_id))
        while len(self._cursors) > MAX_CURSORS or now - next(iter(self._cursors.values()))[0] >= KEPT_S:
            self._cursors.popitem(last=False)
