"""What a WebSocket client may say, and what is done with it: one handler per message (``Session``)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio
from msgspec.json import encode

from protocol.errors import ApiError, CloseCode
from protocol.fields import is_id
from protocol.messages import (
    Ack,
    AuthMessage,
    ClientMessage,
    Get,
    NotifyMessage,
    PingMessage,
    PublishMessage,
    Ref,
    Subscribe,
    Unsubscribe,
    error_message,
    min_interval_s,
    snapshot_parts,
    split_ids,
    subscribe_fields,
    subscribe_filter,
)
from protocol.notice import check_key, check_notice, heard
from protocol.update import Update, format_time
from protocol.watch import ANY, Watch, job_channel, user_channel
from protocol.wire import wire_form
from server.channel import Want
from server.notices import acknowledge, may_join, offset_of, send, split_channels
from server.publishing import (
    HELD_PER_UPDATE,
    PORTION,
    Batch,
    check_count,
    published,
    submit,
    summary,
    take_in,
    wait_kept,
)
from server.reading import (
    Start,
    channel_of_job,
    channels_for,
    missed_notices,
    missed_updates,
    narrowed,
    records,
    snapshot,
    start_from,
)
from server.transports.sse import replay

if TYPE_CHECKING:
    from server.auth import Identity
    from server.transports.websocket import Session

# Publishes whose answer is still on its way; a client further ahead of the store waits.
MAX_UNANSWERED: Final = 64
# With longer ones than this the answers that wait for the store would be much, so many as there may be.
LONG_REF: Final = 1024
# Publish messages of one turn that are decided in one go.
MOST_GATHERED: Final = 64
_SUBSCRIBED: Final = encode({"type": "subscribed"})
# Of so many missed updates it is looked up at once whether any is wanted, of more as they are sent.
FILTERED_AT_ONCE: Final = 1000


Gathered: TypeAlias = list[tuple[Batch, Ref]]


async def _auth(session: Session, message: AuthMessage) -> None:
    known = session.identity
    try:
        identity = await session.node.authenticator.introduce(message.token)
        if known is None:
            await session.node.presence.admit(session.client_id, identity.user)
    except ApiError as error:
        if error.status == 503:
            raise  # nothing is known against this token: the client may say it again
        session.refuse(error, message.ref)
        return
    if known is None:
        session.welcome(identity, message.ref)
        return
    if identity.user != known.user:
        session.close_with(CloseCode.UNAUTHORIZED, "the token is another user's")
        return
    session.identity = identity
    session.expire_with(identity)
    # A newer token may allow less. What is pending came under the old one.
    session.catch_up()
    for name, want in list(session.wants.items()):
        allowed = narrowed(identity, name)
        if allowed != name:
            session.hub.detach(session, [name])
            if allowed is not None and allowed not in session.wants:
                session.hub.attach(session, [allowed], want)
    _leave(session, [channel for channel in session.channels if not may_join(session.node, identity, channel)])
    session.wants_changed()
    expires = None if identity.expires_at is None else format_time(int(identity.expires_at * 1000))
    session.say("authenticated", userId=identity.user, expiresAt=expires, ref=message.ref)


async def _subscribe(session: Session, message: Subscribe) -> None:
    identity = session.known()
    wanted, fields = subscribe_filter(message), subscribe_fields(message)
    interval = min_interval_s(message)
    if message.user_id is not None and not is_id(message.user_id):
        raise ApiError(422, "invalid_field", "userId: not an id", field="userId")
    named = message.job_ids
    if named is None and message.channels is not None and message.user_id is None and not message.all:
        named = []  # channels alone ask for no jobs
    job_ids: list[str] | None = None
    denied: list[str] = []
    if named is not None:
        job_ids, denied = split_ids(
            named,
            session.node.config.limits.jobs_per_connection - len(session.wants),
            lambda job_id: channel_of_job(identity, job_id, message.user_id) in session.wants,
        )
    channels: list[str] = []
    if message.channels is not None:
        channels, refused = split_channels(session.node, identity, message.channels, session.channels)
        denied += refused
    watch = Watch(None if job_ids is None else tuple(job_ids), message.user_id, wanted, fields)
    names = channels_for(identity, watch, all_jobs=message.all)
    last_seen = None if message.last_seen is None else str(message.last_seen)
    await session.node.broker.follow(names, last_seen)
    history = session.hub.history
    begin = start_from(history, last_seen)
    form = wire_form(session.framing, fields)

    # All that this reader is owed so far goes out first: from here on one offset stands for all its channels.
    session.catch_up()
    if interval is not None:
        session.min_interval_s = interval
    session.hub.attach(session, names, Want(wanted, form))
    session.node.counters.begin(resumed=begin.after is not None, lost=begin.lost)
    head = _SUBSCRIBED if message.ref is None else encode({"type": "subscribed", "ref": message.ref})
    scope: dict[str, Any] = {"jobIds": job_ids or [], "denied": denied}
    if message.channels is not None:
        scope["channels"] = channels
    notices = _join(session, channels, begin)
    if begin.after is None:
        jobs = snapshot(session.node.jobs, names)
        last = scope | {"id": f"{history.epoch}:{history.last}", "recovered": False}
        parts = session.framed(snapshot_parts(records(jobs, wanted, fields), "snapshot", head, encode(last)))
        session.post(next(parts) if len(jobs) <= 1 else parts)
    else:
        missed = missed_updates(history, names, begin.after)
        if len(missed) <= FILTERED_AT_ONCE and not wanted.is_any:
            missed = [update for update in missed if wanted.passes(update)]
        if notices:
            missed = sorted(missed + notices, key=lambda update: update.offset)
        # Not further than what the client has: the replay behind it takes the cursor on from there.
        cursor = f"{history.epoch}:{begin.after if missed else history.last}"
        (part,) = session.framed(
            snapshot_parts((), "snapshot", head, encode(scope | {"id": cursor, "recovered": True}))
        )
        session.post(part, replay(session.node, form, missed, wanted))
    session.wants_changed()


def _join(session: Session, channels: list[str], start: Start) -> list[Update]:
    """Join channels. Returns the notifications that came after the cursor and have not been given here."""
    history, joined = session.hub.history, session.joined or {}
    after = history.last if start.after is None else start.after
    notices: list[Update] = []
    if start.given is not None and start.after is not None:
        acknowledge(session.node, session.user, after)
    if after < history.last:
        for notice in missed_notices(history, heard(session.client_id, session.user, channels), after):
            if not _was_given(session, notice, joined):
                notices.append(notice)
        session.notices_from = min(session.notices_from, after)
    for channel in channels:
        session.node.presence.join(session, channel)
        joined[channel] = min(joined.get(channel, after), after)
    session.joined = joined or None
    return notices


def _was_given(session: Session, notice: Update, joined: Mapping[str, int]) -> bool:
    targets, offset = notice.targets or (), notice.offset
    if targets[0].startswith("channel/"):
        return any(joined.get(target[8:], offset) < offset for target in targets)
    return offset > session.notices_from or offset in session.from_inbox


def _leave(session: Session, channels: Iterable[str]) -> None:
    for channel in channels:
        session.node.presence.part(session, channel)
        if session.joined is not None:
            session.joined.pop(channel, None)


async def _unsubscribe(session: Session, message: Unsubscribe) -> None:
    identity = session.known()
    if not (message.job_ids or message.user_id or message.all or message.channels):
        names = list(session.wants)
        channels = tuple(session.channels)
    else:
        channels = tuple(message.channels or ())
        names = ["*"] if message.all else []
        if message.user_id is not None and message.job_ids is None:
            names.append(user_channel(message.user_id))
        for job_id in message.job_ids or ():
            names += [job_channel(job_id), job_channel(job_id, message.user_id or identity.user)]
    session.catch_up()  # nothing of it may come after the answer
    session.hub.detach(session, names)
    _leave(session, channels)
    session.wants_changed()
    session.say("unsubscribed", jobIds=message.job_ids, channels=message.channels, ref=message.ref)


async def _get(session: Session, message: Get) -> None:
    identity = session.known()
    good, _ = split_ids(message.job_ids, session.node.config.limits.jobs_per_connection)
    names = channels_for(identity, Watch(tuple(good)))
    await session.node.broker.follow(names)
    session.catch_up()  # no update that comes after the answer is older than it
    jobs = snapshot(session.node.jobs, names)
    head: dict[str, Any] = {"type": "jobs"} if message.ref is None else {"type": "jobs", "ref": message.ref}
    session.post(session.framed(snapshot_parts(records(jobs, ANY, None), "jobs", encode(head), b"{}")))


async def _publish(session: Session, message: PublishMessage) -> None:
    identity = session.known()
    if not identity.can("publish"):
        raise ApiError(403, "forbidden", "publishing needs the capability 'publish'")
    session.node.check_accepting()
    check_count(len(message.updates))
    if session.node.limits.on_publishes:
        await session.node.limits.check_publish(identity.user, trio.current_time(), len(message.updates))
    if len(message.updates) > PORTION or (isinstance(message.ref, str) and len(message.ref) > LONG_REF):
        await _publish_alone(session, identity, message)
        return
    if session.hub.full:
        await session.hub.wait_room()
    batch = Batch(session.node, identity, [bytes(update) for update in message.updates], source="websocket")
    if session.gathered is None:
        session.gathered = [(batch, message.ref)]
    else:
        session.gathered.append((batch, message.ref))
    if not session.corked or len(session.gathered) >= MOST_GATHERED:
        hand_over(session)
    if session.unanswered + len(session.gathered or ()) > MAX_UNANSWERED:
        hand_over(session)
        with suppress(ApiError):  # ``_answer`` has said it
            await batch.submission.wait_kept()


async def _publish_alone(session: Session, identity: Identity, message: PublishMessage) -> None:
    """So large a message, or answer, that what follows waits until it is answered; others have turns in between."""
    node, updates = session.node, message.updates
    hand_over(session)
    held = len(updates) * HELD_PER_UPDATE
    node.limits.hold(0, held)
    try:
        batches: list[Batch] = []
        for start in range(0, len(updates), PORTION):
            items = [bytes(update) for update in updates[start : start + PORTION]]
            await take_in(node, identity, batches, items, key=None, source="websocket")
        for batch in batches:
            await wait_kept(batch.submission)
        session.say("published", ref=message.ref, **summary(batches, node))
        await session.wait_drained()  # the answer may be larger than the message
    finally:
        node.limits.hold(held, 0)


def hand_over(session: Session) -> None:
    """Decide the publishes that came together: kept and shown in one go, and answered in order of commit without
    stopping the reading of further messages."""
    gathered = session.gathered
    if gathered is not None:
        session.gathered = None
        session.unanswered += len(gathered)
        submit(session.node, [batch for batch, _ in gathered]).when_kept(partial(_answer, session, gathered))


def _answer(session: Session, gathered: Gathered, error: ApiError | None) -> None:
    session.unanswered -= len(gathered)
    if session.unanswered and not session.corked:  # others were kept with it, most likely
        session.corked = True
        session.hub.soon(session, session.uncork)
    node, message = session.node, session.form.message
    if error is not None:
        for batch, _ in gathered:
            batch.settled(error)
        answers = [message(error_message(error, ref)) for _, ref in gathered]
    else:
        answers = [message(published(batch, node, ref)) for batch, ref in gathered]
    session.post(b"".join(answers))


async def _ack(session: Session, message: Ack) -> None:
    """Everything up to this cursor has arrived. A cursor that is not of this log is a sign of life and no more."""
    offset = offset_of(session.node, message.id)
    if offset is not None:
        acknowledge(session.node, session.user, offset)


async def _notify(session: Session, message: NotifyMessage) -> None:
    session.node.check_accepting()
    notice, key = check_notice(message), check_key(message)
    delivered, accepted = await send(session.node, session.known(), notice, key)
    session.say(
        "published",
        accepted=0 if accepted.duplicate else 1,
        duplicates=1 if accepted.duplicate else 0,
        rejected=[],
        delivered=delivered,
        id=f"{session.node.broker.epoch}:{accepted.offset}",
        ref=message.ref,
    )


async def _ping(session: Session, message: PingMessage) -> None:
    session.say("pong", ref=message.ref, timestamp=format_time(int(time.time() * 1000)))


# ApiErrors are answered by the session.
HANDLERS: Final[dict[type[ClientMessage], Callable[[Session, Any], Awaitable[None]]]] = {
    Subscribe: _subscribe,
    Unsubscribe: _unsubscribe,
    Get: _get,
    PublishMessage: _publish,
    NotifyMessage: _notify,
    Ack: _ack,
    AuthMessage: _auth,
    PingMessage: _ping,
}
