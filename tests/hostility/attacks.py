"""What hostile clients do: one function each, which is one client's whole life; it is called again when it returns.

A function gets the ``Prey`` and does its worst until it is cancelled or thrown out. ``ATTACKS`` says of each how many
such clients there are and how much memory they may cost the server, in bytes: what ``docs/limits.md`` promises.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from tests.pacing import for_a_while

KIB: Final = 1024
MIB: Final = 1024 * KIB
UPGRADE: Final = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


@dataclass
class Totals:
    """What all clients of an attack have done together: ``standing`` are those that got where they wanted to be."""

    connects: int = 0
    standing: int = 0
    rounds: int = 0


@dataclass
class Prey:
    """Where one client strikes, and the connections that it has made this time.

    Attributes:
        port: of the server, on 127.0.0.1.
        source: the client's own address.
        token: of a user who may publish.
    """

    port: int
    source: str
    token: str
    totals: Totals
    streams: list[trio.SocketStream] = field(default_factory=list)

    async def connect(self, receive_buffer: int | None = None) -> trio.SocketStream:
        """One connection, with a small ``receive_buffer`` for those who will not read."""
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        # Its end is a reset, which leaves nothing in TIME_WAIT: there are more connects than ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream = trio.SocketStream(sock)
        self.streams.append(stream)
        await sock.bind((self.source, 0))
        await sock.connect(("127.0.0.1", self.port))
        self.totals.connects += 1
        return stream

    def stand(self) -> None:
        """This client is where it wants to be."""
        self.totals.standing += 1

    def head(self, method: str, target: str, *headers: str) -> bytes:
        """The head of a request that is let in."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}", *headers]
        return "\r\n".join([*lines, "", ""]).encode()

    def post(self, target: str, body: bytes, *headers: str) -> bytes:
        """A whole request with a body."""
        return (
            self.head("POST", target, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers) + body
        )

    async def websocket(self, *headers: str, receive_buffer: int | None = None) -> trio.SocketStream:
        """A WebSocket that is let in. Raises trio.BrokenResourceError otherwise."""
        stream = await self.connect(receive_buffer)
        await stream.send_all(self.head("GET", "/ws/jobs", *UPGRADE, *headers))
        if not (await stream.receive_some(64)).startswith(b"HTTP/1.1 101 "):
            raise trio.BrokenResourceError("not let in")
        return stream


