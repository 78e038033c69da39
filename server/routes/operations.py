"""How it goes: for scrapers, and for people and pages."""

from __future__ import annotations

from collections.abc import Callable

import trio

from server import stats as statistics
from server.answers import NO_STORE, Response, json_answer
from server.auth import CAPABILITIES
from server.exchange import Exchange
from server.metrics import Sample, merged


async def metrics(exchange: Exchange) -> Response:
    """``GET /metrics``: the numbers of this server's processes, in the form that ``Accept`` asks for."""
    by_node = await statistics.samples(exchange.node, everywhere=False)
    # In a thread: the first scrape imports the library (50 ms, 12 MB), which a server that nobody scrapes does without.
    render = await trio.to_thread.run_sync(_renderer)
    content_type, text = render(merged(by_node.values()), exchange.request.headers.get("accept", ""))
    return Response(200, (("Content-Type", content_type), NO_STORE), text)


async def stats(exchange: Exchange) -> Response:
    """``GET /api/v2/stats``."""
    return json_answer(200, await statistics.stats(exchange.node))


async def me(exchange: Exchange) -> Response:
    """``GET /api/v2/me``: who the caller is, so that a page need not offer what would be refused."""
    caller = exchange.caller
    capabilities = sorted(CAPABILITIES if caller.admin else caller.capabilities)
    return json_answer(200, {"userId": caller.user, "admin": caller.admin, "capabilities": capabilities})


def _renderer() -> Callable[[Sample, str], tuple[str, bytes]]:
    from server.exposition import exposition

    return exposition
