"""Long-poll and plain polling (RFC 6202 section 2): one answer per request, the same cursor as everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from functools import partial
from hashlib import blake2b
from itertools import chain
from operator import attrgetter
from typing import Final, NamedTuple

from protocol.notice import heard, parse_channels, reaches
from protocol.polling import parse_client_id, parse_timeout, poll_body
from protocol.update import NOTIFICATION, Update
from protocol.watch import ALL_TYPES, NOTICES, Filter, Watch, parse_watch, wants_all
from protocol.wire import Framing, update_message, wire_form
from server.answers import JSON, NO_STORE, Response
from server.auth import Identity, bad_token
from server.channel import Reader, Want
from server.config import Config
from server.cursors import Client
from server.exchange import Deferred, Exchange
from server.node import Node
from server.notices import check_join, owed
from server.reading import Start, channel_jobs, channels_for, missed_updates, over, snapshot, start_from
from server.turns import PORTION, at_once, in_turns, portions, sort, steps

# One answer holds at most about this much; the next poll gets the rest at once.
ANSWER_BYTES: Final = 1024 * 1024
# A question of at most so many characters is kept as it was read.
KEPT_TARGET: Final = 2048
# What a question takes with an answer that is kept, and each of its names besides the letters.
QUESTION_BYTES: Final = 1024
NAME_BYTES: Final = 100
# What one of those that are looked through takes until that is told: its places in a copy, and a job's in a portion and
# in order.
UPDATE_BYTES: Final = 8
JOB_BYTES: Final = 24
# One with records of so many bytes is sent whole.
WHOLE_BYTES: Final = 65536
_offset = attrgetter("offset")


class Hearing(NamedTuple):
    """The notifications a poll asks for.

    Attributes:
        user: whose stored ones.
        names: the targets, empty if it asks for none.
    """

    user: str
    names: Set[str]


class Question(NamedTuple):
    """What a poll asks for.

    Attributes:
        watch: the jobs.
        names: their channels.
        hearing: the notifications.
        timeout: seconds to wait for news.
        client: whose cursor to remember, if anybody's.
        size: what keeping the question takes, about, in bytes.
    """

    watch: Watch
    names: tuple[str, ...]
    hearing: Hearing
    timeout: float
    client: Client | None
    size: int


class Asked(NamedTuple):
    """What a question depends on besides the cursor: the target before and behind it, who asks, the configuration."""

    before: str
    after: str
    identity: Identity
    config: Config


class WaitingPoll(Reader, Deferred):
    """A poll that waits, with the hub: any wanted update has it answered, from the log, by whoever brings that update.

    Attributes:
        exchange, patience_s, headers: see ``Deferred``.
    """

    __slots__ = ("_after", "_begin", "_epoch", "_question", "exchange", "patience_s")

    headers = (JSON, NO_STORE)

    def __init__(self, exchange: Exchange, question: Question, begin: Start) -> None:
        node, identity = exchange.node, exchange.caller
        history = node.history
        super().__init__(wire_form(Framing.JSON, question.watch.fields), history.last, _not_written_to)
        self.exchange = exchange
        self.patience_s = question.timeout
        if identity.expires_at is not None:
            self.patience_s = min(question.timeout, max(0.0, identity.expires_at - time.time()))
        self._question = question
        self._begin = begin
        # Nothing that is wanted stands between its cursor and here: what is wanted comes behind it.
        self._epoch, self._after = history.epoch, history.last
        want = Want(question.watch.filter, self.form)
        names = (*question.names, NOTICES) if question.hearing.names else question.names
        node.hub.attach(self, names, want)
        node.polls[self] = None

    def take(self, batch: Sequence[Update]) -> None:
        """Answer if any of it is wanted."""
        wanted = self._question.watch.filter
        for update in batch:
            if update.offset <= self.offset:
                continue
            if wanted.passes(update) if update.targets is None else reaches(update, self._question.hearing.names):
                self._after = update.offset - 1
                self.exchange.connection.wake(self)
                return

    def stalled(self, wire: bytes, sent: int) -> None:
        """Never called: it is not written to."""

    def broken(self) -> None:
        """Something went wrong with it that should not have."""
        self.exchange.connection.abandon()

    def log_lost(self) -> None:
        """The log began anew: answer with a reset, soon, as all at once would keep the loop for long."""
        self._epoch = ""  # whatever it is called now: it may have kept its name
        self.exchange.node.hub.soon(self, partial(self.exchange.connection.wake, self))

    def leave(self) -> None:
        """See ``Deferred``."""
        self.exchange.node.hub.leave(self)
        self.exchange.node.polls.pop(self, None)

    def answer(self, *, late: bool) -> Response:
        """What came since it began to wait."""
        node, question, begin = self.exchange.node, self._question, self._begin
        if late and self.patience_s < question.timeout:
            raise bad_token("the token has expired", "token_expired")
        # What it was offered and did not want is no news, though the log may have been trimmed past it.
        after = max(self._after, node.hub.given())
        # While it waited the log may have begun anew, or been trimmed past what is on its way to it (a time may be).
        is_time = begin.given is None and begin.after is not None
        lost = node.history.epoch != self._epoch or (not is_time and after < node.history.first - 1)
        begin = Start(None, None if lost else after, lost)  # the client does not have all of that: it acknowledges none
        if lost and _many(node, question, begin):
            # Held beforehand, as it can still be refused.
            self.exchange.connection.hold(len(channel_jobs(node.jobs, question.names[0])) * JOB_BYTES)
            return _made_as_it_is_sent(node, question, begin, timed_out=late)
        return _response(node, question, _tell(node, question, begin, timed_out=late))


def _not_written_to(data: bytes | memoryview) -> int:
    raise AssertionError("a poll is not written to by the hub")


async def poll(exchange: Exchange) -> Response | Deferred:
    """``GET /api/v2/jobs/poll``."""
    node = exchange.node
    question, cursor = _question(exchange)
    if question.client is not None:
        cursor = cursor or await node.recall(question.client)
    await node.broker.follow(question.names, cursor)
    begin = start_from(node.history, cursor)
    node.counters.opened["poll"] += 1
    node.counters.begin(resumed=begin.after is not None, lost=begin.lost)
    if _many(node, question, begin):
        found = await in_turns(_collect(node, question, begin, exchange.connection.hold))
        if found.updates or begin.lost or not question.timeout or node.draining:
            return _response(node, question, _told(node, question, begin, found))
        exchange.connection.let_go()
        begin = start_from(node.history, found.cursor)  # what came meanwhile is news
    # From here on nothing is awaited until it is registered: so nothing can fall between reading and waiting.
    may_wait = question.timeout > 0 and not begin.lost and not node.draining
    if may_wait and begin.after == node.history.last and not question.hearing.names:
        return WaitingPoll(exchange, question, begin)
    told = _tell(node, question, begin)
    if may_wait and not told.updates:
        return WaitingPoll(exchange, question, begin)
    return _response(node, question, told)


def _many(node: Node, question: Question, begin: Start) -> bool:
    """Whether there may be so much to look through that others should have turns meanwhile."""
    if question.watch.job_ids is not None:
        return False
    if begin.after is None:
        return len(channel_jobs(node.jobs, question.names[0])) > PORTION
    return node.history.last - begin.after > PORTION


def _question(exchange: Exchange) -> tuple[Question, str | None]:
    """Read the query: what is asked for, and the cursor. Raises ApiError 400, 403.

    Who polls asks the same again over the same connection, but for the cursor. So it is kept there as it was read.
    """
    node, identity, connection = exchange.node, exchange.caller, exchange.connection
    target = exchange.request.target
    before, given, rest = target.partition("last_seen=")
    cursor, _, after = rest.partition("&")
    plain = given and before[-1:] in ("?", "&") and "%" not in cursor and "+" not in cursor
    plain = plain and len(target) <= KEPT_TARGET
    # The configuration says who may join what, and how long a poll may wait.
    asked = Asked(before, after, identity, node.config) if plain else None
    if asked is not None and connection.memory is not None:
        known, question = connection.memory
        if known == asked:
            return question, cursor
    query = exchange.request.query
    watch = parse_watch(query, ALL_TYPES)
    hearing = _hearing(exchange, watch)
    names = tuple(channels_for(identity, watch, all_jobs=wants_all(query)))
    timeout = min(parse_timeout(query), node.config.limits.poll_timeout)
    client_id = parse_client_id(query)
    client: Client | None = None
    if client_id is not None:
        client = Client(identity.user, client_id, _digest([*names, *hearing.names], watch.filter))
    size = QUESTION_BYTES + sum([NAME_BYTES + len(name) for name in chain(names, watch.filter.kinds or ())])
    question = Question(watch, names, hearing, timeout, client, size)
    connection.memory = None if asked is None else (asked, question)
    return question, query.get("last_seen")


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


class Told(NamedTuple):
    """What a poll is answered with.

    Attributes:
        updates: how many.
        cursor: behind them.
        body: bytes, or pieces if it is large.
    """

    updates: int
    cursor: str
    body: bytes | Iterable[bytes]


def _response(node: Node, question: Question, told: Told) -> Response:
    node.counters.polled += told.updates
    # Remembered once all of it has been sent: what was not sent was not seen.
    then = None if question.client is None else partial(node.remember, question.client, told.cursor)
    return Response(200, WaitingPoll.headers, told.body, then)


def _made_as_it_is_sent(node: Node, question: Question, begin: Start, *, timed_out: bool) -> Response:
    """An answer for which many are looked through, where nothing can be awaited: others have turns as it is sent."""
    made: list[Response] = []

    def pieces() -> Iterator[bytes]:
        found: list[Found] = []
        for _ in steps(_collect(node, question, begin), found):
            yield b""
        response = _response(node, question, _told(node, question, begin, found[0], timed_out=timed_out))
        made.append(response)
        yield from (response.body,) if isinstance(response.body, bytes) else response.body

    def sent() -> None:
        if made[0].then is not None:
            made[0].then()

    return Response(200, WaitingPoll.headers, pieces(), sent)


def _tell(node: Node, question: Question, begin: Start, *, timed_out: bool = False) -> Told:
    """What there is to say as of now. Who asks for the same from the same place on is told the same."""
    watch, history = question.watch, node.history
    moment = key = None
    if begin.after is not None and not question.hearing.names:
        moment = history.epoch, history.last, node.broker.live
        key = question.names, watch.filter, watch.fields, begin.after, timed_out
        kept: Told | None = node.told.get(moment, key)
        if kept is not None:
            return kept
    told = _told(node, question, begin, at_once(_collect(node, question, begin)), timed_out=timed_out)
    if key is not None and isinstance(told.body, bytes):
        node.told.keep(moment, key, told, question.size + len(told.body))
    return told


def _told(node: Node, question: Question, begin: Start, found: Found, *, timed_out: bool = False) -> Told:
    watch, history, updates = question.watch, node.history, found.updates
    # Not before the endings themselves have been given: clients stop at it.
    done = (
        not found.cut and watch.job_ids is not None and all(over(node.jobs, history, name) for name in question.names)
    )
    epoch = found.cursor.rpartition(":")[0]
    messages = (update_message(update, f"{epoch}:{update.offset}", watch.fields) for update in updates)
    facts = node.liveness()
    timed_out = timed_out and not updates
    body = poll_body(messages, last_seen=found.cursor, reset=begin.lost, timed_out=timed_out, done=done, **facts)
    small = len(updates) <= PORTION and sum([len(update.body) for update in updates]) <= WHOLE_BYTES
    return Told(len(updates), found.cursor, b"".join(body) if small else body)


class Found(NamedTuple):
    """What was found for a poll.

    Attributes:
        updates: in log order.
        cursor: behind them.
        cut: whether more is left for the next answer.
    """

    updates: list[Update]
    cursor: str
    cut: bool


def _collect(
    node: Node, question: Question, start: Start, hold: Callable[[int], object] = int
) -> Generator[None, None, Found]:
    """What there is to answer with as of now, from a snapshot if there is no cursor to go on from.

    Args:
        hold: told how many bytes are taken by what is looked through; raises ApiError 503 if that is too much.
    """
    wanted, hearing, names = question.watch.filter, question.hearing, question.names
    epoch, last = node.history.epoch, node.history.last
    notices = owed(node, start, hearing.user, hearing.names).notices if hearing.names else []
    if start.after is None:
        jobs = snapshot(node.jobs, names)
        hold(len(jobs) * JOB_BYTES)
        runs = ([job.latest for job in portion if wanted.passes(job.latest)] for portion in portions(jobs))
        latest = yield from sort(chain(runs, [notices]) if notices else runs, _offset)
        return Found(latest, f"{epoch}:{last}", False)
    missed = missed_updates(node.history, names, start.after)
    hold(len(missed) * UPDATE_BYTES)
    if notices:
        missed = sorted(missed + notices, key=_offset)
    found: list[Update] = []
    size = 0
    for count, update in enumerate(missed, 1):
        if update.targets is not None or wanted.passes(update):
            if size > ANSWER_BYTES:
                return Found(found, f"{epoch}:{found[-1].offset}", True)
            found.append(update)
            size += len(update.body)
        if count % PORTION == 0:
            yield
    return Found(found, f"{epoch}:{last}", False)


def _digest(names: list[str], wanted: Filter) -> bytes:
    parts = [sorted(names), *(None if words is None else sorted(words, key=str) for words in wanted)]
    return blake2b(repr(parts).encode(), digest_size=16).digest()
