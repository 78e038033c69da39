"""TLS on the server's own sockets: every transport, partial writes, hostile peers, files that change."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from server import tls
from server.config import ConfigError, Server
from server.socketio import all_acknowledged, linger, receive
from tests import certificates
from tests.certificates import Certificates
from tests.integration.running import STATUSWIRE, clean_environment
from tests.redis_servers import running_server
from tests.streams import clean_server, event_stream, narrow, poll, put, session, versions, websocket
from tests.support import PATIENCE_S, Address, request_bytes, server, spawned, until, write_config


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


class Peer:
    """A client whose records are its own: what it does with the connection below them is the test's affair."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")
        self.got = b""

    @classmethod
    def connect(cls, port: int, context: ssl.SSLContext) -> Peer:
        return cls(socket.create_connection(("127.0.0.1", port), PATIENCE_S), context).shake_hands()

    def shake_hands(self) -> Peer:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                assert self.more(), "closed in the handshake"
            else:
                self.flush()
                return self

    def flush(self) -> None:
        self.sock.sendall(self.outgoing.read())

    def more(self) -> bool:
        data = self.sock.recv(65536)
        self.incoming.write(data)
        return bool(data)

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def read(self) -> bytes | None:
        """More content; None once the server has said that there is no more."""
        while True:
            try:
                return self.tls.read(65536) or None
            except ssl.SSLZeroReturnError:
                return None
            except ssl.SSLWantReadError:
                assert self.more(), "the connection ended without TLS's farewell"

    def rest(self) -> bytes:
        while (data := self.read()) is not None:
            self.got += data
        return self.got


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


async def in_thread(task: object, *arguments: object) -> object:
    with trio.fail_after(2 * PATIENCE_S):
        return await trio.to_thread.run_sync(task, *arguments)  # type: ignore[arg-type]


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


