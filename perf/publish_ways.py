"""Publishing without HTTP: over WebSocket, and through Redis; what an update costs the server."""

from __future__ import annotations

import json
import os
import socket
import time
from functools import partial

from perf.measure import Measure, Row, Start, Target, Watch, alone, server
from perf.nodes import redis_server

EACH = Measure("each", "server CPU per update", "µs", 2)
RATE = Measure("rate", "updates/s", "/s", 0)
JOBS = 100
# Updates in a message, and messages that are on their way.
OVER_WEBSOCKET = {"one a message, 16 on their way": (1, 16), "100 a message, 2 on their way": (100, 2)}
HANDSHAKE = (
    "GET /ws/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
THROUGH_REDIS = {
    "stream": ("XADD", "statuswire:ingest", "*", "data"),
    "channel": ("PUBLISH", "job_progress_updates"),
}
PIPELINE = 200
LATE_S = 60.0


def update(number: int, mark: str) -> dict[str, object]:
    """An update of one of the jobs; no two are byte-equal."""
    fields = {"userId": "bench", "status": "processing", "progress": 45, "message": f"{mark} {number}"}
    return {"jobId": f"bench-{number % JOBS}", **fields}


def masked(text: bytes) -> bytes:
    """A text frame of a client, masked with zeros (RFC 6455, section 5.2)."""
    size = len(text)
    if size < 126:
        head = bytes([0x81, 0x80 | size])
    else:
        head = b"\x81\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\x81\xff" + size.to_bytes(8, "big")
    return head + bytes(4) + text


def over_websocket(target: Target, seconds: float, batch: int, depth: int) -> dict[str, float]:
    """As fast as answered. Raises OSError if something is refused."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(HANDSHAKE.format(port=target.port).encode())
        while b'"connected"' not in connection.recv(65536):
            pass
        updates = [update(number, "ws") for number in range(batch)]
        frame = masked(json.dumps({"type": "publish", "ref": 1, "updates": updates}).encode())
        watch = Watch(target, os.getpid())
        began = time.monotonic()
        connection.sendall(frame * depth)
        answered, rest = 0, b""
        while (passed := time.monotonic() - began) < seconds:
            rest += connection.recv(65536)
            count = rest.count(b'"published"')
            if rest.count(b'"accepted":%d' % batch) < count or b'"error"' in rest:
                raise OSError(f"publishing failed: {rest[-500:]!r}")
            answered += count
            rest = rest[rest.rfind(b'"published"') + 11 :] if count else rest
            connection.sendall(frame * count)
        result = watch.stop()
    return result | {"each": result["cpu"] / (answered * batch) * 1e6, "rate": answered * batch / passed}


def command(*words: str) -> bytes:
    """A command for Redis (RESP)."""
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def through_redis(target: Target, redis: Target, source: str, number: int) -> dict[str, float]:
    """So many updates as fast as Redis takes them, until the server has accepted the last; its share is counted.

    Raises:
        OSError: it did not accept them in time.
    """
    mark = f"{source}-{time.monotonic_ns()}"
    commands = [command(*THROUGH_REDIS[source], json.dumps(update(n, mark))) for n in range(number)]
    last = update(number - 1, mark)
    with socket.create_connection(("127.0.0.1", redis.port), timeout=10) as connection:
        watch = Watch(target, os.getpid(), redis.pid)
        began = time.monotonic()
        for start in range(0, number, PIPELINE):
            part = commands[start : start + PIPELINE]
            connection.sendall(b"".join(part))
            answers = b""
            while answers.count(b"\r\n") < len(part) * (2 if source == "stream" else 1):
                answers += connection.recv(65536)
        while target.ask("GET", f"/api/v2/jobs/{last['jobId']}").get("message") != last["message"]:
            if time.monotonic() - began > LATE_S:
                raise OSError(f"{source}: not everything was taken in")
            time.sleep(0.05)
        passed = time.monotonic() - began
        result = watch.stop()
    return result | {"each": result["cpu"] / number * 1e6, "rate": number / passed}


def run(start: Start, program: str | None, *, quick: bool) -> list[Row]:
    """The lines of all ways."""
    seconds, rounds, number = (0.2, 1, 1_000) if quick else (0.5, 3, 5_000)
    rows: list[Row] = []
    for store in ("memory:", "sqlite:"):
        with start(store) as target:
            for way, (batch, depth) in OVER_WEBSOCKET.items():
                over_websocket(target, 0.1, batch, depth)
                rows += alone(
                    f"{store.rstrip(':')}, over WebSocket, {way}",
                    (EACH, RATE),
                    rounds,
                    partial(over_websocket, target, seconds, batch, depth),
                )
    with redis_server() as redis, server(f"redis://127.0.0.1:{redis.port}", program) as target:
        target.ask("POST", "/api/v2/updates", json.dumps([update(n, "first") for n in range(JOBS)]).encode())
        for source in THROUGH_REDIS:
            through_redis(target, redis, source, JOBS)
            rows += alone(
                f"Redis, through its {source}",
                (EACH, RATE),
                rounds,
                partial(through_redis, target, redis, source, number),
            )
    return rows
