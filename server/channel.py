"""What is watched and by whom, as the flusher sees it: channels, their readers, and what these want."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from protocol.update import Update
from protocol.watch import Filter
from protocol.wire import WireForm


class Want(NamedTuple):
    """What a reader wants of one channel."""

    filter: Filter
    form: WireForm


class Reader(ABC):
    """What the hub asks of a connection that watches something.

    A class of its own for the sake of memory: CPython lays out a base class's slots first, so all that the
    flusher reads of a reader is next to its head, in one or two cache lines instead of five.

    Attributes:
        direct: nothing is held back and nothing is filtered: the flusher may write to the socket itself.
        form: the wire form, when ``direct``.
        multi: it is on several channels; kept by the hub.
        offset: everything up to here has been given, held or filtered.
        open_jobs: named jobs that have not ended yet, for readers that stop with the last; else None.
        sock_send: the socket's non-blocking ``send``.
        wanted: what is wanted of all its channels, None while it is on none; if that is not the same of all, of how
            many channels each is wanted. Kept by the hub.
        wants: channel name to what is wanted of it; kept by the hub.
    """

    __slots__ = ("direct", "form", "multi", "offset", "open_jobs", "sock_send", "wanted", "wants")

    def __init__(self, form: WireForm, offset: int, sock_send: Callable[[bytes | memoryview], int]) -> None:
        self.direct = False
        self.form = form
        self.multi = False
        self.offset = offset
        self.open_jobs: set[str] | None = None
        self.sock_send = sock_send
        self.wanted: Want | dict[Want, int] | None = None
        self.wants: dict[str, Want] = {}

    @abstractmethod
    def take(self, batch: Sequence[Update]) -> None:
        """Accept a batch on the slow path; never waits."""

    @abstractmethod
    def stalled(self, wire: bytes, sent: int) -> None:
        """The socket took only ``sent`` bytes of ``wire``; the rest is the reader's to send."""

    @abstractmethod
    def broken(self) -> None:
        """The socket failed; end this connection."""

    @abstractmethod
    def log_lost(self) -> None:
        """The log began a new epoch: what was held is void."""


class Channel:
    """The readers of one name and what is to be sent to them."""

    __slots__ = ("name", "order", "pending", "readers")

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers: dict[Reader, None] = {}
        # The flusher yields in the middle of a channel, so it walks a tuple, made anew only after a change. Who has
        # left since is passed over: its ``offset`` says that it has been given everything.
        self.order: tuple[Reader, ...] | None = None
        self.pending: list[Update] = []


def write(reader: Reader, wire: bytes, offset: int) -> None:
    """Write to a ``direct`` reader what takes it to ``offset``. The loop in ``Hub._send`` has this inline."""
    try:
        sent = reader.sock_send(wire)
    except BlockingIOError:
        sent = 0
    reader.offset = offset
    if sent != len(wire):
        reader.stalled(wire, sent)
