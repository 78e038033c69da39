"""Clients of others in Python, each doing what ``clients/conversation.mjs`` does in JavaScript."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import websocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

Plan = dict[str, Any]
Said = dict[str, Any]


async def watch(
    receive: Callable[[], Awaitable[str]], send: Callable[[str], Awaitable[object]], plan: Plan, said: Said
) -> None:
    """What is done on ``/ws/jobs``, up to the close that the server begins."""
    types: list[str] = []

    async def until(type_: str) -> Any:
        while True:
            message = json.loads(await receive())
            if types[-1:] != [message["type"]]:
                types.append(message["type"])
            if message["type"] == type_:
                return message

    said["clientId"] = (await until("connected"))["clientId"]
    await send(json.dumps({"type": "subscribe", "jobIds": ["early"]}))
    said["snapshot"] = len((await until("subscribed"))["snapshot"])
    for _ in range(plan["beats"]):
        await until("heartbeat")
    await send(json.dumps({"type": "subscribe", "jobIds": ["late"]}))
    await until("subscribed")
    said["ending"] = (await until("job_completed"))["message"]
    said["types"] = types
    await send(json.dumps({"type": "subscribe", "jobIds": ["over"]}))


async def with_websockets(plan: Plan, **options: Any) -> Said:
    """The package websockets."""
    said: Said = {}

    async def ended(connection: ClientConnection) -> list[object]:
        try:
            while True:
                await connection.recv()
        except ConnectionClosed as closed:
            return [closed.rcvd.code, closed.rcvd.reason] if closed.rcvd else [1006, ""]

    async with connect(plan["echo"], max_size=None, **options) as echo:
        said["extensions"] = "; ".join(extension.name for extension in echo.protocol.extensions)
        said["texts"] = []
        for text in plan["texts"]:
            await echo.send(text)
            said["texts"].append(await echo.recv())
        await echo.send(bytes(plan["binary"]))
        said["binary"] = list(await echo.recv(decode=False))
        await echo.send(iter(plan["texts"]))
        said["fragments"] = await echo.recv()
        await (await echo.ping("are you there"))
        said["pong"] = "are you there"
        await echo.close(3456, "enough")
        said["closed"] = [echo.close_code]
    async with connect(plan["jobs"], ping_interval=None, **options) as jobs:
        await watch(lambda: jobs.recv(decode=True), jobs.send, plan, said)
        said["disconnected"] = await ended(jobs)
    async with connect(plan["refused"], **options) as refused:
        said["refused"] = (await ended(refused))[0]
    return said


async def with_aiohttp(plan: Plan, **options: Any) -> Said:
    """The package aiohttp; it can send no fragments, and shows answers to pings only if it is told to."""
    said: Said = {}
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(plan["echo"], max_msg_size=0, autoping=False, **options) as echo:
            said["extensions"] = "permessage-deflate" if echo.compress else ""
            said["texts"] = []
            for text in plan["texts"]:
                await echo.send_str(text)
                said["texts"].append(await echo.receive_str())
            await echo.send_bytes(bytes(plan["binary"]))
            said["binary"] = list(await echo.receive_bytes())
            await echo.ping(b"are you there")
            said["pong"] = bytes((await echo.receive()).data).decode()
            await echo.close(code=3456, message=b"enough")
            said["closed"] = [echo.close_code]
        async with session.ws_connect(plan["jobs"], **options) as jobs:
            await watch(jobs.receive_str, jobs.send_str, plan, said)
            message = await jobs.receive()
            while message.type is aiohttp.WSMsgType.TEXT:
                message = await jobs.receive()
            said["disconnected"] = [message.data, message.extra]
        async with session.ws_connect(plan["refused"], **options) as refused:
            said["refused"] = (await refused.receive()).data
    return said


def with_websocket_client(plan: Plan) -> Said:
    """The package websocket-client, which knows no compression, and no waiting but by blocking."""
    said: Said = {"extensions": "", "texts": []}
    with _connected(plan["echo"]) as echo:
        for text in plan["texts"]:
            echo.send(text)
            said["texts"].append(echo.recv())
        echo.send_binary(bytes(plan["binary"]))
        said["binary"] = list(echo.recv())
        for frame in _fragments(plan["texts"]):
            echo.send_frame(frame)
        said["fragments"] = echo.recv()
        echo.ping("are you there")
        opcode, data = echo.recv_data(control_frame=True)
        assert opcode == websocket.ABNF.OPCODE_PONG
        said["pong"] = data.decode()
        echo.send_close(3456, b"enough")
        said["closed"] = _closed(echo)
    with _connected(plan["jobs"]) as jobs:

        async def receive() -> str:
            text = jobs.recv()
            assert isinstance(text, str)
            return text

        async def send(text: str) -> None:
            jobs.send(text)

        asyncio.run(watch(receive, send, plan, said))
        said["disconnected"] = _closed(jobs)
    with _connected(plan["refused"]) as refused:
        said["refused"] = _closed(refused)[0]
    return said


@contextmanager
def _connected(url: str) -> Iterator[websocket.WebSocket]:
    connection = websocket.create_connection(url)
    try:
        yield connection
    finally:
        connection.shutdown()  # its close() does nothing once a close frame was sent


def _fragments(texts: list[str]) -> Iterable[websocket.ABNF]:
    text = websocket.ABNF.OPCODE_TEXT
    for part in texts:
        yield websocket.ABNF.create_frame(part.encode(), text, 0)
        text = websocket.ABNF.OPCODE_CONT
    yield websocket.ABNF.create_frame(b"", text, 1)


def _closed(connection: websocket.WebSocket) -> list[object]:
    while True:
        opcode, data = connection.recv_data(control_frame=True)
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            return [int.from_bytes(data[:2], "big"), data[2:].decode()]
