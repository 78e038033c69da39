"""What the server's tests share: a real server in this process or in one of its own, and a client that hides nothing.

``server(…)`` runs the server within the test, so the test can look inside; ``spawned(…)`` starts it the way a user
does, for what only a process can do: signals, sudden death, limits of the system. ``Http`` speaks bytes on one
connection and reads one answer at a time, strictly; ``ask`` is one request on a connection of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import jwt
import trio

from server.app import running
from server.config import Config
from server.config_load import load_config
from server.node import Node

ROOT: Final = Path(__file__).parents[1]
# Far beyond what anything here takes on a loaded machine: reached only by what would never end.
PATIENCE_S: Final = 60.0
SECRET: Final = "a secret for tests, 32 bytes or more"
AUTH: Final = {"jwt_key": SECRET}

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


def token(sub: str = "alice", **claims: object) -> str:
    """A token of this user; further claims by name (``admin=True``, ``capabilities=["publish"]``, ``exp=…``)."""
    return jwt.encode({"sub": sub, **claims}, SECRET, algorithm="HS256")


def bearer(sub: str = "alice", **claims: object) -> dict[str, str]:
    """The same as a request header."""
    return {"Authorization": f"Bearer {token(sub, **claims)}"}


ADMIN: Final = bearer("root", admin=True)
WORKER: Final = bearer("worker", capabilities=["publish"])
ALICE: Final = bearer("alice")
BOB: Final = bearer("bob")


# Answers


@dataclass(frozen=True)
class Answer:
    """One HTTP answer: header names in lower case, repeated ones joined with ``", "``; the body without framing."""

    status: int
    headers: dict[str, str]
    body: bytes
    version: str = "1.1"

    @property
    def json(self) -> Any:
        """The body, which must be JSON and say so."""
        assert self.headers["content-type"] == "application/json; charset=utf-8", self
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of a refusal, whose form is checked: code, message and the request's id."""
        error = self.json["error"]
        assert self.status >= 400, self
        assert set(error) <= {"code", "message", "requestId", "field"}, error
        assert error["message"], error
        assert error["requestId"] == self.headers["x-request-id"], self
        code = error["code"]
        assert isinstance(code, str)
        return code


class Ended(Exception):
    """The server closed the connection where an answer was expected."""


