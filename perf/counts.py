"""The fixed workload whose instructions are counted; `perf.budget` runs it within valgrind.

The real server and its clients run in one task loop over real loopback sockets. A client acts only when the server has
nothing left to do, and only what the server then does is counted: so nothing depends on time, and the counts of two
runs are alike. What is printed last is, for each count, how many times the thing was done.
"""

from __future__ import annotations

import ctypes
import gc
import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import h11
import jwt
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import server.beat
import server.hub
import server.poller
import server.transports.websocket
from server.app import running
from server.config_load import load_config
from server.node import Node

SECRET: Final = "a secret for a benchmark, 32 bytes or more"
FIELDS: Final = {"userId": "bench", "status": "processing", "progress": 45, "message": "step 12 of 30"}
JOB: Final = "bench"
PUBLISHES, BATCH, TOGETHER, UPDATES, CONNECTIONS, POLLS = 60, 100, 32, 10, 20, 2
# Two sizes: their difference is what the readers cost, without the publish that both have.
FEW, MANY = 20, 320
WATCHED = 80  # jobs with a reader each
MANY_POLLS = 120
YARDSTICK = 60
PATIENCE = 1000  # looks, of 2 ms each


class Marks:
    """Which instructions count, and under which name they are kept."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self.times: dict[str, int] = {}
        self.looking = False

    def begin(self) -> None:
        """From here on instructions can be counted."""
        if self.looking:
            self._library.marks_begin()

    def rest(self) -> None:
        """From here on they cannot, which is several times faster."""
        if self.looking:
            self._library.marks_rest()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is done within this block counts."""
        self._library.marks_toggle()
        try:
            yield
        finally:
            self._library.marks_toggle()

    def keep(self, name: str, times: int) -> None:
        """Ends one count."""
        self._library.marks_dump(name.encode())
        self.times[name] = times

    def clear(self) -> None:
        """Begins one, however the last ended."""
        gc.collect()
        self._library.marks_clear()


class Client:
    """One connection to the server, without any task of its own."""

    def __init__(self, port: int, marks: Marks) -> None:
        self.marks = marks
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    async def give(self, data: bytes, expected: bytes) -> None:
        """Sends, and lets the server do all it has to. Raises RuntimeError if `expected` is not in what it sends."""
        self.socket.send(data)
        await self.take(expected)

    async def take(self, expected: bytes) -> None:
        """Waits for what the server sends, and looks at it. Raises RuntimeError if `expected` is not in it."""
        received = b""
        for _ in range(PATIENCE):
            await settle(self.marks)
            with suppress(BlockingIOError):
                data = self.socket.recv(65536)
                received += data
                if expected in received:
                    return
                if not data:
                    break
        raise RuntimeError(f"expected {expected!r} from the server, got {received[:500]!r}")

    def look(self, expected: bytes) -> bytes:
        """The same of what has been sent already. Gives what came."""
        received = self.socket.recv(65536)
        if expected not in received:
            raise RuntimeError(f"expected {expected!r} from the server, got {received[:500]!r}")
        return received


async def settle(marks: Marks) -> None:
    """Returns when the server waits for its clients; until then its instructions count.

    The kernel may take a moment to hand over what was sent, and waiting for it costs no instructions.
    """
    with marks.counted():
        await wait_all_tasks_blocked(cushion=0.002)


async def close(node: Node, marks: Marks, *clients: Client) -> None:
    """End these, all there are; returns when the server is done with them."""
    for client in clients:
        client.socket.close()
    for _ in range(PATIENCE):
        await settle(marks)
        if not node.connections:
            return
    raise RuntimeError(f"{node.connections} connections did not end")


def head(method: str, path: str, user: str, *more: str, **claims: object) -> str:
    """A request's head, authenticated."""
    token = jwt.encode({"sub": user, **claims}, SECRET, algorithm="HS256")
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", *more, "", "")
    return "\r\n".join(lines)


def post(path: str, body: object) -> bytes:
    """A publish by HTTP."""
    text = json.dumps(body, separators=(",", ":"))
    more = "Content-Type: application/json", f"Content-Length: {len(text)}"
    return (head("POST", path, "worker", *more, capabilities=["publish"]) + text).encode()


def masked(message: object) -> bytes:
    """A WebSocket frame from a client, masked with zeros (RFC 6455, section 5.3)."""
    text = json.dumps(message, separators=(",", ":")).encode()
    size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + text


