"""A hub over a log that the test writes, and readers that take down what they are given."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from protocol.update import Update
from protocol.watch import ANY, Filter
from protocol.wire import Framing, WireForm
from server.channel import Want
from server.history import History
from server.hub import Hub


def update(offset: int, job_id: str = "a", user: str = "u", *, ended: bool = False, body: bytes = b'{"x":1}') -> Update:
    return Update(offset, 0, "status_update", job_id, user, None, "queued", offset, body, ended, ended)


class CountingForm(WireForm):
    """A form that says how often it encoded what."""

    def __init__(self) -> None:
        super().__init__(Framing.JSON, None)
        self.encoded: list[list[int]] = []

    def updates(self, updates: Sequence[Update], epoch: str) -> bytes:
        self.encoded.append([update.offset for update in updates])
        return b"".join(b"%s:%d " % (epoch.encode(), update.offset) for update in updates)


class Recorder:
    """A reader that takes everything down. ``room`` is what its socket still takes."""

    def __init__(self, form: WireForm, *, offset: int = 0, direct: bool = True) -> None:
        self.direct = direct
        self.offset = offset
        self.form = form
        self.multi = False
        self.open_jobs: set[str] | None = None
        self.wanted: Want | dict[Want, int] | None = None
        self.wants: dict[str, Want] = {}
        self.sent: list[bytes] = []
        self.taken: list[list[int]] = []
        self.rest: list[tuple[bytes, int]] = []
        self.room = 10**9
        self.failure: Exception | None = None
        self.ended = False
        self.resets = 0

    def sock_send(self, data: bytes, /) -> int:
        if self.failure is not None:
            raise self.failure
        if not self.room:
            raise BlockingIOError
        size = min(self.room, len(data))
        self.sent.append(bytes(data[:size]))
        return size

    def take(self, batch: Sequence[Update]) -> None:
        if self.failure is not None:
            raise self.failure
        self.taken.append([update.offset for update in batch])

    def stalled(self, wire: bytes, sent: int) -> None:
        self.direct = False
        self.rest.append((wire, sent))

    def broken(self) -> None:
        self.ended = True
        self.direct = False

    def log_lost(self) -> None:
        self.resets += 1
        if self.failure is not None:
            raise self.failure


class Bench:
    """A hub over a log that the test writes."""

    def __init__(self, nursery: trio.Nursery | None) -> None:
        self.history = History("e", max_updates=10_000, max_age=1e9, max_bytes=10**9)
        self.hub = Hub(self.history)
        self.form = CountingForm()
        if nursery is not None:  # else the flusher is the test's to start
            nursery.start_soon(self.hub.run)

    def reader(self, *names: str, form: WireForm | None = None, filter: Filter = ANY) -> Recorder:
        reader = Recorder(form or self.form, offset=self.history.last)
        self.hub.attach(reader, names, Want(filter, reader.form))
        return reader

    def deliver(self, *updates: Update) -> None:
        for one in updates:
            self.history.append(one)
            self.hub.deliver(one)

    def next(self, job_id: str = "a", user: str = "u", *, ended: bool = False, body: bytes = b'{"x":1}') -> int:
        one = update(self.history.last + 1, job_id, user, ended=ended, body=body)
        self.deliver(one)
        return one.offset