class Http:
    """One connection to a server. Every read has a deadline."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.received = b""

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        with trio.fail_after(PATIENCE_S):
            await self.stream.send_all(data)

    async def request(
        self, method: str, target: str, *, body: object = None, headers: Headers = (), host: str = "localhost"
    ) -> Answer:
        """Send a request and read its answer. ``body``: bytes as they are, anything else but None as JSON."""
        await self.send(request_bytes(method, target, body=body, headers=headers, host=host))
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> Answer:
        """The next final answer; interim ones (100) are skipped.

        Raises:
            Ended: the connection was closed instead.
        """
        with trio.fail_after(PATIENCE_S):
            while True:
                status, version, headers = await self._head()
                if status >= 200:
                    break
            if method == "HEAD" or status in (204, 304):
                return Answer(status, headers, b"", version)
            if headers.get("transfer-encoding") == "chunked":
                body = b"".join([piece async for piece in self.chunks()])
            elif "content-length" in headers:
                body = await self._exactly(int(headers["content-length"]))
            else:
                assert headers.get("connection") == "close", "a body without length must end with the connection"
                body = await self.rest()
            return Answer(status, headers, body, version)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer, interim or final; its body is left to read."""
        with trio.fail_after(PATIENCE_S):
            status, _, headers = await self._head()
            return status, headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The pieces of a chunked body, to its end."""
        while True:
            size = int(await self._until(b"\r\n"), 16)
            data = await self._exactly(size + 2)
            assert data.endswith(b"\r\n"), data
            if not size:
                return
            yield data[:-2]

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        with trio.fail_after(PATIENCE_S):
            while await self._more():
                pass
        data, self.received = self.received, b""
        return data

    async def closed(self) -> bool:
        """Wait for the server's close; whether it came without another byte."""
        try:
            return await self.rest() == b""
        except trio.BrokenResourceError:
            return False

    async def alive(self) -> bool:
        """Whether the connection goes on, in step."""
        return bool((await self.request("GET", "/health")).json == {"status": "ok"})

    async def aclose(self) -> None:
        """Close our side."""
        await self.stream.aclose()

    async def _head(self) -> tuple[int, str, dict[str, str]]:
        text = (await self._until(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = text.split("\r\n")
        match = re.fullmatch(r"HTTP/(1\.[01]) ([0-9]{3}) [ -~]*", status_line)
        assert match is not None, status_line
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, line
            assert re.fullmatch(r"[A-Za-z0-9-]+", name), line
            name = name.lower()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return int(match[2]), match[1], headers

    async def _until(self, end: bytes) -> bytes:
        while end not in self.received:
            if not await self._more():
                raise Ended(self.received)
        data, _, self.received = self.received.partition(end)
        return data

    async def _exactly(self, size: int) -> bytes:
        while len(self.received) < size:
            if not await self._more():
                raise Ended(self.received)
        data, self.received = self.received[:size], self.received[size:]
        return data

    async def _more(self) -> bool:
        data = await self.stream.receive_some()
        self.received += bytes(data)
        return bool(data)


def request_bytes(
    method: str, target: str, *, body: object = None, headers: Headers = (), host: str = "localhost"
) -> bytes:
    """A request as bytes. ``body``: bytes as they are, anything else but None as JSON with its Content-Type."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    names = {name.lower() for name, _ in pairs}
    content = b""
    if body is not None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes) and "content-type" not in names:
            pairs.append(("Content-Type", "application/json"))
        pairs.append(("Content-Length", str(len(content))))
    if "host" not in names:
        pairs.insert(0, ("Host", host))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in pairs), "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


# Servers


@dataclass
class Address:
    """Where a server listens."""

    port: int
    unix: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        """Its HTTP address."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        """The same for a WebSocket."""
        return f"ws://127.0.0.1:{self.port}"

    def secured(self, stream: trio.SocketStream) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        """A connection to it, behind TLS if that is spoken there."""
        if self.tls is None or self.unix is not None:
            return stream
        # Browsers close without TLS's farewell, too.
        return trio.SSLStream(stream, self.tls, server_hostname="127.0.0.1", https_compatible=True)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Http]:
        """One connection, closed at the end of the block."""
        with trio.fail_after(PATIENCE_S):
            if self.unix is not None:
                stream = await trio.open_unix_socket(self.unix)
            else:
                stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        try:
            yield Http(self.secured(stream))
        finally:
            await trio.aclose_forcefully(stream)

    async def ask(
        self, method: str, target: str, body: object = None, headers: Headers = (), *, host: str = "localhost"
    ) -> Answer:
        """One request on a connection of its own."""
        async with self.connect() as http:
            return await http.request(method, target, body=body, headers=headers, host=host)

    async def get(self, target: str, headers: Headers = ()) -> Answer:
        """One GET on a connection of its own."""
        return await self.ask("GET", target, headers=headers)

    async def post(self, target: str, body: object, headers: Headers = ()) -> Answer:
        """One POST on a connection of its own."""
        return await self.ask("POST", target, body, headers)

    async def publish(self, job_id: str, headers: Headers = (), **fields: object) -> Answer:
        """Publish one update of a job, which must be accepted; ``userId`` creates it."""
        answer = await self.post(f"/api/v2/jobs/{job_id}/updates", fields, headers)
        assert answer.status == 200, answer
        return answer


@asynccontextmanager
async def answering(serve: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[int]:
    """Somebody else's server, who does ``serve`` with each connection; its port."""
    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, serve, 0, host="127.0.0.1", handler_nursery=nursery)
        (listener,) = await nursery.start(listen)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@dataclass
class InProcess(Address):
    """A server within this process: ``node`` is its inside."""

    node: Node = field(kw_only=True)
    config: Config = field(kw_only=True)


def configure(tables: Mapping[str, Mapping[str, object]]) -> Config:
    """A configuration from tables, ``{"limits": {"backlog": 1024}}``; on a free port, in memory, without drain."""
    flags: dict[str, object] = {"server.port": 0, "server.host": "127.0.0.1", "server.drain": 0, "store.url": "memory:"}
    for table, keys in tables.items():
        flags.update({f"{table}.{key}": value for key, value in keys.items()})
    return load_config(flags, {}, None)


@asynccontextmanager
async def server(*, tls: ssl.SSLContext | None = None, **tables: Mapping[str, object]) -> AsyncIterator[InProcess]:
    """Run a server within this process: ``server(auth=AUTH, limits={"connections_per_user": 1})``.

    Args:
        tls: what its clients trust, if it speaks TLS.
    """
    config = configure(tables)
    async with running(config) as (node, addresses):
        port = int(addresses[0].rpartition(":")[2]) if config.server.tcp else 0
        yield InProcess(port, config.server.unix_socket or None, tls, node=node, config=config)


@dataclass
class Spawned(Address):
    """A server in a process of its own. ``start_line`` is what it printed, ``log()`` what it has logged so far."""

    process: subprocess.Popen[bytes] = field(kw_only=True)
    start_line: str = field(kw_only=True)
    log_file: Path = field(kw_only=True)

    def log(self) -> str:
        """Everything on its stderr until now."""
        return self.log_file.read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def exit_status(self) -> int:
        """Wait for its end."""
        await until(lambda: self.process.poll() is not None)
        return self.process.returncode

    async def logged(self, text: str, times: int = 1) -> None:
        """Wait until this is in its log, so many times."""
        await until(lambda: self.log().count(text) >= times)


@asynccontextmanager
async def spawned(
    directory: Path,
    *,
    descriptors: int | None = None,
    sources: Path = ROOT,
    tls: ssl.SSLContext | None = None,
    **tables: Mapping[str, object],
) -> AsyncIterator[Spawned]:
    """Run ``statuswire serve`` in ``directory``, configured by a TOML file there; stop it at the end if need be.

    Without a ``store`` it keeps everything in ``directory``, so a second one there goes on from the first.

    Args:
        descriptors: most open files of the process (``RLIMIT_NOFILE``).
        sources: where its packages are.
        tls: what its clients trust, if it speaks TLS.
    """
    write_config(directory, tables)
    log_file = directory / "server.log"
    process, start_line = await trio.to_thread.run_sync(start, directory, descriptors, sources)
    try:
        match = re.search(r"https?://[^ ]*:(\d+)", start_line)
        unix = tables.get("server", {}).get("unix_socket")
        yield Spawned(
            int(match[1]) if match else 0,
            str(unix) if unix else None,
            tls,
            process=process,
            start_line=start_line,
            log_file=log_file,
        )
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stop, process)