ONE: Final = post(f"/api/v2/jobs/{JOB}/updates", FIELDS)
UPGRADE: Final = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)


async def websocket(port: int, marks: Marks, job: str = JOB) -> Client:
    """A reader of a job with its snapshot."""
    client = Client(port, marks)
    await client.give(head("GET", "/ws/jobs", "bench", *UPGRADE).encode(), b"HTTP/1.1 101")
    await client.give(masked({"type": "subscribe", "jobIds": [job]}), b'"snapshot":[{')
    return client


async def sse(port: int, marks: Marks) -> Client:
    """The same as an event stream."""
    client = Client(port, marks)
    await client.give(
        head("GET", f"/api/v2/jobs/stream?jobIds={JOB}", "bench", "Accept: text/event-stream").encode(),
        b'"type":"snapshot"',
    )
    return client


TRANSPORTS: Final = {"ws": websocket, "sse": sse}


async def publishes(node: Node, port: int, marks: Marks, times: int) -> None:
    """One by one over HTTP: decode, decide, store in memory; nobody watches."""
    client = Client(port, marks)
    marks.clear()
    for _ in range(times):
        await client.give(ONE, b"HTTP/1.1 200")
    marks.keep("publish", times)
    await close(node, marks, client)


async def batches(node: Node, port: int, marks: Marks, times: int) -> None:
    """The same in batches."""
    client = Client(port, marks)
    data = post("/api/v2/updates", [{"jobId": f"{JOB}-{n % 10}", **FIELDS} for n in range(BATCH)])
    marks.clear()
    for _ in range(times):
        await client.give(data, b'"accepted":%d' % BATCH)
    marks.keep("publish in a batch", times * BATCH)
    await close(node, marks, client)


async def over_websocket(node: Node, port: int, marks: Marks, times: int) -> None:
    """One a message, as many together as a busy worker has on their way."""
    client = Client(port, marks)
    await client.give(head("GET", "/ws/jobs", "worker", *UPGRADE, capabilities=["publish"]).encode(), b'"connected"')
    data = b"".join(
        masked({"type": "publish", "ref": n, "updates": [{"jobId": f"{JOB}-{n % 10}", **FIELDS}]})
        for n in range(TOGETHER)
    )
    marks.clear()
    for _ in range(times):
        await client.give(data, b'"ref":%d' % (TOGETHER - 1))
    marks.keep("publish, ws", times * TOGETHER)
    await close(node, marks, client)


async def connections(node: Node, port: int, marks: Marks, transport: str, times: int) -> None:
    """Handshake, authentication, subscription with its snapshot, and the client's end."""
    marks.clear()
    for _ in range(times):
        client = await TRANSPORTS[transport](port, marks)
        await close(node, marks, client)
    marks.keep(f"connection, {transport}", times)


async def deliveries(node: Node, port: int, marks: Marks, transport: str, readers: int, updates: int) -> None:
    """Updates to all readers of one job, one in flight."""
    marks.rest()
    clients = [await TRANSPORTS[transport](port, marks) for _ in range(readers)]
    publisher = Client(port, marks)  # last: a connection without a request is not waited for long
    marks.begin()
    await publisher.give(ONE, b"HTTP/1.1 200")
    for client in clients:
        client.look(b"status_update")
    marks.clear()
    for _ in range(updates):
        await publisher.give(ONE, b"HTTP/1.1 200")
        for client in clients:
            client.look(b"status_update")
    marks.keep(f"{transport} {readers}", updates)
    marks.rest()
    await close(node, marks, *clients, publisher)
    marks.begin()


async def channels(node: Node, port: int, marks: Marks, updates: int) -> None:
    """Batches with an update for each of many jobs: first a few of them have a reader, then all."""
    jobs = [f"{JOB}-{n}" for n in range(WATCHED)]
    data = post("/api/v2/updates", [{"jobId": job, **FIELDS} for job in jobs])
    marks.rest()
    clients: list[Client] = []
    publisher = Client(port, marks)
    await publisher.give(data, b'"accepted":%d' % WATCHED)
    for readers in (FEW, WATCHED):
        clients += [await websocket(port, marks, job) for job in jobs[len(clients) : readers]]
        marks.begin()
        await publisher.give(data, b'"accepted":%d' % WATCHED)
        for client in clients:
            client.look(b"status_update")
        marks.clear()
        for _ in range(updates):
            await publisher.give(data, b'"accepted":%d' % WATCHED)
            for client in clients:
                client.look(b"status_update")
        marks.keep(f"channels {readers}", updates)
        marks.rest()
    await close(node, marks, *clients, publisher)
    marks.begin()


