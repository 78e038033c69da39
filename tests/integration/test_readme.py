"""What the documents promise: their commands are run as they stand, their tables and samples are compared and used."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
import trio
import trio_websocket
import trustme

from server.config import Config
from server.config_rules import toml
from tests.integration.pages import SECRET, sign
from tests.integration.running import ROOT, STATUSWIRE, clean_environment, free_port, running
from tests.nginx import running_nginx
from tests.support import PATIENCE_S
from tools.examples.nginx_example import configure

pytestmark = pytest.mark.slow

DOCUMENTS = ("README.md", "docs/wire-protocol.md", "docs/operations.md", "docs/workers.md")


class Block(NamedTuple):
    """One fenced block of shell commands.

    Attributes:
        kind: "" runs to its end; "watch" runs in another terminal until it ends by itself, "watch open" until it is
            ended; "server" runs until the end of the document.
        expected: the lines it prints, "…" for anything.
    """

    line: int
    kind: str
    commands: str
    expected: tuple[str, ...]


def fences(document: str) -> Iterator[tuple[int, str, str]]:
    """The fenced blocks of a document: line number, info string, text."""
    text = (ROOT / document).read_text()
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def blocks(document: str) -> list[Block]:
    """The shell blocks of a document, each with the output that stands below it."""
    found: list[Block] = []
    for line, info, text in fences(document):
        language, _, kind = info.partition(" ")
        if language == "sh":
            found.append(Block(line, kind, text, ()))
        elif language == "text":
            found[-1] = found[-1]._replace(expected=tuple(text.splitlines()))
    return found


def missing(expected: tuple[str, ...], printed: str) -> str | None:
    """The first expected line that was not printed, in order; None if all were."""
    lines = iter(printed.replace("\r", "").splitlines())
    for wanted in expected:
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if not any(pattern.fullmatch(line.strip()) for line in lines):
            return wanted
    return None


class Terminal:
    """One process of a reader of the document, with what it printed so far."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.printed = ""
        self._news = trio.Event()
        self._over = False

    async def listen(self) -> None:
        """Take in what is printed until the end."""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.printed += data.decode(errors="replace")
            self._news.set()
        self._over = True
        self._news.set()

    async def wait_for(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Wait until something was printed; fails when the process ends without it."""
        while (match := re.compile(pattern, re.DOTALL).search(self.printed, start)) is None:
            assert not self._over, f"{pattern!r} was never printed, only:\n{self.printed}"
            self._news = trio.Event()
            await self._news.wait()
        return match


@asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[tuple[trio.Nursery, list[Terminal]]]:
    """Terminals of their own process groups, all closed at the end."""
    terminals: list[Terminal] = []
    async with trio.open_nursery() as nursery:
        try:
            yield nursery, terminals
        finally:
            for terminal in terminals:
                if terminal.process.poll() is None:
                    os.killpg(terminal.process.pid, signal.SIGTERM)
            with trio.move_on_after(PATIENCE_S, shield=True):
                for terminal in terminals:
                    await terminal.process.wait()


async def open_terminal(
    nursery: trio.Nursery, terminals: list[Terminal], directory: Path, *command: str, environ: dict[str, str]
) -> Terminal:
    """Start a process whose output is kept."""
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if command[0] != "bash" or len(command) > 1 else None,
        cwd=directory,
        env=environ,
        start_new_session=True,
    )
    terminal = Terminal(process)
    terminals.append(terminal)
    nursery.start_soon(terminal.listen)
    return terminal


@pytest.mark.parametrize("document", DOCUMENTS)
async def test_commands_do_what_they_say(document: str, tmp_path: Path) -> None:
    directory = tmp_path / "clone"
    directory.mkdir()
    (directory / ".venv").symlink_to(ROOT / ".venv")
    second = free_port()
    async with running(tmp_path) as server, desk(directory) as (nursery, terminals):
        environ = clean_environment(STATUSWIRE_URL=server.url)

        async def start(*command: str) -> Terminal:
            return await open_terminal(nursery, terminals, directory, *command, environ=environ)

        shell = await start("bash")
        assert shell.process.stdin is not None
        await shell.process.stdin.send_all(b"trap 'echo FAILED: $BASH_COMMAND' ERR; set -E -o pipefail\n")
        watches: list[tuple[Block, Terminal]] = []
        for block in blocks(document):
            text = block.commands.replace("127.0.0.1:3000", f"127.0.0.1:{server.port}").replace("3001", str(second))
            script = directory / f"block-{block.line}.sh"
            await trio.Path(script).write_text(text)
            where = f"{document}:{block.line}"
            with trio.fail_after(PATIENCE_S):
                if block.kind == "server":
                    await (await start("bash", str(script))).wait_for("listening on")
                elif block.kind:
                    watch = await start("bash", str(script))
                    watches.append((block, watch))
                    # It watches once it has printed something; a WebSocket first says that it is one.
                    await watch.wait_for("subscribed" if block.kind == "watch open" else ".")
                else:
                    before = len(shell.printed)
                    done = f"done-{block.line}"
                    await shell.process.stdin.send_all(f". {script}\nprintf '\\n%s\\n' {done}\n".encode())
                    printed = (await shell.wait_for(f"(.*)\n{done}\n", before))[1]
                    assert "FAILED" not in printed, (where, printed)
                    assert missing(block.expected, printed) is None, (where, printed)
        for block, watch in watches:
            where = f"{document}:{block.line}"
            with trio.fail_after(PATIENCE_S):
                if block.kind == "watch":
                    assert await watch.process.wait() == 0, (where, watch.printed)
                else:
                    await watch.wait_for("job_completed")
            assert missing(block.expected, watch.printed) is None, (where, watch.printed)
            assert "completed" in watch.printed, (where, watch.printed)


def test_the_documents_have_commands_to_run() -> None:
    """Against a change of format that would leave nothing to test."""
    kinds = [block.kind for document in DOCUMENTS for block in blocks(document)]
    assert kinds.count("") >= 20
    assert kinds.count("watch") >= 4
    assert kinds.count("watch open") == 2
    assert kinds.count("server") == 1


def test_the_two_commands_stand_on_top_of_the_readme() -> None:
    _, _, text = next(fences("README.md"))
    assert [line.split("  ")[0] for line in text.splitlines()] == ["make run", "make test"]


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in (
        *DOCUMENTS,
        "docs/client.md",
        "docs/configuration.md",
        "docs/examples.md",
        "docs/views.md",
        "CHANGELOG.md",
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), (document, target)


def test_anchors_lead_somewhere() -> None:
    text = (ROOT / "docs/wire-protocol.md").read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_every_key_of_the_configuration_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    documented = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]*)` \|", text, re.MULTILINE))
    config = Config()
    defaults = {
        f"{table.name}.{key.name}": toml(getattr(getattr(config, table.name), key.name))
        for table in msgspec.structs.fields(Config)
        if isinstance(getattr(config, table.name), msgspec.Struct)  # else there is one for every name
        for key in msgspec.structs.fields(getattr(config, table.name))
    }
    assert documented == defaults


async def test_sample_configurations_are_accepted(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "public.pem"))  # any certificate has a public key
    certificate = authority.issue_cert("status.example.com")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "fullchain.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "privkey.pem"))
    samples = [
        text
        for document in ("docs/configuration.md", "docs/operations.md")
        for _, info, text in fences(document)
        if info == "toml"
    ]
    assert len(samples) == 6  # none is overlooked
    for sample in samples:
        file = tmp_path / "sample.toml"
        text = sample.replace("/etc/statuswire/", f"{tmp_path}/").replace('"RS256"', '"ES256"')
        if "[auth]" not in text:  # a part of a file, which says elsewhere who is who
            text += '\n[auth]\nhook_url = "http://127.0.0.1:8000/who"\n'
        await trio.Path(file).write_text(text)
        await trio.run_process(
            [str(STATUSWIRE), "check-config", "--config", str(file)],
            capture_stdout=True,
            cwd=tmp_path,
            env=clean_environment(),
        )


async def test_the_nginx_sample_carries_every_transport(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pem = tmp_path / "certificate.pem"
    authority.issue_cert("status.example.com", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    port = free_port()
    token = await sign(tmp_path, "--sub", "alice", "--capability", "publish")
    trusting = {"STATUSWIRE_SERVER_TRUSTED_PROXIES": "127.0.0.1"}
    async with running(tmp_path, "--jwt-key", SECRET, environ=trusting) as server:
        listen, statuswire = f"127.0.0.1:{port}", f"127.0.0.1:{server.port}"
        async with running_nginx(configure(tmp_path, "site-own-host.conf", listen, statuswire, certificate=pem)):
            with trio.fail_after(PATIENCE_S):
                await through_nginx(f"https://127.0.0.1:{port}", tmp_path / "ca.pem", token)
    log = await trio.Path(tmp_path / "statuswire.log").read_text()
    assert 'GET /api/v2/jobs/stream HTTP/2.0"' in log
    assert token not in log


async def discard(stream: trio.abc.ReceiveStream) -> None:
    """Read on, so that its writer never waits."""
    while await stream.receive_some():
        pass


async def through_nginx(url: str, authority: Path, token: str) -> None:
    """Publish, and watch over each transport while the others are open."""
    context = ssl.create_default_context(cafile=str(authority))
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, verify=context, timeout=PATIENCE_S) as client:
        created = await client.post("/api/v2/jobs", json={"jobId": "one", "status": "processing"})
        assert created.status_code == 201
        stream_url = f"{url}/api/v2/jobs/stream?jobIds=one&access_token={token}"
        curl = ("curl", "--silent", "--no-buffer", "--cacert", str(authority), stream_url)
        async with (
            desk(authority.parent) as (terminals_nursery, terminals),
            trio_websocket.open_websocket_url(
                f"{url.replace('https', 'wss')}/ws/jobs", ssl_context=context, extra_headers=[(b"Origin", url.encode())]
            ) as websocket,
        ):
            stream = await open_terminal(
                terminals_nursery, terminals, authority.parent, *curl, environ=clean_environment()
            )
            await stream.wait_for('"snapshot"')
            await websocket.send_message(msgspec.json.encode({"type": "auth", "token": token}).decode())
            await websocket.send_message('{"type":"subscribe"}')
            await next_message(websocket, '"subscribed"')
            # Streamed NDJSON is taken in line by line: this one is answered while the request is still open.
            release = trio.Event()

            async def updates() -> AsyncIterator[bytes]:
                yield b'{"jobId":"one","progress":40}\n'
                await release.wait()
                yield b'{"jobId":"one","progress":60}\n'

            async with trio.open_nursery() as nursery:
                kind = {"Content-Type": "application/x-ndjson"}
                nursery.start_soon(partial(client.post, "/api/v2/updates", content=updates(), headers=kind))
                await stream.wait_for('"progress":40')
                await next_message(websocket, '"progress":40')
                release.set()
            await stream.wait_for('"progress":60')
            poll = await client.get("/api/v2/jobs/poll", params={"jobIds": "one", "timeout": 0})
            assert poll.json()["updates"][0]["progress"] == 60
            large = [{"jobId": "one", "metadata": {"text": "x" * 60_000}}] * 100
            assert (await client.post("/api/v2/updates", json=large)).json()["accepted"] == 100


async def next_message(websocket: trio_websocket.WebSocketConnection, text: str) -> None:
    while text not in await websocket.get_message():
        pass
