"""Whole conversations with a running server: several connections at once, each said something, or half of it.

The bytes of an input are a script, so that a fuzzer can change it and a file can keep it. Two bytes are a step: which
connection and what is done, and with what. The server runs in a thread of this process, so that coverage counts what
it does.
"""

from __future__ import annotations

import atexit
import logging
import socket
import struct
import threading
from contextlib import suppress
from typing import Final

import trio

from server.app import running
from server.node import Node
from tests.support import PATIENCE_S, configure, wait_for

CONNECTIONS: Final = 3
STEPS: Final = 40
_HANDSHAKE: Final = (
    b"GET /ws/jobs HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
_HEAD: Final = b" HTTP/1.1\r\nHost: localhost\r\n"
_JSON: Final = b"Content-Type: application/json\r\n"
_LINES: Final = b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
# What makes sense to the server, whole and in parts.
WORDS: Final = (
    b"GET /health" + _HEAD + b"\r\n",
    b"GET /api/v2/jobs" + _HEAD + b"\r\n",
    b"GET /api/v2/jobs/stream" + _HEAD + b"Accept: text/event-stream\r\n\r\n",
    b"GET /api/v2/jobs/stream?jobIds=a,b&last_seen=1" + _HEAD + b"\r\n",
    b"GET /api/v2/jobs/poll?timeout=0&jobIds=a" + _HEAD + b"\r\n",
    b"GET /api/v2/jobs/poll?timeout=1&client_id=c" + _HEAD + b"\r\n",
    b"GET /api/sse?channels=x,y" + _HEAD + b"\r\n",
    b"POST /api/v2/jobs/a/updates" + _HEAD + _JSON + b"Content-Length: 31\r\n\r\n",
    b'{"userId":"u","status":"queued"}'[:31],
    b"}",
    b"POST /api/v2/updates" + _HEAD + _JSON + b"Content-Length: 42\r\n\r\n[",
    b'{"jobId":"a","userId":"u","progress":5.5}',
    b"]",
    b"POST /api/v2/updates" + _HEAD + _LINES,
    b'2a\r\n{"jobId":"a","userId":"u","progress":5.5}\n\r\n',
    b"3\r\nx\n{\r\n",
    b"0\r\n\r\n",
    b"POST /api/v2/jobs" + _HEAD + _JSON + b"Expect: 100-continue\r\nContent-Length: 28\r\n\r\n",
    b'{"jobId":"b","userId":"you"}',
    b"DELETE /api/v2/jobs/a" + _HEAD + b"\r\n",
    b"POST /api/v2/jobs/a/cancel" + _HEAD + b"Content-Length: 0\r\n\r\n",
    b"GET /api/v2/jobs/a/history" + _HEAD + b"Connection: close\r\n\r\n",
    b"POST /api/sse/message" + _HEAD + _JSON + b"Content-Length: 43\r\n\r\n",
    b'{"target":"broadcast","event":"e","data":1}',
    b"GET /api/brand-monitor/progress/t" + _HEAD + b"\r\n",
    b"PATCH /api/brand-monitor/progress/t" + _HEAD + _JSON + b"Content-Length: 2\r\n\r\n{}",
    b"GET /api/projects/p/initial-report-status/stream" + _HEAD + b"\r\n",
    b"HEAD /api/v2/jobs/a" + _HEAD + b"\r\n",
    b"OPTIONS *" + _HEAD + b"\r\n",
    _HANDSHAKE + b"\r\n",
    _HANDSHAKE + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
    _HANDSHAKE + b"Sec-WebSocket-Protocol: statuswire.v1.lines\r\n\r\n",
    _HANDSHAKE,
    b"X-Y: z\r\n",
    b"\r\n",
)  # fmt: skip
MESSAGES: Final = (
    b'{"type":"subscribe"}',
    b'{"type":"subscribe","jobIds":["a","b"],"channels":["x"],"ref":1}',
    b'{"type":"subscribe","all":true,"minInterval":50,"fields":["progress"]}',
    b'{"type":"subscribe","jobIds":["a"],"last_seen":"0"}',
    b'{"type":"unsubscribe"}',
    b'{"type":"unsubscribe","jobIds":["a"]}',
    b'{"type":"get","jobIds":["a","b","\\u0000"]}',
    b'{"type":"publish","ref":2,"updates":[{"jobId":"a","userId":"u","progress":50},{"jobId":"b"},7]}',
    b'{"type":"publish","updates":[{"jobId":"a","userId":"u","status":"completed"}]}',
    b'{"type":"notification","target":"broadcast","event":"e","data":1}',
    b'{"type":"ack","id":"0:0"}',
    b'{"type":"auth","token":"x"}',
    b'{"type":"ping","ref":"r"}',
    b'{"type":"nothing"}',
    b"{",
)


def conversation(data: bytes) -> None:
    """Follow a script; afterwards the server must be as if nothing had been, and serve."""
    server = _server()
    sockets: dict[int, socket.socket] = {}
    try:
        _follow(data, server, sockets)
    finally:
        for sock in sockets.values():
            sock.close()
    with server.connect() as sock:
        sock.sendall(WORDS[0])
        answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
    with suppress(TimeoutError):
        wait_for(lambda: not server.node.connections, every=0.001)
    assert not server.node.connections, "a connection was left behind"
    assert not server.node.streams
    assert not server.node.hub.channels
    assert not server.node.limits.unfinished
    assert not server.complaints, server.complaints


def _follow(data: bytes, server: _Server, sockets: dict[int, socket.socket]) -> None:
    position = 0
    for _ in range(STEPS):
        step, position = data[position : position + 2], position + 2
        if len(step) < 2:
            return
        which, deed, what = step[0] % CONNECTIONS, step[0] // CONNECTIONS % 12, step[1]
        if which not in sockets:
            sockets[which] = server.connect()
        sock = sockets[which]
        rest, size = data[position:], what % 64
        with suppress(OSError):
            if deed <= 2:
                sock.sendall(WORDS[what % len(WORDS)])
            elif deed == 3:
                word = WORDS[what % len(WORDS)]
                sock.sendall(word[: len(word) // 2])
                sock.sendall(word[len(word) // 2 :])
            elif deed <= 6:
                sock.sendall(frame(MESSAGES[what % len(MESSAGES)], 0x81))
            elif deed == 7:
                sock.sendall(frame(rest[:size], 0x81 if what < 128 else 0xC1))
                position += size
            elif deed == 8:
                sock.sendall(frame(rest[: size // 4], what))
                position += size // 4
            elif deed == 9:
                sock.sendall(rest[:size])
                position += size
            elif deed == 10:
                sock.settimeout(0.002)
                sock.recv(65536)
                sock.settimeout(PATIENCE_S)
            elif what % 3 == 0:
                sock.shutdown(socket.SHUT_WR)
            else:
                if what % 3 == 1:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sockets.pop(which).close()


def frame(payload: bytes, first: int) -> bytes:
    """A client's frame, with a mask of zeros."""
    return bytes([first, 0x80 | min(len(payload), 125)]) + bytes(4) + payload[:125]


class _Server:
    """The server in its thread."""

    def __init__(self) -> None:
        self.node: Node
        self.complaints: list[str] = []
        self._port = 0
        self._ready = threading.Event()
        self._stop: trio.CancelScope
        self._token: trio.lowlevel.TrioToken
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.complaints.append(  # type: ignore[method-assign]
            f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}"
        )
        logging.getLogger("statuswire").addHandler(handler)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        atexit.register(self.stop)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._stop:
            history = {"max_updates": 200, "max_jobs": 50}
            async with running(configure({"history": history})) as (self.node, addresses):
                self._port = int(addresses[0].rpartition(":")[2])
                self._ready.set()
                await trio.sleep_forever()

    def connect(self) -> socket.socket:
        """One connection."""
        return socket.create_connection(("127.0.0.1", self._port), PATIENCE_S)

    def stop(self) -> None:
        """End it."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: self._stop.cancel())
        self._thread.join(PATIENCE_S)


_SERVERS: list[_Server] = []


def _server() -> _Server:
    if not _SERVERS:
        _SERVERS.append(_Server())
    return _SERVERS[0]
