"""TLS on the server's own sockets: every transport, partial writes, and all that clients do to it."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from server import tls
from server.config import Server
from server.socketio import all_acknowledged, linger, receive
from tests.certificates import Certificates
from tests.server.tls_peers import KeyChanger, Peer, in_thread
from tests.streams import clean_server, event_stream, narrow, poll, put, session, versions, websocket
from tests.support import PATIENCE_S, Address, request_bytes, server, until

# --- the transports -------------------------------------------------------------------------------------------------


async def test_every_transport(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:
        assert at.url.startswith("https:")
        await at.publish("j", userId="anonymous", status="processing")
        async with event_stream(at, jobIds="j") as stream, session(at) as ws:
            await ws.subscribe(jobIds=["j"])
            await stream.until("snapshot")
            last_seen = (await poll(at, jobIds="j"))["last_seen"]
            for number in range(1, 20):
                await at.publish("j", progress=number)
            assert versions([event.data for event in await stream.updates("j", 20)], "j") == list(range(2, 21))
            assert versions(await ws.updates("j", 20), "j") == list(range(2, 21))
            assert versions((await poll(at, jobIds="j", last_seen=last_seen))["updates"], "j") == list(range(2, 21))
            await ws.send("publish", ref=1, updates=[{"jobId": "j", "status": "completed"}])
            assert {(await ws.receive())["type"] for _ in range(2)} == {"published", "job_completed"}
            assert (await stream.rest())[-1].type == "job_completed"


async def test_large_bodies_both_ways(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:
        updates = [
            {"jobId": f"j{n}", "userId": "anonymous", "metadata": {"text": f"{n:06}" * 1000}} for n in range(800)
        ]
        answer = await at.post("/api/v2/updates", updates)
        assert answer.json["accepted"] == 800
        async with at.connect() as http:  # one connection, several answers
            for page in ("", "&status=queued"):
                jobs = (await http.request("GET", f"/api/v2/jobs?limit=500{page}")).json["jobs"]
                assert all(job["metadata"]["text"] == f"{int(job['jobId'][1:]):06}" * 1000 for job in jobs)
                assert len(jobs) == 500


@pytest.mark.parametrize("way", ["sse", "websocket"])
async def test_a_slow_reader_catches_up(issued: Certificates, way: str) -> None:
    """What the socket takes in part must go on exactly there: a byte too many or too few breaks TLS."""
    async with clean_server(tls=issued.trust, server=issued.table, store={"url": "memory:"}) as at:
        put(at, "j", "anonymous", status="processing")
        text = "x" * 30_000
        async with (
            event_stream(at, jobIds="j", receive_buffer=4096) as stream,
            websocket(at, receive_buffer=4096) as ws,
        ):
            await stream.until("snapshot")
            await ws.receive()
            await ws.subscribe(jobIds=["j"])
            narrow(at)
            for number in range(1, 60):
                put(at, "j", "anonymous", progress=number, metadata={"text": text, "number": number})
                await trio.lowlevel.checkpoint()
            await until(lambda: not all(reader.caught_up for reader in at.node.streams))  # type: ignore[attr-defined]
            seen = (
                [event.data for event in await stream.updates("j", 60)] if way == "sse" else await ws.updates("j", 60)
            )
            assert all(each["metadata"] == {"text": text, "number": each["progress"]} for each in seen[-1:])
            put(at, "j", "anonymous", progress=99)
            seen = (
                [event.data for event in await stream.updates("j", 61)] if way == "sse" else await ws.updates("j", 61)
            )
            assert versions(seen, "j")[-1] == 61
            assert versions(seen, "j") == sorted(set(versions(seen, "j")))


async def test_that_all_was_acknowledged_is_seen_through_tls(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at, event_stream(at) as stream:
        await stream.until("snapshot")
        (reader,) = at.node.streams
        await until(lambda: all_acknowledged(reader.sock))  # type: ignore[attr-defined]


async def test_a_unix_socket_beside_it_is_plain(issued: Certificates, tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    async with server(tls=issued.trust, server={**issued.table, "unix_socket": path}) as at:
        assert (await at.get("/health")).status == 200
        assert (await Address(at.port, None, issued.trust).get("/health")).status == 200


# --- the socket -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts(issued: Certificates) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    context = tls.load_context(Server(tls_cert=str(issued.cert), tls_key=str(issued.key)))
    assert context is not None
    return context, issued.trust


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), min_size=1, max_size=8))
def test_what_goes_in_comes_out(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], pieces: list[tuple[int, bool]]
) -> None:
    """As the hub and the readers write: what was not taken comes first, and what is said later behind it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        got: list[bytes] = []

        def hear() -> None:
            with theirs:
                got.append(Peer(theirs, contexts[1]).shake_hands().rest())

        thread = threading.Thread(target=hear)
        thread.start()

        async def talk() -> bytes:
            sock = tls.TlsSocket(ours, contexts[0])
            done = False
            while not done:
                done = sock.shake_hands(await receive(ours, 1000))
                while True:
                    try:
                        sock.push()
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(ours)
            said, rest = b"", b""
            for number, (size, joined) in enumerate(pieces):
                data = bytes([65 + number]) * size
                said += data
                rest += data
                while rest and not joined:
                    try:
                        rest = rest[sock.send(rest) :]
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(sock)
            while rest:
                try:
                    rest = rest[sock.send(memoryview(rest)) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sock)
            await linger(sock)
            return said

        said = trio.run(talk)
        thread.join(PATIENCE_S)
        assert got == [said]


