"""Cursors remembered for polling clients that send only a ``client_id``."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, NamedTuple

# At some 200 bytes each this is 2 MB; beyond it the client longest unheard of starts from a snapshot again.
MAX_CURSORS: Final = 10_000
# A client that polls at all does so far more often; after this long a snapshot is smaller than what it missed.
KEPT_S: Final = 3600.0


class Client(NamedTuple):
    """Whose cursor it is.

    Attributes:
        user: whoever asks.
        client_id: the name it gave itself.
        watch: digest of what it watches: a cursor of one question says nothing about what another has missed.
    """

    user: str
    client_id: str
    watch: bytes

    @property
    def name(self) -> str:
        """All of it as one text, the same on every node."""
        return blake2b(f"{self.user}/{self.watch.hex()}/{self.client_id}".encode(), digest_size=16).hexdigest()


class Cursors:
    """Last cursor by client; bounded in number and age. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._cursors: OrderedDict[Client, tuple[float, str]] = OrderedDict()

    def get(self, client: Client, now: float) -> str | None:
        """The client's cursor, None if it has none or it is too old."""
        kept = self._cursors.get(client)
        return kept[1] if kept is not None and now - kept[0] < KEPT_S else None

    def put(self, client: Client, cursor: str, now: float) -> None:
        """Remember a cursor that was given to the client."""
        self._cursors[client] = (now, cursor)
        self._cursors.move_to_end(client)
        while len(self._cursors) > MAX_CURSORS or now - next(iter(self._cursors.values()))[0] >= KEPT_S:
            self._cursors.popitem(last=False)
