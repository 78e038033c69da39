"""``/openapi.json`` and ``/asyncapi.json``: made when first asked for, and not again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import Any

import msgspec
import trio

from protocol.views import all_views
from server.answers import JSON, Response
from server.exchange import Exchange
from server.stats import VERSION


async def openapi(exchange: Exchange) -> Response:
    """``GET /openapi.json``."""
    return await _described(exchange, _openapi)


async def asyncapi(exchange: Exchange) -> Response:
    """``GET /asyncapi.json``."""
    return await _described(exchange, _asyncapi)


def _openapi(base_path: str, is_open: bool) -> dict[str, Any]:
    # Imported here: some 100 types that a server is never asked about by most.
    from server.describe.openapi import openapi
    from server.describe.operations import OPERATIONS
    from server.routes import ROUTES

    return openapi(ROUTES, OPERATIONS, version=VERSION, base_path=base_path, is_open=is_open)


def _asyncapi(base_path: str, is_open: bool) -> dict[str, Any]:
    from server.describe.asyncapi import asyncapi
    from server.describe.messages import CHANNELS
    from server.describe.views import view_channels

    channels = dict(CHANNELS)
    for view in all_views().values():
        channels |= view_channels(view)
    return asyncapi(channels, version=VERSION, base_path=base_path)


@lru_cache(maxsize=8)
def _text(describe: Callable[[str, bool], dict[str, Any]], base_path: str, is_open: bool) -> tuple[bytes, str]:
    text = msgspec.json.encode(describe(base_path, is_open))
    return text, f'"{sha256(text).hexdigest()[:16]}"'


async def _described(exchange: Exchange, describe: Callable[[str, bool], dict[str, Any]]) -> Response:
    node = exchange.node
    # In a thread: the first time it takes 90 ms.
    text, tag = await trio.to_thread.run_sync(_text, describe, node.config.server.base_path, node.authenticator.open)
    headers = (JSON, ("ETag", tag), ("Cache-Control", "no-cache"))
    if exchange.request.header("if-none-match") == tag:
        return Response(304, headers)
    return Response(200, headers, text)