def frame(payload: bytes, opcode: int = 1, fin: bool = True, rsv1: bool = False) -> bytes:
    """A client's frame (RFC 6455 section 5.2), with a mask of zeros."""
    head = bytes([fin << 7 | rsv1 << 6 | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += b"\xfe" + struct.pack(">H", size)
    else:
        head += b"\xff" + struct.pack(">Q", size)
    return head + bytes(4) + payload


def message(type_: str, **fields: object) -> bytes:
    """One message in a frame."""
    return frame(json.dumps({"type": type_, **fields}).encode())


async def heard_out(stream: trio.SocketStream) -> None:
    """Read to the end, so that nothing but the server ends it."""
    while await stream.receive_some(65536):
        pass


# Slow ones


async def slow_head(prey: Prey) -> None:
    """A byte of the head now and then."""
    stream = await prey.connect()
    prey.stand()
    for byte in prey.head("GET", "/api/v2/jobs", f"X-Filler: {'x' * 2000}"):
        await stream.send_all(bytes([byte]))
        await for_a_while(0.1)


async def slow_body(prey: Prey) -> None:
    """A byte of the body now and then."""
    stream = await prey.connect()
    await stream.send_all(
        prey.head("POST", "/api/v2/updates", "Content-Type: application/json", "Content-Length: 90000")
    )
    prey.stand()
    for _ in range(90000):
        await stream.send_all(b"[")
        await for_a_while(0.1)


async def slow_read(prey: Prey) -> None:
    """Ask for much, and read it byte by byte."""
    stream = await prey.connect(receive_buffer=1)
    await stream.send_all(prey.head("GET", "/api/v2/jobs?limit=1000") * 20)
    prey.stand()
    while await stream.receive_some(1):
        await for_a_while(0.1)


async def deaf_websocket(prey: Prey) -> None:
    """Watch everything there is and never read it."""
    stream = await prey.websocket(receive_buffer=1)
    await stream.send_all(message("subscribe", all=True) + message("subscribe", userId="mallory"))
    prey.stand()
    await trio.sleep_forever()


async def deaf_event_stream(prey: Prey) -> None:
    """The same as an event stream."""
    stream = await prey.connect(receive_buffer=1)
    await stream.send_all(prey.head("GET", "/api/v2/jobs/stream", "Accept: text/event-stream"))
    prey.stand()
    await trio.sleep_forever()


async def deaf_request(prey: Prey) -> None:
    """Ask again and again and never read an answer."""
    stream = await prey.connect(receive_buffer=1)
    prey.stand()
    while True:
        await stream.send_all(prey.head("GET", "/api/v2/jobs?limit=1000") * 50)


async def slow_poll(prey: Prey) -> None:
    """Wait for what never comes, and pipeline more of the same behind it."""
    stream = await prey.connect()
    await stream.send_all(prey.head("GET", "/api/v2/jobs/poll?jobIds=never&timeout=60") * 20)
    prey.stand()
    await heard_out(stream)


# Floods


async def one_byte_frames(prey: Prey) -> None:
    """A message in fragments of a byte, each byte sent by itself in the end."""
    stream = await prey.websocket()
    prey.stand()
    text = json.dumps({"type": "ping", "ref": "r" * 200}).encode()
    pieces = [frame(text[:1], 1, False)] + [frame(bytes([byte]), 0, False) for byte in text[1:]] + [frame(b"", 0, True)]
    while True:
        await stream.send_all(b"".join(pieces))
        for byte in pieces[0] + pieces[-1]:
            await stream.send_all(bytes([byte]))


async def flood(prey: Prey, data: bytes, *headers: str) -> None:
    """Say the same for ever over a WebSocket, reading nothing."""
    stream = await prey.websocket(*headers)
    prey.stand()
    while True:
        await stream.send_all(data)


async def ping_flood(prey: Prey) -> None:
    """Pings whose pongs nobody reads."""
    await flood(prey, frame(b"p" * 125, 9) * 100)


async def empty_frame_flood(prey: Prey) -> None:
    """A message that never ends and never says anything."""
    stream = await prey.websocket()
    await stream.send_all(frame(b"", 1, False))
    prey.stand()
    while True:
        await stream.send_all(frame(b"", 0, False) * 500)


async def get_flood(prey: Prey) -> None:
    """Questions whose answers are much longer than they are."""
    await flood(prey, message("get", jobIds=[f"seed{number}" for number in range(200)]) * 10)


async def malformed_flood(prey: Prey) -> None:
    """Messages that are none, up to the server's patience, and again."""
    stream = await prey.websocket()
    prey.stand()
    for text in (b"{", b"[]", b'{"type":"nothing"}', b"\xc3\xa9" * 40, b'{"type":"get","jobIds":7}', b"[" * 2000) * 10:
        await stream.send_all(frame(text))


async def publish_flood(prey: Prey) -> None:
    """As many updates as it can write, over a WebSocket."""
    stream = await prey.websocket()
    prey.stand()
    updates = [{"jobId": f"flood{number}", "userId": "mallory", "progress": number} for number in range(50)]
    data = message("publish", updates=updates) * 4
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heard_out, stream)
        while True:
            await stream.send_all(data)


async def publish_lines(prey: Prey) -> None:
    """The same as lines, half of which are wrong."""
    stream = await prey.connect()
    await stream.send_all(
        prey.head("POST", "/api/v2/updates", "Content-Type: application/x-ndjson", "Transfer-Encoding: chunked")
    )
    prey.stand()
    lines = b'{"jobId":"lines","userId":"mallory","progress":1}\nx\n' * 200
    while True:
        await stream.send_all(b"%x\r\n%b\r\n" % (len(lines), lines))


async def pipelining(prey: Prey) -> None:
    """A thousand requests in one breath."""
    stream = await prey.connect()
    prey.stand()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heard_out, stream)
        while True:
            await stream.send_all(prey.head("GET", "/api/v2/jobs/seed1") * 200)


