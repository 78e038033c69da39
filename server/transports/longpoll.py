"""Long-poll and plain polling (RFC 6202 section 2): one answer per request, the same cursor as everywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence, Set
from hashlib import blake2b
from typing import Final, NamedTuple

import trio

from protocol.notice import heard, parse_channels, reaches
from protocol.polling import parse_client_id, parse_timeout, poll_body
from protocol.update import NOTIFICATION, Update
from protocol.watch import ALL_TYPES, NOTICES, Filter, Watch, parse_watch, wants_all
from protocol.wire import Framing, WireForm, update_message, wire_form
from server.answers import JSON, NO_STORE, Response
from server.auth import bad_token
from server.connection import Exchange
from server.cursors import Client
from server.hub import Reader, Want
from server.node import Node
from server.notices import check_join, owed
from server.reading import Start, channels_for, missed_updates, over, snapshot, start_from

# One answer holds at most about this much; the next poll gets the rest at once.
ANSWER_BYTES: Final = 1024 * 1024


class PollReader(Reader):
    """The hub's side of a poll that waits: any wanted update wakes it; the answer is read from the log.

    Attributes:
        wake: set when there is something to answer with.
        filter: which updates are wanted.
        heard: the targets of notifications that are wanted.
    """

    __slots__ = ("filter", "heard", "wake")

    def __init__(self, wake: trio.Event, form: WireForm, offset: int, filter: Filter, heard: Set[str]) -> None:
        super().__init__(form, offset, _not_written_to)
        self.wake = wake
        self.filter = filter
        self.heard = heard

    def take(self, batch: Sequence[Update]) -> None:
        """Wake up if any of it is wanted."""
        for update in batch:
            if update.offset <= self.offset:
                continue
            wanted = reaches(update, self.heard) if update.targets is not None else self.filter.passes(update)
            if wanted:
                self.wake.set()

    def stalled(self, wire: bytes, sent: int) -> None:
        """Never called: it is not written to."""

    def broken(self) -> None:
        """Never called, for the same reason."""

    def log_lost(self) -> None:
        """The log began anew: answer now, with a reset."""
        self.wake.set()


def _not_written_to(data: bytes | memoryview) -> int:
    raise AssertionError("a poll is not written to by the hub")


async def poll(exchange: Exchange) -> Response:
    """``GET /api/v2/jobs/poll``."""
    node, request, identity = exchange.node, exchange.request, exchange.caller
    watch = parse_watch(request.query, ALL_TYPES)
    hearing = _hearing(exchange, watch)
    names = channels_for(identity, watch, all_jobs=wants_all(request.query))
    timeout = min(parse_timeout(request.query), node.config.limits.poll_timeout)
    client_id = parse_client_id(request.query)
    cursor = request.query.get("last_seen")
    client: Client | None = None
    if client_id is not None:
        client = Client(identity.user, client_id, _digest([*names, *hearing.names], watch.filter))
        cursor = cursor or await node.recall(client)
    await node.broker.follow(names, cursor)
    begin = start_from(node.history, cursor)
    epoch, last = node.history.epoch, node.history.last
    token_left = math.inf if identity.expires_at is None else max(0.0, identity.expires_at - time.time())

    wake = trio.Event()
    reader = PollReader(wake, wire_form(Framing.JSON, watch.fields), last, watch.filter, hearing.names)
    timed_out = False
    # Registered before the log is read, so nothing can fall between reading and waiting.
    on = [*names, NOTICES] if hearing.names else names
    node.hub.attach(reader, on, Want(watch.filter, reader.form))
    node.polls[wake] = None
    node.counters.opened["poll"] += 1
    node.counters.begin(resumed=begin.after is not None, lost=begin.lost)
    try:
        updates, cursor, cut = _collect(node, watch, names, hearing, begin)
        if not updates and not begin.lost and timeout and not node.draining:
            with trio.move_on_after(min(timeout, token_left)) as patience:
                await wake.wait()
            timed_out = patience.cancelled_caught
            if timed_out and token_left < timeout:
                raise bad_token("the token has expired", "token_expired")
            # Without a cursor there was nothing to show: whatever came since is news.
            after = last if begin.after is None else begin.after
            # While it waited the log may have begun anew, or been trimmed past where it stood (a time may be).
            is_time = begin.given is None and begin.after is not None
            lost = node.history.epoch != epoch or (not is_time and after < node.history.first - 1)
            begin = begin._replace(after=None if lost else after, lost=lost)
            updates, cursor, cut = _collect(node, watch, names, hearing, begin)
    finally:
        node.hub.leave(reader)
        del node.polls[wake]

    # Not before the endings themselves have been given: clients stop at it.
    done = not cut and watch.job_ids is not None and all(over(node.jobs, node.history, name) for name in names)
    node.counters.polled += len(updates)
    epoch = node.history.epoch
    messages = (update_message(update, f"{epoch}:{update.offset}", watch.fields) for update in updates)
    body = poll_body(messages, last_seen=cursor, reset=begin.lost, timed_out=timed_out, done=done, **node.liveness())
    if client is not None:
        body = _remembering(body, node, client, cursor)
    return Response(200, (JSON, NO_STORE), body)


class Hearing(NamedTuple):
    """The notifications a poll asks for.

    Attributes:
        user: whose stored ones.
        names: the targets, empty if it asks for none.
    """

    user: str
    names: Set[str]


def _hearing(exchange: Exchange, watch: Watch) -> Hearing:
    """Notifications come with ``channels=`` (it may be empty), or if ``types`` names them.

    Raises:
        ApiError: 400 for a malformed channel, 403 for one that may not be joined.
    """
    channels = parse_channels(exchange.request.query)
    user = watch.user_id or exchange.caller.user
    if channels is None and NOTIFICATION not in (watch.filter.types or ()):
        return Hearing(user, frozenset())
    for channel in channels or ():
        check_join(exchange.node, exchange.caller, channel)
    # Not what is for a client: a poll gives itself a name, and would get what is for another's connection.
    return Hearing(user, frozenset(heard(None, user, channels or ())))


def _collect(
    node: Node, watch: Watch, names: list[str], hearing: Hearing, start: Start
) -> tuple[list[Update], str, bool]:
    """What to answer with as of now, in log order, from a snapshot if there is no cursor to go on from.

    Returns:
        The updates, the cursor behind them, and whether more is left for the next answer.
    """
    epoch, last = node.history.epoch, node.history.last
    notices = owed(node, start, hearing.user, hearing.names).notices if hearing.names else []
    if start.after is None:
        latest = [job.latest for job in snapshot(node.jobs, names, watch.filter)]
        return sorted(latest + notices, key=lambda update: update.offset), f"{epoch}:{last}", False
    missed = missed_updates(node.history, ((name, watch.filter) for name in names), start.after)
    if notices:
        missed = sorted(missed + notices, key=lambda update: update.offset)
    size = 0
    for count, update in enumerate(missed):
        if size > ANSWER_BYTES:
            return missed[:count], f"{epoch}:{missed[count - 1].offset}", True
        size += len(update.body)
    return missed, f"{epoch}:{last}", False


def _digest(names: list[str], wanted: Filter) -> bytes:
    parts = [sorted(names), *(None if words is None else sorted(words, key=str) for words in wanted)]
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def _remembering(body: Iterable[bytes], node: Node, client: Client, cursor: str) -> Iterable[bytes]:
    """Pass the body on, and remember the cursor once all of it has been asked for: what was not sent was not seen."""
    yield from body
    node.remember(client, cursor)
