"""Real Redis for the tests: servers, sentinels and clusters on free ports, and what can befall them.

Starting blocks, for two seconds with sentinels or a cluster; processes end with the ``with`` that began them.
"""

from __future__ import annotations

import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis
import trio

from tests.support import wait_for

SLOTS = 16384
# What dies with its parent dies with the thread that started it: this one lasts as long as the tests.
_STARTER = ThreadPoolExecutor(1)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; not of those that the system gives away, so that they can be come back to."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            port = random.randrange(10_000, 32_000)
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _program(name: str) -> str:
    """A program of Redis, wherever the system or ``make system`` has put it."""
    return shutil.which(name) or str(Path(sys.prefix) / "bin" / name)


@dataclass
class RedisServer:
    """One redis-server (or redis-sentinel) process."""

    port: int
    directory: Path
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None
    password: str | None = None
    tls: dict[str, Any] = field(default_factory=dict)  # for the oracle: redis.Redis(ssl=True, …)

    @property
    def url(self) -> str:
        """Without password."""
        return f"redis://127.0.0.1:{self.port}"

    def oracle(self, **more: Any) -> redis.Redis:
        """redis-py's view of it. Blocking."""
        return redis.Redis(
            "127.0.0.1", self.port, password=self.password, socket_timeout=5, protocol=2, **(self.tls | more)
        )

    def answers(self) -> bool:
        """Whether it is ready to serve."""
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        try:
            with self.oracle() as oracle:
                return bool(oracle.ping())
        except redis.exceptions.RedisError:
            return False

    def start(self, *, wait: bool = True) -> None:
        """Start it; it keeps port and directory."""
        with (self.directory / "log").open("ab") as log:
            # It must not outlive us even if we are killed: util-linux' setpriv becomes the server.
            command = ["setpriv", "--pdeathsig", "KILL", *self.arguments]
            started = _STARTER.submit(subprocess.Popen, command, cwd=self.directory, stdout=log, stderr=log)
            self.process = started.result()
        if wait:
            wait_for(self.answers)

    def kill(self) -> None:
        """``kill -9``, and gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """It keeps its connections and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """The end of ``freeze``."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def make_server(directory: Path, *options: str, port: int | None = None) -> RedisServer:
    """A server that is not started yet. Nothing is kept on disk unless the options say so (``--appendonly yes``)."""
    port = port or free_ports(1)[0]
    home = directory / str(port)
    home.mkdir()
    common = ["--bind", "127.0.0.1", "--dir", str(home), "--save", "", "--daemonize", "no"]
    where = [] if "--port" in options else ["--port", str(port)]
    command = [_program("redis-server"), *where, *common, "--enable-debug-command", "yes", *options]
    return RedisServer(port, home, command)


@contextmanager
def running_server(directory: Path, *options: str) -> Iterator[RedisServer]:
    """One Redis on its own."""
    server = make_server(directory, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass
class Sentinels:
    """A master ``main`` with a replica, watched by sentinels."""

    servers: list[RedisServer]
    sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/main"

    def master(self) -> RedisServer:
        """Whom the first sentinel takes for the master."""
        with self.sentinels[0].oracle() as oracle:
            _, port = oracle.sentinel_get_master_addr_by_name("main")
        return next(server for server in self.servers if server.port == int(port))

    def fail_over(self, old: RedisServer) -> bool:
        """Have the first sentinel replace a master that is well; to be asked until it says that it is done.

        It gives up on a replica that is slow to answer, as on a busy machine; all being well, it does not try again.
        """
        if self.master() is not old:
            return True
        with self.sentinels[0].oracle() as oracle, suppress(redis.exceptions.ResponseError):
            oracle.execute_command("SENTINEL", "FAILOVER", "main")
        return False

    def _settled(self) -> bool:
        with self.sentinels[0].oracle() as oracle:
            state = oracle.sentinel_master("main")
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == len(self.sentinels) - 1)


@contextmanager
def running_sentinels(directory: Path, *, down_after_ms: int = 500, count: int = 3) -> Iterator[Sentinels]:
    """A master, a replica, ``count`` sentinels. A failover takes ``down_after_ms`` and about a second."""
    master = make_server(directory, "--repl-diskless-sync-delay", "0")
    replica = make_server(directory, "--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
    sentinels = []
    for port in free_ports(count):
        home = directory / str(port)
        home.mkdir()
        file = home / "sentinel.conf"
        file.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {home}\n"
            f"sentinel monitor main 127.0.0.1 {master.port} {count // 2 + 1}\n"
            f"sentinel down-after-milliseconds main {down_after_ms}\n"
            "sentinel failover-timeout main 3000\n"
        )
        sentinels.append(RedisServer(port, home, [_program("redis-sentinel"), str(file)]))
    running = Sentinels([master, replica], sentinels)
    everyone = [master, replica, *sentinels]
    try:
        for server in everyone:
            server.start()
        for sentinel in sentinels:
            # One that was starved for two seconds would do nothing for thirty ("TILT mode").
            with sentinel.oracle() as oracle:
                oracle.execute_command("SENTINEL", "DEBUG", "tilt-trigger", 60_000, "tilt-period", 1000)
        wait_for(running._settled)
        yield running
    finally:
        for server in everyone:
            server.kill()


@dataclass
class Cluster:
    """Masters with equal shares of the slots, and replicas of them (the n-th of the n-th master)."""

    masters: list[RedisServer]
    replicas: list[RedisServer]
    ids: dict[int, str]  # of each port

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{server.port}' for server in self.masters)}"

    @property
    def servers(self) -> list[RedisServer]:
        return [*self.masters, *self.replicas]

    def owner(self, slot: int) -> RedisServer:
        """The master that was given this slot at first."""
        return self.masters[slot * len(self.masters) // SLOTS]

    def ready(self) -> bool:
        """Every node sees every slot served."""
        for server in self.servers:
            with server.oracle() as oracle:
                if b"cluster_state:ok" not in oracle.execute_command("CLUSTER", "INFO"):
                    return False
        return True

    def move_slot(self, slot: int, target: RedisServer) -> None:
        """Reshard: its keys, then the slot. "Redis cluster specification", "Cluster live reconfiguration"."""
        self.begin_move(slot, target)
        source = self.owner(slot)
        with source.oracle() as oracle:
            while keys := oracle.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                oracle.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, source):
            with server.oracle() as oracle:
                oracle.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[target.port])

    def begin_move(self, slot: int, target: RedisServer) -> None:
        """From now on its owner answers ASK for keys that it has not."""
        source = self.owner(slot)
        with target.oracle() as oracle:
            oracle.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source.port])
        with source.oracle() as oracle:
            oracle.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[target.port])


@contextmanager
def running_cluster(
    directory: Path, *options: str, masters: int = 3, replicas: bool = False, node_timeout_ms: int = 1000
) -> Iterator[Cluster]:
    """A cluster, ready. Each node is given its nodes.conf, which spares the seconds that MEET and gossip take."""
    count = masters * (2 if replicas else 1)
    both = free_ports(2 * count)
    ports, buses = both[:count], both[count:]
    ids = {port: secrets.token_hex(20) for port in ports}
    share = [n * SLOTS // masters for n in range(masters + 1)]
    rows = []
    for n, (port, bus) in enumerate(zip(ports, buses, strict=True)):
        if n < masters:
            rows.append((port, bus, "master", "-", n + 1, f" {share[n]}-{share[n + 1] - 1}"))
        else:
            rows.append((port, bus, "slave", ids[ports[n - masters]], n - masters + 1, ""))
    servers = []
    for port, bus in zip(ports, buses, strict=True):
        server = make_server(
            directory,
            *("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", str(node_timeout_ms)),
            *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", *options),
            port=port,
        )
        lines = [
            f"{ids[its]} 127.0.0.1:{its}@{its_bus} {'myself,' if its == port else ''}{role} {master} 0 0 {epoch} "
            f"connected{slots}\n"
            for its, its_bus, role, master, epoch, slots in rows
        ]
        (server.directory / "nodes.conf").write_text("".join(lines) + f"vars currentEpoch {masters} lastVoteEpoch 0\n")
        servers.append(server)
    cluster = Cluster(servers[:masters], servers[masters:], ids)
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            wait_for(server.answers)
        wait_for(cluster.ready)
        for server in cluster.replicas:
            wait_for(lambda server=server: _synchronised(server))  # type: ignore[misc]
        yield cluster
    finally:
        for server in servers:
            server.kill()


def _synchronised(replica: RedisServer) -> bool:
    with replica.oracle() as oracle:
        return bool(oracle.info("replication")["master_link_status"] == "up")


class Proxy:
    """A TCP proxy between a client and a server that can fail like a network does."""

    def __init__(self, target: int) -> None:
        self.target = target  # of new connections
        self._passing = trio.Event()
        self._passing.set()
        self._answering = self._passing
        self._streams: set[trio.SocketStream] = set()
        self.port = 0
        self.connections = 0  # ever accepted
        self.chunks: list[int] = []  # bytes of each piece from the client
        self.replace: tuple[bytes, bytes] | None = None  # in what the server says

    def stop_passing(self) -> None:
        """Connections stay, and new ones are accepted, but nothing comes through: a dead link."""
        self._passing = trio.Event()

    def stop_answering(self) -> None:
        """What the client says goes through, and nothing comes back."""
        self._answering = trio.Event()

    def pass_again(self) -> None:
        """The end of ``stop_passing`` and ``stop_answering``; what was held back goes through."""
        self._passing.set()
        self._answering.set()

    def cut(self) -> None:
        """Reset every connection."""
        for stream in self._streams:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            stream.socket.close()
        self._streams.clear()

    async def serve(self, client: trio.SocketStream) -> None:
        """One connection."""
        self.connections += 1
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            client.socket.close()
            return
        self._streams |= {client, server}
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, client, server, False, nursery.cancel_scope)
                nursery.start_soon(self._pass, server, client, True, nursery.cancel_scope)
        finally:
            self._streams -= {client, server}
            for stream in (client, server):
                stream.socket.close()  # without a checkpoint, which would raise in a cancelled task

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, answers: bool, scope: trio.CancelScope
    ) -> None:
        try:
            while data := bytes(await source.receive_some(65536)):
                if not answers:
                    self.chunks.append(len(data))
                elif self.replace is not None:
                    data = data.replace(*self.replace)
                if answers:
                    await self._answering.wait()
                await self._passing.wait()
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def running_proxy(target: int) -> AsyncIterator[Proxy]:
    """A proxy to a local port, on a port of its own."""
    proxy = Proxy(target)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1"))
        proxy.port = listeners[0].socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()