def next_poll(client: Client, received: bytes) -> None:
    """Ask what came behind the answer that was received."""
    cursor = received.partition(b'"last_seen":"')[2].partition(b'"')[0].decode()
    client.socket.send(head("GET", f"/api/v2/jobs/poll?jobIds={JOB}&last_seen={cursor}", "bench").encode())


async def polls(node: Node, port: int, marks: Marks, readers: int, updates: int) -> None:
    """The same to so many that poll: each answer, and the next question over the same connection."""
    marks.rest()
    clients = [Client(port, marks) for _ in range(readers)]
    for client in clients:
        next_poll(client, b"")
        await client.take(b'"last_seen"')
        next_poll(client, b'"last_seen":"%b:%d"' % (node.history.epoch.encode(), node.history.last))
    publisher = Client(port, marks)
    marks.begin()
    for counting in (False, True):
        if counting:
            marks.clear()
        for _ in range(updates if counting else 1):
            for _ in range(PATIENCE):
                if len(node.polls) == readers:
                    break
                await settle(marks)
            await publisher.give(ONE, b"HTTP/1.1 200")
            for client in clients:
                next_poll(client, client.look(b"status_update"))
            await settle(marks)
    marks.keep(f"poll {readers}", updates)
    marks.rest()
    await close(node, marks, *clients, publisher)
    marks.begin()


def yardstick(marks: Marks, times: int) -> None:
    """What the interpreter itself costs here: requests read by h11, which is plain Python and rarely changes."""
    marks.clear()
    with marks.counted():
        for _ in range(times):
            connection = h11.Connection(h11.SERVER)
            connection.receive_data(ONE)
            while not isinstance(connection.next_event(), h11.EndOfMessage):
                pass
    marks.keep("yardstick", times)


async def everything(node: Node, port: int, marks: Marks, share: float) -> None:
    """All of it, or a share."""

    def number(whole: int) -> int:
        return max(2, int(whole * share))

    yardstick(marks, number(YARDSTICK))
    await publishes(node, port, marks, number(PUBLISHES))
    await batches(node, port, marks, number(5))
    await over_websocket(node, port, marks, number(10))
    for transport in TRANSPORTS:
        await connections(node, port, marks, transport, number(CONNECTIONS))
        for readers in (FEW, MANY):
            await deliveries(node, port, marks, transport, readers, number(UPDATES))
    await channels(node, port, marks, number(UPDATES))
    for readers in (FEW, MANY_POLLS):
        await polls(node, port, marks, readers, number(POLLS))


async def main(library: str, print_line: Callable[[str], object] = print) -> None:
    """Everything twice: what the first time costs more (imports, caches, specialised bytecode) does not count."""
    marks = Marks(library)
    # The flusher and the poller's leader look at a clock of their own to see whether others should run, or more may
    # come; and on a busy machine a turn may take long enough to count as a heavy one.
    server.hub.YIELD_AFTER_S = server.poller.YIELD_AFTER_S = 3600.0  # type: ignore[misc]
    server.transports.websocket.HEAVY_TURN_S = 3600.0  # type: ignore[misc]
    server.beat.BEAT_S = 0.0  # type: ignore[misc]
    flags: dict[str, object] = {"server.port": 0, "store.url": "memory:", "auth.jwt_key": SECRET}
    async with running(load_config(flags, {}, None)) as (node, addresses):
        port = int(addresses[0].rpartition(":")[2])
        await everything(node, port, marks, 0.3)
        # When the collector runs depends on what was allocated before; what it finds is looked for between two counts.
        gc.disable()
        marks.looking = True
        marks.begin()
        await everything(node, port, marks, 1.0)
    print_line(json.dumps(marks.times))


if __name__ == "__main__":
    # Valgrind makes a millisecond last fifty; but for a clock as slow, what the server does every second would count.
    trio.run(main, sys.argv[1], clock=MockClock(rate=0.01))
