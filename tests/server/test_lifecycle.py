"""A server's life: start, signals, drain, sudden death and return, exhaustion of descriptors, connections and disk."""

from __future__ import annotations

import errno
import json
import re
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio

from server import listener
from server.app import StartError, drain
from server.poller import Peer
from tests.streams import event_stream, handshake_bytes, websocket
from tests.support import (
    AUTH,
    SECRET,
    WORKER,
    Address,
    Answer,
    Http,
    Spawned,
    bearer,
    command,
    request_bytes,
    server,
    spawned,
    until,
    until_answered,
    write_config,
)

pytestmark = pytest.mark.slow

JOBS = "/api/v2/jobs"
STREAM = {"Accept": "text/event-stream"}


async def fails_to_start(directory: Path, **tables: Mapping[str, object]) -> str:
    """Start a server that cannot; its one line of complaint."""
    write_config(directory, tables)
    (directory / "server.log").unlink(missing_ok=True)

    def run() -> str:
        process = command(directory)
        output, _ = process.communicate(timeout=20)
        assert (process.returncode, output) == (2, b"")
        return (directory / "server.log").read_text()

    text = await trio.to_thread.run_sync(run)
    line = text.splitlines()[-1]
    assert line.startswith("statuswire: "), text
    assert "Traceback" not in text
    return line


async def ready(at: Address) -> Answer:
    return await at.get("/ready")


# --- start --------------------------------------------------------------------------------------------------------


async def test_it_says_where_it_listens_and_logs_one_line_per_event(tmp_path: Path) -> None:
    async with spawned(tmp_path, log={"format": "json", "level": "debug"}) as at:
        assert re.fullmatch(
            r"statuswire listening on http://127\.0\.0\.1:\d+ \(store sqlite:statuswire\.db\)\n", at.start_line
        )
        assert (await at.get("/health")).json == {"status": "ok"}
        assert (await ready(at)).json == {"status": "ready"}
        await at.get("/nowhere", {"X-Request-Id": "r1"})
        await at.logged('"r1"')
        lines = [json.loads(line) for line in at.log().splitlines()]
        (line,) = [line for line in lines if line.get("requestId") == "r1"]
        assert (line["event"], line["level"], line["status"], line["path"]) == ("request", "info", 404, "/nowhere")
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
        assert at.process.stdout is not None
        assert at.process.stdout.read() == b"", "one line on stdout and no more"


async def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = await fails_to_start(tmp_path, server={"port": port})
        assert f"127.0.0.1 port {port}" in line
        assert "another program listens there" in line


async def test_an_address_of_another_machine_is_said_in_one_line(tmp_path: Path) -> None:
    # 192.0.2.0/24 is for documentation: no machine has it (RFC 5737).
    line = await fails_to_start(tmp_path, server={"host": "192.0.2.1"}, auth=AUTH)
    assert "this machine does not have that address" in line


async def test_a_store_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    assert "does not exist" in await fails_to_start(tmp_path, store={"url": "sqlite:no/such/dir.db"})
    async with server(store={"url": f"sqlite:{tmp_path}/used.db"}):
        assert "in use by another server" in await fails_to_start(tmp_path, store={"url": "sqlite:used.db"})


async def test_without_auth_it_listens_on_loopback_only(tmp_path: Path) -> None:
    assert "loopback only" in await fails_to_start(tmp_path, server={"host": "0.0.0.0"})


# --- unix socket --------------------------------------------------------------------------------------------------


