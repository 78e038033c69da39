"""Notifications on this node: who may join what, what a connection is owed, sending and acknowledging."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import NamedTuple

import trio

from protocol.errors import ApiError
from protocol.fields import is_id
from protocol.notice import MAX_CHANNELS, Notice
from protocol.position import Position, parse_cursor
from protocol.presence import PRESENCE, PRESENCE_OF_USER
from protocol.update import Update
from protocol.watch import check_parameter_id
from server.auth import Identity
from server.brokers.base import Accepted, Acknowledge, Notify
from server.exchange import Exchange
from server.node import Node
from server.publishing import wait_kept
from server.reading import Start, missed_notices


def may_join(node: Node, identity: Identity, channel: str) -> bool:
    """Whether this identity may hear a channel, or who is on it; who is there of a user, that user and ``ops``."""
    while channel.startswith(PRESENCE):  # who listens to who is there is for those who may listen themselves
        if channel.startswith(PRESENCE_OF_USER):
            return identity.can("ops") or channel.removeprefix(PRESENCE_OF_USER) == identity.user
        channel = channel.removeprefix(PRESENCE)
    return identity.may_join(channel, node.authenticator.default_channels)


def check_join(node: Node, identity: Identity, channel: str) -> None:
    """Raise ApiError 403 unless this identity may hear a channel."""
    if not may_join(node, identity, channel):
        raise ApiError(403, "forbidden", f"channels: you may not join {channel!r}", field="channels")


def split_channels(
    node: Node, identity: Identity, channels: Iterable[str], joined: Collection[str]
) -> tuple[list[str], list[str]]:
    """Tell channels that may be joined from those denied: malformed, not allowed, or beyond ``MAX_CHANNELS``."""
    good: list[str] = []
    denied: list[str] = []
    room = MAX_CHANNELS - len(joined)
    for channel in dict.fromkeys(channels):
        if not is_id(channel) or not may_join(node, identity, channel):
            denied.append(channel[:128])
        elif channel in joined:
            good.append(channel)
        elif room > 0:
            room -= 1
            good.append(channel)
        else:
            denied.append(channel)
    return good, denied


def notified_user(exchange: Exchange) -> str:
    """Whose notifications a request is about: the caller's, or those of ``userId``.

    Raises:
        ApiError: 400 for one that is no id, 403 for another user's by other than an admin.
    """
    user_id = exchange.request.query.get("userId")
    if user_id is None:
        return exchange.caller.user
    check_parameter_id("userId", user_id)
    if user_id != exchange.caller.user and not exchange.caller.admin:
        raise ApiError(403, "forbidden", "userId: only an admin may be notified for another user", field="userId")
    return user_id


class Owed(NamedTuple):
    """What a reader is given at its beginning.

    Attributes:
        notices: in log order.
        before: an offset that is ahead of none of them.
    """

    notices: list[Update]
    before: int


def owed(node: Node, start: Start, user: str, names: Set[str]) -> Owed:
    """What a reader that begins now is owed: the stored ones, and behind its cursor, if it has one, all that it hears.

    A cursor of this log acknowledges what was stored up to it. Synchronous: what comes later comes live.
    """
    history = node.history
    if start.after is None:
        notices = node.broker.inboxes.of_user(user)
    else:
        if start.given is not None:
            acknowledge(node, user, start.after)
        found = {notice.offset: notice for notice in node.broker.inboxes.of_user(user, start.after)}
        found.update({notice.offset: notice for notice in missed_notices(history, names, start.after)})
        notices = [found[offset] for offset in sorted(found)]
    # What came on another node a moment ago, and is not shown here yet, will come live.
    notices = [notice for notice in notices if notice.offset <= history.last]
    before = history.last if start.after is None else start.after
    return Owed(notices, min(before, notices[0].offset - 1) if notices else history.last)


def acknowledge(node: Node, user: str, offset: int) -> None:
    """A user has everything up to here. Not waited for: what cannot be kept now comes again, and goes the next time."""
    if node.broker.inboxes.up_to(user, offset):
        node.broker.submit([Acknowledge(user, offset)])


def offset_of(node: Node, cursor: str) -> int | None:
    """The offset of a cursor of this log, None for any other text."""
    position = parse_cursor(cursor)
    if isinstance(position, Position) and position.epoch == node.history.epoch:
        return min(position.offset, node.history.last)
    return None


class Sent(NamedTuple):
    """A notification is on its way: to how many live connections over all nodes, and where it stands in the log."""

    delivered: int
    accepted: Accepted


async def send(node: Node, identity: Identity, notice: Notice, key: str | None) -> Sent:
    """Take a notification in and wait until it is kept.

    Raises:
        ApiError: 403 without the capability, 422 ``idempotency_key_reused``, 429 over the rate, 503 if it is not kept.
    """
    if not identity.can("notify"):
        raise ApiError(403, "forbidden", "sending notifications needs the capability 'notify'")
    await node.limits.check_publish(identity.user, trio.current_time())
    await node.hub.wait_room()
    submission = node.broker.submit([Notify(notice, identity.user, key)])
    try:
        await wait_kept(submission)
        result = submission.results[0]
        if isinstance(result, ApiError):
            raise result
    except ApiError:
        node.counters.notices["rejected"] += 1
        raise
    node.counters.notices["duplicate" if result.duplicate else "accepted"] += 1
    return Sent(await node.presence.count(notice.target), result)
