"""A long run: clients of every kind come and go while a server works; at the end it must be as it was at the beginning.

`python -m perf.soak [--seconds 1800] [--clients 150]`, or `make soak`. Users, jobs and transports change all the time,
and so does how clients leave: some say goodbye, some reset the connection, some stop reading first. A probe measures
how late updates are. Printed is a line for each window; exit status 1 if memory, descriptors, tasks or delivery times
grew, or if anything was left once everybody had gone. Delivery times are by a clock that stands still while the clients
do, and what counts of them is what they are beyond `slowed`: by which factor others, who wanted to run as well, held up
the server in that window.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import jwt
import trio

from perf.crowded import LoopClock, slowed, waits_of
from perf.measure import Target, server
from perf.publish_ways import masked
from server.poller import MAX_PARKED

SECRET: Final = "a secret for a benchmark, 32 bytes or more"
USERS: Final = 200
FILL: Final = 2500  # jobs, more than `max_jobs`
WINDOWS: Final = 12
PROBES_PER_S: Final = 20.0
# What may be more in the last quarter of the run than in the second, which is the first that has everything in it.
GROWTH: Final = {"memory": (1.05, 2.0), "descriptors": (1.1, 8.0), "tasks": (1.1, MAX_PARKED), "p99": (2.0, 20.0)}
PATIENCE_S: Final = 30.0
# What a client does takes some seconds. This long it takes if it is never answered, and not because all of the machine
# stood still for a while.
HANGS_S: Final = 400.0
# So small that everything that has a bound has reached it after a quarter of the run.
CONFIG: Final = f"""
[auth]
jwt_key = "{SECRET}"
[history]
max_jobs = 2000
max_updates = 20000
max_age = 30
[server]
heartbeat = 1.0
# Nobody is given up only because all of the machine stood still for a while.
[health]
stale_after = {HANGS_S}
[limits]
head_timeout = {HANGS_S}
body_timeout = {HANGS_S}
idle_timeout = {HANGS_S}
send_timeout = {HANGS_S}
auth_timeout = {HANGS_S}
connects_per_second = 0
messages_per_second = 0
publishes_per_second = 0
connections_per_user = 0
connections_per_address = 0
"""
# A sign of life: a peer that gives none for long is given up.
PONG: Final = b"\x8a\x80\0\0\0\0"
LINGER_RESET: Final = struct.pack("ii", 1, 0)


@dataclass
class Soak:
    """What the tasks of a run share.

    Attributes:
        done: what clients did, by name.
        delays: of the probe in this window, seconds.
        over: set when clients are to stop coming.
        clock: stands still while the clients do.
        waits: as of the window before, see ``waits_of``.
    """

    target: Target
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    delays: list[float] = field(default_factory=list)
    over: bool = False
    number: int = 0
    clock: LoopClock = field(default_factory=LoopClock)
    waits: dict[str, float] = field(default_factory=dict)

    def user(self) -> str:
        """Somebody."""
        return f"user-{self.random.randrange(USERS)}"

    def job(self) -> str:
        """One of the jobs of late."""
        return f"job-{max(0, self.number - self.random.randrange(300))}"


def token(user: str, **claims: object) -> str:
    """A request's header."""
    return f"Authorization: Bearer {jwt.encode({'sub': user, **claims}, SECRET, algorithm='HS256')}\r\n"


WORKER: Final = token("worker", admin=True)


async def connect(soak: Soak) -> trio.SocketStream:
    """One connection."""
    return await trio.open_tcp_stream("127.0.0.1", soak.target.port)


async def ask(soak: Soak, method: str, path: str, body: object = None, headers: str = WORKER) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body. Raises OSError, AssertionError if there is no answer."""
    text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n{headers}"  # 1.0: answers without chunks
    if text:
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    answer = b""
    stream = await connect(soak)
    async with stream:
        await stream.send_all(head.encode() + b"\r\n" + text)
        async for data in stream:
            answer += data
    if not answer:
        raise AssertionError("no answer")
    return int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]


def upgrade(user: str) -> bytes:
    """A WebSocket's handshake."""
    return (
        "GET /ws/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{token(user)}\r\n"
    ).encode()


