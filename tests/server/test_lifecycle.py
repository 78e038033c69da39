"""A server's life: where it listens, what it rereads, sudden death and return."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import jwt
import pytest
import trio

from server.app import StartError
from tests.pacing import for_a_while
from tests.streams import event_stream, handshake_bytes, session, websocket
from tests.support import (
    AUTH,
    PATIENCE_S,
    SECRET,
    WORKER,
    Address,
    Answer,
    Spawned,
    bearer,
    command,
    request_bytes,
    server,
    spawned,
    token,
    until,
    write_config,
)

pytestmark = pytest.mark.slow
JOBS = "/api/v2/jobs"


async def fails_to_start(directory: Path, **tables: Mapping[str, object]) -> str:
    """Start a server that cannot; its one line of complaint."""
    write_config(directory, tables)
    (directory / "server.log").unlink(missing_ok=True)

    def run() -> str:
        process = command(directory)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, output) == (2, b"")
        return (directory / "server.log").read_text()

    text = await trio.to_thread.run_sync(run)
    line = text.splitlines()[-1]
    assert line.startswith("statuswire: "), text
    assert "Traceback" not in text
    return line


# --- start --------------------------------------------------------------------------------------------------------


async def test_it_says_where_it_listens_and_logs_one_line_per_event(tmp_path: Path) -> None:
    async with spawned(tmp_path, log={"format": "json", "level": "debug"}) as at:
        assert re.fullmatch(
            r"statuswire listening on http://127\.0\.0\.1:\d+ \(store sqlite:statuswire\.db\)\n", at.start_line
        )
        assert (await at.get("/health")).json == {"status": "ok"}
        assert (await at.get("/ready")).json == {"status": "ready"}
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


# --- SIGHUP -------------------------------------------------------------------------------------------------------


async def test_sighup_rereads_keys_and_limits(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(SECRET + "\n")
    auth = {"jwt_key_file": str(key)}
    new_key = SECRET[::-1]
    new = {"Authorization": f"Bearer {jwt.encode({'sub': 'alice'}, new_key)}"}
    async with (
        spawned(tmp_path, auth=auth) as at,
        at.connect() as kept,
        session(at, token=token("alice")) as ws,
        event_stream(at, headers=bearer("alice")) as stream,
    ):
        await ws.subscribe()
        await stream.until("snapshot")
        assert (await kept.request("GET", JOBS, headers=bearer("alice"))).status == 200
        assert (await at.get(JOBS, new)).status == 401
        key.write_text(new_key)
        write_config(tmp_path, {"auth": auth, "limits": {"publishes_per_second": 0.01}})
        await reload(at, "reloaded")
        assert (await kept.request("GET", JOBS, headers=bearer("alice"))).status == 401, "the connection stays"
        assert (await at.get(JOBS, new)).status == 200
        worker = jwt.encode({"sub": "worker", "capabilities": ["publish"]}, new_key)
        update = {"jobId": "job_1", "userId": "alice"}
        statuses = [(await at.post(JOBS, update, {"Authorization": f"Bearer {worker}"})).status for _ in range(2)]
        assert statuses == [201, 429]
        # Whoever was let in goes on, by the old key.
        await ws.updates("job_1", 1)
        await stream.updates("job_1", 1)

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


# --- standing still -----------------------------------------------------------------------------------------------


async def test_who_was_not_heard_while_the_process_stood_still_is_not_given_up(tmp_path: Path) -> None:
    """A machine that slept, or a process that was stopped: what came meanwhile counts as in time."""
    short, long = 4, 5
    tables = {
        "server": {"heartbeat": 0.5},
        "health": {"check_interval": 0.1, "stale_after": short},
        "limits": {"head_timeout": short, "idle_timeout": short},
    }
    async with (
        spawned(tmp_path, **tables) as at,
        session(at) as ws,
        event_stream(at) as stream,
        at.connect() as begun,
        at.connect() as idle,
    ):
        await ws.subscribe()
        await stream.until("snapshot")
        assert await idle.alive()
        head = request_bytes("GET", "/health")
        await begun.send(head[:10])
        at.signal(signal.SIGSTOP)
        await for_a_while(long)
        await begun.send(head[10:])
        await idle.send(head)
        at.signal(signal.SIGCONT)
        assert (await begun.answer()).status == 200
        assert (await idle.answer()).status == 200
        await at.publish("job_1", userId="alice")
        await ws.updates("job_1", 1)
        await stream.updates("job_1", 1)


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