async def test_a_unix_socket_alone_and_what_is_left_of_a_dead_server(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    async with spawned(tmp_path, server={"unix_socket": str(path)}) as at:
        assert at.start_line.startswith(f"statuswire listening on unix:{path} ")
        await at.publish("j1", userId="alice")
        assert f"another server listens on {path}" in await fails_to_start(tmp_path, server={"unix_socket": str(path)})
        assert (await at.get(f"{JOBS}/j1")).status == 200, "the attempt took nothing away"
        at.signal(signal.SIGKILL)
        await at.exit_status()
        assert path.is_socket()
    async with spawned(tmp_path, server={"unix_socket": str(path), "port": 0}) as at:
        assert (await at.get(f"{JOBS}/j1")).status == 200
        assert (await Address(at.port).get(f"{JOBS}/j1")).status == 200, "with a port it listens on both"
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "exists and is no socket"), ("file/s.sock", "Not a directory"), ("x" * 120, "path too long")],
)
async def test_a_unix_socket_that_cannot_be(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StartError, match=message):
        async with server(server={"unix_socket": str(tmp_path / name)}):
            pass
    assert (tmp_path / "file").read_text() == "mine"


async def test_clients_of_a_trusted_unix_proxy_are_told_apart(tmp_path: Path) -> None:
    table = {"unix_socket": str(tmp_path / "s.sock"), "trusted_proxies": "unix"}
    async with server(server=table, limits={"connects_per_second": 0.01}) as at:
        for address, status in (("203.0.113.1", 200), ("203.0.113.1", 429), ("203.0.113.2", 200)):
            assert (await at.get(JOBS, {"X-Forwarded-For": address})).status == status


# --- drain --------------------------------------------------------------------------------------------------------


async def test_sigterm_drains(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 1.5}) as at, AsyncExitStack() as stack:
        last = await at.publish("j1", userId="alice")
        idle, poll, stream, slow = [await stack.enter_async_context(at.connect()) for _ in range(4)]
        await idle.request("GET", "/health")
        await stream.send(request_bytes("GET", f"{JOBS}/stream"))
        assert (await stream.head())[0] == 200
        await poll.send(request_bytes("GET", f"{JOBS}/poll?timeout=60&last_seen={last.json['id']}"))
        body = b'{"jobId":"j2"}'
        await slow.send(
            request_bytes("POST", JOBS, headers={"Content-Length": str(len(body)), "Expect": "100-continue"})
        )
        assert (await slow.head())[0] == 100

        started = trio.current_time()
        at.signal(signal.SIGTERM)
        answer = await until_answered(at, "/ready", 503)
        assert (answer.status, answer.json["reason"], "retry-after" in answer.headers) == (503, "draining", True)
        assert (await at.get("/health")).status == 200
        for method, target in (
            ("GET", JOBS),
            ("POST", JOBS),
            ("GET", "/"),
            ("GET", f"{JOBS}/poll"),
            ("GET", "/ws/jobs"),
            ("GET", "/nowhere"),
            ("PUT", JOBS),
        ):
            refused = await at.ask(method, target, {} if method == "POST" else None)
            assert (refused.status, refused.error, refused.headers["connection"]) == (503, "try_later", "close"), target
            assert int(refused.headers["retry-after"]) >= 1
        later = await at.get(f"{JOBS}/stream", STREAM)
        assert later.status == 200
        assert re.match(rb'retry: \d+\ndata: \{"type":"error","code":"try_later"', later.body)
        assert (await idle.request("GET", JOBS)).status == 503, "on a connection that was there, too"

        polled = await poll.answer()
        assert (polled.status, polled.json["updates"], polled.json["timedOut"]) == (200, [], False)
        await slow.send(body)
        assert (await slow.answer()).status == 201, "what was under way is finished"
        with trio.fail_after(20):
            text = b"".join([piece async for piece in stream.chunks()])
        assert re.search(rb'retry: \d+\nid: \w+:\d+\ndata: \{"type":"error","code":"try_later"', text)
        assert await stream.closed()
        assert await at.exit_status() == 0
        assert trio.current_time() - started >= 1.5, "streams are closed over `drain` seconds, the rest waits"
        assert "drained" in at.log()
    async with spawned(tmp_path) as at:
        assert (await at.get(f"{JOBS}/j2")).status == 200


