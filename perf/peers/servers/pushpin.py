"""The application behind pushpin, which holds its readers' connections (GRIP): it says who is to be held on which
channel, keeps what long-polls ask for, and publishes to pushpin by its ZeroMQ socket."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import uvloop
import zmq

from perf.peers.servers.common import GREETING, GREETING_EVENT, arguments, feed, kept

POLLS = kept()
WAYS: defaultdict[str, set[str]] = defaultdict(set)
PEERS = Path(sys.executable).parents[1]
READY = "/ready"


def netstrings(value: dict[str, object] | bytes | str) -> bytes:
    """Tagged netstrings, which its own libraries speak on ZeroMQ."""
    if isinstance(value, dict):
        inner = b"".join(netstrings(key) + netstrings(each) for key, each in value.items())  # type: ignore[arg-type]
        return b"%d:%b}" % (len(inner), inner)
    data = value.encode() if isinstance(value, str) else value
    return b"%d:%b," % (len(data), data)


def item(channel: str, message: bytes) -> bytes:
    """One update, in the forms that somebody waits for."""
    formats: dict[str, object] = {}
    found: dict[str, object] = {"channel": channel, "formats": formats}
    if "ws" in WAYS[channel]:
        formats["ws-message"] = {"content": message}
    if "sse" in WAYS[channel]:
        formats["http-stream"] = {"content": b"data: %b\n\n" % message}
    if "poll" in WAYS[channel]:
        channel_ = POLLS[channel]
        seen = channel_.last
        channel_.add(message)
        found |= {"prev-id": str(seen), "id": str(channel_.last)}
        formats["http-response"] = {
            "headers": {"Content-Type": "application/json"},
            "body": channel_.since(seen),
        }
    return b"T" + netstrings(found)


def event(kind: str, text: str) -> str:
    """One event of WebSocket-over-HTTP."""
    return f"{kind} {len(text):x}\r\n{text}\r\n"


def answer(target: str, body: bytes) -> tuple[str, bytes]:
    """Further headers and the body for what pushpin asks."""
    found = urlsplit(target)
    if found.path == READY:
        return "", b"ready"
    _, way, channel = found.path.split("/")
    WAYS[channel].add(way)
    if way == "ws":
        head = "Content-Type: application/websocket-events\r\nSec-WebSocket-Extensions: grip\r\n"
        if not body.startswith(b"OPEN"):
            return head, b""
        subscribe = f'c:{{"type":"subscribe","channel":"{channel}"}}'
        return head, ("OPEN\r\n" + event("TEXT", subscribe) + event("TEXT", f"m:{GREETING}")).encode()
    if way == "sse":
        return f"Content-Type: text/event-stream\r\nGrip-Hold: stream\r\nGrip-Channel: {channel}\r\n", GREETING_EVENT
    seen = parse_qs(found.query).get("last_seen")
    head = "Content-Type: application/json\r\n"
    if seen and int(seen[0]) == POLLS[channel].last:
        head += f"Grip-Hold: response\r\nGrip-Channel: {channel}; prev-id={seen[0]}\r\nGrip-Timeout: 30\r\n"
    return head, POLLS[channel].since(int(seen[0]) if seen else POLLS[channel].last)


class Backend(asyncio.Protocol):
    """A connection of pushpin's: one request after the other."""

    _rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n") + 4) > 3:
            head = self._rest[:end].lower()
            _, mark, length = head.partition(b"\r\ncontent-length:")
            whole = end + (int(length.split(b"\r", 1)[0]) if mark else 0)
            if len(self._rest) < whole:
                return
            more, body = answer(self._rest.split(b" ", 2)[1].decode(), self._rest[end:whole])
            self._rest = self._rest[whole:]
            self._transport.write(  # type: ignore[attr-defined]
                f"HTTP/1.1 200 OK\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )


async def ready(port: int) -> None:
    """Returns once a request comes through all of it."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {READY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            found = await asyncio.wait_for(reader.read(4096), 1)
            writer.close()
            if found.startswith(b"HTTP/1.1 200"):
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)


def start(port: int, backend: int) -> None:
    """Pushpin itself, in the current directory, in front of what listens on `backend`."""
    directory, installed = Path.cwd(), PEERS / "pushpin/usr"
    with socket.create_server(("127.0.0.1", 0)) as free:
        control = free.getsockname()[1]
    text = Path(__file__).with_suffix(".conf").read_text()
    filled = {"directory": directory, "lib": installed / "lib/pushpin", "control": control, "port": port}
    for key, value in filled.items():
        text = text.replace(f"@{key}@", str(value))
    (directory / "pushpin.conf").write_text(text)
    (directory / "routes").write_text(f"*,id=all 127.0.0.1:{backend},over_http\n")
    libraries = ":".join(str(path) for path in (installed / "lib").glob("*-linux-*"))
    path = f"{installed / 'bin'}:{os.environ['PATH']}"
    command = [str(installed / "bin/pushpin"), "--config", str(directory / "pushpin.conf"), "--merge-output"]
    subprocess.Popen(command, env=os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path})


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    backend = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=4096)
    start(options.port, backend.sockets[0].getsockname()[1])
    await ready(options.port)
    publisher = zmq.Context().socket(zmq.PUSH)
    publisher.connect(f"ipc://{Path.cwd()}/p-push")
    await feed(options.feed, lambda channel, message: publisher.send(item(channel, message)))
    await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main())
