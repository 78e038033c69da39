"""The load client against scripted servers: a benchmark is worth what its counting is worth."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perf.bare import STREAM_HEAD, SWITCH, Template, chunk, frame
from perf.load import LoadClient, LoadError
from perf.measure import Target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SNAPSHOT = b'{"type":"subscribed","jobIds":["bench"],"snapshot":[{"jobId":"bench","version":10}]}'
SSE_SNAPSHOT = b'id: e:1\ndata: {"type":"snapshot","jobs":[{"jobId":"bench","version":10}]}\n\n'
HEARTBEAT = b'{"type":"heartbeat","timestamp":"2026-01-01T00:00:00Z"}'
Script = Callable[[socket.socket], None]


def update(version: int, stamp: int = 0) -> bytes:
    return b'{"type":"status_update","id":"e:1","jobId":"bench","message":"t=%d","version":%d}' % (stamp, version)


def event(version: int, stamp: int = 0) -> bytes:
    return b"id: e:%d\ndata: %b\n\n" % (version, update(version, stamp))


@contextmanager
def scripted(script: Script) -> Iterator[int]:
    """A server that reads the request of each connection, then runs the script on it; the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            kept.append(connection)
            connection.settimeout(5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            text = b""
            while b"\r\n\r\n" not in text:
                text += connection.recv(1)
            script(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in kept:
            connection.close()


@contextmanager
def bare_server() -> Iterator[Target]:
    process = subprocess.Popen([sys.executable, "-m", "perf.bare"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield Target("bare", process.pid, int(process.stdout.readline().rpartition(b":")[2]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def client() -> Iterator[LoadClient]:
    with LoadClient() as client:
        yield client


def websocket(parts: list[bytes]) -> Script:
    def script(connection: socket.socket) -> None:
        connection.sendall(SWITCH)
        head = connection.recv(2, socket.MSG_WAITALL)
        connection.recv(4 + (head[1] & 127), socket.MSG_WAITALL)  # the subscribe message and its mask
        for part in parts:
            connection.sendall(part)

    return script


def stream(parts: list[bytes], head: bytes = STREAM_HEAD) -> Script:
    def script(connection: socket.socket) -> None:
        for part in [head, *parts]:
            connection.sendall(part)

    return script


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def read_all(client: LoadClient, port: int, version: int, **options: object) -> dict[str, object]:
    options = {"transport": "ws", "path": "/ws/jobs", "subscribe": '{"type":"subscribe"}', **options}
    client.start(port=port, **options)
    return client.wait_version(version, 5)


def test_counts_frames_of_every_length_however_they_are_split(client: LoadClient) -> None:
    large = b'{"type":"status_update","metadata":"%b","version":12}' % (b"x" * 70_000)
    data = frame(SNAPSHOT) + frame(update(11)) + b"\x82\x01x" + frame(HEARTBEAT)
    with scripted(
        websocket([*one_by_one(data), frame(large) + frame(update(13))[:50], frame(update(13))[50:]])
    ) as port:
        report = read_all(client, port, 13)
    assert (report["deliveries"], report["snapshots"], report["others"]) == (3, 1, 2)
    assert (report["lost"], report["repeated"], report["errors"]) == (0, 0, 0)


@pytest.mark.parametrize("sample", [1, 4])
@pytest.mark.parametrize("transport", ["ws", "sse"])
def test_finds_what_was_lost_and_what_was_repeated(client: LoadClient, sample: int, transport: str) -> None:
    versions = [11, 12, 13, 13, 14, *range(17, 40), 39, 40]
    if transport == "ws":
        script = websocket([frame(SNAPSHOT), b"".join(frame(update(version)) for version in versions)])
    else:
        script = stream([chunk(SSE_SNAPSHOT), chunk(b"".join(map(event, versions)))])
    with scripted(script) as port:
        report = read_all(client, port, 40, transport=transport, sample=sample)
    assert (report["deliveries"], report["lost"], report["repeated"]) == (len(versions), 2, 2)


@pytest.mark.parametrize("sample", [1, 7])
def test_a_sampled_read_counts_the_same_as_a_full_one(client: LoadClient, sample: int) -> None:
    messages = [frame(update(version, time.monotonic_ns())) for version in range(11, 3011)]
    messages.insert(1500, frame(HEARTBEAT))
    with scripted(websocket([frame(SNAPSHOT), b"".join(messages)])) as port:
        report = read_all(client, port, 3010, sample=sample)
    assert (report["deliveries"], report["others"], report["lost"], report["repeated"]) == (3000, 1, 0, 0)
    assert report["latency"]["count"] == 3000  # type: ignore[index]


@pytest.mark.parametrize("chunked", [True, False])
def test_counts_events_however_they_are_split(client: LoadClient, chunked: bool) -> None:
    events = b"retry: 5\n" + SSE_SNAPSHOT + event(11) + b": comment\n\n" + event(12) + event(13)
    if chunked:  # chunks that end anywhere, a chunk extension, then everything in small writes
        data = b"".join(chunk(events[i : i + 37]) for i in range(0, len(events), 37)).replace(
            b"25\r\n", b"25;a=b\r\n", 1
        )
        script = stream(one_by_one(data))
    else:
        head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
        script = stream(one_by_one(events), head)
    with scripted(script) as port:
        report = read_all(client, port, 13, transport="sse")
    assert (report["deliveries"], report["snapshots"], report["others"]) == (3, 1, 1)
    assert (report["lost"], report["repeated"], report["errors"]) == (0, 0, 0)


def test_an_event_finished_in_one_chunk_is_not_mixed_with_the_next(client: LoadClient) -> None:
    first, second = event(11), event(12)
    parts = [chunk(SSE_SNAPSHOT), chunk(first[:20]), chunk(first[20:]) + chunk(second) + chunk(event(13))]
    read = threading.Event()

    def script(connection: socket.socket) -> None:
        stream(parts[:2])(connection)
        read.wait(5)  # the client has the first part: the rest comes in another read
        stream(parts[2:], b"")(connection)

    with scripted(script) as port:
        client.start(port=port, transport="sse", path="/")
        deadline = time.monotonic() + 5
        while client.report()["bytes"] < len(STREAM_HEAD + parts[0] + parts[1]):
            assert time.monotonic() < deadline
        read.set()
        report = client.wait_version(13, 5)
    assert (report["deliveries"], report["lost"], report["repeated"], report["errors"]) == (3, 0, 0, 0)


def test_latency_is_the_age_of_the_time_stamp(client: LoadClient) -> None:
    def script(connection: socket.socket) -> None:
        stamp = time.monotonic_ns() - 250_000_000
        websocket([frame(SNAPSHOT), *(frame(update(version, stamp)) for version in range(11, 21))])(connection)

    with scripted(script) as port:
        report = read_all(client, port, 20)
    latency = report["latency"]
    assert latency["count"] == 10  # type: ignore[index]
    assert 250 <= latency["p50_ms"] <= latency["p99_ms"] <= latency["max_ms"] < 2000  # type: ignore[index]


def test_pings_are_answered_with_their_payload(client: LoadClient) -> None:
    pongs: list[bytes] = []

    def script(connection: socket.socket) -> None:
        websocket([frame(SNAPSHOT), b"\x89\x03abc"])(connection)
        pongs.append(connection.recv(9, socket.MSG_WAITALL))
        connection.sendall(frame(update(11)))

    with scripted(script) as port:
        read_all(client, port, 11)
    assert pongs == [b"\x8a\x83\0\0\0\0abc"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "503"),
        (SWITCH + b"\x88\x02\x03\xf5", "closed with 1013"),
        (SWITCH + frame(b'{"type":"error","code":"forbidden","message":"no"}') + b"\x88\x02\x03\xf0", "forbidden"),
    ],
)
def test_a_refused_reader_says_why(client: LoadClient, answer: bytes, words: str) -> None:
    with scripted(lambda connection: connection.sendall(answer)) as port, pytest.raises(LoadError, match=words):
        read_all(client, port, 1)


def test_a_stream_that_ends_is_an_error(client: LoadClient) -> None:
    with scripted(stream([chunk(SSE_SNAPSHOT), chunk(event(11)), b"0\r\n\r\n"])) as port:
        client.start(port=port, transport="sse", path="/")
        deadline = time.monotonic() + 5
        while not (report := client.report())["closed"]:
            assert time.monotonic() < deadline
    assert (report["deliveries"], report["closed"], report["connections"]) == (1, 1, 0)
    assert "the stream ended" in report["error"]


@pytest.mark.parametrize(
    ("transport", "path", "subscribe"),
    [("ws", "/ws/jobs", '{"type":"subscribe","jobIds":["bench"]}'), ("sse", "/api/v2/jobs/stream?jobIds=bench", "")],
)
def test_publishing_reaches_every_reader_of_the_bare_loop(
    client: LoadClient, transport: str, path: str, subscribe: str
) -> None:
    with bare_server() as bare:
        client.start(
            port=bare.port, transport=transport, path=path, subscribe=subscribe, connections=20, rate=1000, sources=5
        )
        assert client.report()["first_snapshot"]["count"] == 20
        client.mark()
        # In lockstep the loop never has two updates to send at once, so it does exactly one send a reader and update.
        published = client.ask("publish", "published", port=bare.port, requests=50, lockstep=True)
        assert (published["accepted"], published["failed"], published["unanswered"]) == (50, 0, 0)
        assert (bare.ask("GET", "/bare")["sends"], client.report()["reads"]) == (1000, 1000)
        published = client.ask(
            "publish",
            "published",
            port=bare.port,
            batch=10,
            rate=2000,
            seconds=0.5,
            depth=8,
            connections=2,
            ndjson=True,
        )
        report = client.wait_version(50 + published["accepted"], 5)
    assert published["accepted"] == 1000
    assert 0.49 <= published["seconds"] < 2
    assert report["deliveries"] == 20 * 1050
    assert (report["lost"], report["repeated"], report["errors"]) == (0, 0, 0)
    assert report["latency"]["count"] == 20 * 1050


@pytest.mark.parametrize("chunked", [True, False])
def test_long_polls_go_on_with_their_cursor(client: LoadClient, chunked: bool) -> None:
    asked: list[bytes] = []

    def answer(cursor: bytes, *updates: bytes) -> list[bytes]:
        body = b'{"updates":[%b],"last_seen":"%b","reset":false}' % (b",".join(updates), cursor)
        if not chunked:
            return one_by_one(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        return [head, *(chunk(body[i : i + 31]) for i in range(0, len(body), 31)), b"0\r\n", b"\r\n"]

    def script(connection: socket.socket) -> None:
        # The request for the first answer has been read; its cursor must come back in the next one.
        for parts in (
            answer(b"e:10", update(10)),
            answer(b"e:12", update(11), update(12)),
            answer(b"e:15", update(14)),
        ):
            for part in parts:
                connection.sendall(part)
            text = b""
            while b"\r\n\r\n" not in text:
                text += connection.recv(1)
            asked.append(text.split(b" ")[1])

    with scripted(script) as port:
        report = read_all(client, port, 14, transport="poll", path="/api/v2/jobs/poll?jobIds=load-{n}", first=7)
        deadline = time.monotonic() + 5
        while len(asked) < 3:
            assert time.monotonic() < deadline
    assert asked == [b"/api/v2/jobs/poll?jobIds=load-7&timeout=30&last_seen=e:%d" % at for at in (10, 12, 15)]
    assert (report["deliveries"], report["snapshots"], report["lost"], report["repeated"]) == (3, 1, 1, 0)


def test_churning_connections_are_counted_when_they_have_their_snapshot(client: LoadClient) -> None:
    with bare_server() as bare:
        client.send(
            "start",
            port=bare.port,
            transport="sse",
            path="/api/v2/jobs/stream",
            connections=8,
            churn_seconds=0.2,
            sources=9,
        )
        deadline = time.monotonic() + 5
        while (report := client.report())["pending"] or report["seconds"] < 0.2:
            assert time.monotonic() < deadline
    assert report["finished"] == report["snapshots"] == report["first_snapshot"]["count"] > 8
    assert report["failed"] == report["errors"] == 0


def test_an_answer_that_refuses_is_counted_and_shown(client: LoadClient) -> None:
    body = b'{"error":{"code":"job_ended","message":"job bench has ended"}}'

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 409 Conflict\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with scripted(script) as port:
        published = client.ask("publish", "published", port=port, requests=2, depth=2)
    assert (published["failed"], published["accepted"]) == (1, 1)
    assert "job_ended" in published["error"]


def test_the_bare_loop_sends_a_template_with_version_and_stamp_filled_in() -> None:
    template = Template(b'{"version":1,"message":"t=2","x":3}')
    assert template.fill(17, b"99") == b'{"version":17,"message":"t=99","x":3}'
    assert Template(b'{"message":"t=2","version":1}').fill(17, b"99") == b'{"message":"t=99","version":17}'
    with pytest.raises(ValueError, match="needs a version"):
        Template(b"{}")