async def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 600}) as at, at.connect() as stream:
        await stream.send(request_bytes("GET", f"{JOBS}/stream"))
        await stream.head()
        at.signal(signal.SIGTERM)
        await until_answered(at, "/ready", 503)
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
        assert "second signal" in at.log()


async def test_an_interrupt_with_nobody_there_does_not_wait(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 600}) as at:
        at.signal(signal.SIGINT)
        assert await at.exit_status() == 0


async def test_accepted_updates_are_flushed_though_their_request_never_ends(tmp_path: Path) -> None:
    async with spawned(tmp_path) as at, at.connect() as http:
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": "100000"}
        lines = b"".join(b'{"jobId":"j%d","userId":"alice"}\n' % number for number in range(300))
        await http.send(request_bytes("POST", "/api/v2/updates", headers=headers) + lines)
        await until_answered(at, f"{JOBS}/j299", 200)
        await http.aclose()
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
    async with spawned(tmp_path) as at:
        assert len((await at.get(f"{JOBS}?limit=1000")).json["jobs"]) == 300


async def test_lines_that_go_on_are_answered_when_the_drain_is_over(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 1}) as at, at.connect() as http:
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": "100000"}
        await http.send(request_bytes("POST", "/api/v2/updates", headers=headers))
        for number in range(3):
            await http.send(b'{"jobId":"j%d","userId":"alice"}\n' % number)
            await until_answered(at, f"{JOBS}/j{number}", 200)
        at.signal(signal.SIGTERM)
        await until_answered(at, "/ready", 503)
        await http.send(b'{"jobId":"j0","progress":7}\n{"jobId":"j1","progr')
        answer = await http.answer()
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "try_later", "1")
        assert "4 updates of this request were read" in answer.json["error"]["message"]
        assert await at.exit_status() == 0
    async with spawned(tmp_path) as at:
        assert (await at.get(f"{JOBS}/j0")).json["progress"] == 7


async def test_streams_that_are_opened_while_draining_are_ended_too() -> None:
    async with server() as at:
        drained: list[int] = []

        class Late:
            def drain(self, delay_ms: int) -> None:
                drained.append(delay_ms)

        class Early(Late):
            def drain(self, delay_ms: int) -> None:
                super().drain(delay_ms)
                del at.node.streams[self]
                at.node.streams[late] = None

        late = Late()
        at.node.streams[Early()] = None
        await drain(at.node, 0)
        assert len(drained) == 2


# --- SIGHUP -------------------------------------------------------------------------------------------------------


