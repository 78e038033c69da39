"""A push reader on one end of a socket pair, the test on the other."""

from __future__ import annotations

import json
import socket

import trio
from trio.testing import wait_all_tasks_blocked

from protocol.update import Update
from protocol.watch import ANY, Filter
from protocol.wire import Framing, wire_form
from server.channel import Want
from server.history import History
from server.hub import Hub
from server.reader import PushReader
from server.wheel import Wheel
from tests.support import PATIENCE_S

FORM = wire_form(Framing.SSE)


class Probe(PushReader):
    """Says what happened to it."""

    __slots__ = ("again", "ends", "resets")

    send_timeout = 60.0

    def on_end(self) -> None:
        self.ends += 1

    def on_log_lost(self) -> None:
        self.resets += 1
        self.post(self.form.message(b'{"type":"reset"}'))

    def reopened(self) -> set[str]:
        return self.again


class Bench:
    """A reader on one end of a socket pair, the test on the other."""

    def __init__(self, nursery: trio.Nursery, *, backlog: int = 100_000, max_updates: int = 10_000) -> None:
        self.history = History("e", max_updates=max_updates, max_age=1e9, max_bytes=10**9)
        self.hub = Hub(self.history)
        self.wheel = Wheel()
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.nursery = nursery
        self.reader = Probe(ours, nursery, self.hub, self.wheel, FORM, backlog_bytes=backlog)
        self.reader.ends = self.reader.resets = 0
        self.reader.again = set()
        nursery.start_soon(self.hub.run)
        nursery.start_soon(self.wheel.run)

    def watch(self, *names: str, filter: Filter = ANY) -> None:
        self.hub.attach(self.reader, names, Want(filter, FORM))
        self.reader.wants_changed()

    def put(
        self, job_id: str = "a", *, size: int = 0, ended: bool = False, urgent: bool = False, kind: str | None = None
    ) -> int:
        offset = self.history.last + 1
        body = json.dumps({"jobId": job_id, "x": "x" * size}, separators=(",", ":")).encode()
        type_ = "job_completed" if ended else "status_update"
        update = Update(offset, 0, type_, job_id, "u", kind, "queued", offset, body, ended, ended or urgent)
        self.history.append(update)
        self.hub.deliver(update)
        return offset

    def fill(self) -> None:
        """Make the socket full, once this update is flushed."""
        self.put(size=20_000)

    async def received(self, ends_with: str | None = None) -> list[dict[str, object]]:
        """What has come by now, whole events; with ``ends_with``, up to an event with this id."""
        data = b""
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    data += self.peer.recv(65536)
                    continue
                except BlockingIOError:
                    pass
                if ends_with is None or f"id: {ends_with}\n".encode() in data:
                    await wait_all_tasks_blocked()
                    try:
                        data += self.peer.recv(65536)
                        continue
                    except BlockingIOError:
                        break
                await trio.lowlevel.wait_readable(self.peer)
        events = []
        for block in data.decode().split("\n\n")[:-1]:
            lines = dict(line.split(": ", 1) for line in block.split("\n"))
            events.append(json.loads(lines["data"]) | ({"cursor": lines["id"]} if "id" in lines else {}))
        return events

    def close(self) -> None:
        self.reader.finish("closed")
        self.hub.leave(self.reader)
        self.reader.sock.close()
        self.peer.close()


def ids(events: list[dict[str, object]]) -> list[object]:
    return [str(event["id"]).partition(":")[2] for event in events if "id" in event]
