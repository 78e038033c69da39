"""socketify, which is uWebSockets: its topics. The feed is a WebSocket of its own, at /feed."""

from __future__ import annotations

from typing import Any

from socketify import App, AppListenOptions, CompressOptions, OpCode

from perf.peers.servers.common import GREETING, arguments

APP = App()


def upgrade(response: Any, request: Any, context: Any) -> None:
    """One handshake; the channel goes with the connection."""
    channel = request.get_url().rpartition("/")[2]
    headers = (request.get_header(f"sec-websocket-{name}") for name in ("key", "protocol", "extensions"))
    response.upgrade(*headers, context, channel)


def opened(socket: Any) -> None:
    """One reader."""
    channel = socket.get_user_data()
    if channel != "feed":
        socket.subscribe(channel)
        socket.send(GREETING, OpCode.TEXT)


def received(_socket: Any, message: str, _opcode: OpCode) -> None:
    """One message to all."""
    channel, _, text = message.partition("\t")
    APP.publish(channel, text, OpCode.TEXT)


def main() -> None:
    """Serves until killed."""
    behavior = {
        "compression": CompressOptions.DISABLED,
        "max_backpressure": 64 * 1024 * 1024,
        "idle_timeout": 120,
        "upgrade": upgrade,
        "open": opened,
        "message": received,
    }
    APP.ws("/ws/:channel", behavior)
    APP.ws("/feed", behavior)
    APP.listen(AppListenOptions(port=arguments().port, host="127.0.0.1"), lambda _config: None)
    APP.run()


if __name__ == "__main__":
    main()
