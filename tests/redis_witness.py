"""A Redis client whose callbacks are recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel
import trio.testing

from server.brokers.redis_client import (
    Client,
    NodeInfo,
    Options,
    RedisStartError,
    make_client,
    open_client,
)
from tests.support import PATIENCE_S

IMPATIENT = Options(start_patience_s=0.0)


class Witness:
    """Records what a client tells."""

    def __init__(self) -> None:
        self.ups: list[NodeInfo] = []
        self.downs: list[str] = []
        self.messages: list[tuple[bytes, bytes]] = []
        self.subscribed: list[frozenset[bytes]] = []
        self.lost: list[frozenset[bytes]] = []
        self.client: Client

    def hear(self, channel: bytes, payload: bytes) -> None:
        self.messages.append((channel, payload))


@asynccontextmanager
async def witnessed(url: str, options: Options | None = None) -> AsyncIterator[Witness]:
    """A client whose callbacks are recorded."""
    witness = Witness()
    with trio.fail_after(PATIENCE_S):
        async with open_client(
            url,
            options=options,
            on_up=witness.ups.append,
            on_down=witness.downs.append,
            on_message=witness.hear,
            on_subscribed=witness.subscribed.append,
            on_lost=witness.lost.append,
        ) as client:
            witness.client = client
            yield witness


async def refusal(url: str, options: Options = IMPATIENT) -> str:
    """Why a client does not start."""
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisStartError) as caught:
        await make_client(url, options=options).start()
    return str(caught.value)