def message(**fields: object) -> bytes:
    """A frame."""
    return masked(json.dumps(fields).encode())


async def read_for(stream: trio.SocketStream, seconds: float) -> None:
    """Read whatever comes, for a while."""
    with trio.move_on_after(seconds):
        while await stream.receive_some(65536):
            pass


async def leave(soak: Soak, stream: trio.SocketStream, goodbye: bytes) -> None:
    """Go, in one of the ways in which peers go."""
    way = soak.random.choice(["politely", "close", "reset", "deaf"])
    soak.done[f"left: {way}"] += 1
    if way == "deaf":
        await trio.sleep(soak.random.uniform(0.1, 1))
    if way in ("deaf", "reset"):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    if way == "politely" and goodbye:
        await stream.send_all(goodbye)
        await read_for(stream, 1)


async def by_websocket(soak: Soak) -> None:
    """Subscribe, perhaps publish, perhaps subscribe to more; leave."""
    user = soak.user()
    stream = await connect(soak)
    async with stream:
        await stream.send_all(upgrade(user))
        await stream.send_all(
            message(type="subscribe", **({"jobIds": [soak.job()]} if soak.random.random() < 0.5 else {}))
        )
        await read_for(stream, soak.random.uniform(0, 2))
        for what in soak.random.sample(("get", "subscribe", "unsubscribe", "publish", "ping", "nonsense"), 3):
            await stream.send_all(message(type=what, ref=1, jobIds=[soak.job()], updates=[]))
        await read_for(stream, soak.random.uniform(0, 1))
        await leave(soak, stream, b"\x88\x82\0\0\0\0\x03\xe8")


async def by_events(soak: Soak) -> None:
    """Watch as an event stream; leave."""
    user, path = (
        soak.user(),
        soak.random.choice(["/api/v2/jobs/stream", "/api/sse", f"/api/v2/jobs/stream?jobIds={soak.job()}"]),
    )
    stream = await connect(soak)
    async with stream:
        await stream.send_all(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n{token(user)}\r\n".replace(
                "Host: x", "Host: 127.0.0.1"
            ).encode()
        )
        await read_for(stream, soak.random.uniform(0, 3))
        await leave(soak, stream, b"")


async def by_polls(soak: Soak) -> None:
    """Ask some times, each time for what is new; perhaps go before the answer."""
    # Few enough that the server soon knows as many as there will be.
    user, client, cursor = soak.user(), soak.random.randrange(10), ""
    for _ in range(4):
        with trio.move_on_after(soak.random.uniform(0.2, 3)):
            path = f"/api/v2/jobs/poll?timeout=2&client_id=soak-{client}&last_seen={quote(cursor)}"
            status, body = await ask(soak, "GET", path, headers=token(user))
            if status == 200:
                cursor = json.loads(body)["last_seen"]
    if cursor:  # what was stored for this user need not be kept for a day
        await ask(soak, "POST", "/api/sse/ack", {"id": cursor}, token(user))


