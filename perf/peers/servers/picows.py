"""picows on uvloop."""

from __future__ import annotations

import asyncio

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from perf.peers.servers.common import GREETING, arguments, channels, feed

CHANNELS = channels()


class Reader(WSListener):
    """One reader."""

    def __init__(self, channel: str) -> None:
        self.readers = CHANNELS[channel]

    def on_ws_connected(self, transport: WSTransport) -> None:
        """The handshake is done."""
        self.readers[transport] = None
        transport.send(WSMsgType.TEXT, GREETING.encode())

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Readers say nothing but goodbye."""
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """It has gone."""
        self.readers.pop(transport, None)


def accept(request: WSUpgradeRequest) -> Reader:
    """One handshake."""
    return Reader(request.path.decode().rpartition("/")[2])


def publish(channel: str, message: bytes) -> None:
    """One message to all."""
    for transport in CHANNELS[channel]:
        transport.send(WSMsgType.TEXT, message)


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    await feed(options.feed, publish)
    server = await ws_create_server(accept, "127.0.0.1", options.port, backlog=4096)
    await asyncio.gather(server.serve_forever())


if __name__ == "__main__":
    uvloop.run(main())
