"""Ten thousand connections that came and went leave the memory that there was before."""

from __future__ import annotations

import gc
import json
import socket
import struct
import tracemalloc
from typing import Final

import pytest
import trio

from tests.streams import put, traces
from tests.support import server, until

pytestmark = pytest.mark.slow

CYCLES: Final = 10_000
WARM_UP: Final = 600
AT_ONCE: Final = 20
# 25 for each connection: no object is as small. Most of it are tasks that the poller keeps, 64 at most, for turns that
# wait; how many there were at once depends on the machine.
LEFT_BYTES: Final = 250_000
RESET: Final = struct.pack("ii", 1, 0)
UPGRADE: Final = (
    b"GET /ws/jobs HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
EVENTS: Final = b"GET /api/v2/jobs/stream?jobIds=job_1 HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
RECORD: Final = b"GET /api/v2/jobs/job_1 HTTP/1.1\r\nHost: localhost\r\n\r\n"


def subscribe() -> bytes:
    """A frame, masked with zeros."""
    text = json.dumps({"type": "subscribe", "jobIds": ["job_1"]}).encode()
    return bytes([0x81, 0x80 | len(text)]) + bytes(4) + text


# What is sent, what is waited for, and whether the end is a reset.
CLIENTS: Final = (
    (UPGRADE + subscribe(), b'"subscribed"', False),
    (UPGRADE + subscribe(), b'"subscribed"', True),
    (EVENTS, b'"snapshot"', False),
    (EVENTS, b'"snapshot"', True),
    (RECORD, b'"jobId"', False),
)


async def come_and_go(port: int, cycles: int) -> None:
    async def one_after_another(first: int) -> None:
        for number in range(first, cycles, AT_ONCE):
            request, expected, reset = CLIENTS[number % len(CLIENTS)]
            sock = trio.socket.socket()
            with sock, trio.fail_after(60):
                await sock.connect(("127.0.0.1", port))
                await sock.send(request)
                received = b""
                while expected not in received:
                    data = await sock.recv(65536)
                    assert data, received
                    received += data
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async with trio.open_nursery() as nursery:
        for first in range(AT_ONCE):
            nursery.start_soon(one_after_another, first)


def memory() -> int:
    """Bytes that Python has taken, when nothing is garbage."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def test_ten_thousand_connections_leave_the_memory_of_before() -> None:
    limits = {"connects_per_second": 0, "connections_per_address": 0, "connections_per_user": 0}
    async with server(limits=limits) as running:
        put(running, "job_1")
        # Traced from the first on, so that what is freed later was counted before.
        tracemalloc.start()
        try:
            await come_and_go(running.port, WARM_UP)
            await until(lambda: not traces(running))
            before = memory()
            await come_and_go(running.port, CYCLES)
            await until(lambda: not traces(running))
            after = memory()
        finally:
            tracemalloc.stop()
    assert after - before < LEFT_BYTES