async def test_sighup_rereads_keys_and_limits(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(SECRET + "\n")
    auth = {"jwt_key_file": str(key)}
    new_key = SECRET[::-1]
    new = {"Authorization": f"Bearer {jwt.encode({'sub': 'alice'}, new_key)}"}
    async with spawned(tmp_path, auth=auth) as at, at.connect() as kept:
        assert (await kept.request("GET", JOBS, headers=bearer("alice"))).status == 200
        assert (await at.get(JOBS, new)).status == 401
        key.write_text(new_key)
        write_config(tmp_path, {"auth": auth, "limits": {"publishes_per_second": 0.01}})
        await reload(at, "reloaded")
        assert (await kept.request("GET", JOBS, headers=bearer("alice"))).status == 401, "the connection stays"
        assert (await at.get(JOBS, new)).status == 200
        worker = jwt.encode({"sub": "worker", "capabilities": ["publish"]}, new_key)
        statuses = [(await at.post(JOBS, {}, {"Authorization": f"Bearer {worker}"})).status for _ in range(2)]
        assert statuses == [201, 429]

        key.write_text("short")
        await reload(at, "reload_failed")
        write_config(tmp_path, {"auth": auth, "limits": {"publish_per_second": 1}})
        await reload(at, "publishes_per_second")
        write_config(tmp_path, {})
        await reload(at, "needs a restart")
        assert (await at.get(JOBS, new)).status == 200, "what cannot be used changes nothing"
        assert (await at.get(JOBS)).status == 401


async def test_sighup_changes_origins_and_ends_nobodys_stream(tmp_path: Path) -> None:
    page = {"Origin": "https://app.example.com"}
    upgrade = handshake_bytes("/ws/jobs", bearer("alice") | page)
    async with (
        spawned(tmp_path, auth=AUTH) as at,
        websocket(at, headers=bearer("alice")) as ws,
        event_stream(at, headers=bearer("alice")) as stream,
    ):
        assert (await ws.receive())["type"] == "connected"
        assert (await ws.ask("subscribe"))["type"] == "subscribed"
        await stream.until("snapshot")
        refused, allowed = at.connect(), at.connect()
        async with refused as http:
            await http.send(upgrade)
            assert (await http.answer()).status == 403
        assert "access-control-allow-origin" not in (await at.get(JOBS, bearer("alice") | page)).headers

        write_config(tmp_path, {"auth": AUTH, "cors": {"origins": [page["Origin"]]}})
        await reload(at, "reloaded")
        async with allowed as http:
            await http.send(upgrade)
            assert (await http.head())[0] == 101
        assert (await at.get(JOBS, bearer("alice") | page)).headers["access-control-allow-origin"] == page["Origin"]

        created = await at.post(JOBS, {"jobId": "job_1", "userId": "alice"}, WORKER)
        assert created.status == 201
        assert (await ws.receive())["jobId"] == "job_1", "it is the same connection as before"
        assert (await stream.event()).data["jobId"] == "job_1"


async def reload(at: Spawned, words: str) -> None:
    """Have it read its configuration again, and wait until it says these words once more."""
    times = at.log().count(words) + 1
    at.signal(signal.SIGHUP)
    await at.logged(words, times)


# --- sudden death -------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_kill_9_right_after_an_answer_loses_nothing(tmp_path: Path) -> None:
    answered: dict[str, Answer] = {}
    async with spawned(tmp_path) as at:

        async def work(number: int) -> None:
            async with at.connect() as http:
                for version in range(1, 10_000):
                    body = {"userId": "alice", "progress": version / 100, "seq": version}
                    headers = {"Idempotency-Key": f"{number}-{version}"}
                    try:
                        answer = await http.request("POST", f"{JOBS}/j{number}/updates", body=body, headers=headers)
                    except Exception:
                        return  # the server is dead
                    assert answer.status == 200
                    answered[f"j{number}"] = answer

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(work, number)
            await until(lambda: len(answered) == 8 and answered["j0"].json["version"] >= 20)
            at.signal(signal.SIGKILL)
        assert await at.exit_status() == -signal.SIGKILL
    highest = max(int(answer.json["id"].rpartition(":")[2]) for answer in answered.values())
    epoch = answered["j0"].json["id"].partition(":")[0]

    async with spawned(tmp_path) as at:
        listed = (await at.get(JOBS)).json
        assert listed["id"].partition(":")[0] == epoch, "the log goes on"
        assert int(listed["id"].rpartition(":")[2]) >= highest
        for job_id, answer in answered.items():
            version = answer.json["version"]
            record = (await at.get(f"{JOBS}/{job_id}")).json
            # One more may have been kept without its answer having arrived.
            assert record["version"] in (version, version + 1)
            history = (await at.get(f"{JOBS}/{job_id}/history")).json["updates"]
            assert [update["version"] for update in history] == list(range(1, record["version"] + 1))
            assert history[version - 1]["id"] == answer.json["id"]
            body = {"userId": "alice", "progress": version / 100, "seq": version}
            again = await at.post(f"{JOBS}/{job_id}/updates", body, {"Idempotency-Key": f"{job_id[1:]}-{version}"})
            assert again.json == answer.json | {"duplicate": True}
            missed = (await at.get(f"{JOBS}/poll?timeout=0&jobIds={job_id}&last_seen={answer.json['id']}")).json
            assert (len(missed["updates"]), missed["reset"]) == (record["version"] - version, False)
        offset = int(listed["id"].rpartition(":")[2])
        assert (await at.publish("j0", message="on")).json["id"] == f"{epoch}:{offset + 1}"


async def test_memory_keeps_nothing_and_says_so_by_a_new_epoch(tmp_path: Path) -> None:
    cursors = []
    for _ in range(2):
        async with spawned(tmp_path, store={"url": "memory:"}) as at:
            if cursors:
                answer = (await at.get(f"{JOBS}/poll?timeout=0&last_seen={cursors[0]}")).json
                assert (answer["reset"], answer["updates"]) == (True, [])
            cursors.append((await at.publish("j1", userId="alice")).json["id"])
    assert cursors[0] != cursors[1]


# --- too many -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_running_out_of_descriptors_is_survived(tmp_path: Path) -> None:
    async with spawned(tmp_path, descriptors=64) as at, at.connect() as first:
        assert (await first.request("GET", "/health")).status == 200
        async with AsyncExitStack() as stack:
            for _ in range(80):
                await stack.enter_async_context(at.connect())
            await at.logged("accept_paused")
            assert (await first.request("POST", f"{JOBS}/j/updates", body={"userId": "a"})).status == 200
        assert (await at.get(f"{JOBS}/j")).status == 200, "it accepts again"
        assert at.log().count("accept_paused") < 5
        assert "few_descriptors" in at.log()
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0


class Scarce(socket.socket):
    """A listener that finds no free descriptor the first times."""

    left = 3

    def accept(self) -> tuple[socket.socket, Any]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_a_pause_in_accepting_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "EXHAUSTED_PAUSE_S", 0.01)
    with Scarce() as scarce:
        scarce.bind(("127.0.0.1", 0))
        scarce.listen()
        scarce.setblocking(False)
        async with server() as at:
            at.node.poller.add(scarce.fileno(), listener.Listener(at.node, scarce))
            assert (await Address(scarce.getsockname()[1]).get("/health")).status == 200
    assert (scarce.left, caplog.text.count("accept_paused")) == (0, 1)


