"""Event streams (WHATWG HTML section 9.2) with the clients of others: what is sent is what they are given.

Each client has two streams. One has all that framing can say and is made with the same encoder as every other; the
other is that of a job which moves on while the client is cut off, and ends.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest
import trio

from protocol.sse import encode_event
from server.answers import Response
from server.exchange import Exchange
from server.routes import ROUTES, Route
from server.transports.sse import HEADERS
from tests.conformance.results import Results
from tests.integration.browser import find_chromium, started_chromium, using_browser
from tests.pacing import for_a_while
from tests.streams import put
from tests.support import PATIENCE_S, InProcess, server, until
from tests.web.tools import ROOT, web_tools

pytestmark = pytest.mark.slow

CLIENTS = ROOT / "tests" / "conformance" / "clients"
NAMES = ["message", "notice", "data", "retry"]
# What is no line end in an event stream, though it is one elsewhere; and what looks like fields.
ODD = "a\N{LINE SEPARATOR}b\N{NEXT LINE}c\x0bd\x0ce\x1cf\N{NO-BREAK SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\N{PARTY POPPER}"

# A client's events: name, data, and the last id as of it.
Events = list[list[str]]
Listen = Callable[[str], Awaitable[Events]]

# What is sent, and what is to be heard of it: (data, id, name, delay) and (name, data, last id).
SENT: list[tuple[str, str | None, str | None, int | None]] = [
    ("one", "1", None, 20),
    ("no id of its own", None, None, None),
    ("two\nlines, and one that is empty:\n\nend", "2", None, None),
    ("CR\rand CR LF\r\nare line ends", None, None, None),
    (" a space in front", None, None, None),
    (": a colon in front", None, None, None),
    ("data: like a field", None, None, None),
    (ODD, "3:ä", None, None),
    ("named", "4", "notice", None),
    ("named like a field", None, "data", None),
    ("x" * 100_000, "5", None, None),
]
FIRST: Events = [
    ["message", "one", "1"],
    ["message", "no id of its own", "1"],
    ["message", "two\nlines, and one that is empty:\n\nend", "2"],
    ["message", "CR\nand CR LF\nare line ends", "2"],
    ["message", " a space in front", "2"],
    ["message", ": a colon in front", "2"],
    ["message", "data: like a field", "2"],
    ["message", ODD, "3:ä"],
    ["notice", "named", "4"],
    ["data", "named like a field", "4"],
    ["message", "x" * 100_000, "5"],
]
# This client shows no id with an event that has none, though it keeps it for coming back. So every event has one here.
FORGETFUL: Events = [
    [name, data, last if id is not None else ""] for (name, data, last), (_, id, _, _) in zip(FIRST, SENT, strict=True)
]
AGAIN: Events = [["message", "again", "6"]]


def framing(asked: dict[str, list[str | None]]) -> Callable[[Exchange], Awaitable[Response]]:
    """A stream in three parts: a client comes back with its last id, twice, and is then told to stay away."""

    async def stream(exchange: Exchange) -> Response:
        last = exchange.request.header("last-event-id")
        asked.setdefault(exchange.request.query["client"], []).append(last)
        if last is None:
            events = (encode_event(data.encode(), id=id, event=name, retry_ms=retry) for data, id, name, retry in SENT)
            return Response(200, HEADERS, events)
        if last == "5":
            return Response(200, HEADERS, iter([encode_event(b"again", id="6")]))
        return Response(204)

    return stream


# --- the clients


async def in_chromium(new_page: Callable[[], Any], origin: str, url: str) -> Events:
    page = await new_page()
    await page.open(f"{origin}/client.d.ts")
    source = (CLIENTS / "listening.mjs").read_text().replace("export function", "function")
    await page.run(
        f"(() => {{ {source}; listen((at) => new EventSource(at), {json.dumps(url)}, {json.dumps(NAMES)})"
        ".then((events) => { window.events = events; }); })()"
    )
    return await page.wait("window.events")  # type: ignore[no-any-return]


async def in_node(url: str) -> Events:
    packages = await trio.to_thread.run_sync(web_tools)
    command = ["node", str(CLIENTS / "eventsource.mjs"), str(packages), url, json.dumps(NAMES)]
    done = await trio.run_process(command, capture_stdout=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


async def with_httpx_sse(url: str) -> Events:
    """It reads one answer; coming back, after the time it was told, is its caller's."""
    events: Events = []
    last, retry_ms = "", 0
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        while True:
            headers = {"Last-Event-ID": last.encode()} if last else {}
            async with httpx_sse.aconnect_sse(client, "GET", url, headers=headers) as source:
                if source.response.status_code == 204:
                    return events
                async for event in source.aiter_sse():
                    last, retry_ms = event.id or last, event.retry or retry_ms
                    events.append([event.event, event.data, last])
            await for_a_while(retry_ms / 1000)


