"""Who watches what on this node, and the one task that sends.

Delivering appends an update to the pending list of the channels it is offered on. The flusher sends what is
pending; what arrives meanwhile is sent together in the next pass, in one ``send`` per connection. An idle server sends
at once, a loaded one joins as much as it must; only many small flushes are held to a beat (``server.beat``).

Everything here but the flusher's own yields is synchronous, so registering cannot be torn by cancellation
and a block without ``await`` is atomic.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Final

import trio

from protocol.update import Update
from protocol.watch import channels_of
from protocol.wire import WireForm
from server.beat import Beat
from server.channel import Channel, Reader, Want, write
from server.counters import Counters
from server.history import History
from server.logs import log_event

LOG: Final = logging.getLogger("statuswire")

# After about this long the flusher looks whether a socket has something to read, and lets other tasks run if one has:
# short enough that nobody notices a large channel being served. A pass through Trio's loop costs more than its own
# 20 µs, since the caches are cold after it; looking costs 1 µs.
YIELD_AFTER_S: Final = 0.003
# And after this long in any case, for tasks that wait for something else.
YIELD_ALWAYS_S: Final = 0.005
# Looking at the clock costs 50 ns; once in 16 sends (about 100 µs) is often enough.
LOOK_EVERY: Final = 16
# So many channels are encoded before any of them is sent: sends in quick succession find more of their readers awake.
AHEAD: Final = 16
# Where updates come one after the other the next of them ends the wait for more, as a timer costs 20 µs.
GRACE_S: Final = 0.001
# Updates joined into one send hold at most about this much text, so that one flush of large records cannot
# make one giant buffer per wire form.
JOIN_BYTES: Final = 1024 * 1024
# Encodings that are kept for the next reader with the same batch. Readers that all watch different things have no use
# for each other's.
SHARED_BYTES: Final = 4 * 1024 * 1024
# Publishers wait while more than this is pending: what the node cannot send, it must not take in.
PENDING_BYTES: Final = 8 * 1024 * 1024


def _always() -> bool:
    return True


def _nobody(notice: Update) -> Iterable[Reader]:
    return ()


class Hub:
    """Channels, readers and the flusher of one node.

    Notifications have no channel to which their readers belong: there are as many targets as connections. When one is
    sent, ``audience`` says who is to have it, and these readers take the way of those on several channels.

    Args:
        history: the log.
        audience: the readers here that a notification is for.
        wanted: whether a socket has something to read.
    """

    def __init__(
        self,
        history: History,
        counters: Counters | None = None,
        audience: Callable[[Update], Iterable[Reader]] = _nobody,
        wanted: Callable[[], bool] = _always,
    ) -> None:
        self.history = history
        self.counters = counters or Counters()
        self._audience = audience
        self._wanted = wanted
        self._ran = 0.0
        self._notices: list[Update] = []
        self.channels: dict[str, Channel] = {}
        self.readers: dict[Reader, None] = {}
        self.flushed = history.last
        self._dirty: list[Channel] = []
        self._pending_bytes = 0
        self._flushing = False
        # What was encoded in this flush, by form and offsets.
        self._wires: dict[tuple[WireForm, int | tuple[int, ...]], bytes] = {}
        self._wires_bytes = 0
        # Whether something that is pending, or is being sent, goes over more than one channel. Many jobs with a reader
        # each do not: there, looking for what others have encoded would cost a microsecond for nothing.
        self._overlapping = False
        self._sharing = False
        self._soon: deque[tuple[Reader, Callable[[], object]]] = deque()
        self._beat = Beat()
        self._due = 0.0  # while a flush is put off, until when
        self._wake = trio.Event()
        self._room = trio.Event()
        self._room.set()

    # Registration

    def enter(self, reader: Reader) -> None:
        """Know a reader, though it is on no channel yet: should the log be lost, it is told."""
        self.readers[reader] = None

    def attach(self, reader: Reader, names: Sequence[str], want: Want) -> None:
        """Put a reader on channels; a channel it is on already takes the new want."""
        self.readers[reader] = None
        if not names:
            return
        wants, wanted = reader.wants, reader.wanted
        if not isinstance(wanted, dict):
            # Counted are only different wants: nearly every reader has the same of all its channels.
            wanted = None if wanted is None or wanted == want else {wanted: len(wants)}
        for name in names:
            channel = self.channels.get(name)
            if channel is None:
                channel = self.channels[name] = Channel(name)
            if wanted is not None:
                if name in wants:
                    _uncount(wanted, wants[name])
                wanted[want] = wanted.get(want, 0) + 1
            wants[name] = want
            channel.readers[reader] = None
            channel.order = None
        reader.wanted = want if wanted is None or len(wanted) == 1 else wanted
        reader.multi = len(wants) > 1

    def detach(self, reader: Reader, names: Iterable[str]) -> None:
        """Take a reader off channels; a channel without readers goes. If it stays on others, it must have been given
        what is pending (``PushReader.catch_up``): a flush that is under way still has it on its list."""
        wanted = reader.wanted
        for name in names:
            want = reader.wants.pop(name, None)
            if want is None:
                continue
            if isinstance(wanted, dict):
                _uncount(wanted, want)
            channel = self.channels[name]
            del channel.readers[reader]
            channel.order = None
            if not channel.readers:
                del self.channels[name]
        if not reader.wants:
            reader.wanted = None
        elif isinstance(wanted, dict) and len(wanted) == 1:
            (reader.wanted,) = wanted
        reader.multi = len(reader.wants) > 1

    def leave(self, reader: Reader) -> None:
        """Forget a reader altogether: a flush that is under way gives it nothing more either."""
        self.detach(reader, list(reader.wants))
        self.readers.pop(reader, None)
        reader.offset = self.history.last

    # Delivery

    def deliver(self, update: Update) -> None:
        """Offer one kept update to its readers. Called in offset order; never waits."""
        before: Channel | None = None
        channels = self.channels
        for name in channels_of(update) if channels else ():
            channel = channels.get(name)
            if channel is None:
                continue
            if before is not None:
                self._overlapping = True
            before = channel
            if not channel.pending:
                self._dirty.append(channel)
            channel.pending.append(update)
            self._pending_bytes += len(update.body)
        if update.targets is not None:
            self._notices.append(update)
            self._pending_bytes += len(update.body)
        if self._dirty or self._notices:
            if not self._due or perf_counter() >= self._due:
                self._wake.set()
            if self._pending_bytes > PENDING_BYTES and self._room.is_set():
                self._room = trio.Event()
        elif not self._flushing:
            self.flushed = update.offset

    def soon(self, reader: Reader, callback: Callable[[], object]) -> None:
        """Call back for a reader when those are through who run now, before the next flush; of many, others run in
        between. It must not wait; if it raises, that ends this reader."""
        self._soon.append((reader, callback))
        self._wake.set()

    @property
    def full(self) -> bool:
        """Whether publishers have to wait (``wait_room``)."""
        return self._pending_bytes > PENDING_BYTES

    def urgent(self) -> bool:
        """Whether the flusher has something to do."""
        return self._flushing or self._wake.is_set()

    async def wait_room(self) -> None:
        """Hold a publisher back while the node has more to send than it can."""
        if self._pending_bytes > PENDING_BYTES:
            await self._room.wait()

    @property
    def pending_bytes(self) -> int:
        """Bytes of updates that are yet to be taken by the flusher."""
        return self._pending_bytes

    def given(self) -> int:
        """The offset up to which every reader that holds nothing back has been given everything."""
        return self.flushed if self._dirty or self._notices or self._flushing else self.history.last

    async def run(self) -> None:
        """The flusher: sends what is pending, for ever."""
        while True:
            await self._woken()
            # One channel is not put off: there, what comes during a flush joins anyhow.
            if len(self._dirty) > 1 and (left := self._beat.left(perf_counter())):
                await self._gather(left)
            if (self._dirty or self._notices) and self._wanted():
                await self._take_along()
            if self._dirty or self._notices:
                began = perf_counter()
                await self._flush()
                self._beat.flushed(began, perf_counter())

    async def _woken(self) -> None:
        await self._wake.wait()
        self._wake = trio.Event()
        await self._call_soon()

    async def _take_along(self) -> None:
        """Have what can be read by now read before a flush, so that its updates are joined.

        Whether the flusher or the poller's leader comes first in a pass of Trio's loop is chance, and every second
        flush would go without what came during the one before. It is one pass, and an update that comes alone finds
        nothing to read, so nothing is held.
        """
        self._wake.set()  # who reads meanwhile should know that this waits
        await self._woken()

    async def _call_soon(self) -> None:
        """What is there now; if this is cancelled, the rest of it stays there."""
        started = self._ran = perf_counter()
        for _ in range(len(self._soon)):
            reader, callback = self._soon.popleft()
            try:
                callback()
            except Exception as error:
                _end(reader, error)
            if perf_counter() - started > YIELD_AFTER_S:
                started = await self._yield()

    async def _gather(self, seconds: float) -> None:
        """Put a flush off. What comes after these seconds ends that, or soon after them the clock."""
        before = self._pending_bytes
        self._due = perf_counter() + seconds
        with trio.move_on_after(seconds + GRACE_S):
            while perf_counter() < self._due:
                await self._woken()
        self._due = 0.0
        self._beat.put_off(before, self._pending_bytes)
        await self._call_soon()

    async def _flush(self) -> None:
        """Send all that is pending now."""
        self._flushing = True
        history = self.history
        epoch, target = history.epoch, history.last
        dirty, self._dirty = self._dirty, []
        notices, self._notices = self._notices, []
        self._sharing, self._overlapping = self._overlapping, False
        batches: list[tuple[Channel, list[Update]]] = []
        for channel in dirty:
            batches.append((channel, channel.pending))
            channel.pending = []
        first = [batch[0].at_ms for _, batch in batches[:1]] + [notice.at_ms for notice in notices[:1]]
        if self._pending_bytes > JOIN_BYTES:
            batches = [(channel, part) for channel, batch in batches for part in _split(batch)]
        self._pending_bytes = 0
        self._room.set()
        shared: dict[Reader, list[list[Update]]] = {}
        started = self._ran = perf_counter()
        sent = self.counters.delivered
        if notices:
            started = await self._find_audience(notices, epoch, shared, started)
        heard = list(shared)
        for start in range(0, len(batches), AHEAD):
            if history.epoch != epoch:
                break  # the log was lost meanwhile; readers have been told, what is left of the flush is void
            ahead = [
                (channel, batch, *self._first_wire(channel, batch, epoch))
                for channel, batch in batches[start : start + AHEAD]
            ]
            started = await self._send(ahead, epoch, shared, started)
        if shared:
            await self._send_shared(shared, epoch, started)
        for reader in heard:
            reader.multi = len(reader.wants) > 1
        if self.counters.delivered > sent:
            # One sample for each flush, of what waited longest for it: an upper bound for all the others.
            self.counters.delays.add(min(first))
        if history.epoch == epoch:  # else log_lost has said from where on it is being given
            self.flushed = target
        self._flushing = False
        if self._wires:
            self._wires.clear()
            self._wires_bytes = 0

    async def _find_audience(
        self, notices: list[Update], epoch: str, shared: dict[Reader, list[list[Update]]], started: float
    ) -> float:
        """Give each notification to the readers that it is for. Returns when the flusher last yielded.

        For this flush they count as being on several channels, so that all they get is merged in log order. Who comes
        while this yields is behind the log's end already.
        """
        for notice in notices:
            try:
                audience = tuple(self._audience(notice))
            except Exception as error:  # another node may know targets that this one does not
                log_event(LOG, logging.ERROR, "delivery_failed", offset=notice.offset, exc_info=error)
                continue
            for start in range(0, len(audience), LOOK_EVERY):
                for reader in audience[start : start + LOOK_EVERY]:
                    reader.multi = True
                    shared.setdefault(reader, [[]])[0].append(notice)
                if perf_counter() - started > YIELD_AFTER_S:
                    started = await self._yield()
                    if self.history.epoch != epoch:
                        return started
        return started

    def _first_wire(self, channel: Channel, batch: list[Update], epoch: str) -> tuple[WireForm | None, bytes]:
        """A channel's batch in the form of its first reader, which mostly is that of them all."""
        order = channel.order
        if order is None:
            order = channel.order = tuple(channel.readers)
        if not order or order[0].multi or not order[0].direct:
            return None, b""
        form = order[0].form
        try:
            return form, self._encode(form, batch, epoch)
        except Exception:
            return None, b""  # it is raised again where it can be contained

    def _encode(self, form: WireForm, batch: list[Update], epoch: str) -> bytes:
        return self.encoded(form, batch, epoch) if self._sharing else form.updates(batch, epoch)

    async def _send(
        self,
        ahead: list[tuple[Channel, list[Update], WireForm | None, bytes]],
        epoch: str,
        shared: dict[Reader, list[list[Update]]],
        started: float,
    ) -> float:
        """Send batches of one epoch to their channels' readers. Returns when the flusher last yielded.

        The hot path. Per reader it does one ``send`` and a handful of attribute reads, and nothing else:
        what depends on the batch is worked out before the loop, what depends on the wire form once per form.
        """
        for channel, batch, form, wire in ahead:
            order = channel.order
            if order is None:
                order = channel.order = tuple(channel.readers)
            if len(batch) == 1:
                first = last = batch[0].offset
                has_end = batch[0].ended
            else:
                first, last = batch[0].offset, batch[-1].offset
                has_end = any(update.ended for update in batch)
            size = len(wire)
            wires: dict[WireForm | None, bytes] = {form: wire}
            given = 0
            for start in range(0, len(order), LOOK_EVERY):
                readers = order[start : start + LOOK_EVERY]
                given += len(readers)
                for reader in readers:
                    try:
                        if reader.multi:
                            shared.setdefault(reader, []).append(batch)
                            given -= 1
                        elif reader.direct and reader.offset < first and not (has_end and reader.open_jobs is not None):
                            if reader.form is not form:
                                wanted = reader.form
                                if wanted not in wires:
                                    wires[wanted] = self._encode(wanted, batch, epoch)
                                form, wire = wanted, wires[wanted]
                                size = len(wire)
                            # Fetched, then called: as one expression CPython 3.11 looks for a method, never learns that
                            # it is a slot, and the loop round the send costs 0.37 instead of 0.33 µs.
                            send = reader.sock_send
                            try:
                                sent = send(wire)
                            except BlockingIOError:
                                sent = 0
                            except OSError:
                                given -= 1
                                raise
                            reader.offset = last
                            if sent != size:
                                reader.stalled(wire, sent)
                        else:
                            given -= 1  # whoever takes it counts what goes out
                            if reader.offset < last:
                                reader.take(batch)
                    except Exception as error:
                        _end(reader, error)
                if perf_counter() - started > YIELD_AFTER_S:
                    started = await self._yield()
                    if self.history.epoch != epoch:
                        self.counters.delivered += given * len(batch)
                        return started
            self.counters.delivered += given * len(batch)
        return started

    async def _send_shared(self, shared: dict[Reader, list[list[Update]]], epoch: str, started: float) -> None:
        """Send to readers on several channels: one copy of each update, in log order.

        Readers that watch the same things meet the same merged batch, so its encoding is shared, too.
        """
        for reader, parts in shared.items():
            if self.history.epoch != epoch:
                return
            updates = parts[0]
            if len(parts) > 1:
                merged = {update.offset: update for part in parts for update in part}
                updates = [merged[offset] for offset in sorted(merged)]
            try:
                for batch in _split(updates):
                    last = batch[-1].offset
                    if reader.offset >= last:
                        continue
                    ends = reader.open_jobs is not None and any(update.ended for update in batch)
                    if not reader.direct or reader.offset >= batch[0].offset or ends:
                        reader.take(batch)
                        continue
                    write(reader, self.encoded(reader.form, batch, epoch), last)
                    self.counters.delivered += len(batch)
            except Exception as error:
                _end(reader, error)
            if perf_counter() - started > YIELD_AFTER_S:
                started = await self._yield()

    async def _yield(self) -> float:
        """Let other tasks run, if there is anything for them to do. Returns from when on it is the flusher's turn.

        To 1,000 readers, one update in flight, a delivery costs 1.17 times the bare loop's; 1.26 with a pass through
        Trio's loop every millisecond, and 1.14 with a loop round the sends that checks nothing at all.
        """
        now = perf_counter()
        if now - self._ran > YIELD_ALWAYS_S or self._wanted():
            await trio.lowlevel.checkpoint()
            if self._wanted():  # by chance it was this task's turn first, as in ``_take_along``
                await trio.lowlevel.checkpoint()
            now = self._ran = perf_counter()
        return now

    def encoded(self, form: WireForm, batch: Sequence[Update], epoch: str) -> bytes:
        """Updates in a wire form: made once in a flush, whoever they are for and over whatever channels they go."""
        if not self._flushing:
            return form.updates(batch, epoch)
        key = (form, batch[0].offset if len(batch) == 1 else tuple([update.offset for update in batch]))
        wire = self._wires.get(key)
        if wire is None:
            wire = form.updates(batch, epoch)
            self._wires_bytes += len(wire)
            if self._wires_bytes > SHARED_BYTES:
                self._wires.clear()
                self._wires_bytes = len(wire)
            self._wires[key] = wire
        return wire

    def log_lost(self) -> None:
        """A new epoch began: nothing pending counts any more, every reader starts again from a snapshot."""
        for channel in self._dirty:
            channel.pending = []
        self._dirty = []
        self._notices = []
        self._pending_bytes = 0
        self._wires.clear()
        self._wires_bytes = 0
        self._room.set()
        self.flushed = self.history.last
        for reader in list(self.readers):
            try:
                reader.log_lost()
            except Exception as error:
                _end(reader, error)


def _uncount(wanted: dict[Want, int], want: Want) -> None:
    wanted[want] -= 1
    if not wanted[want]:
        del wanted[want]


def _end(reader: Reader, error: Exception) -> None:
    """End one reader's connection; whatever went wrong with it, or goes wrong here, the others are served."""
    client_id = getattr(reader, "client_id", None)
    if not isinstance(error, OSError):
        log_event(LOG, logging.ERROR, "delivery_failed", clientId=client_id, exc_info=error)
    try:
        reader.broken()
    except Exception as another:
        log_event(LOG, logging.ERROR, "delivery_failed", clientId=client_id, exc_info=another)


def _split(batch: list[Update]) -> Iterable[list[Update]]:
    """Cut a batch so that each part's texts stay near ``JOIN_BYTES``; nearly always it is one part."""
    if sum([len(update.body) for update in batch]) <= JOIN_BYTES:
        yield batch
        return
    part: list[Update] = []
    size = 0
    for update in batch:
        if part and size + len(update.body) > JOIN_BYTES:
            yield part
            part, size = [], 0
        part.append(update)
        size += len(update.body)
    yield part