async def test_who_cannot_be_served_leaves_nothing_and_others_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel has no room for one more socket to wait for, or there is no memory: neither ends accepting."""
    monkeypatch.setattr(listener, "EXHAUSTED_PAUSE_S", 0.01)
    async with server(limits={"connections_per_address": 10}) as at, at.connect() as first:
        assert (await first.request("GET", "/health")).status == 200
        left: list[Exception] = [OSError(errno.ENOSPC, "No space left on device"), MemoryError()]

        def add(fd: int, peer: Peer, really: Callable[[int, Peer], None] = at.node.poller.add) -> None:
            if left:
                raise left.pop()
            really(fd, peer)

        monkeypatch.setattr(at.node.poller, "add", add)
        while left:
            async with at.connect() as refused:
                assert await gone(refused)
        assert (await at.get("/health")).status == 200
        assert (await first.request("GET", "/health")).status == 200
        await until(lambda: at.node.connections == 1)
        assert at.node.limits.entries == 1
        assert caplog.text.count("accept_paused") == 1
        assert "connection_failed" not in caplog.text


async def test_over_max_connections_a_client_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "REFUSED_SOCKETS", 1)
    async with server(server={"max_connections": 2}) as at, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(at.connect()) for _ in range(2)]
        for http in held:
            assert (await http.request("GET", JOBS)).status == 200
        refused = await at.get(JOBS)
        assert (refused.status, refused.error) == (503, "too_many_connections")
        assert int(refused.headers["retry-after"]) >= 1
        await until(lambda: at.node.connections == 2)
        stream = await at.get(f"{JOBS}/stream", STREAM)
        assert (stream.status, b'"code":"try_later"' in stream.body) == (200, True)
        await until(lambda: at.node.connections == 2)
        assert (await at.get("/health")).status == 200
        await until(lambda: at.node.connections == 2)
        async with at.connect() as one, at.connect() as unheard:
            await until(lambda: at.node.connections == 3)
            assert await gone(unheard), "beyond a bound it is closed unheard"
            assert (await one.request("GET", JOBS)).status == 503
        assert (await held[0].request("GET", JOBS)).status == 200, "who is in stays in"
        await held[1].aclose()
        await until(lambda: at.node.connections == 1)
        assert (await at.get(JOBS)).status == 200


async def gone(http: Http) -> bool:
    with trio.fail_after(20):
        try:
            return await http.stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


# --- disk full ----------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_publishes_and_nothing_else(tmp_path: Path) -> None:
    async with server(auth=AUTH, store={"url": f"sqlite:{tmp_path}/s.db"}) as at:
        alice = bearer("alice")
        first = await at.publish("j1", WORKER, userId="alice", progress=1)
        database: Any = at.node.broker._file._db  # type: ignore[attr-defined]
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}").fetchone()
        # As large as an update may be, so that free pages do not help.
        large = {"metadata": {"text": "x" * 60_000}, "userId": "alice"}
        for method, target, body in (
            ("POST", f"{JOBS}/j1/updates", large),
            ("POST", JOBS, large | {"jobId": "j2"}),
            ("POST", "/api/v2/updates", [large | {"jobId": "j1", "progress": 2}, {"jobId": "j1", "progress": 3}]),
        ):
            answer = await at.ask(method, target, body, WORKER)
            assert (answer.status, answer.error) == (503, "store_unavailable"), target
            assert int(answer.headers["retry-after"]) >= 1
        answer = await ready(at)
        assert (answer.status, "full" in answer.json["reason"], "retry-after" in answer.headers) == (503, True, True)
        assert (await at.get("/health")).status == 200
        assert (await at.get(f"{JOBS}/j1", alice)).json["version"] == 1, "nothing of it shows"
        assert (await at.get(f"{JOBS}/j2", alice)).status == 404
        polled = (await at.get(f"{JOBS}/poll?timeout=0&last_seen={first.json['id']}", alice)).json
        assert (polled["updates"], polled["reset"]) == ([], False)

        database.execute(f"PRAGMA max_page_count = {pages + 10_000}").fetchone()
        await until_answered(at, "/ready", 200)
        again = await at.publish("j1", WORKER, **large)
        assert again.json["id"] == f"{at.node.history.epoch}:2", "positions were not used up"
    async with server(auth=AUTH, store={"url": f"sqlite:{tmp_path}/s.db"}) as at:
        assert (await at.get(f"{JOBS}/j1", alice)).json["version"] == 2


@pytest.mark.slow
async def test_a_really_full_disk(tmp_path: Path) -> None:
    """The kernel's own limit on the size of a file: what SQLite meets is a write that fails."""
    async with spawned(tmp_path, store={"url": "sqlite:s.db"}) as at:
        await at.publish("j1", userId="alice")
        # Half a megabyte is more than what there is, and less than what comes.
        resource.prlimit(at.process.pid, resource.RLIMIT_FSIZE, (512 * 1024, resource.RLIM_INFINITY))
        accepted = 0
        while True:
            answer = await at.post(f"{JOBS}/j1/updates", {"metadata": {"text": "x" * 60_000}})
            if answer.status != 200:
                break
            accepted += 1
            assert accepted < 100
        assert (answer.status, answer.error) == (503, "store_unavailable")
        assert (await ready(at)).status == 503
        assert (await at.get(f"{JOBS}/j1")).json["version"] == 1 + accepted
        resource.prlimit(at.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await until_answered(at, "/ready", 200)
        assert (await at.publish("j1", progress=5)).json["version"] == 2 + accepted
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
    async with spawned(tmp_path, store={"url": "sqlite:s.db"}) as at:
        assert (await at.get(f"{JOBS}/j1")).json["version"] == 2 + accepted
