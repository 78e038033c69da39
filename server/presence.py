"""Who is connected: by client id, by user, and by the named channels that they have joined.

Entering, leaving, joining and parting are synchronous, so cancellation cannot leave anything behind. Questions are
asked with ``await`` because other nodes may have the answer; about this node alone they answer at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from heapq import nsmallest
from typing import TYPE_CHECKING, Final, Literal, Protocol

from protocol.presence import PRESENCE, ClientInfo, PresenceEvent, Target, Transport
from server.brokers.base import Submission
from server.limits import Limits

if TYPE_CHECKING:
    from server.cluster import Cluster

_log: Final = logging.getLogger("statuswire.presence")

OnEvent = Callable[[PresenceEvent, str | None], Submission | None]
"""Publishes an event to the members of its ``listeners``. Its second argument is an idempotency key, if it needs one:
several nodes may publish the same event. Gives what to wait for until it is kept, if anything."""
# Channels of one connection up to which a tuple will do: it is a quarter of a dict, and as fast to look through.
_FEW: Final = 16


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
        cluster: what knows the other nodes, if there can be any.
        on_event: told who came and went, if anybody has joined the channel that says so.
        on_sent_away: told of users whose connections are ended, on all nodes, also on those without any.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.clients: dict[str, Connected] = {}
        self.users: dict[str, Collection[Connected]] = {}
        self.channels: dict[str, dict[Connected, None]] = {}
        # Of the channels about which somebody wants to know, how many users are on each: counted once, then kept, or
        # ten thousand that come together would be counted ten thousand times.
        self._users_on: dict[str, int] = {}
        self.cluster: Cluster | None = None
        self.on_event: OnEvent | None = None
        self.on_sent_away: Callable[[str], None] | None = None

    # Coming and going

    async def admit(self, client_id: str, user: str) -> None:
        """Ask for a place, to be taken with ``enter`` before anything else is awaited.

        Raises:
            ApiError: 429 ``rate_limited``: the user has ``connections_per_user`` already.
        """
        limit = self._limits.connections_per_user
        if not limit:
            return
        held = None if self.cluster is None else await self.cluster.admit(client_id, user, limit)
        self._limits.check_connections(len(self.users.get(user, ())) if held is None else held)

    def enter(self, connected: Connected) -> None:
        """It is live and its user known."""
        user = connected.user
        self.clients[connected.client_id] = connected
        others = self.users.get(user)
        if others is None:
            self.users[user] = (connected,)
        elif isinstance(others, dict):
            others[connected] = None
        else:
            self.users[user] = dict.fromkeys((*others, connected))
        self._changed(connected)
        if others is None:
            self._tell("join", user, None, 1)

    def leave(self, connected: Connected) -> None:
        """It is over; again, or without ``enter``, does nothing."""
        if self.clients.get(connected.client_id) is not connected:
            return
        for channel in connected.channels:
            self._drop(connected, channel)
        connected.channels = ()
        self._changed(connected)
        del self.clients[connected.client_id]
        user = connected.user
        left = self.users[user]
        if isinstance(left, dict) and len(left) > 1:
            del left[connected]
        else:
            del self.users[user]
            self._tell("leave", user, None, 0)

    def join(self, connected: Connected, channel: str) -> None:
        """It wants what is sent to a channel. How many it may join is for the caller to bound."""
        if channel in connected.channels or self.clients.get(connected.client_id) is not connected:
            return
        channels = connected.channels
        if isinstance(channels, dict):
            channels[channel] = None
        else:
            joined = (*channels, channel)
            connected.channels = joined if len(joined) <= _FEW else dict.fromkeys(joined)
        members = self.channels.setdefault(channel, {})
        members[connected] = None
        self._changed(connected)
        if channel in self._users_on and self._alone(connected, channel):
            self._users_on[channel] += 1
            self._tell("join", connected.user, channel, self._users_on[channel])
        # Over several nodes it is not for this one to tell.
        if channel.startswith(PRESENCE) and len(members) == 1 and self.cluster is None:
            name = channel.removeprefix(PRESENCE)
            self._users_on[name] = len({each.user for each in self.channels.get(name, ())})

    def part(self, connected: Connected, channel: str) -> None:
        """The opposite of ``join``; without one it does nothing."""
        if channel not in connected.channels:
            return
        if isinstance(connected.channels, dict):
            del connected.channels[channel]
        else:
            connected.channels = tuple(name for name in connected.channels if name != channel)
        self._drop(connected, channel)
        self._changed(connected)

    def _drop(self, connected: Connected, channel: str) -> None:
        members = self.channels[channel]
        del members[connected]
        if not members:
            del self.channels[channel]
            if channel.startswith(PRESENCE):
                self._users_on.pop(channel.removeprefix(PRESENCE), None)
        if channel in self._users_on and self._alone(connected, channel):
            self._users_on[channel] -= 1
            self._tell("leave", connected.user, channel, self._users_on[channel])

    def _changed(self, connected: Connected) -> None:
        if self.cluster is not None:
            self.cluster.touch(connected.client_id)

    def _alone(self, connected: Connected, channel: str) -> bool:
        """Whether its user has no other connection on the channel."""
        return not any(
            channel in other.channels for other in self.users.get(connected.user, ()) if other is not connected
        )

    def _tell(self, kind: Literal["join", "leave"], user: str, channel: str | None, count: int) -> None:
        # Over several nodes Redis decides who was the first or the last, see redis_presence.
        if self.on_event is None or self.cluster is not None or not self.channels:
            return
        event = PresenceEvent(kind, user, channel, count)
        if event.listeners not in self.channels:
            return
        try:
            self.on_event(event, None)
        except Exception:
            _log.exception("a presence event could not be published")  # nobody's coming or going must fail of it

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
        return len(self.here(target)) if self.cluster is None else await self.cluster.count(target)

    async def find(self, client_id: str) -> ClientInfo | None:
        """One live connection, wherever it is."""
        connected = self.clients.get(client_id)
        if connected is not None:
            return self.info_of(connected)
        return None if self.cluster is None else await self.cluster.find(client_id)

    async def of_user(self, user: str) -> list[ClientInfo]:
        """A user's live connections on all nodes."""
        others = [] if self.cluster is None else await self.cluster.of_user(user)
        return [self.info_of(connected) for connected in self.users.get(user, ())] + others

    async def everyone(self, limit: int, after: str | None = None) -> tuple[list[ClientInfo], str | None]:
        """The live connections of all nodes, some at a time, each once if it stays that long.

        Args:
            limit: how many at most.
            after: what was given as the second value last time; None to begin.

        Returns:
            The next ones, and where to go on, None at the end.
        """
        page = None if self.cluster is None else await self.cluster.everyone(limit, after)
        if page is not None:
            return page
        found: Iterable[str] = self.clients if after is None else (name for name in self.clients if name > after)
        names = nsmallest(limit + 1, found)
        infos = [self.info_of(self.clients[name]) for name in names[:limit]]
        return infos, names[limit - 1] if len(names) > limit else None

    def info_of(self, connected: Connected) -> ClientInfo:
        """What is told of a connection of this node."""
        return ClientInfo(
            connected.client_id,
            connected.user,
            connected.username,
            connected.transport,
            connected.address,
            connected.since_ms,
            connected.takes_notices,
            tuple(connected.channels),
            "" if self.cluster is None else self.cluster.node_id,
        )

    # Sending away

    async def disconnect_client(self, client_id: str) -> bool:
        """End a connection, wherever it is; whether there was one."""
        if self.disconnect_here("client", client_id):
            return True
        if self.cluster is None:
            return False
        found = await self.cluster.find(client_id)
        return found is not None and await self.cluster.requests.disconnect("client", client_id, {found.node}) > 0

    async def disconnect_user(self, user: str) -> int:
        """End all of a user's connections, on all nodes; how many there were."""
        count = self.disconnect_here("user", user)
        if self.cluster is not None:
            nodes = {peer.node_id for peer in await self.cluster.peers()}
            count += await self.cluster.requests.disconnect("user", user, nodes)
        return count

    def disconnect_here(self, kind: Literal["client", "user"], name: str) -> int:
        """End the connections of this node alone that a client id or user names; how many there were."""
        its = [self.clients[name]] if kind == "client" and name in self.clients else []
        if kind == "user":
            its = list(self.users.get(name, ()))
            if self.on_sent_away is not None:
                self.on_sent_away(name)
        for connected in its:
            connected.disconnect()
        return len(its)
