"""The bare limit: a Python loop of `sock.send` with the same bytes, behind just enough to be loaded the same way.

It understands nothing: a request for `/ws/…` gets a canned 101, one for `…/stream` a canned event stream head, a POST
a canned answer, and every update found in it (by its time stamp) goes to all readers as a template with version and
time stamp filled in. All POSTs that are there are taken in before one loop sends their updates, joined, in one `send`
a socket. What that costs is what a Python server on this machine cannot go below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import select
import socket
import time
from dataclasses import dataclass, field

STAMP = re.compile(rb"t=(\d+)")
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RECORD = (
    '"jobId":"bench","userId":"bench","status":"processing","progress":45,"message":"t=0","attempt":1,"version":0,'
    '"createdAt":"2026-01-01T00:00:00.000Z","startedAt":"2026-01-01T00:00:00.000Z","timestamp":"2026-01-01T00:00:00.000Z"'
)
WS_UPDATE = b'{"type":"status_update","id":"e:1",%b}' % RECORD.encode()
SSE_UPDATE = b'id: e:1\ndata: {"type":"status_update",%b}\n\n' % RECORD.encode()
CONNECTED = b'{"type":"connected","clientId":"c","userId":"anonymous","heartbeat":30,"id":"e:0"}'
SUBSCRIBED = b'{"type":"subscribed","jobIds":["bench"],"denied":[],"snapshot":[%b],"id":"e:0"}'
EVENTS = b'retry: 2000\ndata: {"type":"connected"}\n\nid: e:0\ndata: {"type":"snapshot","jobs":[%b]}\n\n'
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\n"
    b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def frame(payload: bytes) -> bytes:
    """A whole WebSocket text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)


def chunk(data: bytes) -> bytes:
    """One chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Template:
    """An update message whose version and time stamp can be filled in."""

    def __init__(self, payload: bytes) -> None:
        found = {"version": re.search(rb'"version":(\d+)', payload), "stamp": STAMP.search(payload)}
        spans = sorted((match.span(1), name) for name, match in found.items() if match)
        if len(spans) != 2:
            raise ValueError(f"a template needs a version and a time stamp: {payload!r}")
        (first, self._first_is), (second, _) = spans
        self._parts = payload[: first[0]], payload[first[1] : second[0]], payload[second[1] :]

    def fill(self, version: int, stamp: bytes) -> bytes:
        """The message's bytes."""
        start, middle, end = self._parts
        if self._first_is == "version":
            return b"%b%d%b%b%b" % (start, version, middle, stamp, end)
        return b"%b%b%b%d%b" % (start, stamp, middle, version, end)


@dataclass
class Bare:
    """All state of the loop."""

    listener: socket.socket
    epoll: select.epoll
    fresh: dict[int, socket.socket] = field(default_factory=dict)  # accepted, nothing known about them yet
    websockets: dict[int, socket.socket] = field(default_factory=dict)
    streams: dict[int, socket.socket] = field(default_factory=dict)
    unfinished: dict[int, bytes] = field(default_factory=dict)  # the beginning of a request
    stamps: list[bytes] = field(default_factory=list)  # updates taken in and not sent yet
    ws_template: Template = field(default_factory=lambda: Template(WS_UPDATE))
    sse_template: Template = field(default_factory=lambda: Template(SSE_UPDATE))
    chunked: bool = True
    version: int = 0
    sends: int = 0
    stalls: int = 0
    loop_cpu_ns: int = 0


def snapshot(bare: Bare) -> bytes:
    """The record as JSON."""
    return b"{%b}" % RECORD.replace('"version":0', f'"version":{bare.version}').encode()


def greet(bare: Bare, number: int, connection: socket.socket, data: bytes) -> None:
    """The first bytes of a connection say what it is."""
    if b"\r\n\r\n" not in data:
        return
    del bare.fresh[number]
    if data.startswith(b"GET /ws/"):
        bare.websockets[number] = connection
        connection.send(SWITCH + frame(CONNECTED))
    elif data.startswith(b"GET /api/v2/jobs/stream"):
        bare.streams[number] = connection
        connection.send(STREAM_HEAD + chunk(EVENTS % snapshot(bare)))
    else:
        bare.unfinished[number] = b""
        requests(bare, number, connection, data)


