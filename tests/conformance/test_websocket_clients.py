"""Clients of others over WebSocket, with every compression that they can offer: both ways, pings, fragments, closes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import trio
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from server.transports.live import DISCONNECTED
from tests.conformance.results import Results
from tests.conformance.websocket_clients import with_aiohttp, with_websocket_client, with_websockets
from tests.integration.browser import find_chromium, started_chromium, using_browser
from tests.streams import put
from tests.support import AUTH, PATIENCE_S, InProcess, server, until
from tests.web.tools import ROOT, web_tools

pytestmark = pytest.mark.slow

CLIENTS = ROOT / "tests" / "conformance" / "clients"
TEXTS = ["", "häßlich \N{PARTY POPPER}", "status " * 700, "x" * 100_000]
BINARY = list(range(256)) * 20
# So many heartbeats come in more than the time after which a client that answers no ping is closed.
HEARTBEAT_S, STALE_S, BEATS = 0.5, 3, 8
MESSAGE = "done " * 400  # long enough to be worth compressing
ORDER = ["connected", "subscribed", "subscribed", "job_completed"]
DEFLATE = "permessage-deflate"

Said = dict[str, Any]
Talk = Callable[[dict[str, Any]], Awaitable[Said]]


async def node(options: dict[str, Any], plan: dict[str, Any]) -> Said:
    packages = await trio.to_thread.run_sync(web_tools)
    command = ["node", str(CLIENTS / "ws.mjs"), str(packages), json.dumps(plan), json.dumps(options)]
    done = await trio.run_process(command, capture_stdout=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


async def in_thread(talk: Callable[..., Any], options: dict[str, Any], plan: dict[str, Any]) -> Said:
    def run() -> Said:
        return asyncio.run(talk(plan, **options)) if asyncio.iscoroutinefunction(talk) else talk(plan)

    return await trio.to_thread.run_sync(run, abandon_on_cancel=True)


def deflate(**options: Any) -> dict[str, Any]:
    """What websockets is to offer."""
    return {"compression": None, "extensions": [ClientPerMessageDeflateFactory(**options)]}


def talks() -> dict[str, tuple[Talk, str]]:
    """Every client with every offer, and the extension that comes of it."""
    ws = {
        "nothing offered": ({"perMessageDeflate": False}, ""),
        "its own offer": ({"perMessageDeflate": True}, DEFLATE),
        "every message compressed": ({"perMessageDeflate": {"threshold": 0}}, DEFLATE),
        "no context takeover": ({"perMessageDeflate": {"serverNoContextTakeover": True, "threshold": 0}}, DEFLATE),
        "windows of 15": ({"perMessageDeflate": {"serverMaxWindowBits": 15, "clientMaxWindowBits": 15}}, DEFLATE),
        "windows of 9": ({"perMessageDeflate": {"serverMaxWindowBits": 9, "threshold": 0}}, DEFLATE),
        "a window of 8 asked for": ({"perMessageDeflate": {"serverMaxWindowBits": 8}}, ""),
    }
    websockets = {
        "nothing offered": ({"compression": None}, ""),
        "its own offer": ({}, DEFLATE),
        "windows of 15": (deflate(server_max_window_bits=15, client_max_window_bits=15), DEFLATE),
        "windows of 10": (deflate(server_max_window_bits=10, client_max_window_bits=10), DEFLATE),
        "windows of 9, no context takeover": (
            deflate(server_no_context_takeover=True, client_no_context_takeover=True, server_max_window_bits=9),
            DEFLATE,
        ),
    }
    aiohttp = {
        "nothing offered": ({"compress": 0}, ""),
        "windows of 15": ({"compress": 15}, DEFLATE),
        "windows of 9": ({"compress": 9}, DEFLATE),
    }
    return {
        **{f"ws, {name}": (partial(node, options), agreed) for name, (options, agreed) in ws.items()},
        **{
            f"websockets, {name}": (partial(in_thread, with_websockets, options), agreed)
            for name, (options, agreed) in websockets.items()
        },
        **{
            f"aiohttp, {name}": (partial(in_thread, with_aiohttp, options), agreed)
            for name, (options, agreed) in aiohttp.items()
        },
        "websocket-client": (partial(in_thread, with_websocket_client, {}), ""),
    }


async def in_chromium(new_page: Callable[[], Any], url: str, plan: dict[str, Any]) -> Said:
    page = await new_page()
    await page.call("Page.setBypassCSP", enabled=True)  # the page's policy keeps it from other servers
    await page.open(f"{url}/client.d.ts")
    source = (CLIENTS / "conversation.mjs").read_text().replace("export async function", "async function")
    await page.run(
        f"(() => {{ {source}; converse((url) => new WebSocket(url), {json.dumps(plan)})"
        ".then((said) => { window.said = said; }, (error) => { window.said = { error: String(error) }; }); })()"
    )
    return await page.wait("window.said")  # type: ignore[no-any-return]


def check(said: Said, agreed: str) -> None:
    """What a client was given must be what was sent."""
    assert "error" not in said, said
    assert said["extensions"].partition(";")[0] == agreed
    assert said["texts"] == TEXTS
    assert said["binary"] == BINARY
    assert said.get("fragments", "".join(TEXTS)) == "".join(TEXTS)
    assert said.get("pong", "are you there") == "are you there"
    assert said["closed"][0] == 3456
    assert said["snapshot"] == 1
    assert said["ending"] == MESSAGE
    assert [type_ for type_ in said["types"] if type_ != "heartbeat"] == ORDER
    assert said["disconnected"] == [1008, DISCONNECTED]
    assert said["refused"] == 4401


async def test_websocket_clients(tmp_path: Path, results: Results) -> None:
    began = time.monotonic()
    found: dict[str, Said] = {}
    async with (
        server(
            debug={"echo": True},
            server={"heartbeat": HEARTBEAT_S},
            health={"check_interval": 0.1, "stale_after": STALE_S},
        ) as at,
        server(auth=AUTH, cors={"origins": [at.url]}) as guarded,
    ):
        put(at, "early", "anonymous")
        plan = {
            "echo": f"{at.ws_url}/ws/echo",
            "jobs": f"{at.ws_url}/ws/jobs",
            "refused": f"{guarded.ws_url}/ws/jobs?access_token=bad",
            "texts": TEXTS,
            "binary": BINARY,
            "beats": BEATS,
        }
        clients = talks()

        async def run(name: str, talk: Callable[[], Awaitable[Said]]) -> None:
            found[name] = await talk()

        chromium = started_chromium(tmp_path)
        with trio.fail_after(PATIENCE_S), chromium as address:
            async with using_browser(address) as new_page, trio.open_nursery() as nursery:
                nursery.start_soon(run, "Chromium", partial(in_chromium, new_page, at.url, plan))
                for name, (talk, _) in clients.items():
                    nursery.start_soon(run, name, partial(talk, plan))
                expected = len(clients) + 1
                await until(lambda: watched(at, "late") == expected)
                put(at, "late", "anonymous", status="completed", message=MESSAGE)
                await until(lambda: watched(at, "over") == expected)
                for stream in list(at.node.streams):
                    answer = await at.ask("DELETE", f"/api/sse/clients/{stream.client_id}")
                    assert answer.status == 204
    agreed = {name: agreed for name, (_, agreed) in clients.items()} | {"Chromium": DEFLATE}
    for name, said in found.items():
        check(said, agreed[name])
    record(results, found, time.monotonic() - began)


def watched(at: InProcess, job_id: str) -> int:
    """How many connections watch this job."""
    channel = at.node.hub.channels.get(f"j/{job_id}")
    return 0 if channel is None else len(channel.readers)


def record(results: Results, found: dict[str, Said], seconds: float) -> None:
    modules = web_tools()
    ws = json.loads((modules / "ws" / "package.json").read_text())["version"]
    chromium = subprocess.run([find_chromium(), "--version"], capture_output=True, text=True, check=True).stdout
    names = {
        "ws": f"ws {ws} (Node)",
        "Chromium": " ".join(chromium.split()[:2]),
        **{name: f"{name} {version(name)}" for name in ("websockets", "aiohttp", "websocket-client")},
    }
    for name, title in names.items():
        offers = sum(each.partition(",")[0] == name for each in found)
        results.add("WebSocket clients", title, {"OK": offers})
    results.took("WebSocket clients", seconds)