async def with_curl(url: str) -> Events:
    """The bytes themselves, read by the letter of our own rules: LF only, no byte order mark, one space."""
    events: Events = []
    last, retry_ms = "", 0
    while True:
        header = ["--header", f"Last-Event-ID: {last}"] if last else []
        command = ["curl", "--silent", "--no-buffer", "--include", *header, url]
        done = await trio.run_process(command, capture_stdout=True)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        if b" 204 " in head:
            return events
        assert b"\r\ncontent-type: text/event-stream\r\n" in head.lower() + b"\r\n"
        assert b"\r" not in body
        assert not body.startswith(b"\xef\xbb\xbf")
        assert body.endswith(b"\n\n")
        for block in body[:-2].split(b"\n\n"):
            lines = [line.split(": ", 1) for line in block.decode().split("\n")]
            assert {name for name, _ in lines} <= {"retry", "id", "event", "data"}
            fields = dict(lines)
            last, retry_ms = fields.get("id", last), int(fields.get("retry", retry_ms))
            data = "\n".join(value for name, value in lines if name == "data")
            events.append([fields.get("event", "message"), data, last])
        await for_a_while(retry_ms / 1000)


# --- what they are given


async def test_event_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Results) -> None:
    began = time.monotonic()
    asked: dict[str, list[str | None]] = {}
    monkeypatch.setitem(ROUTES, "/framing", {"GET": Route(framing(asked), public=True)})
    framed: dict[str, Events] = {}
    told: dict[str, Events] = {}
    with trio.fail_after(2 * PATIENCE_S), started_chromium(tmp_path) as address:
        async with server() as at, using_browser(address) as new_page, trio.open_nursery() as nursery:
            clients: dict[str, Listen] = {
                "Chromium": partial(in_chromium, new_page, at.url),
                "eventsource": in_node,
                "httpx-sse": with_httpx_sse,
                "curl": with_curl,
            }

            async def listen(client: Listen, name: str) -> None:
                framed[name] = await client(f"{at.url}/framing?client={name}")
                told[name] = await client(f"{at.url}/api/v2/jobs/stream?jobIds=job")

            for name, client in clients.items():
                nursery.start_soon(listen, client, name)
            await one_job(at, len(clients))
    for name in clients:
        assert framed[name] == (FORGETFUL if name == "eventsource" else FIRST) + AGAIN, name
        # The last answer, 204, is the end: nobody asks once more.
        assert asked[name] == [None, "5", "6"], name
        check_job(told[name])
    package = json.loads((web_tools() / "eventsource" / "package.json").read_text())
    names = {
        "Chromium": " ".join(run("--version", find_chromium()).split()[:2]) + ", EventSource",
        "eventsource": f"eventsource {package['version']} (Node)",
        "httpx-sse": f"httpx-sse {version('httpx-sse')}",
        "curl": " ".join(run("--version", "curl").split()[:2]),
    }
    for name in clients:
        results.add("Event streams", names[name], {"OK": len(SENT) + len(AGAIN) + len(JOB_TYPES)})
    results.took("Event streams", time.monotonic() - began)


def run(flag: str, program: str) -> str:
    return subprocess.run([program, flag], capture_output=True, text=True, check=True).stdout


# What a client hears of the job: to where it is cut off; what it missed; the end.
JOB_TYPES = [
    *("connected", "snapshot", "status_update", "error"),
    *("connected", "status_update", "job_completed"),
]


async def one_job(at: InProcess, clients: int) -> None:
    """Publish while all listen, cut them off, publish while all are away, and end the job when all are back."""
    put(at, "job", "anonymous", progress=10)
    await readers(at, clients)
    put(at, "job", "anonymous", progress=50, message=ODD)
    await trio.testing.wait_all_tasks_blocked(0.05)
    for stream in list(at.node.streams):
        assert (await at.ask("DELETE", f"/api/sse/clients/{stream.client_id}")).status == 204
    await readers(at, 0)
    put(at, "job", "anonymous", progress=70)
    await readers(at, clients)
    put(at, "job", "anonymous", status="completed")


async def readers(at: InProcess, count: int) -> None:
    """Wait until so many are connected."""
    await until(lambda: len(at.node.streams) == count)


def check_job(events: Iterable[list[str]]) -> None:
    """Every step once, each under its own id, whatever was missed in between."""
    messages = [(json.loads(data), last) for name, data, last in events if name == "message"]
    assert [message["type"] for message, _ in messages] == JOB_TYPES
    progress = [message["progress"] for message, _ in messages if "progress" in message]
    assert progress == [50, 70, 100]
    assert messages[2][0]["message"] == ODD
    # No id before something was given; from then on each is that of the log, and none goes back.
    offsets = [int(last.rpartition(":")[2] or -1) for _, last in messages]
    assert offsets[0] == -1
    assert offsets[1:] == sorted(offsets[1:])
    for message, last in messages:
        if "id" in message:
            assert message["id"] == last
