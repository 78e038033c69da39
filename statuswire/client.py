"""The way to one server: a thread that sends, a spool on disk, and what happens when the process forks or ends."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import msgspec

from statuswire import process
from statuswire.errors import Rejected, Unavailable
from statuswire.fields import MAX_UPDATE, bare, encode_update, renumbered
from statuswire.items import Item, Outcome, Refusal, State, sendable
from statuswire.outbox import INTERVAL, Outbox
from statuswire.spool import Entry, Place, Spool
from statuswire.transport import Away, Refused, Token, Transport

DEFAULT_URL: Final = "http://127.0.0.1:3000"
MAX_REQUEST: Final = 1024 * 1024
# The thread ends when it had nothing to do for so long: a process with one thread forks more safely.
IDLE_S: Final = 5.0
ADOPT_EVERY_S: Final = 60.0
# A request that is under way when the client is closed may still be answered for so long, in seconds, before it is
# broken off: httpx does not close a connection that is just being made.
LAST_ANSWER_S: Final = 0.5
# That a job waits may be heard after its worker said that it has begun, or even ended.
LATE: Final = frozenset(("bad_transition", "job_ended", "stale_attempt"))
MAX_ADOPTED: Final = 10_000

logger = logging.getLogger(__name__)


class Client:
    """Sends to one server, in the background.

    Args:
        url: the server's address, else ``STATUSWIRE_URL``, else ``http://127.0.0.1:3000``.
        token: access token, or a function that returns one and is called before each request (so it may renew it),
            else ``STATUSWIRE_TOKEN``.
        spool_dir: where ends of jobs are kept until they are answered, else ``STATUSWIRE_SPOOL_DIR``, else
            ``statuswire`` below ``XDG_STATE_HOME`` or ``~/.local/state``. An empty text for none: then an end is lost
            if the process is killed before it is answered.
        strict: raise what the server refuses, and wait for the answer to every end.
        interval: seconds between two sendings of mere progress.
        timeout: seconds without a byte after which an answer counts as lost; with ``strict``, how long to wait.
        exit_timeout: seconds that the end of the process may wait for what is on its way.

    Raises:
        ValueError: ``url`` is not an HTTP address.
    """

    def __init__(
        self,
        url: str | None = None,
        token: Token = None,
        *,
        spool_dir: str | os.PathLike[str] | None = None,
        strict: bool = False,
        interval: float = INTERVAL,
        timeout: float = 15.0,
        exit_timeout: float = 2.0,
    ) -> None:
        environ = os.environ
        self.transport = Transport(
            url or environ.get("STATUSWIRE_URL") or DEFAULT_URL, token or environ.get("STATUSWIRE_TOKEN"), timeout
        )
        self.strict = strict
        self.timeout = timeout
        self._exit_timeout = exit_timeout
        self._outbox = Outbox(random.random, interval)
        self._spool = _open_spool(spool_dir, self.transport.url)
        # Reentrant, because a signal handler may report something while its own thread is within.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._adopting = threading.Lock()
        self._adopt_at = 0.0
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._away_since: float | None = None
        self._spool_failed = False
        process.register(self)

    # What handles and functions use

    def state(self, job_id: str, attempt: int | None) -> State:
        """The state of a job for a single update."""
        with self._lock:
            return self._outbox.state(job_id, attempt, time.monotonic())

    def hold(self, job_id: str, attempt: int | None, identity: dict[str, Any], renew_ttl: float | None) -> State:
        """The state for a handle, until ``release``; with a lease that is kept if ``renew_ttl`` is given."""
        with self._lock:
            state = self._outbox.hold(job_id, attempt, identity, time.monotonic())
            if renew_ttl:
                self._outbox.renew(state, renew_ttl)
            return state

    def release(self, state: State) -> None:
        """The handle is done with."""
        with self._lock:
            self._outbox.release(state)

    def put(self, state: State, fields: dict[str, Any], urgent: bool = False) -> None:
        """Take in news of a job; it is sent soon, unless newer news overtakes it."""
        with self._lock:
            if self._outbox.put(state, fields, urgent=urgent):
                self._wake()

    def put_unless_held(self, job_id: str, attempt: int | None, fields: dict[str, Any]) -> None:
        """Take in news of a job from outside of it, unless a handle is open here: then it is too late for that."""
        with self._lock:
            if not self._outbox.holds(job_id, attempt):
                self.put(self.state(job_id, attempt), fields, urgent=True)

    def end(self, state: State, fields: Mapping[str, Any]) -> None:
        """Take in the end of a job. When this returns it is on disk, with ``strict`` at the server.

        Raises:
            Rejected, Unavailable: with ``strict``.
        """
        with self._lock:
            merged = self._outbox.final_fields(state, fields)
            at_us = self._outbox.next_seq(time.time_ns() // 1000)
        job_id, attempt = state.key
        body = encode_update(job_id, merged)
        if len(body) > MAX_UPDATE:
            logger.error("job %s: its end has %d bytes, all but the status is left out", job_id, len(body))
            body = bare(body, f"{merged.get('status')}; the result was too large to be sent")
        key = uuid4().hex
        place = self._keep(Entry(key, at_us, job_id, msgspec.Raw(body), attempt))
        with self._lock:
            item = self._outbox.put_end(state, key, at_us, None if place else body, place)
            self._wake()
        if item is None:
            where = f"until a later process sends it from {place.journal.path}" if place else "for good"
            logger.error("job %s: too many ends of jobs wait, this one is lost %s", job_id, where)
        if self.strict:
            self._must_settle(item)

    def flush(self, timeout: float = 10.0) -> bool:
        """Send what there is, also what dead processes left in the spool; whether all was answered in time.

        Args:
            timeout: seconds.
        """
        deadline = time.monotonic() + timeout
        self._adopt()
        with self._news:
            ticket = self._outbox.ticket
            self._outbox.hurry()
            self._wake()
            while not self._outbox.is_settled(ticket):
                left = deadline - time.monotonic()
                if left <= 0 or not self._news.wait(left):
                    return self._outbox.is_settled(ticket)
        return True

    def close(self, timeout: float = 10.0) -> bool:
        """``flush``, then close the connection and the spool; whether all was answered in time.

        What was not is held until the client is used again, and its ends are in the spool.
        """
        settled = self.flush(timeout)
        with self._news:
            thread = self._thread
            self._stopping = thread is not None
            self._news.notify_all()
        if thread is not None:
            thread.join(LAST_ANSWER_S)
            self.transport.close()  # which also breaks off a request
            thread.join(1.0)
        self.transport.close()
        with self._lock:
            if self._spool is not None and not self._outbox.ends:
                self._spool.close()
        return settled

    def post_notice(self, body: bytes) -> None:
        """Send a notification in the background."""
        with self._lock:
            taken = self._outbox.put_notice(uuid4().hex, body)
            self._wake()
        if not taken:
            logger.error("too many notifications wait, this one is lost")

    def send_notice(self, body: bytes) -> int:
        """Send a notification now, in this thread; how many connections got it.

        Raises:
            Rejected, Unavailable: with ``strict``; else that is logged, and 0 returned.
        """
        try:
            return self.transport.notify(body, uuid4().hex)
        except Refused as refused:
            if self.strict:
                raise Rejected(*refused.refusal) from refused
            logger.error("a notification was refused: %s", refused)
        except Away as away:
            if self.strict:
                raise Unavailable(str(away)) from away
            logger.warning("a notification could not be sent: %s", away)
        return 0

    # The thread

    def _wake(self) -> None:
        """With the lock held: there is something new."""
        if self._thread is not None:
            self._news.notify_all()
            return
        thread = threading.Thread(target=self._run, name=process.THREAD, daemon=True)
        if not self._begin(thread):
            return
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending, or there are too many threads: ends are on disk
            self._thread = None
            return
        process.register_exit()

    def _begin(self, thread: threading.Thread) -> bool:
        """Whether this is to be the thread, and not one of a signal handler that was here just now."""
        if self._thread is not None:
            return False
        self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            self._adopt_now_and_then()
            with self._news:
                items = self._wait_for_work()
                if items is None:
                    return
            try:
                self._send(items)
                self._send_notices()
            except Exception:  # a mistake of this package must not end it, nor the worker
                logger.exception("sending failed")
                with self._lock:
                    self._outbox.failed(time.monotonic(), None)
            with self._news:
                self._news.notify_all()

    def _wait_for_work(self) -> list[Item] | None:
        """With the lock held: wait until something is to be sent; None if nothing was for long."""
        idle = False
        while True:
            now = time.monotonic()
            due = self._outbox.due()
            if self._stopping or (idle and due is None):
                self._thread = None
                self._stopping = False
                return None
            if due is not None and due <= now:
                return self._outbox.take(now, time.time_ns() // 1000)
            idle = not self._news.wait(IDLE_S if due is None else due - now)

    def _send(self, items: list[Item]) -> None:
        bodies: list[bytes] = []
        size = 0
        now_us = time.time_ns() // 1000
        for index, item in enumerate(items):
            try:
                body = sendable(item, self._body_of(item), now_us)
            except Exception as error:  # one that cannot be read or encoded must not hold up the others
                self._finish(self._outbox.give_up, item, Refusal("unreadable", f"{type(error).__name__}: {error}"))
                continue
            if bodies and size + len(body) > MAX_REQUEST:
                with self._lock:
                    self._outbox.give_back(items[index:])
                break
            size += len(body) + 1
            bodies.append(body)
        if not bodies:
            return
        try:
            answer = self.transport.publish(b"[" + b",".join(bodies) + b"]")
        except Away as away:
            self._away(away)
        except Refused as refused:
            self._finish(self._outbox.too_much, refused.refusal)
        else:
            self._finish(self._outbox.done, answer, time.monotonic())
            self._back()

    def _body_of(self, item: Item) -> bytes:
        state = item.state
        climbed = state.attempt if state.attempt != state.key[1] else None
        if not item.is_end:
            return encode_update(state.job_id, {**item.fields, "attempt": climbed} if climbed else item.fields)
        if item.body is not None:
            body = item.body
        else:
            assert item.place is not None
            body = item.place.journal.read(item.place)
        return renumbered(body, climbed) if climbed else body

    def _finish(self, settle: Callable[..., Outcome], *arguments: object) -> None:
        with self._lock:
            outcome = settle(*arguments)
        for item, refusal in outcome.unfit:
            logger.error(
                "job %s: its end was refused (%s), all but the status is left out", item.state.job_id, refusal.message
            )
            item.body = bare(self._body_of(item), f"what came with this end was refused: {refusal.message}")
        for item in outcome.done:
            if item.place is not None and self._spool is not None:
                try:
                    self._spool.done(item.place, item.event_id)
                except OSError as error:
                    logger.error("%s: %s", item.place.journal.path, error)
        for item, refusal in outcome.refused:
            # An end that is sent once more, because its answer was lost, finds its job ended; so does that of a parent
            # which its parts have ended.
            expected = item.is_end and (item.tries > 1 or bool(item.state.identity.get("autoComplete")))
            level = logging.DEBUG if expected and refusal.code == "job_ended" else logging.WARNING
            if item.fields.get("status") == "queued" and refusal.code in LATE:
                level = logging.DEBUG
            if item.state.refused is None or item.state.refused is refusal or item.is_end:
                logger.log(level, "job %s: refused: %s (%s)", item.state.job_id, refusal.message, refusal.code)

    def _send_notices(self) -> None:
        while True:
            with self._lock:
                notice = self._outbox.next_notice(time.monotonic())
            if notice is None:
                return
            try:
                self.transport.notify(notice.body, notice.key)
            except Away as away:
                self._away(away)
                return
            except Refused as refused:
                logger.error("a notification was refused: %s", refused)
            with self._lock:
                self._outbox.notice_done(notice)
            self._back()

    def _away(self, away: Away) -> None:
        with self._lock:
            self._outbox.failed(time.monotonic(), away.retry_after)
        if self._away_since is None:
            self._away_since = time.monotonic()
            kept = f"kept in {self._spool.directory}" if self._spool else "held in memory"
            logger.warning("%s; of progress the newest is held, ends of jobs are %s", away, kept)

    def _back(self) -> None:
        if self._away_since is not None:
            seconds, self._away_since = time.monotonic() - self._away_since, None
            with self._lock:
                dropped, self._outbox.dropped = self._outbox.dropped, 0
            logger.info("%s answers again after %.0f s, %d messages were dropped", self.transport.url, seconds, dropped)

    # The spool

    def _keep(self, entry: Entry) -> Place | None:
        if self._spool is None:
            return None
        try:
            place = self._spool.keep(entry)
        except OSError as error:
            if not self._spool_failed:
                self._spool_failed = True
                logger.error("ends of jobs cannot be kept on disk, only in memory: %s", error)
            return None
        self._spool_failed = False
        return place

    def _adopt_now_and_then(self) -> None:
        if time.monotonic() >= self._adopt_at:
            self._adopt()

    def _adopt(self) -> None:
        """Take over what dead processes left."""
        spool = self._spool
        if spool is None:
            return
        with self._adopting:
            self._adopt_at = time.monotonic() + ADOPT_EVERY_S
            count = 0
            for entry, place in spool.adopt(MAX_ADOPTED - self._outbox.ends, time.time_ns() // 1000):
                with self._lock:
                    state = State(entry.job_id, entry.attempt, {}, time.monotonic(), False)
                    item = self._outbox.put_end(state, entry.key, entry.at, None, place)
                    if item is not None:
                        item.tries = 1  # perhaps: it may have been sent before
                        count += 1
            if count:
                logger.info("sending %d ends of jobs that a process before left in %s", count, spool.directory)

    # The end of the process, and other processes

    def _must_settle(self, item: Item | None) -> None:
        deadline = time.monotonic() + self.timeout
        with self._news:
            while item is not None and not item.settled:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._news.wait(left)
        if item is None or not item.settled:
            raise Unavailable(f"{self.transport.url} has not answered in {self.timeout:g} s; the end is kept")
        if item.error is not None:
            raise Rejected(*item.error)

    def at_exit(self) -> None:
        """Give what is on its way a last chance: two tries, and ``exit_timeout`` at most."""
        deadline = time.monotonic() + self._exit_timeout
        with self._news:
            ticket, missed = self._outbox.ticket, self._outbox.missed
            if not self._outbox.is_settled(ticket):
                self._outbox.hurry()
                self._wake()
            while not self._outbox.is_settled(ticket) and self._outbox.missed < missed + 2:
                left = deadline - time.monotonic()
                if left <= 0 or self._thread is None:
                    break
                self._news.wait(left)
            if self._spool is not None and not self._outbox.ends:
                self._spool.close()

    def before_fork(self) -> None:
        """Nobody is in the middle of something when the memory is copied."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Begin anew: the thread, its connection and what it has to send are the parent's."""
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._adopting = threading.Lock()
        self._thread = None
        self._stopping = False
        self._away_since = None
        self._outbox = self._outbox.for_child()
        self.transport.abandon()
        if self._spool is not None:
            self._spool.abandon()


_default: Client | None = None


def configure(
    url: str | None = None, token: Token = None, *, spool_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Client:
    """Make the client that is used where none is named; see ``Client`` for the arguments."""
    global _default
    client = Client(url, token, spool_dir=spool_dir, **options)
    with process.opening:
        _default = client
    return client


def default_client() -> Client:
    """The client that is used where none is named, made from the environment unless ``configure`` made it."""
    global _default
    if _default is None:
        with process.opening:
            if _default is None:
                _default = Client()
    return _default


def _open_spool(directory: str | os.PathLike[str] | None, url: str) -> Spool | None:
    if directory is None:
        directory = os.environ.get("STATUSWIRE_SPOOL_DIR")
    if directory is None:
        state_home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        directory = "" if state_home.startswith("~") else os.path.join(state_home, "statuswire")
    if not os.fspath(directory):
        return None
    # What was meant for one server is not for another: the digest tells apart what reads alike.
    readable = "".join(char if char.isalnum() else "-" for char in url.split("//", 1)[1])
    return Spool(Path(directory) / f"{readable[:100]}-{blake2b(url.encode(), digest_size=4).hexdigest()}")
