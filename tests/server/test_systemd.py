"""Sockets that are handed over, what the service says of itself, and the units in tools/systemd/."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
import trio

from server import systemd
from tests.integration.running import ROOT, STATUSWIRE, clean_environment, free_port
from tests.redis_servers import running_server
from tests.streams import session
from tests.support import PATIENCE_S, Address, until, write_config

pytestmark = pytest.mark.slow

UNITS = ROOT / "tools" / "systemd"
# What systemd does between fork and exec: descriptors from 3 on, and whose they are.
LAUNCH = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
held = [os.dup2(fd, 100 + n) for n, fd in enumerate(fds)]
for n, fd in enumerate(held):
    os.dup2(fd, 3 + n)
    os.close(fd)
if fds:
    os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = str(len(fds)), str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """The other end of NOTIFY_SOCKET, as systemd's."""

    def __init__(self, name: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(name.replace("@", "\0", 1))
        self.environ = {"NOTIFY_SOCKET": name}
        self.heard: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        """Everything so far."""
        with suppress(BlockingIOError):
            while data := self.sock.recv(4096).decode():
                self.heard.append(dict(line.split("=", 1) for line in data.split("\n")))
        return self.heard

    async def told(self, **facts: str) -> dict[str, str]:
        """Wait until something like this was said, and forget what came before."""
        while True:
            await until(self.listen)
            said = self.heard.pop(0)
            if facts.items() <= said.items():
                return said


class Service:
    """A server that was started as systemd does."""

    def __init__(self, directory: Path, sockets: Sequence[socket.socket], environ: Mapping[str, str]) -> None:
        self.log_file = directory / "server.log"
        fds = [sock.fileno() for sock in sockets]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), str(STATUSWIRE), "serve"],
                cwd=directory,
                env=clean_environment(**environ),
                pass_fds=fds,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def start_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def children(self) -> list[str]:
        """Its processes."""
        pid = self.process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def end(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@asynccontextmanager
async def service(
    directory: Path, sockets: Sequence[socket.socket] = (), environ: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Service, str]]:
    """Such a server and its start line."""
    started = Service(directory, sockets, environ or {})
    try:
        line = await trio.to_thread.run_sync(started.start_line)
        assert line, started.log_file.read_text()
        yield started, line
    finally:
        started.kill()


def listening(family: int, address: object) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)  # type: ignore[arg-type]
    sock.listen(128)
    return sock


# --- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
async def test_it_says_how_it_is(tmp_path: Path, abstract: bool) -> None:
    name = f"@statuswire-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    write_config(tmp_path, {"server": {"drain": 1}, "store": {"url": "memory:"}})
    manager = Manager(name)
    with closing(manager.sock):
        async with service(tmp_path, environ=manager.environ | {"WATCHDOG_USEC": "300000"}) as (server, line):
            url = re.findall(r"http://[0-9.:]+", line)[0]
            assert (await manager.told(READY="1"))["STATUS"] == f"Serving on {url}"
            for _ in range(5):
                await manager.told(WATCHDOG="1")
            before = time.monotonic_ns() // 1000
            server.process.send_signal(signal.SIGHUP)
            said = await manager.told(RELOADING="1")
            assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            await manager.told(READY="1")
            (tmp_path / "statuswire.toml").write_text("[server]\nprot = 1\n")
            server.process.send_signal(signal.SIGHUP)
            await manager.told(RELOADING="1")
            await manager.told(READY="1")  # it serves on, with what it had
            assert "reload_failed" in server.log_file.read_text()
            server.process.send_signal(signal.SIGTERM)
            said = await manager.told(STOPPING="1")
            assert int(said["EXTEND_TIMEOUT_USEC"]) > 1_000_000
            await manager.told(WATCHDOG="1")  # while it drains, too
            assert await trio.to_thread.run_sync(server.process.wait) == 0


def hang(seconds: float) -> None:
    """Keep the loop from everything else for so long."""
    time.sleep(seconds)


async def test_a_loop_that_hangs_gives_no_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environ["NOTIFY_SOCKET"])
    with closing(manager.sock):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(systemd.keep_alive, 0.03, lambda: systemd.notify("WATCHDOG=1"))
            await until(lambda: len(manager.listen()) > 2)
            manager.listen()
            manager.heard.clear()
            hang(0.3)
            assert manager.listen() == []
            await until(manager.listen)
            nursery.cancel_scope.cancel()


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with closing(manager.sock), running_server(tmp_path) as redis:
        write_config(tmp_path, {"server": {"workers": 2}, "store": {"url": redis.url}})
        async with service(tmp_path, environ=manager.environ | {"WATCHDOG_USEC": "1500000"}) as (server, line):
            assert "2 workers" in line
            assert (await manager.told(READY="1"))["STATUS"].endswith("with 2 workers")
            workers = server.children()
            assert len(workers) == 2
            os.kill(int(workers[0]), signal.SIGSTOP)
            await until(lambda: "worker_hangs" in server.log_file.read_text())
            await until(lambda: len(set(server.children()) - {workers[0]}) == 2)
            await manager.told(WATCHDOG="1")
            server.process.send_signal(signal.SIGTERM)
            await manager.told(STOPPING="1")
            assert await trio.to_thread.run_sync(server.process.wait) == 0


