"""The peers: what each is called, what it speaks, and how it is started."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from perf.measure import ROOT, SERVER_CORE, START_S, Target

SERVERS: Final = Path(__file__).parent / "servers"
INSTALLED: Final = ROOT / ".venv" / "peers"


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        name: as the tables have it.
        what: one line on its form here.
        runs: `python`, `node`, `c` or `nchan`; `statuswire` for this server itself.
        source: the file in servers/.
        feed: how updates come in, see load.c: `lines`, `frames` or `post`; `messages` to this server.
        transports: of `ws`, `sse` and `poll`, what it has.
        package: the distribution whose version is shown.
        debian: where Debian's package lies instead, in `.venv/peers`.
    """

    name: str
    what: str
    runs: str
    source: str
    feed: str = "lines"
    transports: tuple[str, ...] = ("ws", "sse")
    package: str | None = None
    debian: str | None = None


ALL: Final = ("ws", "sse", "poll")
PUSHPIN: Final = "C++ and Rust, five processes and the application that answers them in Python; all of their CPU counts"

PEERS: Final = (
    Peer("statuswire fed by WebSocket", "as uWebSockets is", "statuswire", "", "messages"),
    Peer("bare loop, C", "`send` for each reader, no library, checks nothing", "c", "loop.c"),
    Peer("bare loop, Python", "the same in Python", "python", "loop", transports=ALL),
    Peer(
        "nchan", "nginx module in C, one process", "nchan", "nchan.conf", "post", ALL, debian="nginx/libnginx-mod-nchan"
    ),
    Peer("pushpin", PUSHPIN, "python", "pushpin", "lines", ALL, "pyzmq", "pushpin/pushpin"),
    Peer("uWebSockets", "C++, by socketify: topics", "python", "socketify", "frames", ("ws",), "socketify"),
    Peer("picows", "Cython, on uvloop", "python", "picows", transports=("ws",), package="picows"),
    Peer("ws", "node; its own http for SSE and long-poll", "node", "ws.mjs", transports=ALL, package="ws"),
    Peer("socket.io", "node: rooms", "node", "socketio.mjs", transports=("ws",), package="socket.io"),
    Peer("aiohttp", "on uvloop", "python", "aiohttp", transports=ALL, package="aiohttp"),
    Peer("websockets", "`broadcast`, on uvloop", "python", "websockets", transports=("ws",), package="websockets"),
    Peer("uvicorn", "Starlette on uvloop; sse-starlette for SSE", "python", "starlette", "lines", ALL, "uvicorn"),
    Peer("channels", "Django Channels on uvicorn, uvloop", "python", "django_channels", "lines", ("ws",), "channels"),
    Peer("trio-websocket", "one task sends", "python", "trio_websocket", transports=("ws",), package="trio-websocket"),
    Peer("hypercorn", "ASGI on Trio", "python", "hypercorn", package="hypercorn"),
)


class Unavailable(OSError):
    """A peer is not installed, or does not start."""


@dataclass(frozen=True)
class Running:
    """A started peer."""

    peer: Peer
    target: Target
    feed_port: int


def free_ports(number: int) -> list[int]:
    """Ports that nobody has: not all peers can tell which one they were given. No connection is given these."""
    ports: set[int] = set()
    while len(ports) < number:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as each,
        ):
            ports.add(each.getsockname()[1])
    return list(ports)


def command(peer: Peer, port: int, feed: int, directory: Path) -> list[str]:
    """How it is started. Raises Unavailable."""
    if peer.runs == "statuswire":
        return [str(ROOT / ".venv/bin/statuswire"), "serve", "--port", str(port), "--store", "memory:"]
    ports = ["--port", str(port), "--feed", str(feed)]
    if peer.runs == "c":
        program = directory / "loop"
        built = ["gcc", "-O2", "-D_GNU_SOURCE", "-o", str(program), str(SERVERS / peer.source)]
        if subprocess.run(built, check=False).returncode:
            raise Unavailable("gcc could not build it")
        return [str(program), *ports]
    if peer.runs == "node":
        node = shutil.which("node")
        if node is None or not (INSTALLED / "node" / "node_modules").is_dir():
            raise Unavailable("not installed (make peers)")
        # An ES module looks for packages beside itself only.
        script = shutil.copy(SERVERS / peer.source, INSTALLED / "node")
        return [node, str(script), *ports]
    if peer.runs == "nchan":
        nginx = INSTALLED / "nginx/usr/sbin/nginx"
        module = INSTALLED / "nginx/usr/lib/nginx/modules/ngx_nchan_module.so"
        if not nginx.exists() or not module.exists():
            raise Unavailable("not installed (make peers)")
        text = (SERVERS / peer.source).read_text()
        for key, value in {"module": module, "directory": directory, "port": port}.items():
            text = text.replace(f"@{key}@", str(value))
        (directory / "nginx.conf").write_text(text)
        return [str(nginx), "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"]
    python = INSTALLED / "bin/python"
    if peer.package is None:
        python = Path(sys.executable)
    elif not python.exists() or (peer.debian and not version_of(peer)):
        raise Unavailable("not installed (make peers)")
    return [str(python), "-m", f"perf.peers.servers.{peer.source}", *ports]


@contextlib.contextmanager
def started(peer: Peer) -> Iterator[Running]:
    """Starts a peer on the server's core. Raises Unavailable."""
    port, feed = free_ports(2)
    feed = feed if peer.feed == "lines" else port
    directory = Path(tempfile.mkdtemp(prefix="statuswire-peer-"))
    log = directory / "log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STATUSWIRE_")}
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(peer, port, feed, directory),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=directory,
                env=environment | {"PYTHONPATH": str(ROOT), "NODE_ENV": "production"},
                preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
            )
        try:
            deadline = time.monotonic() + START_S
            while not all(listens(each) for each in {port, feed}):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable(f"did not start: {log.read_text(errors='replace')[-1000:]}")
                time.sleep(0.05)
            yield Running(peer, Target(peer.name, process.pid, port, tuple(descendants(process.pid))), feed)
        finally:
            for pid in tuple(descendants(process.pid)):  # all first: whoever loses a parent is found no more
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from descendants(child)


def listens(port: int) -> bool:
    """Whether somebody is there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def version_of(peer: Peer) -> str:
    """The installed version, or nothing."""
    if peer.runs == "node" and peer.package:
        manifest = INSTALLED / "node/node_modules" / peer.package / "package.json"
        return str(json.loads(manifest.read_text())["version"]) if manifest.exists() else ""
    if peer.debian:
        found = list(INSTALLED.glob(f"{peer.debian}_*.deb"))
        return unquote(found[0].name.split("_")[1]).rpartition(":")[2] if found else ""
    if peer.package:
        wanted = peer.package.replace("-", "_").lower()
        found = list(INSTALLED.glob(f"lib/python*/site-packages/{wanted}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else ""
    return ""
