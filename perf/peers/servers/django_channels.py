"""Django Channels with its in-memory layer, on uvicorn (uvloop): a consumer for each reader, a group a channel."""

from __future__ import annotations

from typing import Any

import django
import uvicorn
import uvloop
from django.conf import settings

settings.configure(CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}})
django.setup()

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.layers import get_channel_layer  # noqa: E402
from channels.routing import URLRouter  # noqa: E402
from django.urls import re_path  # noqa: E402

from perf.peers.servers.common import GREETING, arguments, awaiting_feed  # noqa: E402


class Reader(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One reader."""

    async def connect(self) -> None:
        """Joins its group."""
        self.group = self.scope["url_route"]["kwargs"]["channel"]
        await self.channel_layer.group_add(self.group, self.channel_name)
        await self.accept()
        await self.send(text_data=GREETING)

    async def disconnect(self, _code: int) -> None:
        """Leaves it."""
        await self.channel_layer.group_discard(self.group, self.channel_name)

    async def passed_on(self, event: dict[str, Any]) -> None:
        """One message of the group."""
        await self.send(text_data=event["text"])


async def publish(channel: str, message: bytes) -> None:
    """One message to all."""
    await get_channel_layer().group_send(channel, {"type": "passed_on", "text": message.decode()})


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    app = URLRouter([re_path(r"^ws/(?P<channel>[^/]+)$", Reader.as_asgi())])
    config = uvicorn.Config(
        app,
        port=options.port,
        backlog=4096,
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
    await awaiting_feed(options.feed, publish)
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    uvloop.run(main())
