"""The bare loop: `send` for each reader of a channel, behind a canned handshake. It understands nothing."""

from __future__ import annotations

import contextlib
import re
import select
import socket

from perf.bare import STREAM_HEAD, SWITCH, chunk, frame
from perf.peers.servers.common import GREETING, GREETING_EVENT, Kept, Lines, arguments, channels, kept

SOCKETS, STREAMS = channels(), channels()
POLLS = kept()
SEEN = re.compile(rb"last_seen=(\d+)")


def listener(port: int) -> socket.socket:
    """A door that is open."""
    door = socket.create_server(("127.0.0.1", port), backlog=4096)
    door.setblocking(False)
    return door


def send_to(readers: dict[socket.socket, None], data: bytes) -> None:
    """The loop."""
    size = len(data)
    for connection in readers:
        try:
            sent = connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            continue
        if sent != size:
            connection.setblocking(True)
            connection.sendall(data[sent:])
            connection.setblocking(False)


def answer(connection: socket.socket, channel: Kept, seen: int) -> None:
    """What a long-poll has waited for."""
    body = channel.since(seen)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.send(head + body)


def poll(connection: socket.socket, request: bytes) -> None:
    """Answers a question, or has it wait."""
    channel = POLLS[request.partition(b"?")[0].rpartition(b"/")[2].decode()]
    found = SEEN.search(request)
    if found is None or int(found[1]) < channel.last:
        answer(connection, channel, int(found[1]) if found else channel.last)
    else:
        channel.waiting.append((connection, channel.last))


def greet(connection: socket.socket, request: bytes) -> dict[socket.socket, None] | None:
    """Answers a handshake; where the reader belongs, if it stays."""
    if request.startswith(b"GET /poll/"):
        poll(connection, request)
        return None
    _, kind, channel = request.split(b" ", 2)[1].decode().split("/")
    if kind == "ws":
        connection.send(SWITCH + frame(GREETING.encode()))
        readers = SOCKETS[channel]
    else:
        connection.send(STREAM_HEAD + chunk(GREETING_EVENT))
        readers = STREAMS[channel]
    readers[connection] = None
    return readers


def main() -> None:
    """Serves until killed."""
    options = arguments()
    readers_door, feed_door = listener(options.port), listener(options.feed)
    epoll = select.epoll()
    for door in (readers_door, feed_door):
        epoll.register(door.fileno(), select.EPOLLIN)
    feeds: dict[int, tuple[socket.socket, Lines]] = {}
    connections: dict[int, tuple[socket.socket, dict[socket.socket, None] | None]] = {}
    while True:
        for number, _events in epoll.poll(-1, 512):
            if number in (readers_door.fileno(), feed_door.fileno()):
                try:
                    connection, _ = (feed_door if number == feed_door.fileno() else readers_door).accept()
                except BlockingIOError:
                    continue
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if number == feed_door.fileno():
                    feeds[connection.fileno()] = connection, Lines()
                else:
                    connections[connection.fileno()] = connection, None
                epoll.register(connection.fileno(), select.EPOLLIN)
            elif number in feeds:
                feed, lines = feeds[number]
                data = feed.recv(65536)
                for channel, message in lines.feed(data):
                    if SOCKETS[channel]:
                        send_to(SOCKETS[channel], frame(message))
                    if STREAMS[channel]:
                        send_to(STREAMS[channel], chunk(b"data: %b\n\n" % message))
                    for waiting, seen in POLLS[channel].add(message):
                        with contextlib.suppress(OSError):
                            answer(waiting, POLLS[channel], seen)
                if not data:
                    del feeds[number]
                    feed.close()
            else:
                connection, readers = connections[number]
                try:
                    data = connection.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    if readers is not None:
                        readers.pop(connection, None)
                    del connections[number]
                    connection.close()
                elif readers is None:
                    connections[number] = connection, greet(connection, data)


if __name__ == "__main__":
    main()