# --- what clients do ------------------------------------------------------------------------------------------------


async def test_a_client_that_has_said_all_is_answered(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:

        def ask() -> bytes:
            peer = Peer.connect(at.port, issued.trust)
            peer.send(request_bytes("GET", "/health"))
            with suppress(ssl.SSLWantReadError):
                peer.tls.unwrap()
            peer.flush()
            peer.sock.shutdown(socket.SHUT_WR)
            with peer.sock:
                return peer.rest()

        assert b'{"status":"ok"}' in await in_thread(ask)  # type: ignore[operator]


async def test_an_answer_ends_with_a_farewell(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:

        def ask(target: str) -> bytes:
            peer = Peer.connect(at.port, issued.trust)
            with peer.sock:
                peer.send(request_bytes("GET", target, headers={"Connection": "close"}))
                return peer.rest()

        put(at, "j", "anonymous", status="completed")
        assert await in_thread(ask, "/health")
        assert b'"status":"completed"' in await in_thread(ask, "/api/v2/jobs/stream?jobIds=j")  # type: ignore[operator]


async def test_a_client_that_breaks_off_leaves_nothing(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:
        for said in (b"", request_bytes("POST", "/api/v2/jobs", headers={"Content-Length": "5"}) + b"{}"):
            peer = await in_thread(Peer.connect, at.port, issued.trust)
            assert isinstance(peer, Peer)
            await until(lambda: at.node.connections == 1)
            if said:
                peer.send(said)
            peer.sock.close()
            await until(lambda: at.node.connections == 0)
        assert at.node.counters.failed == 0


@pytest.mark.parametrize(
    "said", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST / HTTP/1.0\r\n\r\n"], ids=["get", "post"]
)
async def test_plain_http_is_told_so(issued: Certificates, said: bytes) -> None:
    async with server(server=issued.table) as at:
        plain = Address(at.port)
        async with plain.connect() as http:
            await http.send(said)
            answer = await http.answer()
            assert (answer.status, answer.error) == (400, "tls_required")
            assert answer.headers["connection"] == "close"
            assert await http.closed()


async def test_who_is_told_so_may_go_on_talking(issued: Certificates) -> None:
    async with clean_server(server=issued.table) as at:
        async with Address(at.port).connect() as http:
            await http.send(b"GET / HTTP/1.1\r\n")
            assert (await http.answer()).error == "tls_required"
            await http.send(request_bytes("GET", "/health") * 2)
            assert await http.closed()
        await until(lambda: at.node.connections == 0)
        assert at.node.counters.failed == 0


@pytest.mark.parametrize(
    "said",
    [b"\x00" * 100, b"\x16\x03\x01\x02\x00" + b"\xff" * 600, b"\x16\x03\x01\xff\xff"],
    ids=["no record", "no hello", "too long"],
)
async def test_garbage_is_closed(issued: Certificates, said: bytes) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:
        async with Address(at.port).connect() as http:
            await http.send(said)
            await http.stream.send_eof()  # type: ignore[union-attr]
            with suppress(trio.BrokenResourceError):
                await http.rest()
        await until(lambda: at.node.connections == 0)
        await until(lambda: at.node.counters.refused["tls_failed"])
        assert (at.node.counters.failed, at.node.counters.refused["tls_failed"]) == (0, 1)
        assert (await at.get("/health")).status == 200


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "a beginning"])
async def test_a_handshake_has_a_time(issued: Certificates, said: bytes) -> None:
    async with clean_server(server=issued.table, limits={"head_timeout": 0.05}) as at, at.connect() as http:
        await http.send(said)
        with suppress(trio.BrokenResourceError):
            await http.rest()
        await until(lambda: at.node.counters.refused["tls_failed"] == 1)


async def test_versions_and_protocols(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:

        def choose(version: ssl.TLSVersion, *protocols: str) -> tuple[str | None, str | None]:
            context = ssl.create_default_context(cafile=str(issued.authority))
            context.minimum_version = context.maximum_version = version
            if protocols:
                context.set_alpn_protocols(protocols)
            peer = Peer.connect(at.port, context)
            with peer.sock:
                return peer.tls.version(), peer.tls.selected_alpn_protocol()

        assert await in_thread(choose, ssl.TLSVersion.TLSv1_3) == ("TLSv1.3", None)
        assert await in_thread(choose, ssl.TLSVersion.TLSv1_3, "h2", "http/1.1") == ("TLSv1.3", "http/1.1")
        assert await in_thread(choose, ssl.TLSVersion.TLSv1_2, "http/1.1") == ("TLSv1.2", "http/1.1")
        assert await in_thread(choose, ssl.TLSVersion.TLSv1_2, "h2") == ("TLSv1.2", None)
        await until(lambda: at.node.connections == 0)


async def test_old_versions_are_refused(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{at.port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
        assert (await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)).returncode == 1
        await until(lambda: at.node.counters.refused["tls_failed"] == 1)


async def test_keys_may_change_on_the_way(issued: Certificates) -> None:
    async with clean_server(tls=issued.trust, server=issued.table) as at:

        def ask() -> bytes:
            client = KeyChanger(at.port)
            with closing(client):
                assert client.change()
                assert client.change()
                return client.ask(request_bytes("GET", "/health", headers={"Connection": "close"}))

        assert b'{"status":"ok"}' in await in_thread(ask)  # type: ignore[operator]


async def test_a_flood_of_key_changes_is_cut_off(issued: Certificates) -> None:
    """Each costs the server far more than its sender, and none of them is content."""
    async with clean_server(tls=issued.trust, server=issued.table) as at, session(at) as ws:

        def flood() -> int:
            client = KeyChanger(at.port)
            with closing(client):
                # Some hundred thousand may be on their way before the server comes to it.
                for number in range(2_000_000):
                    if not client.change():
                        return number
            return -1

        changes = await in_thread(flood)
        assert isinstance(changes, int)
        assert changes > 100
        await ws.quiet()
        await until(lambda: at.node.connections == 1)


async def test_answers_to_key_changes_that_nobody_takes_are_no_way_to_take_memory(issued: Certificates) -> None:
    """Even if there is content between them, which excuses them."""
    context = tls.load_context(Server(**issued.table))
    assert context is not None

    def flood(port: int) -> None:
        client = KeyChanger(port, receive_buffer=1)
        with closing(client):
            while client.change() and client.send(b"x" * 10):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=flood, args=listening.getsockname()[1:2])
        thread.start()
        sock, _ = listening.accept()
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            ours = tls.TlsSocket(sock, context)
            while not ours.shake_hands(sock.recv(4096)):
                ours.push()
            ours.push()
            sock.setblocking(False)

            async def read() -> None:
                while len(ours._rest) < 1_000_000:
                    await receive(ours, 4096)

            with trio.fail_after(PATIENCE_S), pytest.raises(ConnectionError, match="takes no answers"):
                await read()
        await in_thread(thread.join)
