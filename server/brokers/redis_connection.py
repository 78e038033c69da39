"""One TCP or TLS connection to one Redis node: making it, and the three tasks that keep it.

The writer sends everything that was queued in the same pass of the loop with one ``send``; the reader parses everything
that one ``recv`` brought; the watch notices a peer that has fallen silent. Whatever breaks ends all three.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import trio
from trio.abc import Stream

from protocol.resp import Argument, ProtocolError, RedisError, Replies, Value, encode
from server.brokers.redis_errors import RedisStartError
from server.brokers.redis_url import Address, Options, RedisUrl

OLDEST: Final = (6, 2)
# Sharded pub/sub came with 7.0; without it each message would go to every node of a cluster.
OLDEST_CLUSTER: Final = (7, 0)

Kind = Literal["master", "sentinel"]

# 64 KiB are about 150 messages, 0.25 ms of parsing and callbacks, before other tasks get their turn.
_RECEIVE: Final = 65536
# What is handed to one send_all counts as sent when the connection breaks, so this bounds the doubt.
_SEND: Final = 256 * 1024
# The kernel gives a silent peer up by itself, in case this process hangs: seconds.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

_BROKEN: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)  # ssl.SSLError is an OSError


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a node said of itself (INFO) when the connection was made.

    Attributes:
        address: where it was reached.
        version: such as ``(7, 0, 15)``.
        role: ``"master"`` or ``"slave"`` (Redis' word); ``"sentinel"`` for a sentinel.
        mode: ``"standalone"``, ``"cluster"`` or ``"sentinel"``.
        evicts: its ``maxmemory-policy`` if that lets it drop keys, else None.
    """

    address: Address
    version: tuple[int, ...]
    role: str
    mode: str
    evicts: str | None


async def connect(address: Address, url: RedisUrl, options: Options, kind: Kind = "master") -> tuple[Stream, NodeInfo]:
    """Connect, authenticate, select the database and learn what is there.

    Raises:
        RedisStartError: there is nothing there that could be used, and why.
    """
    try:
        with trio.fail_after(options.connect_timeout_s):
            stream = await _open(address, url)
            try:
                return stream, await _handshake(stream, address, url, options, kind)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
    except trio.TooSlowError:
        # Redis takes a TLS greeting for the beginning of a command and waits for the rest.
        doubt = "is it a TLS port" if url.tls is not None else "does a firewall drop the packets"
        raise RedisStartError(
            f"Redis at {address} did not answer within {options.connect_timeout_s:g} s: is the host right, {doubt}, "
            "is Redis busy or stopped?",
            passing=True,
        ) from None


async def _open(address: Address, url: RedisUrl) -> Stream:
    try:
        plain = await trio.open_tcp_stream(address.host, address.port)  # sets TCP_NODELAY
    except (OSError, UnicodeError) as error:  # the latter for what cannot be the name of a host
        tried = error.__cause__
        reason = tried.exceptions[0] if isinstance(tried, ExceptionGroup) else tried or error
        raise RedisStartError(
            f"Redis at {address} cannot be reached ({reason}): is it running, are host and port right?", passing=True
        ) from error
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        plain.setsockopt(socket.IPPROTO_TCP, option, value)
    if url.tls is None:
        return plain
    tls = trio.SSLStream(plain, url.tls, server_hostname=address.host, https_compatible=True)
    try:
        await tls.do_handshake()
    except (*_BROKEN, ssl.CertificateError) as error:
        await trio.aclose_forcefully(tls)
        raise RedisStartError(
            f"TLS with Redis at {address} failed ({error.__cause__ or error}): if it is not a TLS port, begin the URL "
            "with redis; if its certificate is not from a public authority, add ?ca=FILE."
        ) from error
    except BaseException:
        await trio.aclose_forcefully(tls)
        raise
    return tls


async def exchange(stream: Stream, commands: Sequence[Sequence[Argument]]) -> list[Value]:
    """Send some commands over a connection that nobody else uses, and wait for their answers.

    Raises:
        ProtocolError: the peer does not speak RESP.
        EOFError, OSError, trio.BrokenResourceError: the connection ended.
    """
    await stream.send_all(b"".join(encode(command) for command in commands))
    replies = Replies()
    values: list[Value] = []
    while len(values) < len(commands):
        data = await stream.receive_some(_RECEIVE)
        if not data:
            if values:  # such as "-ERR max number of clients reached", said before hanging up
                return values
            raise EOFError("closed by the peer")
        values += replies.feed(data)
    return values