def requests(bare: Bare, number: int, connection: socket.socket, data: bytes) -> None:
    """HTTP requests: publishes and the bench's own questions."""
    data = bare.unfinished[number] + data
    while (end := data.find(b"\r\n\r\n")) >= 0:
        match = LENGTH.search(data, 0, end)
        body_end = end + 4 + (int(match[1]) if match else 0)
        if len(data) < body_end:
            break
        connection.send(answer(bare, data[: data.index(b" HTTP/")], data[end + 4 : body_end]))
        data = data[body_end:]
    bare.unfinished[number] = data


def answer(bare: Bare, line: bytes, body: bytes) -> bytes:
    """The answer to one request."""
    if line == b"GET /bare":
        counters = {name: getattr(bare, name) for name in ("sends", "stalls", "loop_cpu_ns", "version")}
        text = json.dumps(counters).encode()
    elif line == b"POST /bare":
        text = set_template(bare, json.loads(body))
    elif line == b"POST /api/v2/updates":
        found = STAMP.findall(body)
        bare.stamps += found
        text = b'{"accepted":%d,"duplicates":0,"rejected":[],"id":"e:%d"}' % (len(found), bare.version)
    else:
        bare.stamps += STAMP.findall(body)
        text = b'{"id":"e:%d","version":%d}' % (bare.version, bare.version)
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def set_template(bare: Bare, wanted: dict[str, object]) -> bytes:
    """Takes over a message as another server sent it."""
    wire = bytes.fromhex(str(wanted["hex"]))
    if wanted["transport"] == "ws":
        size = wire[1] & 127
        bare.ws_template = Template(wire[10 if size == 127 else 4 if size == 126 else 2 :])
    else:
        bare.sse_template = Template(wire)
        bare.chunked = bool(wanted["chunked"])
    return b"{}"


def send_to(bare: Bare, connections: dict[int, socket.socket], data: bytes) -> None:
    """The loop everything is measured against."""
    size = len(data)
    began = time.process_time_ns()
    for connection in connections.values():
        try:
            sent = connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            continue  # its end is seen by the epoll loop
        if sent != size:
            bare.stalls += 1
            connection.setblocking(True)
            with contextlib.suppress(OSError):
                connection.sendall(data[sent:])
            connection.setblocking(False)
    bare.loop_cpu_ns += time.process_time_ns() - began
    bare.sends += len(connections)


def flush(bare: Bare) -> None:
    """Sends everything taken in, joined."""
    stamps, bare.stamps = bare.stamps, []
    versions = range(bare.version + 1, bare.version + 1 + len(stamps))
    bare.version += len(stamps)
    if bare.websockets:
        texts = map(bare.ws_template.fill, versions, stamps)
        send_to(bare, bare.websockets, b"".join(map(frame, texts)))
    if bare.streams:
        data = b"".join(map(bare.sse_template.fill, versions, stamps))
        send_to(bare, bare.streams, chunk(data) if bare.chunked else data)


def accept(bare: Bare) -> None:
    """Takes in what waits at the door."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            connection, _address = bare.listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = connection.fileno()
            bare.fresh[number] = connection
            bare.epoll.register(number, select.EPOLLIN)


def receive(bare: Bare, number: int) -> None:
    """Something came on a connection, or its end."""
    table = next(t for t in (bare.fresh, bare.websockets, bare.streams, OTHERS) if number in t)
    connection = table[number]
    try:
        data = connection.recv(262144)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data:
        bare.epoll.unregister(number)
        del table[number]
        bare.unfinished.pop(number, None)
        connection.close()
    elif table is bare.fresh:
        greet(bare, number, connection, data)
        if number in bare.unfinished:
            OTHERS[number] = connection
    elif table is OTHERS:
        requests(bare, number, connection, data)
    elif table is bare.websockets and b"subscribe" in data:
        connection.send(frame(SUBSCRIBED % snapshot(bare)))


OTHERS: dict[int, socket.socket] = {}  # publishers and the bench


def main() -> None:
    """Serves until killed; prints its address first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    listener = socket.create_server(("127.0.0.1", parser.parse_args().port), backlog=4096)
    listener.setblocking(False)
    bare = Bare(listener, select.epoll())
    bare.epoll.register(listener.fileno(), select.EPOLLIN)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        for number, _events in bare.epoll.poll(-1, 512):
            if number == listener.fileno():
                accept(bare)
            else:
                receive(bare, number)
        if bare.stamps:
            flush(bare)


if __name__ == "__main__":
    main()