def write_config(directory: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    """Write ``statuswire.toml``, on a free port unless it says otherwise."""
    merged: dict[str, dict[str, object]] = {name: dict(keys) for name, keys in tables.items()}
    server_table = merged.setdefault("server", {})
    if "unix_socket" not in server_table:
        server_table.setdefault("port", 0)
    server_table.setdefault("drain", 0)
    lines = []
    for name, keys in merged.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (directory / "statuswire.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(directory: Path, descriptors: int | None = None, sources: Path = ROOT) -> subprocess.Popen[bytes]:
    """Start the server process; its stderr goes to ``server.log``."""
    limit = "" if descriptors is None else f"ulimit -n {descriptors}; "
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")}
    with (directory / "server.log").open("ab") as log:
        return subprocess.Popen(
            ["sh", "-c", f'{limit}exec "$0" -m server serve', sys.executable],
            cwd=directory,
            env=environment | {"PYTHONPATH": str(sources)},
            stdout=subprocess.PIPE,
            stderr=log,
        )


def start(directory: Path, descriptors: int | None = None, sources: Path = ROOT) -> tuple[subprocess.Popen[bytes], str]:
    """Start the server and wait for the line that says where it listens."""
    process = command(directory, descriptors, sources)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line:
        process.wait()
        process.stdout.close()
        raise AssertionError(f"the server did not start:\n{(directory / 'server.log').read_text()}")
    return process, line


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, kindly if it lets us."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


# Waiting


async def until(condition: Callable[[], object], *, within: float = PATIENCE_S) -> float:
    """Wait until a condition holds, say on the inside of a server in this process.

    Returns: the seconds it took. Raises TooSlowError where it does not come to hold.
    """
    began = time.monotonic()
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - there are no events for tests
            await trio.sleep(0.002)
    return time.monotonic() - began


async def until_so(ask: Callable[[], Awaitable[object]], *, within: float = PATIENCE_S, every: float = 0.01) -> None:
    """The same for what has to be asked for, over HTTP or in Redis; ``every`` so many seconds, as answers cost."""
    with trio.fail_after(within):
        while not await ask():  # noqa: ASYNC110 - other processes set no events
            await trio.sleep(every)


def wait_for(condition: Callable[[], object], *, within: float = PATIENCE_S, every: float = 0.01) -> None:
    """``until`` outside of Trio: blocks. Raises TimeoutError."""
    give_up = time.monotonic() + within
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"not within {within} s")
        time.sleep(every)


async def until_answered(at: Address, target: str, status: int) -> Answer:
    """Ask until the answer has this status."""
    with trio.fail_after(PATIENCE_S):
        while True:
            answer = await at.get(target)
            if answer.status == status:
                return answer
            await trio.sleep(0.005)


def in_seconds(seconds: float) -> float:
    """A unix time, for ``exp``."""
    return time.time() + seconds