async def _handshake(stream: Stream, address: Address, url: RedisUrl, options: Options, kind: Kind) -> NodeInfo:
    username, password, database = url.username, url.password, url.database
    if kind == "sentinel":
        username, password, database = url.sentinel_username, url.sentinel_password, 0
    commands: list[tuple[Argument, ...]] = []
    if password is not None:
        commands.append(("AUTH", password) if username is None else ("AUTH", username, password))
    if database:
        commands.append(("SELECT", database))
    commands += [("INFO",), ("CLIENT", "SETNAME", options.name)]
    try:
        values = await exchange(stream, commands)
    except ProtocolError as error:
        raise RedisStartError(f"What answers at {address} is not Redis ({error}): check host and port.") from error
    except (*_BROKEN, EOFError) as error:
        raise RedisStartError(
            f"Redis at {address} hung up without an answer ({error}): is it a TLS port (rediss://), is it Redis?",
            passing=True,
        ) from error
    for command, value in zip(commands, values, strict=False):
        if isinstance(value, RedisError) and command[0] != "CLIENT":  # a name is a courtesy; an ACL may forbid it
            raise _explain(str(command[0]), value, address, kind, username, database)
    info = values[commands.index(("INFO",))] if len(values) >= len(commands) - 1 else None
    if not isinstance(info, bytes):
        raise RedisStartError(f"What answers at {address} is not Redis: check host and port.")
    return _examine(info.decode(errors="replace"), address, url, kind)


def _explain(
    command: str, error: RedisError, address: Address, kind: Kind, username: str | None, database: int
) -> RedisStartError:
    """A refusal in the handshake, in words that help."""
    user = "user " + repr(username) if username else "the default user"
    where = "sentinel_username and sentinel_password" if kind == "sentinel" else "redis://user:password@host"
    if error.code == "LOADING":
        return RedisStartError(f"Redis at {address} is still loading its data: wait until it is done.", passing=True)
    if error.code == "WRONGPASS":
        return RedisStartError(f"Redis at {address} refuses {user} with this password: correct the URL ({where}).")
    if error.code == "NOAUTH":
        return RedisStartError(f"Redis at {address} asks for a password: put it into the URL ({where}).")
    if error.code == "NOPERM":
        return RedisStartError(
            f"Redis at {address} does not let {user} run {command} ({error}): grant it, "
            f"ACL SETUSER {username or 'default'} +{command.lower()}."
        )
    if error.code == "DENIED":
        return RedisStartError(
            f"Redis at {address} runs in protected mode and accepts local clients only: give it a password "
            "(requirepass, or ACL SETUSER) and put that into the URL."
        )
    if command == "AUTH" and "without any password configured" in error.message:
        return RedisStartError(
            f"Redis at {address} has no password for {user}: leave the password out of the URL, or set it in Redis."
        )
    if command == "SELECT":
        return RedisStartError(
            f"Redis at {address} has no database {database} ({error}): use a lower number, or raise `databases` there."
        )
    # "ERR max number of clients reached" and whatever comes in later versions.
    return RedisStartError(f"Redis at {address} refuses {command}: {error}.", passing=True)


def _examine(info: str, address: Address, url: RedisUrl, kind: Kind) -> NodeInfo:
    """INFO as NodeInfo, if the node is one that the URL promises."""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    version = tuple(int(part) for part in fields.get("redis_version", "0").split(".") if part.isdigit())
    mode = fields.get("redis_mode", "standalone")
    policy = fields.get("maxmemory_policy", "noeviction")
    node = NodeInfo(
        address=address,
        version=version,
        role=fields.get("role", mode),
        mode=mode,
        evicts=None if policy == "noeviction" or fields.get("maxmemory", "0") == "0" else policy,
    )
    oldest = OLDEST_CLUSTER if url.topology == "cluster" else OLDEST
    if version < oldest:
        raise RedisStartError(
            f"Redis at {address} is version {fields.get('redis_version')}: "
            f"{'.'.join(map(str, oldest))} or newer is needed{' for a cluster' if oldest == OLDEST_CLUSTER else ''}."
        )
    if kind == "sentinel":
        if mode != "sentinel":
            raise RedisStartError(f"{address} is Redis, not a sentinel: use redis://, or the sentinels' port (26379).")
        return node
    if mode == "sentinel":
        raise RedisStartError(f"{address} is a sentinel: use redis+sentinel://{address}/NAME.")
    if mode == "cluster" and url.topology != "cluster":
        raise RedisStartError(f"Redis at {address} is part of a cluster: use redis+cluster://{address}.")
    if mode != "cluster" and url.topology == "cluster":
        raise RedisStartError(
            f"Redis at {address} is not part of a cluster (cluster-enabled no): use redis://{address}."
        )
    if fields.get("loading") == "1":
        raise RedisStartError(f"Redis at {address} is still loading its data: wait until it is done.", passing=True)
    if node.role != "master" and url.topology != "cluster":
        raise RedisStartError(
            f"Redis at {address} is a replica of {fields.get('master_host')}:{fields.get('master_port')}: "
            "put its master into the URL.",
            passing=url.topology == "sentinel",
        )
    return node


