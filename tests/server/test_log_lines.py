"""What a running server writes into its log: who did what, by which ids, and never a token."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from server.config import Log
from server.logs import configure
from tests.streams import event_stream, session, websocket
from tests.support import AUTH, WORKER, bearer, server, token, until


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, at the level that says most."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure(Log(format="json", level="debug"), stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def events(log: io.StringIO, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["event"] == event]


async def test_requests_have_their_ids(log: io.StringIO) -> None:
    async with server(auth=AUTH) as at:
        made = await at.publish("job-1", WORKER, userId="alice")
        refused = await at.get("/api/v2/jobs/job-2/history", bearer("alice") | {"X-Request-Id": "mine-7"})
        async with at.connect() as http:
            await http.send(b"nonsense\r\n\r\n")
            malformed = await http.answer()
    first, second, third = events(log, "request")
    assert (first["level"], first["requestId"], first["jobId"]) == ("debug", made.headers["x-request-id"], "job-1")
    assert (first["user"], first["status"], first["address"]) == ("worker", 200, "127.0.0.1")
    assert (second["level"], second["requestId"], second["jobId"]) == ("info", "mine-7", "job-2")
    assert (second["status"], second["code"]) == (404, refused.error) == (404, "job_not_found")
    assert (third["status"], third["requestId"]) == (malformed.status, malformed.headers["x-request-id"])


async def test_a_connection_is_known_by_its_client_id(log: io.StringIO) -> None:
    async with server(auth=AUTH) as at:
        async with websocket(at, token=token("alice")) as ws, event_stream(at, headers=bearer("bob")) as es:
            hello = await ws.receive()
            greeting = (await es.event()).data
            await ws.send("get", jobIds=3)
            assert (await ws.receive())["type"] == "error"
        await until(lambda: not at.node.streams)
    clients = {hello["clientId"]: ("alice", "websocket"), greeting["clientId"]: ("bob", "sse")}
    connected = {line["clientId"]: (line["user"], line["transport"]) for line in events(log, "connected")}
    assert connected == clients
    (refused,) = events(log, "refused")
    assert (refused["clientId"], refused["code"]) == (hello["clientId"], "invalid_field")
    gone = {line["clientId"]: line for line in events(log, "disconnected")}
    assert gone.keys() == clients.keys()
    for client_id, line in gone.items():
        assert (line["user"], line["reason"], line["level"]) == (clients[client_id][0], "closed", "debug")
        assert line["seconds"] >= 0
    requests = {line.get("clientId") for line in events(log, "request")}
    assert requests == clients.keys()


async def test_no_token_is_ever_written(log: io.StringIO) -> None:
    """Good ones and bad ones, by each way that there is, also where they do not belong."""
    good, bad = token("alice"), token("mallory")[:-4] + "AAAA"
    async with server(auth=AUTH) as at:
        for secret in (good, bad):
            for target, headers in (
                ("/api/v2/jobs", {"Authorization": f"Bearer {secret}"}),
                ("/api/v2/jobs", {"Cookie": f"a=b; statuswire_token={secret}"}),
                (f"/api/v2/jobs?access_token={secret}", {}),
                (f"/api/v2/jobs/{secret}", {"Authorization": f"Bearer {secret}"}),
                (f"/nowhere/access_token={secret}", {}),
                ("/api/v2/jobs", {"X-Request-Id": f"bearer.{secret}"}),
                ("/ws/jobs", {"Sec-WebSocket-Protocol": f"bearer.{secret}"}),
            ):
                await at.get(target, headers)
            async with websocket(at, headers={"Sec-WebSocket-Protocol": f"bearer.{secret}"}) as ws:
                if secret == good:
                    assert (await ws.receive())["type"] == "connected"
                else:
                    assert (await ws.closed()).code == 4401
            async with websocket(at, f"/ws/jobs?access_token={secret}") as ws:
                if secret == good:
                    await ws.send("auth", token=secret, nonsense=secret)
                    await ws.receive()
                else:
                    assert (await ws.closed()).code == 4401
            async with websocket(at) as ws:
                await ws.send("auth", token=secret)
                await ws.closed() if secret == bad else await ws.receive()
            async with websocket(at) as ws:
                await ws.send(f"bearer {secret}", token=secret)
                assert (await ws.receive())["type"] == "error"
    written = log.getvalue()
    assert len(events(log, "request")) >= 22
    assert len(events(log, "connected")) == 3
    for secret in (good, bad):
        for part in secret.split("."):
            assert part not in written


async def test_an_unexpected_failure_is_logged_with_its_request(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server() as at:
        monkeypatch.setattr(at.node.jobs, "page", None)
        answer = await at.get("/api/v2/jobs", {"X-Request-Id": "r-1"})
        assert (answer.status, answer.error) == (500, "internal_error")
        assert (await at.get("/api/v2/stats")).json["errors"] == {"internal_error": 1}
        async with session(at):
            pass
    (line,) = [line for line in events(log, "request") if line["status"] == 500]
    assert (line["level"], line["requestId"]) == ("error", "r-1")
    assert "TypeError" in line["exception"]