async def many_subscriptions(prey: Prey) -> None:
    """As many jobs as it may watch, and more, again and again."""
    stream = await prey.websocket()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heard_out, stream)
        for turn in range(12):
            names = [f"watched{random.randrange(10**9)}" for _ in range(1000)]
            await stream.send_all(message("subscribe", jobIds=names, channels=[f"c{turn}.{n}" for n in range(100)]))
        prey.stand()
        while True:
            await stream.send_all(message("subscribe", jobIds=["a", "b"]) + message("unsubscribe", jobIds=["a"]))
            await for_a_while(0.01)


# Lies


async def giant_lengths(prey: Prey) -> None:
    """Lengths that nobody has: of frames, bodies and chunks."""
    prey.stand()
    for size in (2**62, 2**63 - 1, 2**31, 2**24):
        stream = await prey.websocket()
        await stream.send_all(b"\x81\xff" + struct.pack(">Q", size) + bytes(4) + b"x" * 1000)
        await heard_out(stream)
        for framing in (f"Content-Length: {size}", "Transfer-Encoding: chunked"):
            stream = await prey.connect()
            head = prey.head("POST", "/api/v2/updates", "Content-Type: application/json", framing)
            await stream.send_all(head + (b"%x\r\n" % size if "chunked" in framing else b"") + b"x" * 1000)
            await stream.receive_some(1000)
            await stream.aclose()


def _bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(512)) + packer.flush(zlib.Z_SYNC_FLUSH)
    return frame(packed[:-4], 1, True, True)


_BOMBS: list[bytes] = []


async def compression_bomb(prey: Prey) -> None:
    """Half a gibibyte in half a mebibyte, and a body that says it is compressed."""
    if not _BOMBS:
        _BOMBS.append(_bomb())
    prey.stand()
    stream = await prey.websocket("Sec-WebSocket-Extensions: permessage-deflate")
    await stream.send_all(_BOMBS[0])
    await heard_out(stream)
    stream = await prey.connect()
    await stream.send_all(prey.post("/api/v2/updates", zlib.compress(bytes(MIB)), "Content-Encoding: gzip"))
    await stream.receive_some(1000)
    await stream.aclose()


async def unfinished_bodies(prey: Prey) -> None:
    """All of a large body but its last byte."""
    stream = await prey.connect()
    body = b"[" + b" " * (4 * MIB)
    prey.stand()
    await stream.send_all(prey.post("/api/v2/updates", body)[:-1])
    await heard_out(stream)


async def unfinished_messages(prey: Prey) -> None:
    """All of a large message but its end."""
    stream = await prey.websocket()
    prey.stand()
    await stream.send_all(frame(b" " * (MIB - 100), 1, False))
    await heard_out(stream)


async def never_ending(stream: trio.SocketStream, prey: Prey) -> None:
    """Wait to be thrown out."""
    prey.stand()
    await heard_out(stream)


# Those who vanish


async def half_open(prey: Prey) -> None:
    """Connected and subscribed, and from then on as if the cable had been pulled: no pong, nothing."""
    stream = await prey.websocket()
    await stream.send_all(message("subscribe"))
    await never_ending(stream, prey)


async def half_closed(prey: Prey) -> None:
    """Say something, and that it was all; then wait."""
    for data in (
        prey.head("GET", "/api/v2/jobs/poll?jobIds=never&timeout=60"),
        prey.head("GET", "/api/v2/jobs/stream"),
        prey.head("POST", "/api/v2/updates", "Content-Type: application/json", "Content-Length: 10"),
        prey.head("GET", "/health")[:-2],
    ):
        stream = await prey.connect()
        await stream.send_all(data)
        await stream.send_eof()
        prey.stand()
        with trio.move_on_after(0.5):
            await heard_out(stream)
        await stream.aclose()