@pytest.mark.parametrize(
    ("limit", "pid", "wanted"),
    [("", "", None), ("x", "", None), ("0", "", None), ("3000000", "1", None), ("3000000", "", 3.0)],
)
def test_who_is_watched(limit: str, pid: str, wanted: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert systemd.watchdog_s() == wanted


# --- sockets --------------------------------------------------------------------------------------------------------


async def test_sockets_that_are_handed_over(tmp_path: Path) -> None:
    write_config(tmp_path, {"server": {"port": 1}, "store": {"url": "memory:"}})
    path = str(tmp_path / "s.sock")
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp, listening(socket.AF_UNIX, path) as unix:
        port = tcp.getsockname()[1]
        async with service(tmp_path, [tcp, unix]) as (server, line):
            assert f"http://127.0.0.1:{port}, unix:{path} " in line
            assert (await Address(port).get("/ready")).status == 200
            assert (await Address(0, path).get("/ready")).status == 200
            async with session(Address(port)) as ws:
                await ws.quiet()
            assert await trio.to_thread.run_sync(server.end) == 0
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)  # it is not ours to remove


async def test_workers_share_them(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis, listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp:
        write_config(tmp_path, {"server": {"workers": 2}, "store": {"url": redis.url}})
        at = Address(tcp.getsockname()[1])
        async with service(tmp_path, [tcp]) as (server, _):
            for _ in range(10):
                assert (await at.get("/health")).status == 200
            assert await trio.to_thread.run_sync(server.end) == 0


def test_what_cannot_be_served(tmp_path: Path) -> None:
    refused: list[tuple[Service, str]] = []
    for sock, complaint in (
        (listening(socket.AF_INET, ("0.0.0.0", 0)), "loopback only"),
        (socket.socket(socket.AF_INET), "no listening stream socket"),
        (socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "no listening stream socket"),
    ):
        directory = tmp_path / str(len(refused))
        directory.mkdir()
        write_config(directory, {"store": {"url": "memory:"}})
        with sock:
            refused.append((Service(directory, [sock], {}), complaint))
    for server, complaint in refused:
        try:
            assert server.process.wait(PATIENCE_S) == 2
            assert complaint in server.log_file.read_text().splitlines()[-1]
        finally:
            server.kill()


def test_those_of_another_process_are_not_ours() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert systemd.take_sockets(environ) == []
    assert environ == {}, "nor our children's"


class Caller:
    """Connects again and again, each time for one request, and notes what becomes of it."""

    def __init__(self, family: int, address: object) -> None:
        self.family, self.address = family, address
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0
        self.over = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    async def served(self, times: int) -> None:
        """Wait until it was, so many times more."""
        wanted = self.outcomes["200"] + times
        await until(lambda: self.outcomes["200"] >= wanted)

    def _run(self) -> None:
        while not self.over:
            began = time.monotonic()
            try:
                with socket.socket(self.family) as sock:
                    sock.settimeout(PATIENCE_S)
                    sock.connect(self.address)  # type: ignore[arg-type]
                    sock.sendall(b"GET /api/v2/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    answer = b""
                    while data := sock.recv(65536):
                        answer += data
                self.outcomes[answer[9:12].decode() or "nothing"] += 1
            except OSError as error:
                self.outcomes[type(error).__name__] += 1
            self.longest = max(self.longest, time.monotonic() - began)


async def test_a_restart_refuses_and_resets_nobody(tmp_path: Path) -> None:
    """The socket stays open, so who comes while nobody serves waits for the next server."""
    write_config(tmp_path, {"server": {"drain": 0.3}, "store": {"url": "sqlite:s.db"}})
    path = str(tmp_path / "s.sock")
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp, listening(socket.AF_UNIX, path) as unix:
        callers: list[Caller] = []
        try:
            for serving in ("before", "after"):
                async with service(tmp_path, [tcp, unix]) as (server, _):
                    if not callers:
                        callers = [
                            *[Caller(socket.AF_INET, tcp.getsockname()) for _ in range(4)],
                            *[Caller(socket.AF_UNIX, path) for _ in range(2)],
                        ]
                    for caller in callers:
                        await caller.served(5)
                    if serving == "after":
                        for caller in callers:
                            caller.over = True
                            await trio.to_thread.run_sync(caller.thread.join)
                    assert await trio.to_thread.run_sync(server.end) == 0
        finally:
            for caller in callers:
                caller.over = True
        for caller in callers:
            assert set(caller.outcomes) <= {"200", "503"}, caller.outcomes
            assert caller.longest > 0.3, "it never met a restart"


async def test_systemds_own_activation(tmp_path: Path) -> None:
    program = shutil.which("systemd-socket-activate")
    assert program, "systemd is not there: run `make system`"
    write_config(tmp_path, {"store": {"url": "memory:"}})
    port = free_port()
    with (tmp_path / "server.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # it takes a millisecond
            [program, "-l", f"127.0.0.1:{port}", str(STATUSWIRE), "serve"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=log,
            stderr=log,
        )
    try:
        await until(lambda: "Listening on" in (tmp_path / "server.log").read_text())
        assert (await Address(port).get("/health")).status == 200  # it is started by this connection, which waits
    finally:
        process.terminate()
        assert await trio.to_thread.run_sync(process.wait) == 0


# --- the units ------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be installed, but for the programs, which have to be there."""
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/statuswire/bin/statuswire", str(STATUSWIRE))
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "systemd is not there: run `make system`"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_units_are_good(units: Path) -> None:
    verified = analyze("verify", *(str(unit) for unit in sorted(units.iterdir())))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_the_service_is_locked_in(units: Path) -> None:
    """Of ten points of exposure; an unguarded service has 9.6."""
    unit = str(units / "statuswire.service")
    assert analyze("security", "--offline=true", "--no-pager", "--threshold=15", unit).returncode == 0


def test_the_units_fit_the_server() -> None:
    text = (UNITS / "statuswire.service").read_text()
    for line in ("Type=notify", "WatchdogSec=30", "ExecReload=/bin/kill -HUP $MAINPID", "NoNewPrivileges=yes"):
        assert line in text.splitlines()