class KeyChanger:
    """A client that may ask for new keys, which Python's own cannot: OpenSSL's, by hand."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        name = ctypes.util.find_library("ssl")
        assert name is not None
        self.lib = ctypes.CDLL(name)
        for function in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(self.lib, function).restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(self.lib.SSL_CTX_new(ctypes.c_void_p(self.lib.TLS_client_method())))
        self.tls = ctypes.c_void_p(self.lib.SSL_new(self.context))
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        assert self.lib.SSL_set_fd(self.tls, self.sock.fileno()) == 1
        assert self.lib.SSL_connect(self.tls) == 1

    def change(self) -> bool:
        """New keys, both ways. Whether the connection still stands."""
        return bool(self.lib.SSL_key_update(self.tls, 1) == 1 and self.lib.SSL_do_handshake(self.tls) == 1)

    def send(self, data: bytes) -> bool:
        """Send some. Whether the connection still stands."""
        return bool(self.lib.SSL_write(self.tls, data, len(data)) == len(data))

    def ask(self, data: bytes) -> bytes:
        """Send some, and read to the end."""
        assert self.send(data)
        got, buffer = b"", ctypes.create_string_buffer(65536)
        while (count := self.lib.SSL_read(self.tls, buffer, 65536)) > 0:
            got += buffer.raw[:count]
        return got

    def close(self) -> None:
        self.lib.SSL_free(self.tls)
        self.lib.SSL_CTX_free(self.context)
        self.sock.close()


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
                for number in range(
                    2_000_000
                ):  # some hundred thousand may be on their way before the server comes to it
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


# --- files ----------------------------------------------------------------------------------------------------------


def refusal(**keys: str) -> str:
    with pytest.raises(ConfigError) as caught:
        tls.load_context(Server(**keys))
    return str(caught.value)


def test_files_that_do_not_fit(issued: Certificates, tmp_path: Path) -> None:
    other = certificates.make(tmp_path)
    cert, key = str(issued.cert), str(issued.key)
    assert "is not the key of the certificate" in refusal(tls_cert=cert, tls_key=str(other.key))
    assert "No such file" in refusal(tls_cert=cert, tls_key="nowhere.pem")
    assert refusal(tls_cert="nowhere.pem").startswith("server.tls_cert = 'nowhere.pem': No such file")
    assert "expected a certificate" in refusal(tls_cert=key, tls_key=key)
    assert "expected a certificate" in refusal(tls_cert=cert)  # which holds no key
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-out", str(encrypted), "-passout", "pass:secret"], check=True
    )
    assert "the key is encrypted" in refusal(tls_cert=cert, tls_key=str(encrypted))
    both = tmp_path / "both.pem"
    both.write_bytes(issued.key.read_bytes() + issued.cert.read_bytes())
    assert tls.load_context(Server(tls_cert=str(both))) is not None
    assert tls.load_context(Server()) is None


def served_certificate(at: Address) -> bytes:
    assert at.tls is not None
    with socket.create_connection(("127.0.0.1", at.port), PATIENCE_S) as sock:
        peer = Peer(sock, at.tls).shake_hands()
        found = peer.tls.getpeercert(binary_form=True)
        assert found is not None
        return found


@pytest.mark.slow
async def test_reload_takes_new_files_and_keeps_the_old_if_they_are_bad(tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    async with spawned(tmp_path, tls=made.trust, server=made.table, store={"url": "memory:"}) as at:
        assert at.start_line.startswith("statuswire listening on https://127.0.0.1:")
        first = await in_thread(served_certificate, at)
        async with session(at) as ws:
            made.issue()
            at.signal(signal.SIGHUP)
            await at.logged("reloaded")
            second = await in_thread(served_certificate, at)
            assert second != first
            certificate = made.cert.read_bytes()
            made.issue()
            made.cert.write_bytes(certificate)  # the new key with the old certificate: caught half-way
            at.signal(signal.SIGHUP)
            await at.logged("reload_failed")
            assert "is not the key of the certificate" in at.log()
            assert await in_thread(served_certificate, at) == second
            write_config(tmp_path, {"server": {"port": at.port}, "store": {"url": "memory:"}})
            at.signal(signal.SIGHUP)
            await at.logged("reloaded", 2)
            assert await in_thread(served_certificate, at) == second, "TLS is not turned off by a reload"
            await ws.quiet()


def run(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(STATUSWIRE), *arguments],
        cwd=directory,
        env=clean_environment(**environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_check_config_verifies_that_they_fit(issued: Certificates, tmp_path: Path) -> None:
    write_config(tmp_path, {"server": issued.table})
    assert run(tmp_path, "check-config").returncode == 0
    other = certificates.make(tmp_path)
    write_config(tmp_path, {"server": {"tls_cert": str(issued.cert), "tls_key": str(other.key)}})
    checked = run(tmp_path, "check-config")
    assert checked.returncode == 2
    assert "is not the key of the certificate" in checked.stderr


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_commands_trust_the_authority_they_are_given(issued: Certificates) -> None:
    async with server(tls=issued.trust, server=issued.table) as at:

        def publish(**environ: str) -> subprocess.CompletedProcess[str]:
            return run(
                issued.cert.parent, "publish", "j", "--user", "u", "--status", "completed", "--url", at.url, **environ
            )

        refused = await trio.to_thread.run_sync(publish)
        assert refused.returncode == 1
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
        asked = await trio.to_thread.run_sync(lambda: run(issued.cert.parent, "health", "--url", at.url))
        assert (asked.returncode, asked.stdout) == (0, '{"status":"ok"}\n'), "of its own machine it trusts everybody"
        trusted = {"SSL_CERT_FILE": str(issued.authority)}
        published = await trio.to_thread.run_sync(lambda: publish(**trusted))
        assert published.returncode == 0, published.stderr
        watched = await trio.to_thread.run_sync(
            lambda: run(issued.cert.parent, "watch", "j", "--json", "--url", at.url, **trusted)
        )
        assert watched.returncode == 0, watched.stderr
        assert '"status":"completed"' in watched.stdout
        reported = await trio.to_thread.run_sync(
            lambda: run(
                issued.cert.parent, "run", "--job", "k", "--user", "u", "--url", at.url, "--", sys.executable, "-V",
                **trusted,
            )
        )  # fmt: skip
        assert reported.returncode == 0, reported.stderr
        assert (await at.get("/api/v2/jobs/k")).json["status"] == "completed"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    with running_server(tmp_path) as process:
        yield process.url


@pytest.mark.slow
async def test_several_workers(issued: Certificates, tmp_path: Path, redis: str) -> None:
    keys = {**issued.table, "workers": 2}
    async with spawned(tmp_path, tls=issued.trust, server=keys, store={"url": redis}) as at:
        assert re.match(r"statuswire listening on https://127\.0\.0\.1:\d+ \(.*2 workers\)", at.start_line)
        for number in range(8):
            await at.publish(f"j{number}", userId="anonymous", status="completed")
            assert (await at.get(f"/api/v2/jobs/j{number}")).json["status"] == "completed"
        issued_before = await in_thread(served_certificate, at)
        at.signal(signal.SIGHUP)
        await at.logged("reloaded", 2)
        assert await in_thread(served_certificate, at) == issued_before
