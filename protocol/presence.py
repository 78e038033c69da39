"""Who is there, as data: the targets of a message, what is told of a connection, and what happened to a channel."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

TargetKind: TypeAlias = Literal["client", "user", "users", "channel", "channels", "broadcast"]
Transport: TypeAlias = Literal["websocket", "sse"]

# Channels that tell who joins and leaves: ``presence:<channel>`` and ``presence:user:<user>``.
PRESENCE: Final = "presence:"
PRESENCE_OF_USER: Final = "presence:user:"


class Target(NamedTuple):
    """Whom a message is for; ``ids`` are client, user or channel names, none for ``broadcast``."""

    kind: TargetKind
    ids: tuple[str, ...] = ()


class ClientInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One live connection.

    Attributes:
        client_id: names it on all nodes.
        user: whose it is.
        username: what they call themselves, if anything.
        transport: ``websocket`` or ``sse``.
        address: where it comes from.
        since_ms: since when, unix milliseconds.
        takes_notices: whether notifications reach it.
        channels: the named channels it has joined.
        node: id of the node it is connected to.
    """

    client_id: str
    user: str
    username: str | None
    transport: Transport
    address: str
    since_ms: int
    takes_notices: bool
    channels: tuple[str, ...] = ()
    node: str = ""


class PresenceEvent(msgspec.Struct, frozen=True, gc=False):
    """Somebody came or went: a user at all (``channel`` is None), or a user on a channel.

    Attributes:
        kind: ``join`` with the user's first connection, ``leave`` with the last one.
        user: who.
        channel: where; None for the user's connections as such.
        count: connections there are now: of the user, or users there are now on the channel.
    """

    kind: Literal["join", "leave"]
    user: str
    channel: str | None
    count: int

    @property
    def listeners(self) -> str:
        """The channel whose members are told."""
        return PRESENCE_OF_USER + self.user if self.channel is None else PRESENCE + self.channel