async def by_requests(soak: Soak) -> None:
    """What browsers and others ask for, good and bad."""
    path = soak.random.choice(
        [f"/api/v2/jobs/{soak.job()}", "/api/v2/jobs?limit=20", "/nowhere", "/api/v2/jobs/%00", "/health", "/"]
    )
    await ask(soak, soak.random.choice(["GET", "GET", "HEAD"]), path, headers=token(soak.user()))
    stream = await connect(soak)
    async with stream:
        await stream.send_all(
            soak.random.choice([b"GET / HT", b"\x16\x03\x01\x02", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n12"])
        )
        if soak.random.random() < 0.5:
            await read_for(stream, 0.5)


KINDS: Final[Mapping[Callable[[Soak], Any], int]] = {by_websocket: 4, by_events: 3, by_polls: 2, by_requests: 1}


async def client(soak: Soak) -> None:
    """One after another, for as long as the run goes on."""
    while not soak.over:
        (kind,) = soak.random.choices(list(KINDS), list(KINDS.values()))
        try:
            with trio.fail_after(HANGS_S):
                await kind(soak)
            soak.done[kind.__name__] += 1
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            soak.done["broken off"] += 1  # as when what is sent next meets a reset
        await trio.sleep(soak.random.uniform(0, 0.1))


async def worker(soak: Soak) -> None:
    """Jobs that begin, go on and end, or are deleted; notifications, some of them to be stored."""
    while not soak.over:
        updates = []
        for _ in range(20):
            soak.number += soak.random.random() < 0.2
            number = max(0, soak.number - soak.random.randrange(100))
            end = soak.random.random() < 0.1
            updates.append(
                {
                    "jobId": f"job-{number}",
                    "userId": f"user-{number % USERS}",
                    "status": soak.random.choice(["completed", "failed"]) if end else "processing",
                    "progress": soak.random.randrange(100),
                    "message": "x" * soak.random.randrange(200),
                    "eventId": f"{soak.random.randrange(10**12)}",
                }
            )
        with trio.fail_after(HANGS_S):
            status, body = await ask(soak, "POST", "/api/v2/updates", updates)
            while status == 503:  # a store that has stood still, too: workers send it again
                soak.done["batches sent again"] += 1
                await trio.sleep(1)
                status, body = await ask(soak, "POST", "/api/v2/updates", updates)
        if status != 200:
            raise AssertionError(f"a batch was answered with {status}: {body[:200]!r}")
        soak.done["updates"] += json.loads(body)["accepted"]
        if soak.random.random() < 0.2:
            await ask(soak, "DELETE", f"/api/v2/jobs/{soak.job()}")
        if soak.random.random() < 0.5:
            notice = {
                "target": "user",
                "targetId": soak.user(),
                "event": "news",
                "data": {},
                "store": soak.random.random() < 0.2,
            }
            await ask(soak, "POST", "/api/sse/message", notice)
        await trio.sleep(0.02)


async def fill(soak: Soak) -> None:
    """As many jobs as are kept, so that a slow machine does not add to them all through the run."""
    while soak.number < FILL:
        numbers = range(soak.number, soak.number + 500)  # ended, as only such make room for others
        jobs = [
            {"jobId": f"job-{n}", "userId": f"user-{n % USERS}", "status": "completed", "message": "x" * 100}
            for n in numbers
        ]
        status, body = await ask(soak, "POST", "/api/v2/updates", jobs)
        assert (status, json.loads(body)["accepted"]) == (200, len(jobs)), body[:200]
        soak.number += len(jobs)


async def probe(soak: Soak) -> None:
    """One reader that stays, and an update for it every now and then: how late each is."""
    stream = await connect(soak)
    async with stream, trio.open_nursery() as nursery:
        await stream.send_all(upgrade("probe") + message(type="subscribe", jobIds=["probe"]))

        async def publish() -> None:
            while True:
                update = {"userId": "probe", "message": f"t={soak.clock():.6f}"}
                await ask(soak, "POST", "/api/v2/jobs/probe/updates", update)
                await stream.send_all(PONG)
                await trio.sleep(1 / PROBES_PER_S)

        nursery.start_soon(publish)
        rest = b""
        while data := await stream.receive_some(65536):
            now = soak.clock()
            rest += data
            for found in re.finditer(rb'"status_update".*?"message":"t=([\d.]+)"', rest):
                soak.delays.append(now - float(found[1]))
                end = found.end()
                soak.done["probes"] += 1
            rest = rest[end:] if b'"message":"t=' in rest and soak.delays else rest[-4096:]
            end = 0
        raise AssertionError("the probe's connection was closed")


async def look(soak: Soak) -> dict[str, float]:
    """The server now: its own numbers, and the system's about it."""
    _, body = await ask(soak, "GET", "/metrics")
    found = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) ([-+.e\d]+)$", body.decode(), re.MULTILINE))
    connections = sum(float(value) for name, value in found.items() if name.startswith("statuswire_connections{"))
    delays, soak.delays = sorted(soak.delays), []
    before, soak.waits = soak.waits, waits_of(soak.target.pid)
    return {
        "memory": soak.target.resident_bytes() / 2**20,
        "descriptors": float(found["process_open_fds"]),
        "tasks": float(found["statuswire_tasks"]),
        "sockets": float(found["statuswire_sockets"]),
        "connections": connections,
        "channels": float(found["statuswire_channels"]),
        "pending": float(found["statuswire_pending_bytes"]),
        "p50": 1000 * statistics.median(delays) if delays else 0.0,
        "p99": 1000 * delays[int(0.99 * len(delays))] if delays else 0.0,
        "slowed": slowed(before, soak.waits),
    }


def grown(windows: Sequence[Mapping[str, float]]) -> list[str]:
    """What is more in the last quarter than it may be."""
    quarter = max(1, len(windows) // 4)
    found = []
    for name, (times, more) in GROWTH.items():
        # Descriptors of those who are there just now are theirs: how many that are follows the machine.
        theirs = "sockets" if name == "descriptors" else ""
        values = [
            window[name] / (window["slowed"] if name == "p99" else 1.0) - window.get(theirs, 0.0) for window in windows
        ]
        early, late = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        if late > early * times + more:
            found.append(f"{name} grew from {early:.1f} to {late:.1f}")
    return found


@dataclass(frozen=True)
class Result:
    """What grew meanwhile, what was left in the end, and what clients did."""

    grew: list[str]
    left: list[str]
    done: Counter[str]


async def run(target: Target, seconds: float, clients: int, seed: int) -> Result:
    """All of it. Raises what only a broken server makes its clients raise."""
    soak = Soak(target, random.Random(seed))
    await ask(soak, "POST", "/api/v2/jobs", {"jobId": "probe", "userId": "probe"})
    await fill(soak)
    before = await look(soak)
    windows = []
    print("  ".join(f"{name:>11}" for name in ("seconds", *before)), flush=True)
    async with trio.open_nursery() as everything:
        everything.start_soon(soak.clock.run)
        everything.start_soon(probe, soak)
        async with trio.open_nursery() as crowd:
            for _ in range(clients):
                crowd.start_soon(client, soak)
            for _ in range(2):
                crowd.start_soon(worker, soak)
            began = time.monotonic()
            for number in range(WINDOWS):
                await trio.sleep_until(
                    trio.current_time() + began + (number + 1) * seconds / WINDOWS - time.monotonic()
                )
                windows.append(await look(soak))
                line = (time.monotonic() - began, *windows[-1].values())
                print("  ".join(f"{value:11.1f}" for value in line), flush=True)
            soak.over = True
        everything.cancel_scope.cancel()
    after, deadline = await look(soak), trio.current_time() + PATIENCE_S
    while leftovers(before, after) and trio.current_time() < deadline:
        await trio.sleep(0.2)
        after = await look(soak)
    print("  ".join(f"{value:>11.1f}" for value in (seconds, *after.values())), " everybody gone", flush=True)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(soak.done.items())))
    return Result(grown(windows), leftovers(before, after), soak.done)


