"""A page with a client on it, whose every step is written down."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.integration.browser import NewPage, Page
from tests.pacing import for_a_while
from tests.redis_servers import Proxy
from tests.support import Address, until

TRANSPORTS = ("websocket", "sse", "longpoll", "poll")
LIVE = "client.live"


async def start(page: Page, url: str, what: object = "job-1", token: str = "", **options: object) -> None:
    """Load the client from a server, and watch over it; ``token`` is an expression for ``getToken``.

    Sets ``client``, ``seen`` (what came), ``states``, ``errors`` and ``missed`` (what came twice or late).
    """
    # A page without anything on it, of the server's origin.
    await page.open(f"{url}/client.d.ts")
    given = json.dumps({"reconnectDelay": 50, **options})
    await page.run(
        f"""(async () => {{
            const {{ connect }} = await import("{url}/client.js");
            Object.assign(window, {{ seen: [], states: [], errors: [], missed: [], connect }});
            const getToken = {token or "undefined"};
            window.client = connect({{ ...{given}, getToken, onError: ({{ code }}) => errors.push(code) }});
            client.onState(({{ state, transport }}) => states.push(`${{state}} ${{transport}}`));
            const versions = new Map();
            window.watched = client.watch({json.dumps(what)}, (job) => {{
                if (job.version <= (versions.get(job.jobId) ?? 0)) missed.push(job);
                versions.set(job.jobId, job.version);
                seen.push(job);
            }});
        }})()"""
    )


async def until_live(page: Page, transport: str = "") -> None:
    """Wait until it is, over this transport or any."""
    await page.wait(LIVE + (f" && client.transport === '{transport}'" if transport else ""))


def unexpected(page: Page) -> list[str]:
    """What the browser complained of, but that there is no icon."""
    return [problem for problem in page.problems if "favicon" not in problem]


async def cut_off(page: Page, yes: bool) -> None:
    """Take the network from a page, or give it back."""
    await page.call(
        "Network.emulateNetworkConditions", offline=yes, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )


async def share_one(new_page: NewPage, url: str, count: int) -> list[Page]:
    """So many tabs of one browser, whose clients share one connection."""
    first = await new_page()
    tabs = [first, *[await new_page(first) for _ in range(count - 1)]]
    for tab in tabs:
        await start(tab, url, share=True)
        await until_live(tab)
    return tabs


async def saw_all(page: Page, last: int) -> None:
    """Wait for the job's end, this version; every one before it must have come, once and in order."""
    await page.wait("client.live && seen.at(-1)?.status === 'completed'")
    assert await versions(page) == list(range(1, last + 1))
    assert await page.run("missed") == []


async def watch_to_the_end(page: Page, at: Address, url: str, transport: str) -> None:
    """A job by this transport, from its beginning to its end: every version once, but that polls may miss some."""
    await publish(at, status="processing")
    await start(page, url, transports=[transport])
    await until_live(page, transport)
    for number in range(1, 20):
        await publish(at, progress=number * 5)
    last = await publish(at, status="completed")
    if transport != "poll":
        await saw_all(page, last["version"])
    else:
        await page.wait("seen.at(-1)?.status === 'completed'")
        assert await page.run("missed") == []


async def start_all(page: Page, url: str, what: object = "job-1", **options: object) -> None:
    """The same with a client of each transport: ``clients``, each with ``{client, seen, states, missed, watched}``."""
    await page.open(f"{url}/client.d.ts")
    await page.run(
        f"""(async () => {{
            const {{ connect }} = await import("{url}/client.js");
            window.clients = {json.dumps(TRANSPORTS)}.map((transport) => {{
                const one = {{ seen: [], states: [], missed: [] }};
                one.client = connect({{ transports: [transport], ...{json.dumps({"reconnectDelay": 50, **options})} }});
                one.client.onState(({{ state }}) => one.states.push(state));
                const versions = new Map();
                one.watched = one.client.watch({json.dumps(what)}, (job) => {{
                    const before = versions.get(job.jobId) ?? 0;
                    if (job.type !== "job_deleted" && job.version <= before) one.missed.push(job);
                    versions.set(job.jobId, job.version);
                    one.seen.push(job);
                }});
                return one;
            }});
        }})()"""
    )


async def until_all(page: Page, condition: str) -> None:
    """Wait until it holds of each of the clients, here called ``one``."""
    await page.wait(f"clients.every((one) => {condition})")


async def publish(at: Address, job_id: str = "job-1", **fields: object) -> Any:
    """One accepted update."""
    return (await at.publish(job_id, **{"userId": "anonymous", **fields})).json


async def versions(page: Page) -> list[int]:
    """Of all that came, in order."""
    found: list[int] = await page.run("seen.map((job) => job.version)")
    return found


async def cut_fifty_times(live: Callable[[], Awaitable[object]], *proxies: Proxy) -> None:
    """Cut the connections through one proxy after the other, each time soon after all is live. They are made again."""
    for number in range(50):
        await live()
        await for_a_while(random.uniform(0, 0.1))
        proxy = proxies[number % len(proxies)]
        before = proxy.connections
        proxy.cut()
        await until(lambda proxy=proxy, before=before: proxy.connections > before)  # type: ignore[misc]


@asynccontextmanager
async def busy(publish_one: Callable[[int], Awaitable[object]], pause: float = 0.02) -> AsyncIterator[None]:
    """Publish number after number until the block ends."""

    async def run() -> None:
        number = 0
        while True:
            number += 1
            await publish_one(number)
            await for_a_while(pause)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield
        nursery.cancel_scope.cancel()