async def reset_storm(prey: Prey) -> None:
    """Connect, begin something, and break the connection."""
    for data in (b"", b"GET /", prey.head("GET", "/api/v2/jobs"), prey.head("GET", "/api/v2/jobs/stream")):
        stream = await prey.connect()
        if data:
            await stream.send_all(data)
        await trio.aclose_forcefully(stream)  # a reset, as ``connect`` has set it up
    stream = await prey.websocket()
    await stream.send_all(message("subscribe"))
    await trio.aclose_forcefully(stream)
    prey.stand()


async def crowd(prey: Prey) -> None:
    """One of very many who connect at once, and stay."""
    await prey.connect()
    prey.stand()
    await trio.sleep_forever()


async def strangers(prey: Prey) -> None:
    """WebSockets that never say who they are."""
    stream = await prey.connect()
    await stream.send_all(prey.head("GET", "/ws/jobs", *UPGRADE).replace(b"Authorization", b"X-Nobody"))
    await never_ending(stream, prey)


async def half_a_handshake(prey: Prey) -> None:
    """Begin a TLS handshake, and leave the server with its answer."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _TLS.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    stream = await prey.connect()
    await stream.send_all(outgoing.read())
    await stream.receive_some(1)
    await never_ending(stream, prey)


_TLS = ssl.create_default_context()

Client = Callable[[Prey], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        client: what each of them does.
        clients: how many there are.
        memory: bytes by which the server may grow meanwhile.
    """

    client: Client
    clients: int
    memory: int


# Of what is not held in the server at all, a few megabytes are what its allocator keeps for the next time.
SLACK: Final = 48 * MIB

ATTACKS: Final = {
    # client, clients, bytes of memory
    "slow heads": Attack(slow_head, 300, SLACK),
    "slow bodies": Attack(slow_body, 300, SLACK),
    "slow reads": Attack(slow_read, 100, SLACK),
    "deaf WebSockets": Attack(deaf_websocket, 200, SLACK),
    "deaf event streams": Attack(deaf_event_stream, 200, SLACK),
    "deaf requests": Attack(deaf_request, 100, SLACK),
    "slow polls": Attack(slow_poll, 300, SLACK),
    "one-byte frames": Attack(one_byte_frames, 10, SLACK),
    "ping flood": Attack(ping_flood, 10, SLACK),
    "empty-frame flood": Attack(empty_frame_flood, 10, SLACK),
    "get flood": Attack(get_flood, 10, SLACK),
    "malformed flood": Attack(malformed_flood, 20, SLACK),
    "publish flood": Attack(publish_flood, 4, SLACK),
    "publish lines": Attack(publish_lines, 4, SLACK),
    "pipelining": Attack(pipelining, 10, SLACK),
    "many subscriptions": Attack(many_subscriptions, 10, 2 * SLACK),
    "giant lengths": Attack(giant_lengths, 20, SLACK),
    "compression bombs": Attack(compression_bomb, 10, SLACK),
    # limits.unfinished of the server under test, once as pieces and once joined, and 64 KiB each.
    "unfinished bodies": Attack(unfinished_bodies, 60, 2 * 32 * MIB + SLACK),
    "unfinished messages": Attack(unfinished_messages, 100, 2 * 32 * MIB + SLACK),
    "half-open peers": Attack(half_open, 200, SLACK),
    "half-closed peers": Attack(half_closed, 100, SLACK),
    "reset storm": Attack(reset_storm, 20, SLACK),
    "strangers": Attack(strangers, 300, SLACK),
    "crowd": Attack(crowd, 500, SLACK),
    "10,000 connects": Attack(crowd, 10_000, 10_000 * 16 * KIB + SLACK),
}

# What is reported besides: these have servers of their own.
SCARCITIES: Final = (
    "no descriptors",
    "unfinished bodies, short of memory",
    "unfinished messages, short of memory",
    "crowd of one address",
    "half TLS handshakes",
    "jumps of the clock",
)

# Against a server that speaks TLS.
TLS_ATTACKS: Final = {
    "half handshakes": Attack(half_a_handshake, 1500, 1500 * 60 * KIB + SLACK),
}