class Wire:
    """A made connection: what goes out is queued, what comes in is handed over parsed.

    Args:
        stream: a connection after its handshake; it is closed when ``run`` ends.
        take: gets the values of one ``recv``, synchronously and in order. It must not raise.
        owed: how many answers the peer owes us.
        answered: how many it has given; grows by one per command.
        ping: sends something that the peer must answer.
    """

    def __init__(
        self,
        stream: Stream,
        options: Options,
        *,
        take: Callable[[list[Value]], object],
        owed: Callable[[], int],
        answered: Callable[[], int],
        ping: Callable[[], object],
    ) -> None:
        self._stream = stream
        self._options = options
        self._take = take
        self._owed = owed
        self._answered = answered
        self._ping = ping
        self._out: deque[bytes] = deque()
        self._asleep: trio.Event | None = None  # set while the writer has nothing to do
        self._scope = trio.CancelScope()
        self._heard = 0.0
        self.reason = ""  # why it ended
        self.retiring = False  # to be closed as soon as nothing is owed

    @property
    def unsent(self) -> int:
        """How many of the queued writes, the newest ones, have not been handed to the kernel at all."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Queue bytes; they go out at the end of this pass of the loop, together with all others."""
        self._out.append(data)
        if self._asleep is not None:
            self._asleep.set()
            self._asleep = None

    def end(self, reason: str) -> None:
        """Make ``run`` return. The first reason counts."""
        self.reason = self.reason or reason
        self._scope.cancel()

    async def run(self) -> None:
        """Until the connection ends for whatever ``reason``; then it is closed."""
        self._heard = trio.current_time()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_out)
                    nursery.start_soon(self._watch)
                    nursery.start_soon(self._read)
        finally:
            self.reason = self.reason or "the client was closed"
            await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        replies = Replies()
        try:
            while data := await self._stream.receive_some(_RECEIVE):
                self._heard = trio.current_time()
                self._take(replies.feed(data))
            self.end("Redis closed the connection")
        except ProtocolError as error:
            self.end(f"Redis sent what is not RESP ({error})")
        except _BROKEN as error:
            self.end(f"the connection broke ({error.__cause__ or error})")

    async def _write_out(self) -> None:
        out = self._out
        try:
            while True:
                if not out:
                    self._asleep = trio.Event()
                    await self._asleep.wait()
                batch = [out.popleft()]
                size = len(batch[0])
                while out and size < _SEND:
                    data = out.popleft()
                    size += len(data)
                    batch.append(data)
                await self._stream.send_all(b"".join(batch))
        except _BROKEN as error:
            self.end(f"the connection broke ({error.__cause__ or error})")

    async def _watch(self) -> None:
        """Notice silence. Looks a few times per second: no clock is read and no timer set per command."""
        options = self._options
        tick = min(options.silence_s, options.ping_every_s) / 4
        owed_since: float | None = None
        marks: deque[tuple[float, int]] = deque()  # when, and how many commands had been issued by then
        while True:
            before = trio.current_time()
            await trio.sleep(tick)
            now = trio.current_time()
            if now - before > tick + options.silence_s / 4:
                # We slept longer ourselves (stopped process, laptop lid): what came meanwhile is not read yet.
                self._heard = now
                continue
            owed, answered = self._owed(), self._answered()
            if not owed:
                owed_since = None
                marks.clear()
                if self.retiring:
                    self.end("the node serves nothing any more")
                elif now - self._heard >= options.ping_every_s:
                    self._ping()
                continue
            if owed_since is None:
                owed_since = now
            marks.append((now, answered + owed))
            while marks and marks[0][1] <= answered:
                marks.popleft()
            if now - max(self._heard, owed_since) >= options.silence_s:
                self.end(f"Redis was silent for {options.silence_s:g} s")
            elif marks and now - marks[0][0] >= options.command_timeout_s:
                self.end(f"a command was not answered within {options.command_timeout_s:g} s")
