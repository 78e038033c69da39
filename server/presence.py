"""Who is connected: by client id, by user, and by the named channels that they have joined.

Entering, leaving, joining and parting are synchronous, so cancellation cannot leave anything behind. Questions are
asked with ``await`` because other nodes may have the answer; about this node alone they answer at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from heapq import nsmallest
from typing import Protocol

from protocol.presence import ClientInfo, Target, Transport
from server.limits import Limits


class Connected(Protocol):
    """A live connection whose user is known."""

    client_id: str
    username: str | None
    address: str
    since_ms: int
    channels: Collection[str]

    @property
    def user(self) -> str:
        """Whose it is."""

    @property
    def transport(self) -> Transport:
        """``websocket`` or ``sse``."""

    @property
    def takes_notices(self) -> bool:
        """Whether notifications reach it."""

    def disconnect(self) -> None:
        """End it because the application says so. Must not wait."""


class Presence:
    """The connections of one node.

    Attributes:
        clients: by client id.
        users: by user: a tuple of one, a dict of several, never empty. Most users have one, and a dict is 232 bytes.
        channels: by the channel they have joined; never empty.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.clients: dict[str, Connected] = {}
        self.users: dict[str, Collection[Connected]] = {}
        self.channels: dict[str, dict[Connected, None]] = {}

    # Coming and going

    async def admit(self, client_id: str, user: str) -> None:
        """Ask for a place, to be taken with ``enter`` before anything else is awaited.

        Raises:
            ApiError: 429 ``rate_limited``: the user has ``connections_per_user`` already.
        """
        self._limits.check_connections(len(self.users.get(user, ())))

    def enter(self, connected: Connected) -> None:
        """It is live and its user known."""
        self.clients[connected.client_id] = connected
        others = self.users.get(connected.user)
        if others is None:
            self.users[connected.user] = (connected,)
        elif isinstance(others, dict):
            others[connected] = None
        else:
            self.users[connected.user] = dict.fromkeys((*others, connected))

    def leave(self, connected: Connected) -> None:
        """It is over; again, or without ``enter``, does nothing."""
        if self.clients.get(connected.client_id) is not connected:
            return
        for channel in connected.channels:
            self._drop(connected, channel)
        connected.channels = ()
        del self.clients[connected.client_id]
        left = self.users[connected.user]
        if isinstance(left, dict) and len(left) > 1:
            del left[connected]
        else:
            del self.users[connected.user]

    def join(self, connected: Connected, channel: str) -> None:
        """It wants what is sent to a channel. How many it may join is for the caller to bound."""
        if channel in connected.channels or self.clients.get(connected.client_id) is not connected:
            return
        connected.channels = (*connected.channels, channel)
        self.channels.setdefault(channel, {})[connected] = None

    def part(self, connected: Connected, channel: str) -> None:
        """The opposite of ``join``; without one it does nothing."""
        if channel not in connected.channels:
            return
        connected.channels = tuple(name for name in connected.channels if name != channel)
        self._drop(connected, channel)

    def _drop(self, connected: Connected, channel: str) -> None:
        members = self.channels[channel]
        del members[connected]
        if not members:
            del self.channels[channel]

    # Who is there

    def here(self, target: Target) -> dict[Connected, None]:
        """The connections of this node that a notification to ``target`` reaches, each once."""
        return dict.fromkeys(connected for connected in self._all(target) if connected.takes_notices)

    def _all(self, target: Target) -> Iterator[Connected]:
        if target.kind == "broadcast":
            yield from self.clients.values()
            return
        for name in target.ids:
            if target.kind == "client":
                if name in self.clients:
                    yield self.clients[name]
            elif target.kind in ("user", "users"):
                yield from self.users.get(name, ())
            else:
                yield from self.channels.get(name, ())

    async def count(self, target: Target) -> int:
        """How many live connections, on all nodes, a notification to ``target`` reaches: each counts once."""
        return len(self.here(target))

    async def find(self, client_id: str) -> ClientInfo | None:
        """One live connection, wherever it is."""
        connected = self.clients.get(client_id)
        return None if connected is None else info_of(connected)

    async def of_user(self, user: str) -> list[ClientInfo]:
        """A user's live connections on all nodes."""
        return [info_of(connected) for connected in self.users.get(user, ())]

    async def everyone(self, limit: int, after: str | None = None) -> tuple[list[ClientInfo], str | None]:
        """The live connections of all nodes in the order of their ids, some at a time.

        Args:
            limit: how many at most.
            after: what was given as the second value last time; None to begin.

        Returns:
            The next ones, and where to go on, None at the end.
        """
        found: Iterable[str] = self.clients if after is None else (name for name in self.clients if name > after)
        names = nsmallest(limit + 1, found)
        return [info_of(self.clients[name]) for name in names[:limit]], names[limit - 1] if len(names) > limit else None

    # Sending away

    async def disconnect_client(self, client_id: str) -> bool:
        """End a connection, wherever it is; whether there was one."""
        connected = self.clients.get(client_id)
        if connected is not None:
            connected.disconnect()
        return connected is not None

    async def disconnect_user(self, user: str) -> int:
        """End all of a user's connections, on all nodes; how many there were."""
        its = list(self.users.get(user, ()))
        for connected in its:
            connected.disconnect()
        return len(its)


def info_of(connected: Connected, node: str = "") -> ClientInfo:
    """What is told of a connection."""
    return ClientInfo(
        connected.client_id,
        connected.user,
        connected.username,
        connected.transport,
        connected.address,
        connected.since_ms,
        connected.takes_notices,
        tuple(connected.channels),
        node,
    )