def leftovers(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What there was not before anybody came. One socket is that of whoever asks."""
    names = ("descriptors", "tasks", "sockets", "connections", "channels", "pending")
    # Tasks are kept for whoever comes next; SQLite keeps the temporary file that it once needed.
    kept = {"tasks": MAX_PARKED, "descriptors": 1}
    found = []
    for name in names:
        allowed = before[name] + kept.get(name, 0)
        if after[name] > allowed:
            found.append(f"{name}: {after[name]:.0f} left, {before[name]:.0f} before")
    return found


@contextmanager
def soaked(store: str) -> Iterator[Target]:
    """A server with small bounds."""
    with tempfile.TemporaryDirectory(prefix="statuswire-soak-") as directory:
        config = Path(directory) / "soak.toml"
        config.write_text(CONFIG)
        with server(store, flags=("--config", str(config), "--log-level", "warning"), core=None) as target:
            yield target


def main() -> int:
    """Exit status 1 if something grew or was left."""
    parser = argparse.ArgumentParser(prog="perf.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--clients", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", default="sqlite:", help="sqlite: (a fresh file), memory: or redis://… (%(default)s)")
    options = parser.parse_args()
    with soaked(options.store) as target:
        result = trio.run(run, target, options.seconds, options.clients, options.seed)
    wrong = result.grew + result.left
    for line in wrong:
        print(line)
    print("grew, or was left over" if wrong else "as it was at the beginning")
    return int(bool(wrong))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
