"""A connection that is written to by the hub: write-through while its socket takes everything, latest-wins after.

The flusher writes to the socket itself as long as nothing is held back. A socket that is full gets a drain
task, and updates are held: all of them while they are few, then the newest per
job, ended jobs always. Past the bound the connection is ended and resumes from its cursor elsewhere.

What is owed to the peer, in the order in which it is sent: ``tail`` (the unsent rest of what was begun),
``queue`` (snapshots, replays and answers, in pieces), ``held`` (updates that came meanwhile).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from time import perf_counter
from typing import Final

import trio

from protocol.update import Update
from protocol.watch import channels_of
from protocol.wire import WireForm
from server.channel import Reader
from server.hub import LOG, Hub
from server.logs import log_event
from server.socketio import Socket
from server.turns import TURN_S, next_turn
from server.wheel import Timer, Wheel

# One turn of writing gives at most this much to one socket before other tasks run; and what is queued is not made for
# longer than ``TURN_S``, however little of it there is to send.
TURN_BYTES: Final = 256 * 1024
# Queued pieces are joined into one send of about this much: a greeting and a snapshot are one packet then.
JOIN_BYTES: Final = 16 * 1024
# Held updates are put on the wire in pieces of this many, so a piece is some tens of kilobytes.
PIECE_UPDATES: Final = 64


class PushReader(Reader):
    """The hub's side of one WebSocket or event-stream connection.

    Args:
        sock: connected, non-blocking.
        nursery: where a drain task starts when the socket is full.
        form: wire form of messages, and of updates unless a want says otherwise.
        backlog_bytes: bound of what is held back.

    Transports are subclasses and say what to do ``on_end`` and ``on_log_lost``.
    """

    __slots__ = (
        "_drained",
        "_draining",
        "_due",
        "_nursery",
        "_patience",
        "_plain",
        "_timer",
        "backlog_bytes",
        "conflating",
        "corked",
        "ended",
        "final_cursor",
        "heard_at",
        "held",
        "held_bytes",
        "hub",
        "min_interval_s",
        "queue",
        "sock",
        "tail",
        "wheel",
    )

    def __init__(
        self,
        sock: Socket,
        nursery: trio.Nursery,
        hub: Hub,
        wheel: Wheel,
        form: WireForm,
        *,
        backlog_bytes: int,
    ) -> None:
        super().__init__(form, hub.history.last, sock.send)
        self.direct = True
        self.sock = sock
        self.hub = hub
        self.wheel = wheel
        self.backlog_bytes = backlog_bytes
        self.tail: bytes | memoryview = b""
        self.queue: deque[bytes | Iterator[bytes]] | None = None  # made when first needed: idle readers are many
        self.held: dict[int | str, Update] | None = None
        self.held_bytes = 0
        self.conflating = False
        self.corked = False  # what is posted waits for ``uncork``, to be sent together
        self.min_interval_s = 0.0
        self.ended = ""
        self.final_cursor: str | None = None  # where it stood at its end, if that was not in the middle of a replay
        self.heard_at = wheel.now()  # when the peer last gave a sign of life
        self._plain = True  # nothing is filtered or spaced out, and there is one form for all
        self._due = False
        self._timer: Timer | None = None
        self._draining = False
        self._drained: trio.Event | None = None
        self._patience: trio.CancelScope | None = None
        self._nursery = nursery

    # What subclasses say

    def on_end(self) -> None:
        """This side ends the connection, for the reason in ``ended``: ``finished`` after the last named job ended
        and everything is written, ``broken`` after a socket error or stall, ``overflow`` past the bound of what
        may be held, or one of the subclass's own. Must not wait."""
        raise AssertionError("a transport must say how it ends")

    @property
    def send_timeout(self) -> float:
        """Seconds in which a peer that takes nothing is given up."""
        raise AssertionError("a transport must say how patient it is")

    def on_log_lost(self) -> None:
        """The log was lost: queue a reset and a fresh snapshot. Must not wait."""
        raise AssertionError("a transport must say how it restarts")

    def reopened(self) -> set[str]:
        """Those of the named jobs that live again after all of them had ended."""
        return set()

    def hears(self, notice: Update) -> bool:
        """Whether a notification is for this reader."""
        return False

    # What the hub calls

    def take(self, batch: Sequence[Update]) -> None:
        """Accept a batch when something is held back, filtered, spaced out, or may be the last."""
        if self.ended:
            return
        for update in batch:
            if update.offset <= self.offset:
                continue
            self.offset = update.offset
            if self._form_for(update) is not None and not self._hold(update):
                return
            if update.ended and self.open_jobs is not None:
                self.open_jobs.discard(update.job_id)
        self.pump()

    def stalled(self, wire: bytes, sent: int) -> None:
        """Keep the rest of a write the socket did not take whole."""
        self.tail = memoryview(wire)[sent:]
        self.direct = False
        self._start_drain()

    def broken(self) -> None:
        """The socket failed."""
        self.finish("broken")

    def log_lost(self) -> None:
        """What was held belongs to a log that is gone: begin anew, behind the answers that are on their way. That is
        posted at once, and sent soon: there are many."""
        self._drop_held()
        self.offset = self.hub.history.last
        self.corked = True
        self.on_log_lost()
        self.hub.soon(self, self.uncork)

    # What transports call

    def post(self, *pieces: bytes | Iterator[bytes]) -> None:
        """Send messages that are already framed, in order, behind what is queued. Never waits.

        An iterator makes pieces as the socket takes them. An empty one means that the next takes its time: what comes
        of it may be sent in a later turn.
        """
        if self.ended:
            return
        if self.queue is None:
            owes = self.corked or self.tail or self.held or self._draining
            # Of a reader that stops with its last open job this may be the last.
            if len(pieces) == 1 and not owes and (self.open_jobs is None or self.open_jobs):
                (piece,) = pieces
                if isinstance(piece, bytes):  # nothing is owed: straight to the socket
                    if piece:
                        self._write(piece)
                    return
            self.queue = deque()
        self.queue.extend(pieces)
        self.direct = False
        if not self.corked:
            self.pump()

    def uncork(self) -> None:
        """Send what was posted since ``corked`` was set. Again does nothing."""
        self.corked = False
        if self.queue:
            self.pump()

    def _write(self, data: bytes) -> None:
        try:
            sent = self.sock_send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._give_up(error)
            return
        if sent != len(data):
            self.stalled(data, sent)

    def catch_up(self) -> None:
        """Give at once what is pending in the hub, so that everything up to the log's end has been given or queued.

        Needed before more channels are joined: a channel's snapshot is as of the log's end, and the reader
        has one offset for all of its channels.
        """
        history = self.hub.history
        after = max(self.offset, self.hub.given())
        if after < history.first - 1:  # what is pending has been trimmed from a short log already
            self.log_lost()
            return
        if after < history.last:
            names = self.wants.keys()
            self.take(
                [
                    update
                    for update in history.everything(after)
                    if (not names.isdisjoint(channels_of(update)) if update.targets is None else self.hears(update))
                ]
            )
        if self.held:  # full or spaced out: what is held goes ahead of the answer that follows
            self.post(*[self._release(keys) for keys in _pieces(list(self.held))])
        self.offset = history.last

    def wants_changed(self) -> None:
        """Work out whether the hub may write directly, after wants or interval changed."""
        wanted = self.wanted
        if isinstance(wanted, dict):  # with other filters or in other forms
            self._plain = False
        else:
            if wanted is not None:
                self.form = wanted.form
            self._plain = (wanted is None or wanted.filter.is_any) and not self.min_interval_s
        self._resume()

    def _resume(self) -> None:
        """Let the hub write directly, if it may and nothing is owed."""
        self.direct = self._plain and not (self.tail or self.queue or self.held or self._draining or self.ended)

    def cursor(self) -> str:
        """The reader's cursor: everything up to it has been given (or was not for this reader)."""
        offset = max(self.offset, self.hub.given())
        if self.held:
            offset = min(offset, next(iter(self.held.values())).offset - 1)
        return f"{self.hub.history.epoch}:{offset}"

    @property
    def caught_up(self) -> bool:
        """Whether the socket has taken all that was due: what an interval holds back is not due yet."""
        return not (self.tail or self.queue or (self.held and not self.min_interval_s))

    async def wait_drained(self) -> None:
        """Wait while the socket is full: a peer may ask no faster than it reads the answers."""
        while self._draining:
            self._drained = trio.Event()
            await self._drained.wait()

    async def say_last(self, data: bytes, patience_s: float) -> None:
        """After the end: finish what is half written, send ``data``, and give up after ``patience_s`` seconds."""
        with trio.move_on_after(patience_s, shield=True):
            await self.wait_drained()
            rest = memoryview(bytes(self.tail) + data)
            self.tail = b""
            while rest:
                try:
                    rest = rest[self.sock_send(rest) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)
                except OSError:
                    return

    def finish(self, why: str) -> None:
        """End this side, once; later calls do nothing."""
        if self.corked:
            self.uncork()  # what was said before its end is sent before it
        if self.ended:
            return
        self.ended = why
        self.final_cursor = None if self.queue else self.cursor()
        self.direct = False
        self.queue = None
        self._drop_held()
        if self._patience is not None:
            self._patience.cancel()
        self.on_end()

    # Holding

    def _form_for(self, update: Update) -> WireForm | None:
        """The form in which this reader wants the update, None if it does not."""
        if update.targets is not None:
            return self.form if self.hears(update) else None
        if len(self.wants) == 1:
            (want,) = self.wants.values()
            return want.form if want.filter.passes(update) else None
        for name in channels_of(update):
            want_ = self.wants.get(name)
            if want_ is not None and want_.filter.passes(update):
                return want_.form
        return None

    def _hold(self, update: Update) -> bool:
        """Keep an update for later; False if the reader has ended, of this or otherwise."""
        held = self.held
        if held is None:
            held = self.held = {}
        self._due = self._due or update.urgent
        if self.conflating:
            self._hold_newest(held, update)
        else:
            held[update.offset] = update
            self.held_bytes += len(update.body)
            if self.min_interval_s:
                self._conflate()
            elif self.held_bytes > self.backlog_bytes // 4:
                self.pump()  # a long batch is no backlog, what the socket does not take of it is
                if self.held_bytes > self.backlog_bytes // 4:
                    self._conflate()
        if self.held_bytes > self.backlog_bytes:
            self.finish("overflow")
        return not self.ended

    def _conflate(self) -> None:
        """From now on keep the newest per job only, and every end of a job."""
        updates = list((self.held or {}).values())
        self.conflating = True
        self.held_bytes = 0
        self.held = {}
        for update in updates:
            self._hold_newest(self.held, update)

    def _hold_newest(self, held: dict[int | str, Update], update: Update) -> None:
        # Popping first keeps the dict in offset order, which sending relies on.
        older = held.pop(update.job_id, None)
        if older is not None:
            self.held_bytes -= len(older.body)
            self.hub.counters.conflated += 1
        # Spaced-out delivery promises every change of status; a reader that cannot keep up, the endings.
        lasting = update.urgent if self.min_interval_s else update.ended
        held[update.offset if lasting else update.job_id] = update
        self.held_bytes += len(update.body)

    def _drop_held(self) -> None:
        self.held = None
        self.held_bytes = 0
        self.conflating = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Sending

    def pump(self) -> None:
        """Write what the socket takes now; a drain task does the rest. Raises nothing: whoever has posted something is
        somebody else, a publisher, the wheel, the hub."""
        if self._draining or self.ended:
            return
        try:
            done = self._write_turn()
        except Exception as error:
            self._give_up(error)
        else:
            if not done:
                self._start_drain()

    def _start_drain(self) -> None:
        if not self._draining and not self._nursery.cancel_scope.cancel_called:  # else the server stops
            self._draining = True
            self._nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        try:
            while not self.ended:
                with trio.move_on_after(self.send_timeout) as self._patience:
                    await trio.lowlevel.wait_writable(self.sock)
                if self._patience.cancelled_caught:
                    self.finish("broken")
                    return
                self.heard_at = trio.current_time()  # it reads, if slowly, and may not get to answer pings
                if self.queue:  # making what is sent next takes its time, and there may be many
                    await next_turn()
                if self._write_turn():
                    return
        except Exception as error:  # beyond this task are all the other connections
            self._give_up(error)
        finally:
            self._draining = False
            self._patience = None
            if self._drained is not None:
                self._drained.set()
                self._drained = None
            self._resume()

    def _write_turn(self) -> bool:
        """Write until nothing is owed (True), or the socket is full or the turn is over (False). Raises OSError, and
        whatever the making of it does."""
        budget = TURN_BYTES
        until = perf_counter() + TURN_S if self.queue else 0.0
        while budget > 0:
            data = self.tail or self._piece(until)
            if data is None:
                if self.open_jobs is not None and not self.open_jobs:
                    self.open_jobs = self.reopened()
                    if not self.open_jobs:
                        self.finish("finished")
                self._resume()
                return True
            if not data:
                break
            try:
                sent = self.sock_send(data)
            except BlockingIOError:
                sent = 0
            budget -= sent
            if sent < len(data):
                self.tail = memoryview(data)[sent:]
                self.direct = False
                return False
            self.tail = b""
            if self.queue and perf_counter() > until:
                break
        self.direct = False
        return False

    def _give_up(self, error: Exception) -> None:
        if not isinstance(error, OSError):
            log_event(LOG, logging.ERROR, "delivery_failed", exc_info=error)
        self.finish("broken")

    def _piece(self, until: float) -> bytes | None:
        """The next bytes to send, b"" when it is time for others, None when nothing is due."""
        if self.queue and ((joined := self._joined_pieces(self.queue, until)) or self.queue):
            return joined
        self.queue = None  # an empty deque is 760 bytes
        while self.held and not self.min_interval_s:
            if piece := self._release(list(islice(self.held, PIECE_UPDATES))):
                return piece
        if self.held:
            return self._release_spaced() or None
        self.conflating = False
        return None

    def _joined_pieces(self, queue: deque[bytes | Iterator[bytes]], until: float) -> bytes:
        """What is queued, as far as it goes into one send, and into this turn."""
        pieces: list[bytes] = []
        size = 0
        while queue and size < JOIN_BYTES:
            head = queue[0]
            if isinstance(head, bytes):
                pieces.append(head)
                size += len(head)
                queue.popleft()
                continue
            piece = next(head, None)
            if piece is None:
                queue.popleft()
                continue
            if piece:
                pieces.append(piece)
                size += len(piece)
            if perf_counter() > until:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _release(self, keys: Sequence[int | str]) -> bytes:
        """Frame held updates and let go of them.

        Spaced-out updates carry the cursor behind which nothing is held back any more: an urgent update that
        overtakes a held one must not take the reader's cursor past it.
        """
        assert self.held is not None
        epoch = self.hub.history.epoch
        parts: list[bytes] = []
        group: list[Update] = []
        group_form: WireForm | None = None
        for key in keys:
            update = self.held.pop(key)
            self.held_bytes -= len(update.body)
            form = self._form_for(update)
            if form is None:  # unsubscribed while it was held
                continue
            self.hub.counters.delivered += 1
            if self.min_interval_s:
                parts.append(form.update(update, self.cursor()))
                continue
            if group_form is not None and form is not group_form:
                parts.append(self.hub.encoded(group_form, group, epoch))
                group = []
            group_form = form
            group.append(update)
        if group_form is not None:
            parts.append(self.hub.encoded(group_form, group, epoch))
        return b"".join(parts)

    def _release_spaced(self) -> bytes:
        """Latest-wins delivery (``minInterval``): all that is held once per interval, and what is urgent at once."""
        assert self.held is not None
        due, self._due = self._due, False
        if self._timer is None:
            self._timer = self.wheel.after(self.min_interval_s, self._interval_over)
            return self._release(list(self.held))
        return self._release([key for key, update in self.held.items() if update.urgent]) if due else b""

    def _interval_over(self) -> None:
        self._timer = None
        if self.held:
            self.pump()


def _pieces(keys: list[int | str]) -> list[list[int | str]]:
    return [keys[start : start + PIECE_UPDATES] for start in range(0, len(keys), PIECE_UPDATES)]
